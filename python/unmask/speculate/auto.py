"""How many nodes pay: running acceptance against what a forward of more rows costs.

With acceptance a a chain of N nodes makes 1 + a + ... + a^(N - 1) steps, and its forward costs what one with N times the rows does, which is
measured once per model, device and shape. N = 1, the plain run, wins where nothing pays; then a short draft is tried from time to time.
"""

from __future__ import annotations

import dataclasses
import time
import weakref
from typing import TYPE_CHECKING, Any

import torch

from ..models.backbone import Forward
from ..ops.head_stats import head_stats
from ..ops.linear import pad_rows

if TYPE_CHECKING:
    from ..decode.backend import NativeBackend
    from ..decode.state import Row
    from ..models.model import Model
    from .engine import Speculative

MULTIPLES = (1, 2, 4, 8)
_FAST = 0.05  # seconds: forwards below it are timed several times
_CURVES: weakref.WeakKeyDictionary[Any, dict[tuple, dict[int, float]]] = weakref.WeakKeyDictionary()


def expected_steps(acceptance: float, nodes: int) -> float:
    """Steps that a chain of `nodes` makes.

    >>> expected_steps(0.5, 3)
    1.75
    """
    return sum(acceptance**k for k in range(nodes))


def best_nodes(acceptance: float, cost: dict[int, float], drafting: float, most: int) -> int:
    """The N in 1..most with the most steps a second. cost: seconds of a forward by its multiple of rows, 1 among them; drafting: of one node.

    >>> best_nodes(0.9, {1: 1.0, 2: 1.1, 4: 1.3, 8: 1.8}, 0.0, 8)
    8
    >>> best_nodes(0.9, {1: 1.0, 2: 2.0, 4: 4.0, 8: 8.0}, 0.0, 8)
    1
    """
    rate = {n: expected_steps(acceptance, n) / (between(cost, n) + drafting * (n - 1)) for n in range(1, most + 1)}
    return max(rate, key=lambda n: (rate[n], -n))


def between(cost: dict[int, float], multiple: float) -> float:
    """The measured cost, straight lines between the points and through the last two behind them."""
    points = sorted(cost)
    if len(points) == 1:
        return cost[points[0]] * multiple
    high = next((i for i, x in enumerate(points) if x >= multiple and i), len(points) - 1)
    a, b = points[high - 1], points[high]
    return cost[a] + (cost[b] - cost[a]) * (multiple - a) / (b - a)


def curve(model: Model, tokens: int, keys: int, candidates: int) -> dict[int, float]:
    """Seconds of a forward with the head at 1, 2, 4 and 8 times the rows, measured once per model, device and shape.

    tokens: forwarded for one node of the batch; keys: that each sees; candidates: positions that the head reads.
    """
    shapes = _CURVES.setdefault(model, {})
    key = str(model.device), tokens, keys, candidates
    if key not in shapes:
        shapes[key] = _measured(model, tokens, keys, candidates)
    return shapes[key]


@torch.inference_mode()
def _measured(model: Model, tokens: int, keys: int, candidates: int) -> dict[int, float]:
    cache = model.new_cache(1, max(keys, tokens))
    times = {}
    for multiple in MULTIPLES:
        f = _forward(model, tokens, max(keys, tokens), multiple)
        rows = torch.arange(min(candidates, tokens), device=model.device).repeat(multiple)
        times[multiple] = min(_seconds(model, f, cache, rows) for _ in range(2))
        if times[multiple] < _FAST:
            times[multiple] = min(times[multiple], *(_seconds(model, f, cache, rows) for _ in range(3)))
    return times


def _forward(model: Model, tokens: int, keys: int, multiple: int) -> Forward:
    n, device = tokens * multiple, model.device
    total = pad_rows(n)
    row = torch.full((total,), -1, dtype=torch.int64, device=device)
    row[:n] = 0
    pos = torch.zeros(total, dtype=torch.int64, device=device)
    pos[:n] = torch.arange(tokens, device=device).repeat(multiple)
    slot = torch.full((total,), -1, dtype=torch.int64, device=device)
    slot[:tokens] = torch.arange(tokens, device=device)
    seg = torch.tensor([[[0, keys]]], device=device).expand(multiple, 1, 2).contiguous()
    ids = torch.full((total,), model.config.mask_id, dtype=torch.int64, device=device)
    return Forward(ids, row, pos, slot, torch.arange(multiple + 1, device=device) * tokens, torch.zeros(multiple, dtype=torch.int64, device=device), seg)


def _seconds(model: Model, f: Forward, cache: Any, rows: torch.Tensor) -> float:
    if model.device.type == "cuda":
        torch.cuda.synchronize(model.device)
    began = time.perf_counter()
    hidden = model.backbone(f, cache)  # not the model: its forward hooks count the decoder's calls
    head_stats(hidden, model.head, rows)
    if model.device.type == "cuda":
        torch.cuda.synchronize(model.device)
    return time.perf_counter() - began


class Chooser:
    """Chooses N before each forward of one run.

    acceptance: exponential average of whether a node counted whose parent did. drafting: the same of the seconds that one more node costs to draft.
    """

    START, WEIGHT, PROBE = 0.8, 0.05, 32

    def __init__(self, most: int):
        self.most = most
        self.acceptance, self.drafting = self.START, 0.0
        self.chosen: list[int] = []
        self._idle = 0

    def nodes(self, engine: Speculative, rows: list[Row]) -> int:
        n = best_nodes(self.acceptance, self._cost(engine, rows), self.drafting, self.most)
        self._idle = self._idle + 1 if n == 1 else 0
        if self._idle >= self.PROBE and self.most > 1:
            n = 2  # until something was drafted: a block's last step has no node behind it
        self.chosen.append(n)
        return n

    @staticmethod
    def _cost(engine: Speculative, rows: list[Row]) -> dict[int, float]:
        backend: NativeBackend = engine.backend  # type: ignore[assignment]
        later = [_later(engine, r) for r in rows]
        guided = 1 if backend.guidance is None else 2
        tokens = guided * sum(end - start for start, end in later)
        # shapes are few: the average window of a row times a rounded number of rows
        count = 1 << (len(rows) - 1).bit_length()
        window = -(-tokens // len(rows) // 8) * 8
        keys = -(-max(r.end for r in rows) // 64) * 64
        return curve(backend.model, window * count, keys, engine.nodes.schedule.block_size * count)

    def note(self, nodes: int, counted: int, active: bool) -> None:
        """A row's forward: `counted` of its nodes - 1 drafted ones counted. Where the row ended, what came behind says nothing."""
        for outcome in [1.0] * counted + ([0.0] if counted < nodes - 1 and active else []):
            self.acceptance += self.WEIGHT * (outcome - self.acceptance)

    def spent(self, seconds: float, depth: int) -> None:
        """Drafting took this long, for chains of at most `depth` nodes beside the rows themselves."""
        if depth:
            self._idle = 0
            each = seconds / depth
            self.drafting = each if self.drafting == 0.0 else self.drafting + self.WEIGHT * (each - self.drafting)


def _later(engine: Speculative, row: Row) -> tuple[int, int]:
    """The window of the row's steps behind the block's first one, which is what nodes forward."""
    return engine.cache_run.window(dataclasses.replace(row, step=max(row.step, 1)))
