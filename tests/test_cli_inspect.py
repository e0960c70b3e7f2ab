"""`unmask inspect` and `unmask.models.describe`: the facts are those of the loaded model, problems are all there, no weight is read."""

from __future__ import annotations

import dataclasses
import json
import math
import os
import subprocess
import sys
import time

import pytest
import torch

import unmask
from models_kit import (
    GOLDEN,
    environment,
    golden_config,
    golden_tensors,
    write_cache,
    write_checkpoint,
    write_config,
    write_raw,
)
from test_cli import _one_thread, cli  # noqa: F401  (fixtures)
from unmask.cli import inspect as command
from unmask.models import describe, facts, inspect, llada, load_tensors
from unmask.ops import linear

CHECKPOINTS = {"llada": {}, "dream": {}, "sdar": {"mask_id": 383}, "llada2": {"mask_id": 383}, "fast_dllm_v2": {"mask_id": 383}}


def info_of(family: str):
    return inspect(GOLDEN.parent.parent / family / "checkpoint", overrides=CHECKPOINTS[family])


def overrides(family: str) -> list[str]:
    return [word for name, value in CHECKPOINTS[family].items() for word in ("--override", f"{name}={value}")]


def report(cli, *words: str) -> dict:  # noqa: F811
    code, out, err = cli("inspect", *words, "--json")
    assert code == 0 and err == "", err
    return json.loads(out)


# ---- the facts


@pytest.mark.parametrize("family", CHECKPOINTS)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_bytes_are_those_of_the_tensors(family, dtype):
    info = info_of(family)
    held = sum(t.numel() * t.element_size() for _, t in load_tensors(info, dtype))
    found = describe(info)
    assert found["weight_bytes"][dtype] == held
    assert found["parameters"]["total"] == sum(t.numel() for _, t in load_tensors(info)) == info.config.n_parameters
    json.dumps(found)


@pytest.mark.parametrize("family", CHECKPOINTS)
def test_kv_bytes_are_those_of_the_cache(family):
    info = info_of(family)
    model = unmask.load(info.folder, overrides=CHECKPOINTS[family], dtype="bfloat16")
    cache = model.new_cache(1, 16)
    assert describe(info)["kv_bytes_per_token"]["bfloat16"] * 16 == cache.k.nbytes + cache.v.nbytes


def test_active_parameters_leave_out_the_other_experts():
    info = info_of("llada2")
    found, e = describe(info)["parameters"], info.config.experts
    idle = len(e.layers) * (e.n_experts - e.top_k) * 3 * info.config.d_model * e.expert_dim
    assert idle > 0 and found["active"] == found["total"] - idle
    dense = describe(info_of("llada"))["parameters"]
    assert dense["active"] == dense["total"]


@pytest.mark.parametrize("format", linear.FORMATS)
def test_loaded_bytes_follow_the_format(tmp_path, format, monkeypatch):
    """Against the bytes of every tensor of the loaded model, packed ones by their sizes; a tied head is packed beside the embedding."""
    tensors = {n: t for n, t in golden_tensors().items() if n != "model.transformer.ff_out.weight"}
    folder = write_checkpoint(tmp_path / "tied", tensors, weight_tying=True)
    monkeypatch.setenv("UNMASK_GEMM", format)
    model = unmask.load(folder, dtype="bfloat16")
    assert model.format == format and model.config.tied_head
    held = model.backbone.embed.nbytes + model.backbone.final_norm.nbytes
    item = 4 if format == "packed_fp32" else 2
    for layer in model.backbone.layers:
        held += layer.attn_norm.nbytes + layer.mlp_norm.nbytes
        held += sum(item * p.in_features * p.out_features for p in (layer.qkv, layer.o, layer.mlp.gate_up, layer.mlp.down))
    own = {t._weight.untyped_storage().data_ptr() for t in model.head.tiles if format == "plain"} - {model.backbone.embed.untyped_storage().data_ptr()}
    if format != "plain" or own:
        held += sum(item * t.in_features * t.out_features for t in model.head.tiles)
    assert facts.loaded_bytes(inspect(folder), "bfloat16", format) == held


