"""The Dream family: its config field by field, its tensors, its chat template, and its layers against plain PyTorch."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer as RustTokenizer
from tokenizers import models as rust_models
from tokenizers import pre_tokenizers

import random_models
from models_kit import assert_equal, load, problems, write_index
from unmask.errors import CheckpointError, SettingError
from unmask.models import Tokenizer, dream, inspect
from unmask.models.config import ModelConfig, detect_family
from unmask.models.model import Model, build

GOLDEN = Path(__file__).parent / "golden" / "dream" / "checkpoint"
TENSORS = load_file(GOLDEN / "model.safetensors")

RELEASED = {
    "hidden_size": 3584, "num_hidden_layers": 28, "num_attention_heads": 28, "num_key_value_heads": 4, "intermediate_size": 18944,
    "vocab_size": 152064, "bos_token_id": 151643, "eos_token_id": 151643, "pad_token_id": 151643, "mask_token_id": 151666,
}  # fmt: skip
"""What Dream-v0-Instruct-7B's config.json says where it differs from the golden one."""


def golden_config(**changes) -> dict:
    config = json.loads((GOLDEN / "config.json").read_text()) | changes
    return {name: value for name, value in config.items() if value is not ...}


def write(folder: Path, tensors: dict | None = None, **changes) -> Path:
    """The golden checkpoint without its generation_config.json, with other tensors or changed config fields."""
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps(golden_config(**changes)))
    if tensors is None:
        shutil.copyfile(GOLDEN / "model.safetensors", folder / "model.safetensors")
    else:
        save_file(tensors, folder / "model.safetensors")
    return folder


def without(*names: str) -> dict[str, torch.Tensor]:
    return {name: tensor for name, tensor in TENSORS.items() if name not in names}


def build_from(folder: Path, dtype: torch.dtype | None = None) -> Model:
    info = inspect(folder)
    return build(info, Tokenizer.load(folder, info.config), "dream", dtype, torch.device("cpu"))


def read(changes: dict, generation: dict | None = None) -> ModelConfig:
    return dream.read_config(golden_config(**changes), generation or {}).validate()


def wrong(changes: dict, generation: dict | None = None) -> list[str]:
    with pytest.raises(CheckpointError) as caught:
        read(changes, generation)
    return caught.value.problems


# --- config -----------------------------------------------------------------------------------------------------


def test_golden_config():
    expected = ModelConfig(
        family="dream", d_model=64, n_layers=3, n_heads=4, n_kv_heads=2, head_dim=16, ffn_dim=160, vocab_size=384,
        rope_theta=1e6, rotary_dim=16, norm_eps=1e-6, qkv_bias=True, qk_norm=False, tied_head=False, mask_id=382,
        eos_ids=(381,), pad_id=381, max_positions=131072, block_size=None, shifted=True, visibility="bidirectional",
    )  # fmt: skip
    assert read({}) == inspect(GOLDEN).config == expected


def test_parameter_count_is_that_of_the_tensors():
    info = inspect(GOLDEN)
    assert info.config.n_parameters == info.n_parameters == sum(t.numel() for t in TENSORS.values())


def test_released_config_has_the_released_size():
    config = read(RELEASED)
    assert config.n_parameters * 2 == 15_231_233_024  # total_size of Qwen2.5-7B's index, whose layout Dream-7B keeps
    assert (config.mask_id, config.eos_ids, config.pad_id, config.head_dim) == (151666, (151643,), 151643, 128)
    specs = dream.weight_map(config)
    assert len(specs) == 3 + 12 * 28
    assert (specs["layers.27.k_bias"].name, specs["layers.27.k_bias"].shape) == (
        "model.layers.27.self_attn.k_proj.bias",
        (512,),
    )
    assert (specs["head"].name, specs["head"].shape) == ("lm_head.weight", (152064, 3584))


