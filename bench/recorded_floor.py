"""The products of a run, recorded from the run itself and repeated alone: the floor for any layout, experts included.

`gemm_floor.py` counts the products of a dense model from the shapes of its forwards. Which experts get how many rows only a run shows, so
here one run is watched: every Linear that it calls, in order, with its number of rows. The same calls with inputs made beforehand, one for
each shape, are the floor. Biases are left out and inputs are in the product's own format: neither is part of a product.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch

from unmask.models.model import Model
from unmask.ops.linear import Linear


class Recorded:
    """The products of one run. calls: in order, each with its input; expert_calls: how many of them belong to routed experts."""

    def __init__(self, model: Model, run: Callable[[], object], complete: bool = True):
        """run: decodes with `model`, the same way every time. complete: every dense product and the head's are part of it."""
        seen = _watched(model, run)
        if complete:
            _check_complete(model, {linear for linear, _ in seen})
        bare: dict[Linear, Callable] = {}
        inputs: dict[tuple, torch.Tensor] = {}
        self.calls = []
        for linear, rows in seen:
            if linear not in bare:
                bare[linear] = _without_bias(linear).forward
            shape = rows, linear.in_features, linear.dtype, linear.format
            if shape not in inputs:
                inputs[shape] = linear.prepared(torch.randn(rows, linear.in_features, dtype=linear.dtype))
            self.calls.append((bare[linear], inputs[shape]))
        dense = _dense(model)
        self.expert_calls = sum(linear not in dense for linear, _ in seen)

    @torch.inference_mode()
    def run(self) -> None:
        for product, x in self.calls:
            product(x)


def _watched(model: Model, run: Callable[[], object]) -> list[tuple[Linear, int]]:
    seen: list[tuple[Linear, int]] = []
    forward = Linear.forward

    def watched(self, x):
        seen.append((self, x.shape[0]))
        return forward(self, x)

    with one_by_one(model):
        Linear.forward = watched
        try:
            run()
        finally:
            Linear.forward = forward
    return seen


@contextmanager
def one_by_one(model: Model) -> Iterator[None]:
    """Ops that hold a whole layer or the whole head (`packed` of that part) are off: their products do not go through a Linear."""
    fused = [(part, part.packed) for part in (*model.backbone.modules(), model.head) if getattr(part, "packed", None) is not None]
    for part, _ in fused:
        part.packed = None
    try:
        yield
    finally:
        for part, packed in fused:
            part.packed = packed


def _dense(model: Model) -> dict[Linear, str]:
    """Every Linear that all tokens go through, and its name; experts keep theirs out of the module tree."""
    found = {part: name for name, part in model.backbone.named_modules() if isinstance(part, Linear)}
    return found | {tile: f"head.tiles.{i}" for i, tile in enumerate(model.head.tiles)}


def _check_complete(model: Model, called: set[Linear]) -> None:
    """A product that the run makes by another way than its Linear would be missing from the floor, and the ratio too high."""
    missing = [name for linear, name in _dense(model).items() if linear not in called]
    if missing:
        raise RuntimeError(f"the run made these products without their Linear, so they cannot be recorded: {', '.join(missing)}")


def _without_bias(linear: Linear) -> Linear:
    bare = copy.copy(linear)  # shares the packed weight
    bare._bias = None
    return bare