def test_longest_sequence_and_verdict():
    mb = 1 << 20
    assert facts.longest(300 * mb, 100 * mb, mb, 4096) == 0  # loading may take 310 MB
    assert facts.longest(311 * mb, 100 * mb, mb, 4096) == 211
    assert facts.longest(311 * mb, 100 * mb, mb, 200) == 200
    assert command.verdict("bfloat16", 100 * mb, 300 * mb, 0, mb, 4096).startswith("does not fit here: bfloat16 needs 310 MB")
    assert "up to 211 of 4,096 tokens" in command.verdict("bfloat16", 100 * mb, 311 * mb, 211, mb, 4096)
    assert command.verdict("bfloat16", 100 * mb, 311 * mb, 200, mb, 200).startswith("fits here in bfloat16: 100 MB and 200 MB for 200 tokens")
    assert "does not say" in command.verdict("bfloat16", 100 * mb, 0, 0, mb, 200)


@pytest.mark.parametrize(
    ("n", "text"), [(0, "0 bytes"), (999, "999 bytes"), (1023, "0.999 KB"), (1 << 20, "1 MB"), (1536 << 20, "1.5 GB"), (15 << 40, "15 TB")]
)
def test_size(n, text):
    assert command.size(n) == text


# ---- the command


@pytest.mark.parametrize("family", CHECKPOINTS)
def test_json_says_what_would_run(cli, family):  # noqa: F811
    folder = str(GOLDEN.parent.parent / family / "checkpoint")
    found = report(cli, folder, *overrides(family))
    model = unmask.load(folder, overrides=CHECKPOINTS[family])
    c = model.config
    assert found["family"] == family and found["folder"] == folder and found["stored_dtype"] == "float32"
    assert found["cpu"]["linear_weights"] == model.format and found["cpu"]["isa"] == unmask.ops.isa() and found["cpu"]["dtype"] == "float32"
    assert found["cuda"]["archs"] == list(unmask.ops.cuda_archs())
    assert (found["cpu"]["experts"] is None) == (found["cuda"]["experts"] is None) == (c.experts is None)
    sizes = found["config"]
    names = {"layers": "n_layers", "width": "d_model", "heads": "n_heads", "kv_heads": "n_kv_heads", "ffn": "ffn_dim", "vocab": "vocab_size"}
    for ours in sizes:
        value = getattr(c, names.get(ours, ours))
        if dataclasses.is_dataclass(value):
            value = dataclasses.asdict(value) | {"layers": list(value.layers)}
        assert sizes[ours] == (list(value) if isinstance(value, tuple) else value), ours
    (default,) = [name for name, cache in found["caches"].items() if cache["default"]]
    results = {
        name: unmask.generate(model, [3, 1, 4, 1], max_new_tokens=4, cache=name) for name in found["caches"]
    }  # every cache listed is allowed, and results agree on which are exact
    assert {name: r.exact for name, r in results.items()} == {name: cache["exact"] for name, cache in found["caches"].items()}
    assert unmask.generate(model, [3, 1, 4, 1], max_new_tokens=4).settings["cache"] == default


def test_text(cli):  # noqa: F811
    code, out, err = cli("inspect", str(GOLDEN.parent.parent / "llada2" / "checkpoint"), "--override", "mask_id=383")
    assert code == 0 and err == ""
    lines = {line.split()[0]: line for line in out.splitlines()}
    config = info_of("llada2").config
    assert "2 of 8 experts of 32 and a shared one of 32 in 2" in lines["layers"] and "MLP 128 in 1" in lines["layers"]
    assert "block-causal in blocks of 32" in lines["attention"] and "8 of 16 dims" in lines["attention"]
    assert f"{config.n_parameters:,}, {config.n_active_parameters:,} of them active" in lines["parameters"]
    assert "block (exact, default)" in lines["caches"] and "experts: loop" in lines["CPU"] and "fits here in float32" in lines["verdict"]


def test_tiny_and_the_hugging_face_cache(cli, tmp_path, monkeypatch):  # noqa: F811
    assert report(cli, "tiny")["parameters"]["total"] == sum(
        math.prod(t.shape) for t in inspect(unmask.models.resolve("tiny")).tensors.values()
    )
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path))
    snapshot = write_cache(tmp_path, "org/model")
    assert report(cli, "org/model")["folder"] == str(snapshot.resolve())


def test_dtype(cli):  # noqa: F811
    found = report(cli, "tiny", "--dtype", "bfloat16")
    assert found["cpu"]["dtype"] == "bfloat16" and found["verdict"].startswith("fits here in bfloat16")
    code, out, err = cli("inspect", "tiny", "--dtype", "bfloat61")
    assert code == 2 and out == "" and "bfloat16" in err and err.count("\n") == 1


