"""LLaDA2: config field by field, tensors and experts, layers against the definition."""

from __future__ import annotations

import pytest
import torch

from family_kit import BAD_FLOATS, BAD_INTEGERS, Family, build_from
from models_kit import assert_equal, load, problems
from unmask.errors import CheckpointError
from unmask.models import inspect, llada2
from unmask.models.config import Experts, ModelConfig, detect_family

GOLDEN = Family.golden(llada2, "llada2", {"mask_token_id": 383, "eos_token_id": 381})
MINI = {
    "hidden_size": 2048, "num_hidden_layers": 20, "num_attention_heads": 16, "num_key_value_heads": 4, "head_dim": 128, "rotary_dim": 64,
    "intermediate_size": 5120, "moe_intermediate_size": 512, "num_experts": 256, "num_experts_per_tok": 8, "n_group": 8, "topk_group": 4,
    "vocab_size": 157184, "pad_token_id": 156892, "mask_token_id": ..., "eos_token_id": ...,
}  # fmt: skip
FLASH = MINI | {
    "hidden_size": 4096, "num_hidden_layers": 32, "num_attention_heads": 32, "intermediate_size": 9216, "moe_intermediate_size": 1024,
}  # fmt: skip
EXPERTS = Experts(
    layers=(1, 2), n_experts=8, top_k=2, expert_dim=32, shared_dim=32, scoring="sigmoid", selection_bias=True, n_groups=4, kept_groups=2,
    normalized=True, scale=2.5,
)  # fmt: skip


def test_golden_config():
    assert GOLDEN.read() == ModelConfig(
        family="llada2", d_model=64, n_layers=3, n_heads=4, n_kv_heads=2, head_dim=16, ffn_dim=128, vocab_size=384, rope_theta=6e5,
        rotary_dim=8, norm_eps=1e-6, qkv_bias=False, qk_norm=True, tied_head=False, mask_id=383, eos_ids=(381,), pad_id=381,
        max_positions=32768, block_size=32, shifted=False, visibility="block_causal", experts=EXPERTS,
    )  # fmt: skip


def test_parameter_count_is_that_of_the_tensors(tmp_path):
    info = inspect(GOLDEN.write(tmp_path))
    assert info.config.n_parameters == info.n_parameters == sum(t.numel() for t in GOLDEN.tensors.values())
    assert info.n_parameters - info.config.n_active_parameters == 2 * 6 * 3 * 64 * 32  # two layers, six of eight experts idle


def test_released_models():
    mini, flash = GOLDEN.read(MINI), GOLDEN.read(FLASH)
    assert (mini.mask_id, mini.eos_ids, mini.pad_id, mini.block_size, mini.rotary_dim) == (156895, (156892,), 156892, 32, 64)
    assert round(mini.n_parameters / 1e9, 1) == 16.3 and round(flash.n_parameters / 1e9) == 103  # "16B" and "100B"
    assert round(mini.n_active_parameters / 1e9, 1) == 1.4 and round(flash.n_active_parameters / 1e9, 1) == 6.2
    specs = llada2.weight_map(flash)
    assert len(specs) == 3 + 32 * 6 + 3 + 31 * (2 + 3 * 256 + 3)
    assert specs["layers.0.qkv"].shape == ((32 + 8) * 128, 4096) and specs["layers.31.experts.255.down"].shape == (4096, 1024)
    assert specs["layers.31.router_bias"].name == "model.layers.31.mlp.gate.expert_bias"


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"head_dim": None, "rotary_dim": ...}, {"head_dim": 16, "rotary_dim": 8}),
        ({"partial_rotary_factor": 1.0, "rotary_dim": None}, {"rotary_dim": 16}),
        ({"partial_rotary_factor": ...}, {"rotary_dim": 8}),
        ({"rms_norm_eps": ...}, {"norm_eps": 1e-5}),
        ({"block_size": 16}, {"block_size": 16}),
        ({"first_k_dense_replace": ...}, {"experts": Experts(**(vars(EXPERTS) | {"layers": (0, 1, 2)}))}),
        ({"first_k_dense_replace": 0}, {"experts": Experts(**(vars(EXPERTS) | {"layers": (0, 1, 2)}))}),
        ({"num_shared_experts": None}, {"experts": Experts(**(vars(EXPERTS) | {"shared_dim": 0}))}),
        ({"num_shared_experts": 2}, {"experts": Experts(**(vars(EXPERTS) | {"shared_dim": 64}))}),
        ({"routed_scaling_factor": 1.0, "n_group": 2, "topk_group": 1}, {"experts": Experts(**(vars(EXPERTS) | {"scale": 1.0, "n_groups": 2, "kept_groups": 1}))}),
        ({"score_function": ..., "norm_topk_prob": ..., "router_dtype": ..., "use_rmsnorm": ..., "use_qk_norm": ...}, {"experts": EXPERTS}),
    ],
)  # fmt: skip
def test_fields_are_read_as_the_authors_read_them(changes, expected):
    config = GOLDEN.read(changes)
    assert {name: getattr(config, name) for name in expected} == expected


