"""Low-confidence remasking (NEUIR/PC-Sampler, src/generate.py, after ReMDM): fill most of a block, then trade its weakest tokens for better.

A block of M masks: ceil(start_ratio M) steps commit the best position each; then, loop_steps times, one forward returns the k decided tokens of
the lowest current probability to masks and the next one commits the k best; then one position a step to the end. At most M + 2 loop_steps
forwards: that many unless k is more than the first phase had decided.
"""

from __future__ import annotations

import math
from typing import Any

import torch

from ...ops import LogitStats
from .base import Rule, Selection, StepView


class Remask(Rule):
    """Which of the three a step is follows from its number, so the host never reads what the device decided."""

    revises = True

    def kind(self, row) -> tuple[int, int]:
        """(positions to commit, tokens to take back) of the row's step."""
        first = min(math.ceil(self.knobs["start_ratio"] * row.masks), row.masks)
        loop = 2 * self.knobs["loop_steps"]
        if first <= row.step < first + loop and first > 0:
            back = (row.step - first) % 2 == 0
            return (0, self.knobs["k"]) if back else (self.knobs["k"], 0)
        return 1, 0

    def looped(self, row) -> bool:
        """Whether the loops are behind the row."""
        first = min(math.ceil(self.knobs["start_ratio"] * row.masks), row.masks)
        return row.step >= first + (2 * self.knobs["loop_steps"] if first > 0 else 0)

    def wanted(self, step: StepView) -> torch.Tensor:
        return ~step.given

    def options(self, step: StepView) -> dict[str, Any]:
        return dict(ids=torch.where(step.masked, -1, step.canvas)[:, None].contiguous())

    def select(self, step: StepView, stats: LogitStats, score: torch.Tensor) -> Selection:
        return Selection(score, quota=step.per_entry([self.kind(r)[0] for r in step.rows]))

    def after(self, step: StepView, stats: LogitStats, selection: Selection, committed: torch.Tensor) -> torch.Tensor:
        decided = ~step.masked & ~step.given
        now = torch.where(decided, stats.at_ids[:, 0, 0], torch.inf)
        back = step.spread(step.per_entry([self.kind(r)[1] for r in step.rows]))
        return decided & (step.rank(-now, decided) < back)

    def finished(self, row, left: int, flag: int) -> bool:
        return left == 0 and self.looped(row)