def test_released_ids_are_the_defaults_of_the_released_vocabulary():
    config = read(RELEASED | {"mask_token_id": None, "eos_token_id": None, "pad_token_id": ...})
    assert (config.mask_id, config.eos_ids, config.pad_id) == (151666, (151643,), 151643)


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"num_key_value_heads": None}, {"n_kv_heads": 4}),
        ({"num_key_value_heads": 1}, {"n_kv_heads": 1}),
        ({"head_dim": None}, {"head_dim": 16, "rotary_dim": 16}),
        ({"head_dim": 24}, {"head_dim": 24, "rotary_dim": 24}),
        ({"head_dim": 24, "num_attention_heads": 6}, {"n_heads": 6, "head_dim": 24}),  # 64 is no multiple of 6
        ({"tie_word_embeddings": True}, {"tied_head": True}),
        ({"tie_word_embeddings": ...}, {"tied_head": False}),
        ({"rope_theta": ...}, {"rope_theta": 10000.0}),
        ({"rope_theta": 5e5}, {"rope_theta": 5e5}),
        ({"rms_norm_eps": ...}, {"norm_eps": 1e-6}),
        ({"rms_norm_eps": 1e-5}, {"norm_eps": 1e-5}),
        ({"max_position_embeddings": ...}, {"max_positions": 32768}),
        ({"hidden_act": ...}, {}),
        ({"rope_scaling": {"rope_type": "default"}}, {}),
        ({"rope_scaling": {"type": "default", "rope_type": "default"}}, {}),
        ({"rope_scaling": ...}, {}),
        ({"use_sliding_window": None, "sliding_window": 4096, "max_window_layers": 3}, {}),
        ({"use_sliding_window": ..., "sliding_window": 4096}, {}),
        ({"layer_types": ["full_attention"] * 3, "quantization_config": None, "block_size": None}, {}),
        ({"eos_token_id": [380, 381, 380]}, {"eos_ids": (380, 381)}),
        ({"eos_token_id": None}, {"eos_ids": ()}),
        ({"pad_token_id": None}, {"pad_id": 381}),
        ({"pad_token_id": None, "eos_token_id": None}, {"pad_id": None}),
        ({"auto_map": {"AutoModel": "evil.Model"}, "attention_dropout": 0.1, "some_unknown_field": 7}, {}),
    ],
)
def test_fields_are_read_as_the_authors_read_them(changes, expected):
    config = read(changes)
    expected = {"d_model": 64, "qkv_bias": True, "shifted": True} | expected
    assert {name: getattr(config, name) for name in expected} == expected


def test_generation_config_gives_ids():
    assert read({}, {"eos_token_id": [380, 379]}).eos_ids == (380, 379)
    assert read({"mask_token_id": None}, {"mask_token_id": 377}).mask_id == 377
    assert read({"pad_token_id": ...}, {"pad_token_id": 376}).pad_id == 376
    released = {"alg": "origin", "mask_token_id": None, "eos_token_id": 381, "pad_token_id": 381, "steps": 512}
    assert read({}, released) == read({})  # the released file leaves mask_token_id null
    assert wrong({}, {"eos_token_id": "x"}) == ["eos_token_id must be an integer, got 'x'"]


NUMBERS = (
    "hidden_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads", "head_dim", "intermediate_size", "vocab_size",
    "max_position_embeddings", "mask_token_id", "eos_token_id", "pad_token_id",
)  # fmt: skip


@pytest.mark.parametrize("field", NUMBERS)
@pytest.mark.parametrize("value", [0.5, 64.0, "64", True, [64, "x"], {}, float("nan"), -1, 10**9, 10**5000], ids=lambda v: type(v).__name__)
def test_bad_integers_name_the_field(field, value):
    assert any(problem.startswith(field) for problem in wrong({field: value}))


@pytest.mark.parametrize("field", ["rope_theta", "rms_norm_eps"])
@pytest.mark.parametrize("value", ["1", True, [], float("nan"), float("inf"), -1.0, 1e300, None])
def test_bad_floats_name_the_field(field, value):
    theirs = {"rope_theta": "rope_theta", "rms_norm_eps": "norm_eps"}[field]
    assert any(theirs in problem for problem in wrong({field: value}))


@pytest.mark.parametrize(
    "field",
    ["hidden_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads", "intermediate_size", "vocab_size", "mask_token_id"],
)
def test_missing_fields_are_named(field):
    assert any(problem.startswith(f"{field} is missing") for problem in wrong({field: ...}))