NUMBERS = ("hidden_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads", "head_dim", "intermediate_size", "vocab_size",
           "max_position_embeddings", "mask_token_id", "eos_token_id", "pad_token_id", "block_size", "rotary_dim", "num_experts",
           "num_experts_per_tok", "moe_intermediate_size", "num_shared_experts", "n_group", "topk_group", "first_k_dense_replace")  # fmt: skip


@pytest.mark.parametrize("value", BAD_INTEGERS, ids=lambda v: type(v).__name__)
@pytest.mark.parametrize("field", NUMBERS)
def test_bad_integers_name_the_field(field, value):
    assert any(problem.startswith(field) for problem in GOLDEN.wrong({field: value}))


@pytest.mark.parametrize("value", [*BAD_FLOATS, None])
@pytest.mark.parametrize("field", ["rope_theta", "rms_norm_eps", "routed_scaling_factor"])
def test_bad_floats_name_the_field(field, value):
    ours = {"rms_norm_eps": "norm_eps", "routed_scaling_factor": "scal"}.get(field, field)
    assert any(ours in problem for problem in GOLDEN.wrong({field: value}))


@pytest.mark.parametrize(
    "field",
    ["hidden_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads", "intermediate_size", "vocab_size", "mask_token_id",
     "num_experts", "num_experts_per_tok", "moe_intermediate_size"],
)  # fmt: skip
def test_missing_fields_are_named(field):
    assert any(problem.startswith(f"{field} is missing") for problem in GOLDEN.wrong({field: ...}))


@pytest.mark.parametrize(
    ("field", "value", "text"),
    [
        ("use_bias", ..., "use_bias must be False (the only value supported), got True, the authors' default for a missing field"),
        ("use_qkv_bias", True, "use_qkv_bias must be False (the only value supported), got True"),
        ("use_qk_norm", False, "use_qk_norm must be True (the only value supported), got False"),
        ("score_function", "softmax", "score_function must be 'sigmoid' (the only value supported), got 'softmax'"),
        ("norm_topk_prob", False, "norm_topk_prob must be True (the only value supported), got False"),
        ("moe_router_enable_expert_bias", False, "moe_router_enable_expert_bias must be True (the only value supported), got False"),
        ("router_dtype", "bf16", "router_dtype must be 'fp32' (the only value supported), got 'bf16'"),
        ("norm_head", True, "norm_head must be False (the only value supported), got True"),
        ("rope_scaling", {"type": "yarn"}, "rope_scaling must be absent, null or {'rope_type': 'default'}, got {'type': 'yarn'}"),
        ("rope_parameters", {"rope_type": "default"}, "rope_parameters must be absent or null, got {'rope_type': 'default'}"),
        ("use_sliding_window", True, "use_sliding_window must be False or null, got True"),
        ("use_linear_attention", True, "use_linear_attention must be absent or null, got True"),
        ("rotary_dim", 16, "rotary_dim must be head_dim x partial_rotary_factor = 8, got 16"),
        ("partial_rotary_factor", 2.0, "partial_rotary_factor must be in [0.0, 1.0], got 2.0"),
        ("first_k_dense_replace", 3, "first_k_dense_replace must be below num_hidden_layers 3, got 3"),
        ("n_group", 3, "experts.n_experts must be a multiple of n_groups, got 8 and 3"),
        ("topk_group", 5, "experts.kept_groups must be at most n_groups 4, got 5"),
        ("num_experts_per_tok", 5, "experts.top_k must be at most the 4 experts of the kept groups, got 5"),
    ],
)  # fmt: skip
def test_unsupported_options_name_field_value_and_what_is_supported(field, value, text):
    assert text in GOLDEN.wrong({field: value})


