"""EntropyCache (arXiv 2603.18489): the entropy of what was just decoded says how far K and V have drifted. Only the abstract is public so far
(no code): the largest entropy among the distributions of the tokens that a step decoded decides, for a constant cost, whether the next
forward recomputes everything or only the k most recently decoded tokens, beside the positions to predict.

Not in the abstract, and chosen here: the defaults of both settings; "positions to predict" are the block's undecided ones; a block begins with
a whole forward; every token of the last step is forwarded, be there more than `recent` (its slot would else keep the K and V of a mask).
"""

from __future__ import annotations

import dataclasses
import math
from typing import TYPE_CHECKING, ClassVar

import torch

from ...values import number
from .base import CacheRule, CacheRun, Runs
from .settled import GIVEN, NEVER, SettledCache

if TYPE_CHECKING:
    from ...models.config import ModelConfig
    from ...ops import LogitStats
    from ..rules.base import StepView
    from ..state import Row


@dataclasses.dataclass(frozen=True)
class Entropy(CacheRule):
    """threshold: in nats; a whole forward follows a step whose largest entropy is above it. Below 0 = always, which is exact; inf = only where a
    block begins. recent: tokens that are forwarded again, the latest first (in one step: the leftmost first), across blocks."""

    threshold: float = 0.5
    recent: int = 8
    name: ClassVar[str] = "entropy"
    source: ClassVar[str] = "EntropyCache, arXiv 2603.18489 (abstract)"
    forwards: ClassVar[str] = "the block's masks and the latest tokens; the whole canvas at a block's first step and after a token of high entropy"

    def __post_init__(self):
        number("entropy: threshold", self.threshold, -math.inf, math.inf, finite=False)
        self._integer("recent", 0)

    def exact(self, config: ModelConfig) -> bool:
        return config.n_layers == 1 or self.threshold < 0

    def start(self, run: CacheRun) -> _ByEntropy:
        return _ByEntropy(self, run)


class _ByEntropy(SettledCache):
    rule: Entropy

    def __init__(self, rule: CacheRule, run: CacheRun):
        super().__init__(rule, run)
        self._due = [True] * self.settled.shape[0]
        self._beyond = run.policy.rule == "klass" and run.policy.knobs["variant"] == "d2cache"  # it watches the blocks to come too

    def committed(self, step: StepView, stats: LogitStats, committed: torch.Tensor) -> None:
        highest = step.highest(stats.entropy.double(), committed).clamp_min(0.0)  # 0 where nothing was decided
        due = torch.zeros(self.settled.shape[0], dtype=torch.int64, device=step.device)
        due[step.plan.row] = (highest > self.rule.threshold).long()
        read = self.note(step, due)
        assert read is not None
        for row in step.rows:
            self._due[row.index] = bool(read[row.index])

    def runs(self, row: Row) -> Runs:
        if row.step == 0 or self._due[row.index] or not self.open(row):
            return self.whole(row)
        settled = self.settled[row.index, : row.end]
        chosen = settled == row.nfe - 1
        predicted = slice(row.block_start, row.end if self._beyond else row.block_end)
        chosen[predicted] |= settled[predicted] == NEVER
        decoded = torch.nonzero((settled != NEVER) & (settled != GIVEN)).flatten()
        latest = settled[decoded].argsort(descending=True, stable=True)[: self.rule.recent]
        chosen[decoded[latest]] = True
        return self.as_runs(row, chosen)
