"""SPRINT's unmasking (LLaDA2.0-Uni, README of inclusionAI/LLaDA2.0-Uni): a pace that adapts, and everything that is sure beside it."""

from __future__ import annotations

import torch

from ...ops import LogitStats
from .base import Rule, Selection, StepView


class Sprint(Rule):
    """The k = ceil(undecided / steps left) best by the score, and every position with p > threshold, whatever the score is. A block takes at
    most its steps; behind them (a block may be asked for more) everything that is left commits."""

    def select(self, step: StepView, stats: LogitStats, score: torch.Tensor) -> Selection:
        undecided = step.count(self.run.state.masked.view(-1).index_select(0, step.flat))
        steps_left = step.per_entry([max(len(r.quotas) - r.step, 1) for r in step.rows])
        pace = (undecided + steps_left - 1) // steps_left
        sure = step.masked & (stats.confidence > float(self.knobs["threshold"]))
        return self.exactly(step, score, sure | (step.masked & (step.rank(score, step.masked) < step.spread(pace))))