def test_float16_is_stored_but_not_served_on_the_cpu(cli, tmp_path):  # noqa: F811
    folder = str(write_checkpoint(tmp_path, {n: t.half() for n, t in golden_tensors().items()}))
    found = report(cli, folder)
    assert found["stored_dtype"] == "float16" and found["cpu"]["dtype"] == "bfloat16" and "dtype='bfloat16'" in found["verdict"]
    assert cli("inspect", folder, "--dtype", "float16")[0] == 2


def test_too_little_memory(cli, monkeypatch):  # noqa: F811
    monkeypatch.setattr(linear, "available_memory", lambda: 1 << 20)
    found = report(cli, "tiny")
    assert found["cpu"]["tokens"] == 0 and found["verdict"].startswith("does not fit here")


def test_a_broken_folder_lists_every_problem(cli, tmp_path):  # noqa: F811
    tensors = golden_tensors()
    gone = [name for name in tensors if "blocks.0" in name][:2]
    folder = str(write_checkpoint(tmp_path, {n: t for n, t in tensors.items() if n not in gone} | {"stray": torch.zeros(3)}))
    code, out, err = cli("inspect", folder)
    assert code == 2 and out == "" and err.startswith("unmask inspect: ") and "Traceback" not in err
    for name in (*gone, "stray"):
        assert name in err
    code, out, err = cli("inspect", folder, "--json")
    assert code == 2 and err == "" and len(json.loads(out)["problems"]) >= 3


def test_no_such_model(cli):  # noqa: F811
    code, out, err = cli("inspect", "tinny")
    assert code == 2 and out == "" and "did you mean 'tiny'?" in err
    code, _, err = cli("inspect", "tiny", "--override", "mask_idd=3")
    assert code == 2 and "did you mean 'mask_id'?" in err


def test_no_weight_is_read(tmp_path):
    """LLaDA-8B's shape, its 16 GB of weights a hole in a sparse file: the command answers in little time and memory."""
    sizes = dict(d_model=4096, n_layers=32, n_heads=32, n_kv_heads=32, mlp_hidden_size=12288, vocab_size=126464, embedding_size=126464)
    ids = dict(mask_token_id=126336, eos_token_id=126081, pad_token_id=126081, max_sequence_length=4096)
    write_config(tmp_path, golden_config(**sizes, **ids))
    header, at = {}, 0
    for spec in llada.weight_map(llada.read_config(golden_config(**sizes, **ids), {})).values():
        n_bytes = 2 * math.prod(spec.shape)
        header[spec.name] = {"dtype": "BF16", "shape": list(spec.shape), "data_offsets": [at, at + n_bytes]}
        at += n_bytes
    file = tmp_path / "model.safetensors"
    write_raw(file, header, b"")
    os.truncate(file, file.stat().st_size + at)
    code = (
        "import re, sys; from unmask.cli import main\n"
        "code = main(sys.argv[1:])\n"  # VmHWM, not ru_maxrss: that one remembers the parent that forked
        "print(re.search(r'VmHWM:\\s+(\\d+)', open('/proc/self/status').read())[1], file=sys.stderr); sys.exit(code)"
    )
    began = time.perf_counter()
    done = subprocess.run([sys.executable, "-c", code, "inspect", str(tmp_path), "--json"], capture_output=True, text=True, env=environment())
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found["parameters"]["total"] == 8_015_581_184 and found["stored_bytes"] == at == 2 * 8_015_581_184
    assert found["kv_bytes_per_token"]["bfloat16"] == 512 << 10
    assert int(done.stderr.split()[-1]) * 1024 < at / 16 and time.perf_counter() - began < 60


def test_help_loads_no_torch_and_a_broken_folder_neither():
    code = "import sys; from unmask.cli import main\ntry: main(sys.argv[1:])\nfinally: print('torch' in sys.modules)"
    for words in (["inspect", "--help"], ["inspect", str(GOLDEN.parent.parent / "nowhere")]):
        done = subprocess.run([sys.executable, "-c", code, *words], capture_output=True, text=True, env=environment())
        assert done.stdout.endswith("False\n") and "Traceback" not in done.stderr, done.stderr
