"""Loading weights: right names and values, every way a folder can be wrong, and nothing from it that runs."""

from __future__ import annotations

import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file

from models_kit import (
    GOLDEN,
    assert_equal,
    environment,
    golden_config,
    golden_tensors,
    load,
    problems,
    write_checkpoint,
    write_config,
    write_shards,
)
from unmask.errors import SettingError
from unmask.models import inspect, load_tensors
from unmask.models.config import ModelConfig

ROOT = "model.transformer."


# --- right ------------------------------------------------------------------------------------------------------


def plain_forward(config: ModelConfig, w: dict[str, torch.Tensor], ids: torch.Tensor) -> torch.Tensor:
    """Logits by the words of the canonical names, in plain PyTorch: shows that each tensor is what its name says."""

    def norm(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        return weight * x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + config.norm_eps)

    def heads(x: torch.Tensor) -> torch.Tensor:
        return x.unflatten(-1, (-1, config.head_dim)).transpose(1, 2)

    half = config.rotary_dim // 2
    angle = torch.arange(ids.shape[1])[:, None] * config.rope_theta ** (-torch.arange(half) / half)

    def rotate(x: torch.Tensor) -> torch.Tensor:
        a, b = x[..., :half], x[..., half:]
        return torch.cat((a * angle.cos() - b * angle.sin(), b * angle.cos() + a * angle.sin()), -1)

    x = w["embed"][ids]
    for i in range(config.n_layers):
        layer = {name.rsplit(".", 1)[1]: t for name, t in w.items() if name.startswith(f"layers.{i}.")}
        y = norm(x, layer["attn_norm"])
        q, k, v = (heads(y @ layer[name].T) for name in "qkv")
        y = F.scaled_dot_product_attention(rotate(q), rotate(k), v)
        x = x + y.transpose(1, 2).flatten(2) @ layer["o"].T
        y = norm(x, layer["mlp_norm"])
        x = x + (F.silu(y @ layer["gate"].T) * (y @ layer["up"].T)) @ layer["down"].T
    return norm(x, w["final_norm"]) @ w["head"].T


def test_golden_checkpoint_gives_the_golden_logits():
    info = inspect(GOLDEN)
    weights = dict(load_tensors(info))
    data = load_file(GOLDEN.parent / "forward.safetensors")
    for name in ("full", "half_masked", "batch2", "all_masked", "single_token"):
        logits = plain_forward(info.config, weights, data[f"{name}.input_ids"].long())
        assert (logits - data[f"{name}.logits"]).abs().max() <= 3e-4, name


def test_info_of_the_golden_checkpoint():
    info = inspect(GOLDEN)
    assert info.stored_dtype == "float32" and info.n_parameters == info.config.n_parameters == 190_912
    assert info.n_bytes == 4 * info.n_parameters and [f.name for f in info.files] == ["model.safetensors"]
    assert list(info.tensors)[:3] == ["embed", "layers.0.attn_norm", "layers.0.q"]
    assert list(info.tensors)[-2:] == ["final_norm", "head"]
    assert info.tensors["layers.1.gate"].shape == (160, 64)


def test_tensors_are_owned_by_the_caller(tmp_path):
    write_checkpoint(tmp_path)
    weights = load(tmp_path)
    before = {name: tensor.clone() for name, tensor in weights.items()}
    (tmp_path / "model.safetensors").write_bytes(b"\0" * (tmp_path / "model.safetensors").stat().st_size)
    assert_equal(weights, before)
    assert all(t.is_contiguous() and t.storage_offset() == 0 for t in weights.values())


@pytest.mark.parametrize("count", [1, 2, 3, 30])
def test_shards_equal_the_single_file(tmp_path, count):
    write_shards(tmp_path, count)
    assert_equal(load(tmp_path), load(GOLDEN))
    assert len(inspect(tmp_path).files) == count


def test_names_without_the_leading_model(tmp_path):
    write_checkpoint(tmp_path, {name.removeprefix("model."): t for name, t in golden_tensors().items()})
    assert_equal(load(tmp_path), load(GOLDEN))


def test_mixed_prefixes_are_missing_and_unexpected_tensors(tmp_path):
    tensors = golden_tensors()
    tensors["transformer.wte.weight"] = tensors.pop(ROOT + "wte.weight")
    write_checkpoint(tmp_path, tensors)
    found = problems(tmp_path)
    assert "missing tensor model.transformer.wte.weight of shape [384, 64]" in found
    assert "unexpected tensor 'transformer.wte.weight' of shape [384, 64]" in found