@pytest.mark.parametrize(
    ("field", "value", "text"),
    [
        ("hidden_act", "gelu", "hidden_act must be 'silu' (the only value supported), got 'gelu'"),
        ("hidden_act", None, "hidden_act must be 'silu' (the only value supported), got None"),
        ("rope_scaling", {"type": "yarn"}, "rope_scaling must be absent, null or {'rope_type': 'default'}, got {'type': 'yarn'}"),
        ("rope_scaling", {"rope_type": "default", "factor": 4.0}, "rope_scaling must be absent, null or {'rope_type': 'default'}, got {'rope_type': 'default', 'factor': 4.0}"),
        ("rope_scaling", {}, "rope_scaling must be absent, null or {'rope_type': 'default'}, got {}"),
        ("rope_scaling", False, "rope_scaling must be absent, null or {'rope_type': 'default'}, got False"),
        ("rope_parameters", {"rope_theta": 1e6}, "rope_parameters must be absent or null, got {'rope_theta': 1000000.0}"),
        ("partial_rotary_factor", 0.5, "partial_rotary_factor must be absent or null, got 0.5"),
        ("quantization_config", {"bits": 4}, "quantization_config must be absent or null, got {'bits': 4}"),
        ("block_size", 32, "block_size must be absent or null, got 32"),
        ("bd_size", 32, "bd_size must be absent or null, got 32"),
        ("use_sliding_window", True, "use_sliding_window must be False or null, got True"),
        ("use_sliding_window", 1, "use_sliding_window must be true or false, got 1"),
        ("layer_types", ["full_attention", "sliding_attention"], "layer_types must be absent, null or all 'full_attention', got ['full_attention', 'sliding_attention']"),
        ("layer_types", "full_attention", "layer_types must be absent, null or all 'full_attention', got 'full_attention'"),
        ("tie_word_embeddings", "no", "tie_word_embeddings must be true or false, got 'no'"),
        ("num_attention_heads", 3, "hidden_size must be a multiple of num_attention_heads, got 64 and 3"),
        ("num_key_value_heads", 3, "n_heads must be a multiple of n_kv_heads, got 4 and 3"),
        ("num_attention_heads", 16, "head_dim must be in [8, 1024], got 4"),
        ("head_dim", 20, "head_dim must be a multiple of 8, got 20"),
        ("mask_token_id", 384, "mask_token_id must be in [0, 383], got 384"),
        ("mask_token_id", 381, "mask_id 381 must not be one of eos_ids (381,)"),
        ("mask_token_id", None, "mask_token_id is missing, and vocab_size 384 is not the released vocabulary (152064)"),
        ("eos_token_id", [380, 384], "eos_token_id must be in [0, 383], got 384"),
        ("eos_token_id", list(range(300)), "eos_token_id must hold at most 256 ids, got 300"),
    ],
)  # fmt: skip
def test_unsupported_options_name_field_value_and_what_is_supported(field, value, text):
    assert text in wrong({field: value})


def test_all_problems_come_at_once():
    found = wrong({"hidden_act": 3, "block_size": 4, "use_sliding_window": True, "num_hidden_layers": -1, "rms_norm_eps": "x", "mask_token_id": 10**9})
    assert [problem.split()[0] for problem in found] == [
        "hidden_act", "block_size", "use_sliding_window", "num_hidden_layers", "rms_norm_eps", "mask_token_id",
    ]  # fmt: skip


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda children: st.lists(children, max_size=3) | st.dictionaries(st.text(max_size=5), children, max_size=3),
    max_leaves=5,
)
EXTRA = ("head_dim", "layer_types", "rope_parameters", "partial_rotary_factor", "quantization_config", "block_size", "bd_size")


@given(field=st.sampled_from(sorted(golden_config()) + list(EXTRA)), value=json_values)
def test_any_value_of_any_field_is_read_or_refused(field, value):
    try:
        read({field: value})
    except CheckpointError as error:
        assert error.problems and all(isinstance(problem, str) for problem in error.problems)


def test_family_is_detected():
    assert detect_family({"model_type": "Dream"}) == "dream"
    assert detect_family({"architectures": ["DreamModel"]}) == "dream"
    assert detect_family({"model_type": "llada", "architectures": ["DreamModel"]}) == "llada"  # model_type comes first
    with pytest.raises(CheckpointError, match="supported: .*dream: model_type Dream"):
        detect_family({"model_type": "qwen2", "architectures": ["DreamModel"]})


def test_family_argument(tmp_path):
    write(tmp_path, model_type=..., architectures=...)
    with pytest.raises(CheckpointError, match="is not supported"):
        inspect(tmp_path)
    assert inspect(tmp_path, family="dream").config == read({})
    with pytest.raises(SettingError, match="unknown family 'draem'; did you mean 'dream'"):
        inspect(tmp_path, family="draem")


