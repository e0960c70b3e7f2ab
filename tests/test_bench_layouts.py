"""bench/bench_layouts.py: runs in every layout, and its floor repeats exactly the products that a run makes."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "bench"))

import bench_layouts as bench  # noqa: E402
import report  # noqa: E402
from recorded_floor import Recorded, one_by_one  # noqa: E402
from unmask.models.config import FAMILIES  # noqa: E402
from unmask.models.model import random_model  # noqa: E402
from unmask.ops.linear import Linear  # noqa: E402


def small(name: str):
    layout = next(layout for layout in bench.LAYOUTS if layout.name == name)
    return random_model(layout.config(64, 1, 256, 16), dtype=torch.float32, std=0.05)


def test_quick_run_has_every_family(tmp_path, monkeypatch, threads):
    threads(1)
    monkeypatch.setattr(report, "RESULTS", tmp_path)
    monkeypatch.setattr(sys, "argv", ["bench_layouts.py", "--quick", "--threads", "1"])
    bench.main()
    (file,) = tmp_path.glob("layouts-quick-*.json")
    rows = json.loads(file.read_text())["sections"]["Steps"]
    assert {layout.family for layout in bench.LAYOUTS} == set(FAMILIES)
    assert [row["layout"] for row in rows] == [layout.name for layout in bench.LAYOUTS]
    for row in rows:
        assert row["forwards"] == 32 and row["ratio"] > 0  # one token a forward
        assert ("experts with rows" in row) == (row["layout"] in ("llada_moe", "llada2", "sdar_moe"))
    assert rows[0]["products a forward"] == 5  # qkv, o, gate_up, down, one tile of the head


def test_the_floor_repeats_the_calls_of_the_run(monkeypatch):
    model = small("llada2")
    ids = torch.arange(48).view(1, 48)
    floor = Recorded(model, lambda: model.logits(ids))
    seen, forward = [], Linear.forward
    monkeypatch.setattr(Linear, "forward", lambda self, x: (seen.append((self.out_features, *x.shape, x.dtype)), forward(self, x))[1])
    with one_by_one(model):
        model.logits(ids)
    assert [(product.__self__.out_features, *x.shape, x.dtype) for product, x in floor.calls] == seen
    # a dense layer and the attention of two, a router and a shared expert, one tile of the head; each routed expert twice
    assert len(floor.calls) - floor.expert_calls == 4 + 2 + 1 + 2 + 1 and floor.expert_calls % 2 == 0 < floor.expert_calls
    floor.run()


def test_the_floor_has_no_bias_and_the_model_keeps_its():
    model = small("dream")
    floor = Recorded(model, lambda: model.logits(torch.zeros(1, 16, dtype=torch.int64)))
    (qkv, x), layer = floor.calls[0], model.backbone.layers[0]
    torch.testing.assert_close(qkv(x) + layer.qkv._bias, layer.qkv(x))
    assert layer.qkv._bias.abs().max() > 0


def test_ops_over_a_whole_layer_are_off_only_while_it_records():
    model = small("sdar 4")
    parts = (model.backbone.layers[0], model.head)
    for part in parts:
        part.packed = "weights"
    seen = []

    def run():
        seen.extend(part.packed for part in parts)
        model.logits(torch.zeros(1, 16, dtype=torch.int64))

    Recorded(model, run)
    assert seen == [None, None] and [part.packed for part in parts] == ["weights", "weights"]


def test_a_product_that_goes_another_way_is_an_error():
    model = small("sdar 4")
    with pytest.raises(RuntimeError, match="without their Linear.*layers.0.qkv.*head.tiles.0"):
        Recorded(model, lambda: None)