def test_tied_head(tmp_path):
    tensors = golden_tensors()
    head = tensors.pop(ROOT + "ff_out.weight")
    weights = load(write_checkpoint(tmp_path, tensors, weight_tying=True))
    assert "head" not in weights and "embed" in weights
    write_checkpoint(tmp_path, tensors | {ROOT + "ff_out.weight": head}, weight_tying=True)
    assert problems(tmp_path) == [
        "unexpected tensor 'model.transformer.ff_out.weight' of shape [384, 64] (the config ties the head to the embedding)"
    ]


def test_qkv_bias_and_grouped_heads(tmp_path):
    tensors = golden_tensors()
    for i in range(3):
        for name, rows in (("q", 64), ("k", 32), ("v", 32)):
            key = f"{ROOT}blocks.{i}.{name}_proj."
            tensors[key + "weight"] = tensors[key + "weight"][:rows].clone()
            tensors[key + "bias"] = torch.arange(float(rows))
    write_checkpoint(tmp_path, tensors, include_qkv_bias=True, n_kv_heads=2)
    weights = load(tmp_path)
    assert torch.equal(weights["layers.2.k_bias"], torch.arange(32.0)) and weights["layers.0.v"].shape == (
        32,
        64,
    )
    assert inspect(tmp_path).n_parameters == inspect(tmp_path).config.n_parameters


def test_rotary_buffers_are_ignored(tmp_path):
    write_checkpoint(tmp_path, golden_tensors() | {ROOT + "blocks.0.rotary_emb.inv_freq": torch.ones(8)})
    assert_equal(load(tmp_path), load(GOLDEN))


def test_another_file_name(tmp_path):
    write_config(tmp_path, golden_config())
    save_file(golden_tensors(), tmp_path / "weights.safetensors")
    assert_equal(load(tmp_path), load(GOLDEN))


# --- types ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("asked", [torch.bfloat16, "bfloat16", "bf16", "torch.bfloat16"])
def test_conversion(asked):
    expected = {name: tensor.bfloat16() for name, tensor in load(GOLDEN).items()}
    assert_equal(load(GOLDEN, dtype=asked), expected)


@pytest.mark.parametrize("stored", [torch.float32, torch.bfloat16])
def test_default_is_the_stored_type(tmp_path, stored):
    write_checkpoint(tmp_path, {name: t.to(stored) for name, t in golden_tensors().items()})
    assert {t.dtype for t in load(tmp_path).values()} == {stored}
    widened = load(tmp_path, dtype=torch.float32)
    assert torch.equal(widened["embed"], golden_tensors()[ROOT + "wte.weight"].to(stored).float())


def test_mixed_types_take_the_one_with_most_bytes(tmp_path):
    tensors = {n: t if t.dim() == 1 else t.bfloat16() for n, t in golden_tensors().items()}  # fp32 norms
    info = inspect(write_checkpoint(tmp_path, tensors))
    assert info.stored_dtype == "bfloat16"
    assert {t.dtype for _, t in load_tensors(info)} == {torch.bfloat16}


def test_float16_on_the_cpu_names_bfloat16(tmp_path):
    with pytest.raises(SettingError, match="asked for in float16.*use dtype=torch.bfloat16"):
        load_tensors(inspect(GOLDEN), dtype=torch.float16)
    write_checkpoint(tmp_path, {name: t.half() for name, t in golden_tensors().items()})
    with pytest.raises(SettingError, match="stored in float16.*use dtype=torch.bfloat16"):
        load_tensors(inspect(tmp_path))
    assert load(tmp_path, dtype=torch.bfloat16)["embed"].dtype == torch.bfloat16
    assert {t.dtype for _, t in load_tensors(inspect(tmp_path), device="meta")} == {torch.float16}


def test_unknown_types():
    with pytest.raises(SettingError, match="unknown dtype 'bfloat61'; did you mean 'bfloat16'"):
        load_tensors(inspect(GOLDEN), dtype="bfloat61")
    with pytest.raises(SettingError, match="unknown dtype torch.int8"):
        load_tensors(inspect(GOLDEN), dtype=torch.int8)


@pytest.mark.parametrize("dtype", [torch.float64, torch.int8, torch.float8_e4m3fn, torch.bool])
def test_stored_types_beyond_the_three_are_refused(tmp_path, dtype):
    tensors = golden_tensors()
    tensors[ROOT + "ln_f.weight"] = tensors[ROOT + "ln_f.weight"].to(dtype)
    write_checkpoint(tmp_path, tensors)
    (problem,) = problems(tmp_path)
    assert problem.startswith(
        "tensor model.transformer.ln_f.weight must be stored as one of F32, BF16, F16, got "
    )


# --- tensors that do not fit ------------------------------------------------------------------------------------


