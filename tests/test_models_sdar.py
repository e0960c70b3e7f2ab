"""SDAR, dense and mixture: config field by field, tensors, layers against the definition."""

from __future__ import annotations

import pytest
import torch

from family_kit import BAD_FLOATS, BAD_INTEGERS, Family, build_from, copy_generation_config
from models_kit import assert_equal, load, problems
from unmask.errors import CheckpointError, SettingError
from unmask.models import inspect, sdar
from unmask.models.config import Experts, ModelConfig, detect_family

GOLDEN = Family.golden(sdar, "sdar")
RELEASED = {
    "hidden_size": 4096, "num_hidden_layers": 36, "num_attention_heads": 32, "num_key_value_heads": 8, "head_dim": 128,
    "intermediate_size": 12288, "vocab_size": 151936, "block_size": ..., "mask_token_id": ..., "bos_token_id": 151643, "eos_token_id": 151643,
}  # fmt: skip
"""SDAR-8B-Chat's sizes; its mask token and block length left to the family file."""
MIXTURE = {
    "model_type": "sdar_moe", "architectures": ["SDARMoeForCausalLM"], "num_experts": 8, "num_experts_per_tok": 3, "moe_intermediate_size": 24,
    "norm_topk_prob": True, "decoder_sparse_step": 1, "mlp_only_layers": [],
}  # fmt: skip
EXPERTS = Experts(
    layers=(0, 1, 2), n_experts=8, top_k=3, expert_dim=24, shared_dim=0, scoring="softmax", selection_bias=False, n_groups=1, kept_groups=1,
    normalized=True, scale=1.0,
)  # fmt: skip


def test_golden_config():
    assert GOLDEN.read() == ModelConfig(
        family="sdar", d_model=64, n_layers=3, n_heads=4, n_kv_heads=2, head_dim=24, ffn_dim=160, vocab_size=384, rope_theta=1e6,
        rotary_dim=24, norm_eps=1e-6, qkv_bias=False, qk_norm=True, tied_head=False, mask_id=383, eos_ids=(381,), pad_id=381,
        max_positions=32768, block_size=4, shifted=False, visibility="block_causal",
    )  # fmt: skip


def test_parameter_count_is_that_of_the_tensors(tmp_path):
    info = inspect(GOLDEN.write(tmp_path))
    assert info.config.n_parameters == info.n_parameters == sum(t.numel() for t in GOLDEN.tensors.values())
    assert info.config.n_active_parameters == info.n_parameters


def test_released_ids_and_sizes_are_the_defaults():
    config = GOLDEN.read(RELEASED)
    assert (config.mask_id, config.eos_ids, config.pad_id, config.block_size) == (151669, (151643,), 151643, 4)
    assert config.n_parameters * 2 == 16_381_470_720  # total_size of Qwen3-8B's index, whose layout SDAR-8B keeps
    assert GOLDEN.read(RELEASED, {"eos_token_id": [151643, 151645]}).eos_ids == (151643, 151645)


def test_generation_config_gives_ids(tmp_path):
    copy_generation_config("sdar", GOLDEN.write(tmp_path))
    config = inspect(tmp_path).config
    assert (config.eos_ids, config.pad_id) == ((381,), 380)


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"num_key_value_heads": None}, {"n_kv_heads": 4}),
        ({"head_dim": ...}, {"head_dim": 128, "rotary_dim": 128}),
        ({"block_size": 16}, {"block_size": 16}),
        ({"block_size": None}, {"block_size": 4}),
        ({"rope_theta": ...}, {"rope_theta": 10000.0}),
        ({"rms_norm_eps": 1e-5}, {"norm_eps": 1e-5}),
        ({"tie_word_embeddings": True}, {"tied_head": True}),
        ({"rope_scaling": {"rope_type": "default"}, "sliding_window": 4096, "auto_map": {"AutoModel": "evil.Model"}}, {}),
        (MIXTURE, {"experts": EXPERTS}),
        (MIXTURE | {"model_type": "sdar", "norm_topk_prob": False}, {"experts": Experts(**(vars(EXPERTS) | {"normalized": False}))}),
        (MIXTURE | {"decoder_sparse_step": 2}, {"experts": Experts(**(vars(EXPERTS) | {"layers": (1,)}))}),
        (MIXTURE | {"decoder_sparse_step": ..., "mlp_only_layers": [1]}, {"experts": Experts(**(vars(EXPERTS) | {"layers": (0, 2)}))}),
    ],
)
def test_fields_are_read_as_the_authors_read_them(changes, expected):
    config = GOLDEN.read(changes)
    assert {name: getattr(config, name) for name in expected} == expected


