"""LLaDA-MoE: config field by field, tensors, layers against the definition. No output of the authors' code was at hand."""

from __future__ import annotations

import pytest
import torch

import unmask
from family_kit import BAD_INTEGERS, Family
from models_kit import load, problems
from unmask.errors import CheckpointError
from unmask.models import inspect, llada_moe
from unmask.models.config import Experts, ModelConfig, detect_family

TINY = {
    "architectures": ["LLaDAMoEModelLM"], "model_type": "llada", "attention_bias": False, "clip_qkv": None, "dense_intermediate_size": 96,
    "eos_token_id": 381, "expert_intermediate_size": 24, "hidden_act": "silu", "hidden_size": 64, "mask_token_id": 383,
    "max_position_embeddings": 8192, "moe_layer_freq": [1, 0, 1], "moe_router_enable_expert_bias": False,
    "moe_router_score_function": "softmax", "norm_topk_prob": None, "num_attention_heads": 4, "num_experts": 8, "num_experts_per_tok": 3,
    "num_hidden_layers": 3, "num_key_value_heads": 2, "pad_token_id": 381, "partial_rotary_factor": 1.0, "qk_layernorm": True,
    "rms_norm_eps": 1e-05, "rope_scaling": None, "rope_theta": 50000, "routed_scaling_factor": 1, "shared_expert_intermediate_size": None,
    "tie_word_embeddings": False, "vocab_size": 384,
}  # fmt: skip
RELEASED = {
    "hidden_size": 2048, "num_hidden_layers": 16, "num_attention_heads": 16, "num_key_value_heads": 16, "dense_intermediate_size": 8192,
    "expert_intermediate_size": 1024, "num_experts": 64, "num_experts_per_tok": 8, "moe_layer_freq": [1] * 16, "vocab_size": 157184,
    "mask_token_id": ..., "eos_token_id": ..., "pad_token_id": ...,
}  # fmt: skip
FAMILY = Family(llada_moe, TINY, {})


def test_config():
    experts = Experts(
        layers=(0, 2), n_experts=8, top_k=3, expert_dim=24, shared_dim=0, scoring="softmax", selection_bias=False, n_groups=1, kept_groups=1,
        normalized=False, scale=1.0,
    )  # fmt: skip
    assert FAMILY.read() == ModelConfig(
        family="llada_moe", d_model=64, n_layers=3, n_heads=4, n_kv_heads=2, head_dim=16, ffn_dim=96, vocab_size=384, rope_theta=5e4,
        rotary_dim=16, norm_eps=1e-5, qkv_bias=False, qk_norm=True, tied_head=False, mask_id=383, eos_ids=(381,), pad_id=381,
        max_positions=8192, block_size=None, shifted=False, visibility="bidirectional", experts=experts,
    )  # fmt: skip
    for field, value in {"norm_topk_prob": True, "routed_scaling_factor": 2.5, "router_num_group": 4}.items():
        assert FAMILY.read({field: value}) == FAMILY.read()  # the authors' code does not read them


def test_released_model():
    config = FAMILY.read(RELEASED)
    assert (config.mask_id, config.eos_ids, config.pad_id) == (156895, (156892,), 156892)
    assert round(config.n_parameters / 1e9, 2) == 7.36 and round(config.n_active_parameters / 1e9, 1) == 1.7  # its head and embedding: 0.6


@pytest.mark.parametrize("value", BAD_INTEGERS, ids=lambda v: type(v).__name__)
@pytest.mark.parametrize(
    "field",
    ["hidden_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads", "dense_intermediate_size", "expert_intermediate_size",
     "num_experts", "num_experts_per_tok", "shared_expert_intermediate_size", "moe_layer_freq", "vocab_size", "mask_token_id"],
)  # fmt: skip
def test_bad_integers_name_the_field(field, value):
    assert any(field in problem for problem in FAMILY.wrong({field: value}))


@pytest.mark.parametrize(
    ("field", "value", "text"),
    [
        ("attention_bias", True, "attention_bias must be False (the only value supported), got True"),
        ("clip_qkv", 8.0, "clip_qkv must be absent or null, got 8.0"),
        ("moe_router_enable_expert_bias", True, "moe_router_enable_expert_bias must be False or null, got True"),
        ("moe_layer_freq", [1, 1], "moe_layer_freq must be a list of 3 values, 0 (dense) or 1 (mixture), got [1, 1]"),
        ("moe_layer_freq", [1, 2, 1], "moe_layer_freq must be a list of 3 values, 0 (dense) or 1 (mixture), got [1, 2, 1]"),
        ("rope_theta", ..., "rope_theta is missing"),
        ("partial_rotary_factor", ..., "partial_rotary_factor is missing"),
        ("rope_scaling", {"type": "linear", "factor": 2}, "rope_scaling must be absent, null or {'rope_type': 'default'}, got {'type': 'linear', 'factor': 2}"),
        ("qk_layernorm", "x", "qk_layernorm must be true or false, got 'x'"),
        ("num_experts", ..., "num_experts is missing"),
    ],
)  # fmt: skip
def test_unsupported_options_name_field_value_and_what_is_supported(field, value, text):
    assert text in FAMILY.wrong({field: value})


def test_detection(tmp_path):
    assert detect_family(TINY) == "llada_moe"  # model_type "llada" as LLaDA's own: the architecture decides
    assert detect_family({"model_type": "llada", "architectures": ["LLaDAModelLM"]}) == "llada"
    assert detect_family({"model_type": "llada"}) == "llada"
    for raw in ({"model_type": "lladamoe"}, {"model_type": "llada_moe"}, {"architectures": ["LLaDAMoEModel"]}):
        assert detect_family(raw) == "llada_moe"
    with pytest.raises(CheckpointError, match="mask_id must be in"):
        inspect(FAMILY.write(tmp_path, FAMILY.random({})), overrides={"mask_id": 384})


def test_tensors(tmp_path):
    tensors = FAMILY.random({})
    loaded = load(FAMILY.write(tmp_path, tensors))
    assert torch.equal(loaded["layers.2.experts.5.down"], tensors["model.layers.2.mlp.experts.5.down_proj.weight"])
    assert torch.equal(loaded["layers.0.router"], tensors["model.layers.0.mlp.gate.weight"]) and loaded["layers.1.gate"].shape == (96, 64)
    name = "model.layers.0.mlp.experts.5.up_proj.weight"
    del tensors[name]
    assert problems(FAMILY.write(tmp_path, tensors))[-1] == f"missing tensor {name} of shape [24, 64]"


@pytest.mark.parametrize(
    "changes",
    [{}, {"qk_layernorm": None, "moe_layer_freq": [1, 1, 1]}, {"shared_expert_intermediate_size": 40, "partial_rotary_factor": 0.5}],
    ids=str,
)
def test_layers_are_the_definition_s(tmp_path, changes):
    model = FAMILY.check_against_the_definition(tmp_path, changes)
    assert model.config.n_parameters == inspect(tmp_path).n_parameters


def test_it_decodes(tmp_path):
    """Bidirectional, so the loop that is there runs it; a row gets the tokens that it gets alone."""
    model = unmask.load(FAMILY.write(tmp_path, FAMILY.random({})))
    prompts = [[5, 6, 7], [8] * 9, [40, 41]]
    options = dict(max_new_tokens=16, block_size=8, threshold=0.5, eos_stop=False)
    batch = unmask.generate(model, prompts, **options)
    assert [r.ids for r in batch] == [unmask.generate(model, p, **options).ids for p in prompts]
    assert len({tuple(r.ids) for r in batch}) == 3 and all(383 not in r.ids for r in batch)