def test_detection(tmp_path):
    assert detect_family({"model_type": "llada2_moe"}) == detect_family({"architectures": ["LLaDA2MoeModelLM"]}) == "llada2"
    merged = {"model_type": "llada2_moe_veomni", "architectures": ["LLaDA2MoeModelLM"]}
    with pytest.raises(CheckpointError, match="'llada2_moe_veomni' is not supported: it marks a checkpoint whose experts are merged"):
        detect_family(merged)
    GOLDEN.write(tmp_path, **merged)
    with pytest.raises(CheckpointError, match="experts are merged"):
        inspect(tmp_path, family="llada2")  # naming the family does not help: the tensors are others


def test_ids_that_the_config_lacks(tmp_path):
    GOLDEN.write(tmp_path, mask_token_id=..., eos_token_id=...)
    with pytest.raises(CheckpointError, match="mask_token_id is missing, and vocab_size 384 is not the released vocabulary"):
        inspect(tmp_path)
    config = inspect(tmp_path, overrides={"mask_id": 383, "eos_ids": (381,), "block_size": 8}).config
    assert (config.mask_id, config.eos_ids, config.block_size) == (383, (381,), 8)


def test_config_bombs_are_refused_at_once(tmp_path):
    assert any("over all layers" in p for p in GOLDEN.wrong({"num_hidden_layers": 1024, "num_experts": 4096, "n_group": 1, "topk_group": 1}))


def test_tensors(tmp_path):
    loaded = load(GOLDEN.write(tmp_path))
    assert len(loaded) == len(GOLDEN.tensors) == 3 + 3 * 6 + 3 + 2 * (2 + 8 * 3 + 3)
    assert torch.equal(loaded["layers.2.experts.7.up"], GOLDEN.tensors["model.layers.2.mlp.experts.7.up_proj.weight"])
    assert torch.equal(loaded["layers.1.shared_down"], GOLDEN.tensors["model.layers.1.mlp.shared_experts.down_proj.weight"])
    assert torch.equal(loaded["layers.1.qkv"], GOLDEN.tensors["model.layers.1.attention.query_key_value.weight"])
    half = load(tmp_path, dtype="bfloat16")
    router = {name for name, tensor in half.items() if tensor.dtype == torch.float32}
    assert router == {f"layers.{i}.{part}" for i in (1, 2) for part in ("router", "router_bias")}  # never rounded
    for count in (2, 30):
        assert_equal(load(GOLDEN.write_shards(tmp_path, count)), loaded)
    ids = torch.arange(40).view(1, -1)
    assert torch.equal(build_from(tmp_path).logits(ids), build_from(GOLDEN.write(tmp_path)).logits(ids))  # experts of a layer from many files


def test_wrong_tensors_are_all_named(tmp_path):
    tensors = dict(GOLDEN.tensors)
    experts = "model.layers.2.mlp.experts."
    del tensors[f"{experts}3.gate_proj.weight"], tensors["model.layers.1.mlp.gate.expert_bias"]
    tensors[f"{experts}4.down_proj.weight"] = torch.zeros(32, 64)
    tensors[f"{experts}8.down_proj.weight"] = torch.zeros(64, 32)
    tensors["model.layers.0.mlp.gate.weight"] = torch.zeros(8, 64)
    tensors["model.layers.1.attention.query_key_value.weight"] = torch.zeros(96, 64)
    found = problems(GOLDEN.write(tmp_path, tensors))
    for text in (
        f"missing tensor {experts}3.gate_proj.weight of shape [32, 64]",
        "missing tensor model.layers.1.mlp.gate.expert_bias of shape [8]",
        f"tensor {experts}4.down_proj.weight must have shape [64, 32] by the config, got [32, 64]",
        f"unexpected tensor '{experts}8.down_proj.weight' of shape [64, 32]",
        "unexpected tensor 'model.layers.0.mlp.gate.weight' of shape [8, 64]",
        "tensor model.layers.1.attention.query_key_value.weight must have shape [128, 64] by the config, got [96, 64]",
    ):
        assert text in found
    assert len(found) == 7  # and the number of parameters


@pytest.mark.parametrize(
    "changes",
    [
        {"block_size": 8},
        {"first_k_dense_replace": 0, "num_shared_experts": 2, "routed_scaling_factor": 1.5, "partial_rotary_factor": 1.0, "rotary_dim": ...},
        {"num_shared_experts": 0, "n_group": 1, "topk_group": 1, "num_experts_per_tok": 8, "tie_word_embeddings": True},
        {"num_experts": 4, "num_experts_per_tok": 1, "num_key_value_heads": 1},  # groups of one expert
    ],
    ids=str,
)
def test_layers_are_the_definition_s(tmp_path, changes):
    GOLDEN.check_against_the_definition(tmp_path, {"block_size": 4} | changes)