def test_all_mismatches_are_listed(tmp_path):
    tensors = golden_tensors()
    del tensors[ROOT + "blocks.1.q_proj.weight"]
    del tensors[ROOT + "ln_f.weight"]
    tensors[ROOT + "wte.weight"] = torch.zeros(384, 32)
    tensors[ROOT + "blocks.2.ff_out.weight"] = torch.zeros(160, 64)
    tensors[ROOT + "blocks.0.attn_norm.weight"] = torch.ones(64, dtype=torch.float64)
    tensors["lm_head.weight"] = torch.zeros(2, 2)
    write_checkpoint(tmp_path, tensors)
    assert sorted(problems(tmp_path)) == sorted(
        [
            "missing tensor model.transformer.blocks.1.q_proj.weight of shape [64, 64]",
            "missing tensor model.transformer.ln_f.weight of shape [64]",
            "tensor model.transformer.wte.weight must have shape [384, 64] by the config, got [384, 32]",
            "tensor model.transformer.blocks.2.ff_out.weight must have shape [64, 160] by the config, got [160, 64]",
            "tensor model.transformer.blocks.0.attn_norm.weight must be stored as one of F32, BF16, F16, got F64",
            "unexpected tensor 'lm_head.weight' of shape [2, 2]",
            "the config describes 190,912 parameters, the files hold 174,468",
        ]
    )


def test_problems_of_config_and_files_come_together(tmp_path):
    write_shards(tmp_path, 3)
    write_config(tmp_path, golden_config(alibi=True, n_layers=0))
    (tmp_path / "model-00002-of-00003.safetensors").unlink()
    found = problems(tmp_path)
    assert any("alibi" in p for p in found) and any("n_layers" in p for p in found)
    assert "shard 'model-00002-of-00003.safetensors' is missing" in found


def test_a_config_of_another_model(tmp_path):
    found = problems(write_checkpoint(tmp_path, n_layers=4, d_model=128, mlp_hidden_size=320))
    assert len(found) > 30 and found[0].startswith("the config describes")
    assert "missing tensor model.transformer.blocks.3.up_proj.weight of shape [320, 128]" in found
    fewer = problems(write_checkpoint(tmp_path, n_layers=2))
    assert len(fewer) == 9 and all(
        p.startswith("unexpected tensor 'model.transformer.blocks.2.") for p in fewer
    )


# --- memory -----------------------------------------------------------------------------------------------------


def write_big(folder: Path, megabytes: int) -> None:
    """About `megabytes` of bf16, most of it in two large tensors (embedding and head)."""
    rows = megabytes * (1 << 20) // 2 // 2 // 1024 * 9 // 10
    changes = {"d_model": 1024, "n_heads": 8, "n_kv_heads": 8, "n_layers": 2, "mlp_hidden_size": 1024}
    config = golden_config(**changes, vocab_size=rows, embedding_size=rows)
    write_config(folder, config)
    from unmask.models import llada

    specs = llada.weight_map(llada.read_config(config, {}))
    pattern = torch.randn(1 << 16).bfloat16()
    tensors = {}
    for spec in specs.values():
        n = int(torch.tensor(spec.shape).prod())
        tensors[spec.name] = pattern.repeat(n // len(pattern) + 1)[:n].view(spec.shape)
    save_file(tensors, folder / "model.safetensors")


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_loading_needs_the_weights_and_little_more(tmp_path, dtype):
    write_big(tmp_path, 240)
    script = textwrap.dedent(f"""
        import torch, unmask.models as m
        def peak():  # MB; not ru_maxrss, which a child process inherits from its parent
            return next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith("VmHWM")) / 1024
        info = m.inspect({str(tmp_path)!r})
        weights = [torch.ones(1 << 20).bfloat16()]  # warm up
        before = peak()
        weights = dict(m.load_tensors(info, {dtype!r}))
        size = sum(t.nbytes for t in weights.values()) / 2**20
        print(size, peak() - before)
    """)
    done = subprocess.run([sys.executable, "-c", script], env=environment(), capture_output=True, text=True)
    size, grown = map(float, done.stdout.split())
    assert size > 200 and grown < size + 100, (size, grown, done.stderr)


def test_pieces_of_large_tensors_join_exactly(tmp_path, monkeypatch):
    from unmask.models import checkpoint

    monkeypatch.setattr(checkpoint, "_CHUNK_BYTES", 1000)  # many pieces, the last one shorter
    assert_equal(load(GOLDEN), {n: t for n, t in zip(inspect(GOLDEN).tensors, read_directly(), strict=True)})
    assert load(GOLDEN, dtype="bf16")["head"].dtype == torch.bfloat16


def read_directly() -> list[torch.Tensor]:
    tensors = golden_tensors()
    return [tensors[t.name] for t in inspect(GOLDEN).tensors.values()]