def test_overrides(tmp_path):
    write(tmp_path)
    config = inspect(tmp_path, overrides={"mask_id": 5, "eos_ids": [1, 2], "max_positions": 2048}).config
    assert (config.mask_id, config.eos_ids, config.max_positions) == (5, (1, 2), 2048)
    with pytest.raises(CheckpointError, match="mask_id must be in"):
        inspect(tmp_path, overrides={"mask_id": 1000})
    with pytest.raises(CheckpointError, match="must have shape"):
        inspect(tmp_path, overrides={"n_kv_heads": 4})
    with pytest.raises(CheckpointError, match="unexpected tensor 'model.layers.0.self_attn.k_proj.bias'"):
        inspect(tmp_path, overrides={"qkv_bias": False})
    write(tmp_path, mask_token_id=..., eos_token_id="x", pad_token_id="y", rope_theta=None, rms_norm_eps=[], max_position_embeddings=0)
    given = {"mask_id": 5, "eos_ids": (), "pad_id": None, "rope_theta": 10.0, "norm_eps": 1e-4, "max_positions": 9}
    config = inspect(tmp_path, overrides=given).config  # in place of fields that are missing or wrong
    assert {name: getattr(config, name) for name in given} == given


# --- tensors ----------------------------------------------------------------------------------------------------


def test_tensors_have_canonical_names():
    loaded = load(GOLDEN)
    assert len(loaded) == len(TENSORS) == 3 + 12 * 3
    assert torch.equal(loaded["layers.2.v_bias"], TENSORS["model.layers.2.self_attn.v_proj.bias"])
    assert torch.equal(loaded["layers.0.mlp_norm"], TENSORS["model.layers.0.post_attention_layernorm.weight"])
    assert torch.equal(loaded["head"], TENSORS["lm_head.weight"])


def test_shards(tmp_path):
    write(tmp_path)
    (tmp_path / "model.safetensors").unlink()
    index = {}
    for i in range(3):
        part = {name: TENSORS[name] for name in sorted(TENSORS)[i::3]}
        file = f"model-{i + 1:05d}-of-00003.safetensors"
        save_file(part, tmp_path / file)
        index |= dict.fromkeys(part, file)
    write_index(tmp_path, index)
    assert_equal(load(tmp_path), load(GOLDEN))


def test_names_without_the_leading_part(tmp_path):
    bare = {name.removeprefix("model."): tensor for name, tensor in TENSORS.items()}
    assert_equal(load(write(tmp_path, bare)), load(GOLDEN))
    del bare["lm_head.weight"]  # what the inner module alone would save
    assert problems(write(tmp_path, bare))[-1] == "missing tensor lm_head.weight of shape [384, 64]"


def test_tied_head(tmp_path):
    assert "unexpected tensor 'lm_head.weight' of shape [384, 64] (the config ties the head to the embedding)" in problems(
        write(tmp_path, tie_word_embeddings=True)
    )
    tied = build_from(write(tmp_path, without("lm_head.weight"), tie_word_embeddings=True))
    copied = TENSORS | {"lm_head.weight": TENSORS["model.embed_tokens.weight"].clone()}
    ids = torch.arange(20).view(1, -1)
    assert torch.equal(tied.logits(ids), build_from(write(tmp_path, copied)).logits(ids))
    assert tied.config.n_parameters == sum(t.numel() for t in without("lm_head.weight").values())
    assert "missing tensor lm_head.weight of shape [384, 64]" in problems(write(tmp_path, without("lm_head.weight")))


@pytest.mark.parametrize("part", ["q", "k", "v"])
def test_a_missing_bias_is_named(tmp_path, part):
    name = f"model.layers.1.self_attn.{part}_proj.bias"
    rows = 64 if part == "q" else 32
    assert f"missing tensor {name} of shape [{rows}]" in problems(write(tmp_path, without(name)))


def test_a_bias_of_another_layer_is_refused(tmp_path):
    extra = {"model.layers.0.self_attn.o_proj.bias": torch.zeros(64), "model.layers.2.mlp.up_proj.bias": torch.zeros(160)}
    assert problems(write(tmp_path, TENSORS | extra)) == [
        "unexpected tensor 'model.layers.0.self_attn.o_proj.bias' of shape [64]",
        "unexpected tensor 'model.layers.2.mlp.up_proj.bias' of shape [160]",
    ]


