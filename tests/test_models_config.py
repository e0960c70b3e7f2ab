"""Config reading: the golden and the released model, every bad field, config bombs, hostile JSON."""

from __future__ import annotations

import dataclasses
import json
import os
import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from models_kit import golden_config, write_checkpoint, write_config
from unmask.errors import CheckpointError, SettingError, UnmaskError, check_names, nearest
from unmask.models import inspect, llada
from unmask.models.config import ModelConfig, detect_family, read_json

RELEASED = {
    "d_model": 4096, "n_layers": 32, "n_heads": 32, "n_kv_heads": 32, "mlp_hidden_size": 12288, "vocab_size": 126464,
    "embedding_size": 126464, "mask_token_id": 126336, "eos_token_id": 126081, "pad_token_id": 126081,
}  # fmt: skip
"""What LLaDA-8B-Instruct's config.json says where it differs from the golden one."""


def read(changes: dict, generation: dict | None = None) -> ModelConfig:
    return llada.read_config(golden_config(**changes), generation or {}).validate()


def problems(changes: dict, generation: dict | None = None) -> list[str]:
    with pytest.raises(CheckpointError) as caught:
        read(changes, generation)
    return caught.value.problems


def test_golden_config():
    assert read({}) == ModelConfig(
        family="llada", d_model=64, n_layers=3, n_heads=4, n_kv_heads=4, head_dim=16, ffn_dim=160, vocab_size=384,
        rope_theta=500000.0, rotary_dim=16, norm_eps=1e-5, qkv_bias=False, qk_norm=False, tied_head=False, mask_id=383,
        eos_ids=(381,), pad_id=381, max_positions=4096, block_size=None, shifted=False, visibility="bidirectional",
    )  # fmt: skip


def test_released_config_has_the_released_size():
    config = read(RELEASED)
    assert (
        config.n_parameters * 2 == 16_031_162_368
    )  # total_size in LLaDA-8B-Instruct's model.safetensors.index.json
    assert (config.mask_id, config.eos_ids, config.pad_id) == (126336, (126081, 126348), 126081)
    specs = llada.weight_map(config)
    assert len(specs) == 3 + 9 * 32
    assert specs["layers.31.down"].name == "model.transformer.blocks.31.ff_out.weight"
    assert specs["layers.31.down"].shape == (4096, 12288)


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"n_kv_heads": None}, {"n_kv_heads": 4}),
        ({"n_kv_heads": 2}, {"n_kv_heads": 2}),
        ({"n_kv_heads": None, "multi_query_attention": True}, {"n_kv_heads": 1}),
        ({"multi_query_attention": False}, {"n_kv_heads": 4}),
        ({"mlp_hidden_size": None}, {"ffn_dim": 256}),
        ({"mlp_hidden_size": ..., "mlp_ratio": 3}, {"ffn_dim": 192}),
        ({"embedding_size": None}, {"vocab_size": 384}),
        ({"embedding_size": 512}, {"vocab_size": 512}),
        ({"weight_tying": True}, {"tied_head": True}),
        ({"weight_tying": ...}, {"tied_head": True}),
        ({"include_qkv_bias": True}, {"qkv_bias": True}),
        ({"include_qkv_bias": None}, {"qkv_bias": False}),
        ({"rope_theta": ...}, {"rope_theta": 10000.0}),
        ({"rope_theta": 500000}, {"rope_theta": 500000.0}),
        ({"eos_token_id": [380, 381, 380]}, {"eos_ids": (380, 381)}),
        ({"eos_token_id": None}, {"eos_ids": ()}),
        ({"pad_token_id": None}, {"pad_id": 381}),
        ({"pad_token_id": None, "eos_token_id": None}, {"pad_id": None}),
        ({"auto_map": {"AutoModel": "evil.Model"}, "some_unknown_field": 7}, {}),
    ],
)
def test_fields_are_read_as_the_authors_read_them(changes, expected):
    config = read(changes)
    assert {name: getattr(config, name) for name in expected} == expected


def test_released_ids_are_the_defaults_of_the_released_vocabulary():
    changes = RELEASED | {"mask_token_id": None, "eos_token_id": None, "pad_token_id": ...}
    config = read(changes)
    assert (config.mask_id, config.eos_ids, config.pad_id) == (126336, (126081, 126348), 126081)


