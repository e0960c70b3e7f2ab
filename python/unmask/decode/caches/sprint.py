"""SPRINT (LLaDA2.0-Uni, README of inclusionAI/LLaDA2.0-Uni): after `warmup_steps` steps of a block, the rest of its steps see only part of the
prefix. A prefix token's score is alpha I + (1 - alpha) c: I the norm of its key over the prefix's mean norm, c the highest probability that
the model gives at its place; the keep_ratio best stay. Its unmasking rule is policy="sprint" (decode/rules/sprint.py) and goes with any cache.

| model | warm-up steps | later steps | keep_ratio=1 |
|---|---|---|---|
| block-causal | as cache="block" | the block, seeing the kept prefix and itself | cache="block": exact |
| bidirectional | the whole canvas | the block and everything behind it, seeing the kept prefix and themselves | cache="prefix", with warmup_steps=1 |

K and V of the kept tokens are copied once per block into slots of their own behind the canvas, in order and with the rotation of their
positions: keys are then one run, and a step reads half of the prefix where scattered slots would still touch most of its memory. The copy
and the choice stay on the device; nothing is read by the host.

Not settled by the README (the code is not public): the layer whose keys count (`layer`; by default each layer's I, averaged), the norm (2, per
head, averaged over heads) and how the count is rounded (up). Its ratios per modality have no meaning for text alone.

c of a token comes from the forward that stored its K and V (block-causal), or from the last warm-up step (bidirectional: one pass of the head
over the prefix per block; none with alpha=1). These read hidden states of a forward that is counted already, no layer runs again: the head's rows
are none of Result.rows_forwarded, here as elsewhere. On bidirectional models with shifted logits the position before the block is forwarded with
it and always seen. Refused: keep_ratio below 1 on block-causal models with shifted logits (Fast-dLLM v2; that position would see part of the
block behind it, and its stored K and V must not) and blocks longer than the model's own.
"""

from __future__ import annotations

import dataclasses
import math
from typing import TYPE_CHECKING, ClassVar

import torch

from ...errors import SettingError
from ...ops.head_stats import head_stats
from .base import Cache, CacheRule, CacheRun, Runs
from .windows import attention_block

if TYPE_CHECKING:
    from ...models.config import ModelConfig
    from ...ops import LogitStats
    from ..backend import Plan
    from ..policy import Policy
    from ..rules.base import StepView
    from ..state import Row


@dataclasses.dataclass(frozen=True)
class Sprint(CacheRule):
    """keep_ratio: share of the prefix that stays visible. alpha: weight of the key norm against the probability. warmup_steps: steps of a block
    that see everything. layer: whose keys count, -1 = the mean over all."""

    keep_ratio: float = 0.5
    alpha: float = 0.5
    warmup_steps: int = 1
    layer: int = -1
    name: ClassVar[str] = "sprint"
    source: ClassVar[str] = "SPRINT, inclusionAI/LLaDA2.0-Uni"
    forwards: ClassVar[str] = "everything for warmup_steps steps of a block, then the block (bidirectional: and what follows), seeing the best of the prefix"
    visibility: ClassVar[tuple[str, ...]] = ("bidirectional", "block_causal")

    def __post_init__(self):
        self._number("keep_ratio", 0.0, 1.0)
        self._number("alpha", 0.0, 1.0)
        self._integer("warmup_steps", 1)
        self._integer("layer", -1)

    def exact(self, config: ModelConfig) -> bool:
        return self.keep_ratio == 1 and (config.visibility == "block_causal" or config.n_layers == 1)

    def check(self, policy: Policy, config: ModelConfig) -> None:
        if self.layer >= config.n_layers:
            raise SettingError(f"sprint: layer must be in -1..{config.n_layers - 1} for this model, got {self.layer}")
        if self.keep_ratio < 1 and config.visibility == "block_causal" and config.shifted:
            raise SettingError(
                f"cache={str(self)!r} with keep_ratio below 1 needs a model whose logits are not shifted: the last position of a finished block, "
                "which predicts the next block's first, would see part of that block; use cache='block'"
            )

    def start(self, run: CacheRun) -> Cache:
        return _Pruned(self, run)