@pytest.mark.parametrize(
    ("name", "shape"),
    [
        ("model.layers.0.self_attn.q_proj.weight", [64, 64]),
        ("model.layers.0.self_attn.k_proj.weight", [32, 64]),
        ("model.layers.1.self_attn.v_proj.bias", [32]),
        ("model.layers.2.mlp.down_proj.weight", [64, 160]),
        ("model.embed_tokens.weight", [384, 64]),
        ("lm_head.weight", [384, 64]),
    ],
)
def test_misshapen_tensors_are_named(tmp_path, name, shape):
    wide = torch.cat([TENSORS[name], TENSORS[name]])
    found = problems(write(tmp_path, TENSORS | {name: wide}))
    assert found == [f"tensor {name} must have shape {shape} by the config, got {list(wide.shape)}"]


def test_a_wrong_count_of_kv_heads_shows_in_the_shapes(tmp_path):
    found = problems(write(tmp_path, num_key_value_heads=4))
    assert len([p for p in found if "must have shape" in p]) == 4 * 3  # weight and bias of k and v in each layer


def test_rotary_buffers_are_ignored(tmp_path):
    buffers = {f"model.layers.{i}.self_attn.rotary_emb.inv_freq": torch.ones(8) for i in range(3)}
    assert_equal(load(write(tmp_path, TENSORS | buffers | {"model.rotary_emb.inv_freq": torch.ones(8)})), load(GOLDEN))


def test_bf16(tmp_path):
    half = {name: tensor.bfloat16() for name, tensor in TENSORS.items()}
    model = build_from(write(tmp_path, half))
    assert inspect(tmp_path).stored_dtype == "bfloat16" and model.dtype == torch.bfloat16
    ids = torch.arange(48).view(2, -1)
    exact = plain_forward(load(tmp_path), model.config, ids)
    theirs = (plain_forward(load(tmp_path), model.config, ids, torch.bfloat16) - exact).norm()
    assert 0 < (model.logits(ids) - exact).norm() <= theirs  # plain PyTorch in bf16 rounds more often


# --- layers -----------------------------------------------------------------------------------------------------


def plain_forward(
    weights: dict[str, torch.Tensor], c: ModelConfig, ids: torch.Tensor, dtype: torch.dtype = torch.float64
) -> torch.Tensor:
    """Logits [B, L, V] by the definition, every step in `dtype`: weights by canonical name, K/V heads repeated, no mask."""
    w = {name: tensor.to(dtype) for name, tensor in weights.items()}

    def norm(x, weight):
        return x * (x.pow(2).mean(-1, keepdim=True) + c.norm_eps).rsqrt() * weight

    half = c.head_dim // 2
    inv_freq = 1.0 / (c.rope_theta ** (torch.arange(0, c.head_dim, 2, dtype=torch.float64) / c.head_dim))
    angles = torch.arange(ids.shape[1], dtype=torch.float64)[:, None] * inv_freq
    cos, sin = angles.cos().to(dtype), angles.sin().to(dtype)

    def rotate(x):  # [B, heads, L, head_dim]: dims i and i + half turn together
        a, b = x[..., :half], x[..., half:]
        return torch.cat([a * cos - b * sin, b * cos + a * sin], -1)

    def project(x, layer, name, heads):
        y = x @ w[f"layers.{layer}.{name}"].T + w[f"layers.{layer}.{name}_bias"]
        return y.view(*ids.shape, heads, c.head_dim).transpose(1, 2)

    x = w["embed"][ids]
    for i in range(c.n_layers):
        y = norm(x, w[f"layers.{i}.attn_norm"])
        q, k = rotate(project(y, i, "q", c.n_heads)), rotate(project(y, i, "k", c.n_kv_heads))
        group = c.n_heads // c.n_kv_heads
        k, v = (t.repeat_interleave(group, 1) for t in (k, project(y, i, "v", c.n_kv_heads)))
        seen = ((q @ k.transpose(-1, -2)) / c.head_dim**0.5).softmax(-1) @ v
        x = x + seen.transpose(1, 2).flatten(2) @ w[f"layers.{i}.o"].T
        y = norm(x, w[f"layers.{i}.mlp_norm"])
        x = x + (torch.nn.functional.silu(y @ w[f"layers.{i}.gate"].T) * (y @ w[f"layers.{i}.up"].T)) @ w[f"layers.{i}.down"].T
    return norm(x, w["final_norm"]) @ w["head"].T