def test_generation_config_gives_eos():
    assert read({}, {"eos_token_id": [380, 379]}).eos_ids == (380, 379)
    assert read({}, {"eos_token_id": 380}).eos_ids == (380,)
    assert read({}, {"temperature": 1.0}).eos_ids == (381,)
    assert problems({}, {"eos_token_id": "x"}) == ["eos_token_id must be an integer, got 'x'"]


NUMBERS = (
    "d_model", "n_layers", "n_heads", "n_kv_heads", "mlp_hidden_size", "mlp_ratio", "vocab_size", "embedding_size",
    "max_sequence_length", "mask_token_id", "eos_token_id", "pad_token_id",
)  # fmt: skip
BAD_NUMBERS = (
    0.5,
    64.0,
    "64",
    True,
    [64, "x"],
    {},
    float("nan"),
    float("inf"),
    -1,
    10**9,
    10**30,
    -(10**30),
    10**5000,
)


@pytest.mark.parametrize("field", NUMBERS)
@pytest.mark.parametrize("value", BAD_NUMBERS, ids=lambda v: str(type(v).__name__))
def test_bad_integers_name_the_field(field, value):
    assert any(problem.startswith(field) for problem in problems({field: value}))


@pytest.mark.parametrize("field", ["rope_theta", "rms_norm_eps"])
@pytest.mark.parametrize(
    "value", ["1", True, [], float("nan"), float("inf"), float("-inf"), -1.0, 1e300, None]
)
def test_bad_floats_name_the_field(field, value):
    theirs = {"rope_theta": "rope_theta", "rms_norm_eps": "norm_eps"}[field]
    assert any(theirs in problem for problem in problems({field: value}))


@pytest.mark.parametrize("field", ["d_model", "n_heads", "n_layers", "vocab_size", "mask_token_id"])
def test_missing_fields_are_named(field):
    assert any(problem.startswith(f"{field} is missing") for problem in problems({field: ...}))


@pytest.mark.parametrize(
    ("field", "value", "text"),
    [
        ("block_type", "sequential", "block_type must be 'llama' (the only value supported), got 'sequential'"),
        ("layer_norm_type", "low_precision", "layer_norm_type must be 'rms' (the only value supported), got 'low_precision'"),
        ("activation_type", "gelu", "activation_type must be 'silu' (the only value supported), got 'gelu'"),
        ("rope", False, "rope must be True (the only value supported), got False"),
        ("rope_full_precision", False, "rope_full_precision must be True (the only value supported), got False"),
        ("alibi", True, "alibi must be False (the only value supported), got True"),
        ("attention_layer_norm", True, "attention_layer_norm must be False (the only value supported), got True"),
        ("include_bias", True, "include_bias must be False (the only value supported), got True"),
        ("layer_norm_with_affine", False, "layer_norm_with_affine must be True (the only value supported), got False"),
        ("bias_for_layer_norm", True, "bias_for_layer_norm must be False or null, got True"),
        ("input_emb_norm", True, "input_emb_norm must be False (the only value supported), got True"),
        ("scale_logits", True, "scale_logits must be False (the only value supported), got True"),
        ("block_group_size", 3, "block_group_size must be 1 (the only value supported), got 3"),
        ("alibi", 0, "alibi must be False (the only value supported), got 0"),
        ("rope_scaling", {"type": "yarn"}, "rope_scaling must be absent or null, got {'type': 'yarn'}"),
        ("quantization_config", {"bits": 4}, "quantization_config must be absent or null, got {'bits': 4}"),
        ("weight_tying", "no", "weight_tying must be true or false, got 'no'"),
        ("include_qkv_bias", 1, "include_qkv_bias must be true or false, got 1"),
        ("multi_query_attention", "yes", "multi_query_attention must be true, false or null, got 'yes'"),
        ("multi_query_attention", True, "n_kv_heads 4 contradicts multi_query_attention True, which means 1"),
        ("n_heads", 3, "d_model must be a multiple of n_heads, got 64 and 3"),
        ("n_kv_heads", 3, "n_heads must be a multiple of n_kv_heads, got 4 and 3"),
        ("n_heads", 16, "head_dim must be in [8, 1024], got 4"),
        ("embedding_size", 383, "embedding_size must be at least vocab_size 384, got 383"),
        ("mask_token_id", 384, "mask_token_id must be in [0, 383], got 384"),
        ("mask_token_id", 381, "mask_id 381 must not be one of eos_ids (381,)"),
        ("eos_token_id", [380, 384], "eos_token_id must be in [0, 383], got 384"),
        ("eos_token_id", list(range(300)), "eos_token_id must hold at most 256 ids, got 300"),
        (
            "layer_norm_type", ...,
            "layer_norm_type must be 'rms' (the only value supported), got 'default', the authors' default for a missing field",
        ),
    ],
)  # fmt: skip
def test_unsupported_options_name_field_value_and_what_is_supported(field, value, text):
    assert text in problems({field: value})


