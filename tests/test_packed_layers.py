"""A model's forward takes the ops that hold several products where its weights are packed, and gives the tokens and bits of their parts."""

from __future__ import annotations

import sys
from collections import Counter
from pathlib import Path

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import unmask
from golden_runs import load
from unmask.ops.linear import packed_weights_available

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "bench"))

from recorded_floor import one_by_one  # noqa: E402

pytestmark = pytest.mark.skipif(not packed_weights_available(), reason="this torch has no packed weights")

FAMILIES = ("llada", "dream", "sdar", "llada2", "fast_dllm_v2")


class Count(TorchDispatchMode):
    """How often each op of ours ran."""

    def __init__(self):
        super().__init__()
        self.seen: Counter[str] = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace == "unmask":
            self.seen[func._schema.name.removeprefix("unmask::")] += 1
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("family", FAMILIES)
def test_a_step_is_a_few_ops(family):
    model = load(family)
    experts = len(model.config.experts.layers) if model.config.experts else 0
    with Count() as count:
        result = unmask.generate(model, [[5, 6, 7]], max_new_tokens=4, threshold=1.0, eos_stop=False)[0]
    assert count.seen["decoder_layer"] == model.config.n_layers * result.nfe and count.seen["moe_experts"] == experts * result.nfe
    assert count.seen["head_stats"] == result.nfe
    assert not {"block_attention", "rope_append", "silu_mul", "stats_tile"} & set(count.seen)


@pytest.mark.parametrize("family", FAMILIES)
def test_the_bits_of_the_parts(family):
    model = load(family)
    ids = torch.randint(0, 380, (2, 37), generator=torch.Generator().manual_seed(0))
    prompts = [[5, 6, 7], list(range(20))]

    def run():
        return model.logits(ids), [r.canvas for r in unmask.generate(model, prompts, max_new_tokens=40, threshold=0.6, trace=True)]

    logits, canvases = run()
    with one_by_one(model), Count() as count:
        parts = run()
    assert torch.equal(logits, parts[0]) and canvases == parts[1]
    assert count.seen["block_attention"] and not {"decoder_layer", "moe_experts", "head_stats"} & set(count.seen)


def test_other_formats_run_the_parts(monkeypatch):
    monkeypatch.setenv("UNMASK_GEMM", "plain")
    model = load("llada2")
    assert model.head.packed is None and all(layer.packed is None for layer in model.backbone.layers)
    assert all(getattr(layer.mlp, "packed", None) is None for layer in model.backbone.layers)
    with Count() as count:
        unmask.generate(model, [[5, 6]], max_new_tokens=2)
    assert count.seen["block_attention"] and "decoder_layer" not in count.seen
