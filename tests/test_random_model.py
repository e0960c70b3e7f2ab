"""`random_model`: deterministic, in every layout, and without a second copy of a weight; the bench of LLaDA-8B's shape that rests on it."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from models_kit import environment
from random_models import make
from unmask.models import model as model_file
from unmask.models.config import Experts
from unmask.ops.head_stats import TILE, Head, head_stats
from unmask.ops.linear import FORMATS

BENCH = Path(__file__).resolve().parent.parent / "bench"
MIXTURE = Experts((1,), 4, 2, 16, 16, "sigmoid", True, 1, 1, True, 1.0)
LAYOUTS = {"plain": {}, "tied": {"tied_head": True}, "biases, norms": {"qkv_bias": True, "qk_norm": True}, "experts": {"experts": MIXTURE}}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_deterministic_in_the_seed(layout, dtype):
    ids = torch.arange(24).view(2, 12)
    first, again, other = (make(seed, dtype, **LAYOUTS[layout]).logits(ids) for seed in (5, 5, 6))
    assert torch.equal(first, again) and not torch.equal(first, other)
    assert first.isfinite().all()


class Made(TorchDispatchMode):
    """Bytes of every ordinary tensor that an op newly made, and how many of them had each shape."""

    def __init__(self):
        super().__init__()
        self.bytes: list[int] = []
        self.shapes: list[tuple[int, ...]] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        if isinstance(out, torch.Tensor) and out.layout is torch.strided:
            given = {a.untyped_storage().data_ptr() for a in args if isinstance(a, torch.Tensor) and a.layout is torch.strided}
            if out.untyped_storage().data_ptr() not in given:
                self.bytes.append(out.untyped_storage().nbytes())
                self.shapes.append(tuple(out.shape))
        return out


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_no_weight_is_there_twice(dtype, monkeypatch):
    """Nothing larger than the embedding or a product is ever made, no draw in fp32 is as large as a weight, and no whole head exists."""
    monkeypatch.setattr(model_file, "_DRAWN_AT_ONCE", 4096)
    make(dtype=dtype, n_layers=1)  # what is probed once is not counted
    vocab, d, ffn = 3 * TILE + 100, 64, 256
    with Made() as made:
        make(dtype=dtype, vocab_size=vocab, d_model=d, ffn_dim=ffn, mask_id=0, eos_ids=(1,), pad_id=1)
    assert made.shapes.count((vocab, d)) == 1  # the embedding; the head comes in tiles
    assert made.shapes.count((TILE, d)) == 3 and made.shapes.count((100, d)) == 1
    assert max(made.bytes) == vocab * d * dtype.itemsize
    assert max(n for n, shape in zip(made.bytes, made.shapes, strict=True) if len(shape) == 1) <= 4096 * 4


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("vocab", [100, TILE, 2 * TILE + 33])
def test_head_of_tiles_is_the_head(format, vocab):
    weight, hidden = torch.randn(vocab, 32).bfloat16(), torch.randn(5, 32).bfloat16()
    whole, tiles = Head(weight, format), Head.of_tiles(weight.split(TILE), format)
    assert (tiles.vocab_size, tiles.width, tiles.dtype, tiles.device) == (whole.vocab_size, whole.width, whole.dtype, whole.device)
    assert torch.equal(tiles.logits(hidden), whole.logits(hidden))
    a, b = head_stats(hidden, tiles), head_stats(hidden, whole)
    assert torch.equal(a.ids, b.ids) and torch.equal(a.values, b.values)


def test_head_of_tiles_refuses_others():
    for parts in ([torch.zeros(TILE + 1, 8)], [torch.zeros(100, 8), torch.zeros(TILE, 8)], [torch.zeros(100, 8, device="meta")], []):
        with pytest.raises(ValueError, match="Head: "):
            Head.of_tiles(parts, "plain")


def test_bench_of_the_8b_shape_runs_scaled_down():
    words = ["--layers", "1", "--width", "256", "--ffn", "512", "--vocab", "20000", "--rounds", "1", "--no-report"]
    done = subprocess.run([sys.executable, str(BENCH / "bench_8b_cpu.py"), *words], capture_output=True, text=True, env=environment())
    assert done.returncode == 0, done.stderr
    cells = dict(line.strip("| ").split("|") for line in done.stdout.splitlines() if line.count("|") == 3)
    found = {name.strip(): value.strip() for name, value in cells.items()}
    d, ffn, vocab = 256, 512, 20000
    assert int(found["parameters"]) == 2 * vocab * d + 4 * d * d + 3 * d * ffn + 3 * d
    assert float(found["peak MB"]) >= float(found["weights MB"]) > 0 and float(found["first step / GEMMs"]) > 0
    assert float(found["block step / GEMMs"]) > 0
    for words, text in ((["--width", "100"], "--width"), (["--steps", "3"], "--steps")):
        wrong = subprocess.run([sys.executable, str(BENCH / "bench_8b_cpu.py"), *words], capture_output=True, text=True, env=environment())
        assert wrong.returncode == 2 and text in wrong.stderr


@pytest.mark.parametrize(("words", "exit_code"), [([], 0), (["--layers", "32"], 1)])
def test_bench_does_not_run_where_it_does_not_fit(words, exit_code):
    """Without --layers that is no failure: bench/run_all.sh goes on."""
    code = (
        "import sys, json; sys.path.insert(0, sys.argv[1]); import bench_8b_cpu as bench\n"
        "bench.available_memory = lambda: 1 << 30; sys.argv = ['bench_8b_cpu.py', '--no-report', *sys.argv[2:]]\n"
        "bench.main()"
    )
    done = subprocess.run([sys.executable, "-c", code, str(BENCH), *words], capture_output=True, text=True, env=environment())
    assert done.returncode == exit_code and done.stdout == "" and "not run: 32 layers need" in done.stderr and "use fewer: --layers" in done.stderr and "Traceback" not in done.stderr


def test_config_of_the_8b_shape():
    code = "import sys; sys.path.insert(0, sys.argv[1]); import bench_8b_cpu as b, json; print(json.dumps(b.llada_8b().validate().n_parameters))"
    done = subprocess.run([sys.executable, "-c", code, str(BENCH)], capture_output=True, text=True, env=environment())
    assert json.loads(done.stdout) == 8_015_581_184, done.stderr