def test_all_problems_come_at_once():
    found = problems(
        {"alibi": True, "n_layers": -1, "rms_norm_eps": "x", "mask_token_id": 10**9, "block_type": 3}
    )
    assert [problem.split()[0] for problem in found] == [
        "block_type",
        "alibi",
        "n_layers",
        "rms_norm_eps",
        "mask_token_id",
    ]


@pytest.mark.parametrize(
    "changes",
    [
        {"d_model": 10**9},
        {"n_layers": 10**9},
        {"n_layers": -1},
        {"vocab_size": 10**9, "embedding_size": 10**9},
        {"mlp_hidden_size": 10**12},
        {"d_model": 131072, "n_heads": 128, "n_kv_heads": 128, "n_layers": 1024, "mlp_hidden_size": 1 << 20},
    ],
)
def test_config_bombs_are_refused_at_once(tmp_path, changes):
    write_checkpoint(tmp_path, **changes)
    start = time.perf_counter()
    with pytest.raises(CheckpointError):
        inspect(tmp_path)
    assert time.perf_counter() - start < 2


def test_parameter_count_is_capped_and_named():
    found = problems(
        {"d_model": 131072, "n_heads": 128, "n_kv_heads": 128, "n_layers": 1024, "mlp_hidden_size": 1 << 20}
    )
    assert found == [
        "the sizes make 492,600,279,040,000 parameters; at most 1,099,511,627,776 are accepted"
    ] or (len(found) == 1 and found[0].endswith("parameters; at most 1,099,511,627,776 are accepted"))


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda children: (
        st.lists(children, max_size=3) | st.dictionaries(st.text(max_size=5), children, max_size=3)
    ),
    max_leaves=5,
)


@given(field=st.sampled_from(sorted(golden_config())), value=json_values)
def test_any_value_of_any_field_is_read_or_refused(field, value):
    try:
        read({field: value})
    except CheckpointError as error:
        assert error.problems and all(isinstance(problem, str) for problem in error.problems)


@given(field=st.sampled_from([f.name for f in dataclasses.fields(ModelConfig)]), value=json_values)
def test_any_value_of_any_model_field_is_valid_or_refused(field, value):
    try:
        dataclasses.replace(read({}), **{field: value}).validate()
    except CheckpointError:
        pass


# --- families ---------------------------------------------------------------------------------------------------


def test_family_is_detected():
    assert detect_family({"model_type": "llada"}) == "llada"
    assert detect_family({"architectures": ["LLaDAModelLM"]}) == "llada"


@pytest.mark.parametrize(
    "raw",
    [
        {},
        {"model_type": "llama"},
        {"model_type": 3},
        {"architectures": "LLaDAModelLM"},
        {"architectures": [None]},
    ],
)
def test_unknown_families_name_the_supported_ones(raw):
    with pytest.raises(CheckpointError, match="supported: llada: model_type llada"):
        detect_family(raw)


def test_family_argument(tmp_path):
    write_checkpoint(tmp_path, model_type=..., architectures=...)
    with pytest.raises(CheckpointError, match="is not supported"):
        inspect(tmp_path)
    assert inspect(tmp_path, family="llada").config.n_layers == 3
    with pytest.raises(SettingError, match="unknown family 'lada'; did you mean 'llada'"):
        inspect(tmp_path, family="lada")


