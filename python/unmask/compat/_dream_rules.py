"""Fast-dLLM's threshold rule for Dream on the whole canvas: a quota per step, of which what is not confident enough carries over."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import torch

from ..decode.policy import Policy
from ..decode.rules.base import Rule, Run, Selection, StepView
from ..decode.state import Row
from ..ops import LogitStats


@dataclasses.dataclass(frozen=True)
class OwnRule(Policy):
    """A policy whose rule is not in the table: `make` builds it for a run. `rule` then only names the score that is ordered by."""

    make: Callable[[Run], Rule] | None = None

    def lower(self, run: Run) -> Rule:
        assert self.make is not None
        return self.make(run)


@dataclasses.dataclass
class _Budget:
    """Of one row. each: new quota per step; left: of earlier steps; steps: forwards in all, so far as known; cap: this step's limit."""

    each: int
    steps: int
    left: int = 0
    cap: int = 0


class CarryOver(Rule):
    """Step i may commit cap = masks / steps + what earlier steps left over: of the cap best positions those with score >= threshold, and
    always the best. Where the last step falls short one more follows, with no new quota, and so on.

    Source: NVlabs/Fast-dLLM, dream/model/generation_utils.py (alg="confidence_threshold"); each row has its own budget, where their code
    takes one row only.
    """

    def __init__(self, run: Run, steps: int, threshold: float):
        super().__init__(run)
        self.steps, self.threshold = steps, threshold
        self._budgets: dict[int, _Budget] = {}
        self._masks: dict[int, int] = {}

    def select(self, step: StepView, stats: LogitStats, score: torch.Tensor) -> Selection:
        for row in step.rows:
            budget = self._budgets.get(row.index)
            if budget is None:
                budget = self._budgets[row.index] = _Budget(row.masks // self.steps, self.steps)
                self._masks[row.index] = row.masks
            budget.cap = min(budget.each + budget.left, self._masks[row.index])
        cap = step.spread(step.per_entry([self._budgets[r.index].cap for r in step.rows]))
        place = step.rank(score, step.masked)
        chosen = step.masked & (place < cap) & ((score.double() >= self.threshold) | (place == 0))
        return self.exactly(step, score, chosen)

    def finished(self, row: Row, left: int, flag: int) -> bool:
        """After row.step forwards, `left` masks remain."""
        budget = self._budgets[row.index]
        short = budget.cap - (self._masks[row.index] - left)
        self._masks[row.index], budget.left = left, max(short, 0)
        if row.step >= budget.steps and short > 0:
            budget.each, budget.steps = 0, budget.steps + 1
        return row.step >= budget.steps
