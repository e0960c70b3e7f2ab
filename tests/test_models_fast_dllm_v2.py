"""Fast-dLLM v2: config field by field, tensors, layers against the definition."""

from __future__ import annotations

import pytest
import torch

from family_kit import BAD_FLOATS, BAD_INTEGERS, Family
from models_kit import assert_equal, load, problems
from unmask.errors import CheckpointError
from unmask.models import fast_dllm_v2, inspect
from unmask.models.config import ModelConfig, detect_family

GOLDEN = Family.golden(fast_dllm_v2, "fast_dllm_v2", {"mask_token_id": 383})
RELEASED = {
    "hidden_size": 3584, "num_hidden_layers": 28, "num_attention_heads": 28, "num_key_value_heads": 4, "intermediate_size": 18944,
    "vocab_size": 152064, "bd_size": ..., "mask_token_id": ..., "eos_token_id": 151645, "layer_types": ["full_attention"] * 28,
}  # fmt: skip


def test_golden_config():
    assert GOLDEN.read() == ModelConfig(
        family="fast_dllm_v2", d_model=64, n_layers=3, n_heads=4, n_kv_heads=2, head_dim=16, ffn_dim=160, vocab_size=384, rope_theta=1e6,
        rotary_dim=16, norm_eps=1e-6, qkv_bias=True, qk_norm=False, tied_head=False, mask_id=383, eos_ids=(381,), pad_id=381,
        max_positions=32768, block_size=32, shifted=True, visibility="block_causal",
    )  # fmt: skip


def test_parameter_count_is_that_of_the_tensors(tmp_path):
    info = inspect(GOLDEN.write(tmp_path))
    assert info.config.n_parameters == info.n_parameters == sum(t.numel() for t in GOLDEN.tensors.values())


@pytest.mark.parametrize(("eos", "expected"), [(151645, (151645,)), (151643, (151643, 151645)), (..., (151645,)), (None, (151645,))])
def test_released_ids(eos, expected):
    config = GOLDEN.read(RELEASED | {"eos_token_id": eos})
    assert (config.mask_id, config.eos_ids, config.pad_id, config.block_size) == (151665, expected, 151643, 32)
    assert config.n_parameters * 2 == 15_231_233_024  # total_size of Qwen2.5-7B's index, whose layout it keeps
    small = RELEASED | {"vocab_size": 151936, "hidden_size": 1536, "num_attention_heads": 12, "num_key_value_heads": 2, "tie_word_embeddings": True}
    assert GOLDEN.read(small).eos_ids == (151645,)


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"bd_size": 8}, {"block_size": 8}),
        ({"bd_size": None}, {"block_size": 32}),
        ({"head_dim": 24}, {"head_dim": 24, "rotary_dim": 24}),
        ({"rope_theta": ...}, {"rope_theta": 10000.0}),
        ({"tie_word_embeddings": True}, {"tied_head": True}),
        ({"eos_token_id": [380, 381]}, {"eos_ids": (380, 381)}),
        ({"pad_token_id": 379}, {"pad_id": 379}),
    ],
)
def test_fields_are_read_as_the_authors_read_them(changes, expected):
    config = GOLDEN.read(changes)
    assert {name: getattr(config, name) for name in expected} == expected
    assert GOLDEN.read({}, {"eos_token_id": 380, "pad_token_id": 379}).eos_ids == (380,)


NUMBERS = ("hidden_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads", "head_dim", "intermediate_size", "vocab_size",
           "max_position_embeddings", "mask_token_id", "eos_token_id", "pad_token_id", "bd_size")  # fmt: skip


@pytest.mark.parametrize("value", BAD_INTEGERS, ids=lambda v: type(v).__name__)
@pytest.mark.parametrize("field", NUMBERS)
def test_bad_integers_name_the_field(field, value):
    assert any(problem.startswith(field) for problem in GOLDEN.wrong({field: value}))


@pytest.mark.parametrize("value", BAD_FLOATS)
@pytest.mark.parametrize("field", ["rope_theta", "rms_norm_eps"])
def test_bad_floats_name_the_field(field, value):
    assert any(field.removeprefix("rms_") in problem for problem in GOLDEN.wrong({field: value}))


@pytest.mark.parametrize(
    ("field", "value", "text"),
    [
        ("mask_token_id", ..., "mask_token_id is missing, and vocab_size 384 is not the released vocabulary (152064)"),
        ("num_key_value_heads", ..., "num_key_value_heads is missing"),
        ("hidden_act", "relu", "hidden_act must be 'silu' (the only value supported), got 'relu'"),
        ("block_size", 32, "block_size must be absent or null, got 32"),
        ("rope_scaling", {"rope_type": "yarn", "factor": 4.0}, "rope_scaling must be absent, null or {'rope_type': 'default'}, got {'rope_type': 'yarn', 'factor': 4.0}"),
        ("layer_types", ["sliding_attention"], "layer_types must be absent, null or all 'full_attention', got ['sliding_attention']"),
        ("num_attention_heads", 3, "hidden_size must be a multiple of num_attention_heads, got 64 and 3"),
        ("mask_token_id", 381, "mask_id 381 must not be one of eos_ids (381,)"),
    ],
)  # fmt: skip
def test_unsupported_options_name_field_value_and_what_is_supported(field, value, text):
    assert text in GOLDEN.wrong({field: value})


def test_detection_and_overrides(tmp_path):
    assert detect_family({"model_type": "Fast_dLLM_Qwen"}) == detect_family({"architectures": ["Fast_dLLM_QwenForCausalLM"]}) == "fast_dllm_v2"
    GOLDEN.write(tmp_path, mask_token_id=..., bd_size="x")
    with pytest.raises(CheckpointError) as caught:
        inspect(tmp_path)
    assert [p.split()[1] for p in caught.value.problems] == ["mask_token_id", "bd_size"]
    config = inspect(tmp_path, overrides={"mask_id": 382, "block_size": 16}).config
    assert (config.mask_id, config.block_size) == (382, 16)


def test_tensors(tmp_path):
    loaded = load(GOLDEN.write(tmp_path))
    assert len(loaded) == len(GOLDEN.tensors) == 3 + 12 * 3
    assert torch.equal(loaded["layers.2.v_bias"], GOLDEN.tensors["model.layers.2.self_attn.v_proj.bias"])
    assert_equal(load(GOLDEN.write_shards(tmp_path, 3)), loaded)
    name = "model.layers.1.self_attn.k_proj.bias"
    assert problems(GOLDEN.write(tmp_path, GOLDEN.without(name)))[-1] == f"missing tensor {name} of shape [32]"
    relay = {"model.relay_layer_norm.weight": torch.ones(64)}
    assert problems(GOLDEN.write(tmp_path, GOLDEN.tensors | relay)) == [
        "unexpected tensor 'model.relay_layer_norm.weight' of shape [64]"
    ]


@pytest.mark.parametrize("changes", [{"bd_size": 4}, {"bd_size": 8, "num_key_value_heads": 4, "tie_word_embeddings": True}, {"head_dim": 24}], ids=str)
def test_layers_are_the_definition_s(tmp_path, changes):
    assert GOLDEN.check_against_the_definition(tmp_path, changes).config.shifted