def test_overrides(tmp_path):
    write_checkpoint(tmp_path)
    config = inspect(tmp_path, overrides={"mask_id": 5, "eos_ids": [1, 2], "max_positions": 128}).config
    assert (config.mask_id, config.eos_ids, config.max_positions) == (5, (1, 2), 128)
    with pytest.raises(SettingError, match="unknown config override 'mask_idd'; did you mean 'mask_id'"):
        inspect(tmp_path, overrides={"mask_idd": 5})
    with pytest.raises(CheckpointError, match="mask_id must be in"):
        inspect(tmp_path, overrides={"mask_id": 1000})
    with pytest.raises(CheckpointError, match="must have shape"):
        inspect(tmp_path, overrides={"ffn_dim": 168})
    write_checkpoint(tmp_path, mask_token_id=..., eos_token_id="x", pad_token_id=..., rope_theta=None)
    given = {"mask_id": 5, "eos_ids": (), "pad_id": None, "rope_theta": 10.0}
    config = inspect(tmp_path, overrides=given).config  # in place of fields that are missing or wrong
    assert {name: getattr(config, name) for name in given} == given


# --- hostile JSON -----------------------------------------------------------------------------------------------

BAD_JSON = {
    "empty": b"",
    "not json": b"hello",
    "cut": b'{"d_model": 64',
    "list": b"[]",
    "string": b'"x"',
    "null": b"null",
    "duplicate": b'{"d_model": 64, "d_model": 128}',
    "deep lists": b'{"a": ' + b"[" * 200_000 + b"]" * 200_000 + b"}",
    "deep objects": b'{"a":' * 100_000 + b"1" + b"}" * 100_000,
    "long number": b'{"d_model": ' + b"9" * 100_000 + b"}",
    "not utf-8": b'{"a": "\xff\xfe"}',
    "nul bytes": b"\0" * 1000,
    "too large": b'{"a": "' + b"x" * (1 << 20) + b'"}',
}


@pytest.mark.parametrize("name", BAD_JSON)
@pytest.mark.parametrize("file", ["config.json", "generation_config.json"])
def test_hostile_json(tmp_path, name, file):
    write_checkpoint(tmp_path)
    (tmp_path / file).write_bytes(BAD_JSON[name])
    with pytest.raises(CheckpointError, match=file):
        inspect(tmp_path)


def test_a_fifo_is_not_opened(tmp_path):
    write_checkpoint(tmp_path)
    (tmp_path / "config.json").unlink()
    os.mkfifo(tmp_path / "config.json")
    with pytest.raises(CheckpointError, match="not a regular file"):
        inspect(tmp_path)


def test_a_folder_named_config(tmp_path):
    (tmp_path / "config.json").mkdir()
    with pytest.raises(CheckpointError, match="not a regular file"):
        inspect(tmp_path)


@given(data=st.binary(max_size=200))
def test_any_bytes_are_json_or_refused(tmp_path_factory, data):
    path = tmp_path_factory.getbasetemp() / "any.json"
    path.write_bytes(data)
    try:
        assert isinstance(read_json(path), dict)
    except CheckpointError:
        pass


def test_nan_in_json_is_refused_by_the_field(tmp_path):
    write_config(tmp_path, json.dumps(golden_config(rope_theta=float("nan"))))
    with pytest.raises(CheckpointError, match="rope_theta must be in"):
        inspect(tmp_path)


# --- errors -----------------------------------------------------------------------------------------------------


def test_errors_are_the_builtin_kinds_too():
    import pickle

    error = CheckpointError("cannot load x", ["one", "two"])
    assert isinstance(error, ValueError) and isinstance(error, UnmaskError)
    assert str(error) == "cannot load x (2 problems):\n  - one\n  - two"
    again = pickle.loads(pickle.dumps(error))
    assert again.problems == error.problems and str(again) == str(error)


def test_long_problem_lists_are_cut_in_the_message_only():
    error = CheckpointError("x", [str(i) for i in range(1000)])
    assert len(error.problems) == 1000 and str(error).endswith("... and 960 more (all in .problems)")


def test_nearest_names():
    assert nearest("tresh", ["threshold", "steps"]) == "; did you mean 'threshold'? valid: steps, threshold"
    assert nearest("THRESHOLD", ["threshold"]) == "; did you mean 'threshold'? valid: threshold"
    assert nearest("qqq", ["threshold"]) == "; valid: threshold"
    check_names("option", ["steps"], ["steps"])
    with pytest.raises(SettingError, match="unknown option 'tresh'; did you mean 'threshold'"):
        check_names("option", ["tresh"], ["threshold"])
