"""bench/bench_block_causal.py: runs, compares equal tokens, and counts the forwards that its floor repeats."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "bench"))

import bench_block_causal as bench  # noqa: E402
import report  # noqa: E402
from unmask.compat import llada2  # noqa: E402
from unmask.models.model import random_model  # noqa: E402


def test_quick_run(tmp_path, monkeypatch, threads):
    threads(1)
    monkeypatch.setattr(report, "RESULTS", tmp_path)
    monkeypatch.setattr(sys, "argv", ["bench_block_causal.py", "--quick", "--threads", "1"])
    bench.main()
    (file,) = tmp_path.glob("block_causal-quick-*.json")
    sections = json.loads(file.read_text())["sections"]
    (store,), (step,) = sections["Fused store"], sections["A block step beside its GEMMs"]
    # 16 tokens behind 64 of prompt: four blocks, of which three are stored, and the prompt
    assert store["tokens equal"] and store["unfused"] == store["forwards fused"] + 4
    assert step["forwards"] == 16 and step["step ms"] > 0 and step["GEMMs ms"] > 0


def test_a_changed_token_stops_it(monkeypatch, threads):
    threads(1)
    monkeypatch.setattr(sys, "argv", ["bench_block_causal.py", "--quick", "--threads", "1"])
    theirs = llada2.generate_cached

    def other(*args, **options):
        x, stats = theirs(*args, **options)
        x[0, -1] += 1
        return x, stats

    monkeypatch.setattr(llada2, "generate_cached", other)
    with pytest.raises(SystemExit, match="changed a token"):
        bench.main()


def test_forwards_counts_what_the_decoder_runs():
    model = random_model(bench.config(4, 64, 2, 96, 512), dtype=torch.float32, std=0.05)
    counts = bench.forwards(lambda: bench.fused(model, [[1] * 20, [2] * 20], 8, 1.0))
    # two rows together: the prompts with their first blocks (2 x 24 rows), then blocks (8 rows) and once two blocks each (16 rows)
    assert counts == {(48, 16): 1, (16, 16): 7}