NUMBERS = ("hidden_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads", "head_dim", "intermediate_size", "vocab_size",
           "max_position_embeddings", "mask_token_id", "eos_token_id", "pad_token_id", "block_size")  # fmt: skip
EXPERT_NUMBERS = ("num_experts", "num_experts_per_tok", "moe_intermediate_size", "decoder_sparse_step", "mlp_only_layers")


@pytest.mark.parametrize("value", BAD_INTEGERS, ids=lambda v: type(v).__name__)
@pytest.mark.parametrize("field", (*NUMBERS, *EXPERT_NUMBERS))
def test_bad_integers_name_the_field(field, value):
    assert any(field in problem for problem in GOLDEN.wrong(MIXTURE | {field: value}))


@pytest.mark.parametrize("value", BAD_FLOATS)
@pytest.mark.parametrize("field", ["rope_theta", "rms_norm_eps"])
def test_bad_floats_name_the_field(field, value):
    assert any(field.removeprefix("rms_") in problem for problem in GOLDEN.wrong({field: value}))


@pytest.mark.parametrize(
    "field",
    ["hidden_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads", "intermediate_size", "vocab_size", "mask_token_id",
     "num_experts", "num_experts_per_tok", "moe_intermediate_size", "norm_topk_prob"],
)  # fmt: skip
def test_missing_fields_are_named(field):
    assert any(problem.startswith(f"{field} is missing") for problem in GOLDEN.wrong(MIXTURE | {field: ...}))


@pytest.mark.parametrize(
    ("field", "value", "text"),
    [
        ("hidden_act", "gelu", "hidden_act must be 'silu' (the only value supported), got 'gelu'"),
        ("attention_bias", True, "attention_bias must be False (the only value supported), got True"),
        ("rope_scaling", {"type": "yarn"}, "rope_scaling must be absent, null or {'rope_type': 'default'}, got {'type': 'yarn'}"),
        ("use_sliding_window", True, "use_sliding_window must be False or null, got True"),
        ("bd_size", 32, "bd_size must be absent or null, got 32"),
        ("quantization_config", {"bits": 4}, "quantization_config must be absent or null, got {'bits': 4}"),
        ("head_dim", None, "head_dim is missing"),
        ("head_dim", 20, "head_dim must be a multiple of 8, got 20"),
        ("num_key_value_heads", 3, "n_heads must be a multiple of n_kv_heads, got 4 and 3"),
        ("mask_token_id", 381, "mask_id 381 must not be one of eos_ids (381,)"),
        ("num_experts_per_tok", 9, "experts.top_k must be at most the 8 experts of the kept groups, got 9"),
        ("norm_topk_prob", "yes", "norm_topk_prob must be true or false, got 'yes'"),
        ("shared_expert_intermediate_size", 8, "shared_expert_intermediate_size must be absent or null, got 8"),
        ("num_experts", 4096 * 4, "num_experts must be in [1, 4096], got 16384"),
    ],
)  # fmt: skip
def test_unsupported_options_name_field_value_and_what_is_supported(field, value, text):
    assert text in GOLDEN.wrong(MIXTURE | {field: value})


def test_all_problems_come_at_once():
    found = GOLDEN.wrong({"hidden_act": 3, "bd_size": 4, "use_sliding_window": True, "num_hidden_layers": -1, "block_size": 0, "mask_token_id": 10**9})
    assert [problem.split()[0] for problem in found] == [
        "hidden_act", "bd_size", "use_sliding_window", "num_hidden_layers", "mask_token_id", "block_size",
    ]  # fmt: skip


def test_family_is_detected(tmp_path):
    for raw in ({"model_type": "sdar"}, {"model_type": "sdar_moe"}, {"architectures": ["SDARForCausalLM"]}, {"architectures": ["SDARMoeForCausalLM"]}):
        assert detect_family(raw) == "sdar"
    with pytest.raises(CheckpointError, match="supported: .*sdar: model_type sdar or sdar_moe"):
        detect_family({"model_type": "qwen3"})
    GOLDEN.write(tmp_path, model_type=..., architectures=...)
    assert inspect(tmp_path, family="sdar").config == GOLDEN.read()