class _Pruned(Cache):
    rule: Sprint

    def __init__(self, rule: Sprint, run: CacheRun):
        super().__init__(rule, run)
        self.size: int | None = run.backend.attention_block
        if rule.keep_ratio < 1 and self.size is not None and run.part > self.size:
            raise SettingError(f"cache={str(rule)!r} needs a block_size of at most the model's {self.size}, got {run.part}")
        self.kept: dict[int, torch.Tensor] = {}  # by row, while its block prunes: int64, the positions that stay, rising
        self._plan: Plan | None = None
        state = run.state
        self._confidence = torch.zeros(state.canvas.shape, dtype=torch.float64, device=run.device)
        if rule.keep_ratio < 1:
            self._scratch = run.backend.add_slots(self._count(state.canvas.shape[1]))  # for copies of what is kept

    def _count(self, prefix: int) -> int:
        return min(prefix, math.ceil(self.rule.keep_ratio * prefix - 1e-9))

    def _block(self, row: Row) -> tuple[int, int]:
        """[start, end) of what every step forwards."""
        if self.size is not None:
            return attention_block(row, self.size)
        return row.block_start, row.end

    def window(self, row: Row) -> tuple[int, int]:
        start, end = self._block(row)
        if self.size is not None:
            return min(row.stored, start), end
        return (0 if row.step < self.rule.warmup_steps else start), end

    def keys(self, row: Row) -> Runs | None:
        kept = self.kept.get(row.index)
        if kept is None:
            return None
        start, end = self._block(row)
        own = (start - self.run.lag, end)
        return ((self._scratch, self._scratch + kept.shape[0]), own) if kept.shape[0] else (own,)

    def begin(self, plan: Plan) -> None:
        self._plan = plan

    def committed(self, step: StepView, stats: LogitStats, committed: torch.Tensor) -> None:
        if self.size is None or self.rule.keep_ratio == 1 or self.rule.alpha == 1:
            return
        for entry, row in enumerate(step.rows):  # what this forward stores for good
            start, _ = self.window(row)
            end, _ = self._block(row)
            if start < end:
                self._note_confidence(entry, row, start, end)

    def forwarded(self, row: Row) -> None:
        if self.size is not None:
            row.stored = row.opened = self._block(row)[0]

    def joined(self, row: Row) -> None:
        self.kept.pop(row.index, None)

    def moved(self, rows: list[Row]) -> None:
        assert self._plan is not None
        entry_of = {row: entry for entry, (row, *_) in enumerate(self._plan.entries)}
        for row in rows:
            if row.step < self.rule.warmup_steps:
                self.kept.pop(row.index, None)
            elif row.step == self.rule.warmup_steps and self.rule.keep_ratio < 1:
                self._prune(entry_of[row.index], row)

    def _prune(self, entry: int, row: Row) -> None:
        """Chooses the prefix tokens that stay, and copies their K and V."""
        prefix = self._block(row)[0] - (self.run.lag if self.size is None else 0)
        count = self._count(prefix)
        if prefix <= 0 or count == prefix:
            return
        if self.size is None and self.rule.alpha < 1:
            self._note_confidence(entry, row, 0, prefix)
        order = self.score(row, prefix).argsort(descending=True, stable=True)
        kept = self.kept[row.index] = order[:count].sort().values
        slots = slice(self._scratch, self._scratch + count)
        for tensor in (self.run.backend.cache.k, self.run.backend.cache.v):
            tensor[:, row.index, :, slots] = tensor[:, row.index].index_select(2, kept)

    def score(self, row: Row, prefix: int) -> torch.Tensor:
        """float64 [prefix]: what orders the row's prefix."""
        k, layer = self.run.backend.cache.k, self.rule.layer
        total = torch.zeros(prefix, dtype=torch.float64, device=k.device)
        chosen = range(k.shape[0]) if layer < 0 else [layer]
        for i in chosen:
            norm = torch.linalg.vector_norm(k[i, row.index, :, :prefix], dim=-1, dtype=torch.float32).double().mean(0)
            total += norm / norm.mean().clamp_min(1e-30)
        alpha = self.rule.alpha
        return alpha * total / len(chosen) + (1.0 - alpha) * self._confidence[row.index, :prefix]

    def _note_confidence(self, entry: int, row: Row, start: int, end: int) -> None:
        """Highest probability at positions [start, end), from the forward that has just been: its hidden states are still there."""
        plan, backend = self._plan, self.run.backend
        assert plan is not None
        first = plan.entries[entry][1]
        query = torch.arange(start, end, device=self.run.device) - self.run.lag
        query = query.clamp_min(first) - first + plan.cu_q[entry]
        stats = head_stats(backend.hidden, backend.model.head, query, forbid=backend.forbid)
        self._confidence[row.index, start:end] = stats.confidence