@pytest.mark.parametrize(
    "changes",
    [
        {"num_key_value_heads": 1},
        {"num_key_value_heads": 4},
        {"head_dim": 24},  # q is 96 wide, the model 64
        {"head_dim": 8, "num_attention_heads": 6, "num_key_value_heads": 3},
        {"rope_theta": 100.0, "rms_norm_eps": 0.1},
    ],
    ids=str,
)
def test_layers_are_the_definition_s(tmp_path, changes):
    config = read(changes)
    generator = torch.Generator().manual_seed(0)
    tensors = {s.name: torch.randn(s.shape, generator=generator) * 0.2 for s in dream.weight_map(config).values()}
    model = build_from(write(tmp_path, tensors, **changes))
    ids = torch.randint(0, 384, (2, 13), generator=generator)
    expected = plain_forward(load(tmp_path), config, ids)
    assert (model.logits(ids) - expected).abs().max() <= 1e-5 * expected.abs().max()


def test_random_model_of_this_layout():
    changes = {"family": "dream", "n_kv_heads": 2, "qkv_bias": True, "shifted": True}
    model, again = random_models.make(**changes), random_models.make(**changes)
    ids = torch.arange(12).view(1, -1)
    logits = model.logits(ids)
    assert torch.equal(logits, again.logits(ids)) and model.config.shifted
    for layer in again.backbone.layers:
        layer.qkv._bias.zero_()
    assert not torch.allclose(logits, again.logits(ids))  # it has biases, and they count
    assert random_models.make(tied_head=True, **changes).logits(ids).shape == (1, 12, 61)


# --- chat -------------------------------------------------------------------------------------------------------

SPECIAL = ("<|im_start|>", "<|im_end|>", "<|endoftext|>", "<|mask|>")
USER = [{"role": "user", "content": "Hi"}]
SYSTEM_TURN = "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n"


def chat_tokenizer(folder: Path, special: tuple[str, ...] = SPECIAL) -> Tokenizer:
    """The tokenizer of a golden checkpoint whose special tokens end at the mask's id, 382."""
    vocab = {token: i for i, token in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    vocab |= {token: 383 - len(special) + i for i, token in enumerate(special)}
    rust = RustTokenizer(rust_models.BPE(vocab, []))
    rust.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    rust.add_special_tokens(list(special))
    write(folder)
    (folder / "tokenizer.json").write_text(rust.to_str())
    return Tokenizer.load(folder, inspect(folder).config)


def test_default_template(tmp_path):
    tokenizer = chat_tokenizer(tmp_path)
    turn = "<|im_start|>user\nHi<|im_end|>\n"
    assert tokenizer.chat(USER) == SYSTEM_TURN + turn + "<|im_start|>assistant\n"
    assert tokenizer.chat(USER, add_generation_prompt=False) == SYSTEM_TURN + turn
    assert tokenizer.chat([]) == SYSTEM_TURN + "<|im_start|>assistant\n"
    talk = [{"role": "system", "content": "Rhyme."}, *USER, {"role": "assistant", "content": " Yo "}, *USER]
    assert tokenizer.chat(talk) == (
        f"<|im_start|>system\nRhyme.<|im_end|>\n{turn}<|im_start|>assistant\n Yo <|im_end|>\n{turn}<|im_start|>assistant\n"
    )
    assert tokenizer.encode(tokenizer.chat(USER), add_special=False).count(tokenizer.token_to_id("<|im_start|>")) == 3
    assert "bos_token" not in tokenizer.special  # nothing comes before the first turn


def test_a_template_of_the_checkpoint_comes_first(tmp_path):
    chat_tokenizer(tmp_path)
    (tmp_path / "chat_template.jinja").write_text("{{ messages[0]['content'] }}!")
    assert Tokenizer.load(tmp_path, inspect(tmp_path).config).chat(USER) == "Hi!"


@pytest.mark.parametrize("lacks", ["<|im_start|>", "<|im_end|>"])
def test_a_tokenizer_without_the_turn_tokens_has_no_default_template(tmp_path, lacks):
    tokenizer = chat_tokenizer(tmp_path, tuple(token for token in SPECIAL if token != lacks))
    assert tokenizer.available and tokenizer.chat_template is None