def test_overrides(tmp_path):
    GOLDEN.write(tmp_path, mask_token_id=..., eos_token_id="x", block_size=[], rope_theta=None)
    given = {"mask_id": 5, "eos_ids": (), "block_size": 8, "rope_theta": 10.0}
    config = inspect(tmp_path, overrides=given).config  # in place of fields that are missing or wrong
    assert {name: getattr(config, name) for name in given} == given
    GOLDEN.write(tmp_path)
    with pytest.raises(CheckpointError, match="block_size must be given where visibility is 'block_causal', got None"):
        inspect(tmp_path, overrides={"block_size": None})
    with pytest.raises(CheckpointError, match="block_size must be in"):
        inspect(tmp_path, overrides={"block_size": 0})
    with pytest.raises(CheckpointError, match="experts must be an Experts or None"):
        inspect(tmp_path, overrides={"experts": {"n_experts": 8}})
    with pytest.raises(SettingError, match="unknown config override"):
        inspect(tmp_path, overrides={"n_experts": 8})


def test_tensors(tmp_path):
    loaded = load(GOLDEN.write(tmp_path))
    assert len(loaded) == len(GOLDEN.tensors) == 3 + 11 * 3
    assert torch.equal(loaded["layers.2.k_norm"], GOLDEN.tensors["model.layers.2.self_attn.k_norm.weight"])
    assert_equal(load(GOLDEN.write_shards(tmp_path, 3)), loaded)
    name = "model.layers.1.self_attn.q_norm.weight"
    assert problems(GOLDEN.write(tmp_path, GOLDEN.without(name)))[-1] == f"missing tensor {name} of shape [24]"
    extra = {"model.layers.0.self_attn.q_proj.bias": torch.zeros(96)}
    assert problems(GOLDEN.write(tmp_path, GOLDEN.tensors | extra)) == [
        "unexpected tensor 'model.layers.0.self_attn.q_proj.bias' of shape [96]"
    ]
    misshapen = GOLDEN.tensors | {name: torch.zeros(16)}
    assert f"tensor {name} must have shape [24] by the config, got [16]" in problems(GOLDEN.write(tmp_path, misshapen))


def test_experts_that_are_missing_or_misshapen_are_named(tmp_path):
    tensors = GOLDEN.random(MIXTURE)
    router, up = "model.layers.1.mlp.gate.weight", "model.layers.2.mlp.experts.7.up_proj.weight"
    del tensors[router]
    tensors[up] = tensors[up][:8].clone()
    found = problems(GOLDEN.write(tmp_path, tensors, **MIXTURE))
    assert f"missing tensor {router} of shape [8, 64]" in found
    assert f"tensor {up} must have shape [24, 64] by the config, got [8, 64]" in found
    found = problems(GOLDEN.write(tmp_path, GOLDEN.random(MIXTURE)))  # a dense config, a mixture's tensors
    assert "unexpected tensor 'model.layers.0.mlp.experts.0.gate_proj.weight' of shape [24, 64]" in found


@pytest.mark.parametrize(
    "changes",
    [
        {"block_size": 8, "num_key_value_heads": 1, "rope_theta": 100.0, "rms_norm_eps": 0.1},
        {"tie_word_embeddings": True},
        MIXTURE,
        MIXTURE | {"norm_topk_prob": False, "decoder_sparse_step": 2, "tie_word_embeddings": True},
    ],
    ids=["dense", "tied", "mixture", "mixture, raw weights, one layer"],
)
def test_layers_are_the_definition_s(tmp_path, changes):
    model = GOLDEN.check_against_the_definition(tmp_path, changes)
    info = inspect(tmp_path)
    assert model.config.n_parameters == info.n_parameters
    if model.config.experts:
        idle = len(model.config.experts.layers) * 3 * 64 * 24 * (8 - 3)
        assert model.config.n_active_parameters == info.n_parameters - idle


def test_bfloat16(tmp_path):
    half = {name: tensor.bfloat16() for name, tensor in GOLDEN.random(MIXTURE).items()}
    model = build_from(GOLDEN.write(tmp_path, half, **MIXTURE))
    assert model.dtype == torch.bfloat16 and all(layer.mlp.router.dtype == torch.float32 for layer in model.backbone.layers)
    ids = torch.arange(48).view(2, -1)
    exact = build_from(tmp_path, dtype=torch.float32).logits(ids)
    assert (model.logits(ids) - exact).norm() <= 0.05 * exact.norm()
