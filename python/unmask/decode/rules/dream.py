"""Dream's sampler (arXiv 2508.15487; HKUNLP/Dream, generation_utils): timesteps from 1 to eps say how many positions commit.

Step i of S, t = t_i and s = t_{i+1} of linspace(1, eps, S + 1): int(masks (1 - s / t)) positions, in float32 as the authors compute it; the last
step commits the rest. The truncation and eps make early steps commit fewer, possibly none: S = N = 8 gives 0, 1, 1, 1, 1, 1, 1, 2. Each row
counts its own masks (the authors take the mean over the batch).
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from ...ops import LogitStats, uniform
from .base import Rule, Run, Selection, StepView


def timesteps(steps: int, eps: float) -> torch.Tensor:
    """float32 [steps + 1], from 1 down to eps."""
    return torch.linspace(1, eps, steps + 1)


def transfer_count(masks: int, step: int, times: torch.Tensor) -> int:
    """How many of `masks` positions commit at a step."""
    last = times.shape[0] - 2
    if step >= last:
        return masks
    return int(torch.tensor(float(masks)) * (1 - times[step + 1] / times[step]))


def order_gumbel(seed: torch.Tensor, step: torch.Tensor, pos: torch.Tensor) -> torch.Tensor:
    """Gumbel noise float64 [N], one per position: the highest n of score + noise are a draw without replacement (Gumbel top-k)."""
    u = uniform(seed, step, pos).double()
    return -torch.log(-torch.log(u))


class Dream(Rule):
    """uniforms: replaces the draws of `origin` (a function of the StepView giving float [N]): for replaying recorded runs. first_step: number
    of a block's first step in the schedule (AdaBlock's copy of the block loop begins with step 1). leave_masked: a step behind the schedule's
    last one commits nothing instead of the rest (where first_step is the number of steps, the block then stays masked: their bug)."""

    uniforms: Callable[[StepView], torch.Tensor] | None = None
    first_step = 0
    leave_masked = False

    def __init__(self, run: Run):
        super().__init__(run)
        self._times: dict[int, torch.Tensor] = {}
        self._left: dict[int, int] = {}

    def times(self, row) -> torch.Tensor:
        steps = self.knobs["steps"] or max(row.masks, 1)
        if steps not in self._times:
            self._times[steps] = timesteps(steps, float(self.knobs["eps"]))
        return self._times[steps]

    def select(self, step: StepView, stats: LogitStats, score: torch.Tensor) -> Selection:
        if self.knobs["alg"] == "origin":
            return self._origin(step, stats, score)
        score = self.confidence(stats)
        if self.knobs["alg_temp"]:
            score = score.double() / float(self.knobs["alg_temp"]) + order_gumbel(**step.key)
        counts = []
        for row in step.rows:
            masks = row.masks if row.step == 0 else self._left[row.index]
            i, times = row.step + self.first_step, self.times(row)
            behind = self.leave_masked and i >= times.shape[0] - 1
            counts.append(0 if behind else transfer_count(masks, i, times))
        return Selection(score, quota=step.per_entry(counts))

    def confidence(self, stats: LogitStats) -> torch.Tensor:
        """What `alg` orders by, from the tempered and filtered distribution."""
        alg = self.knobs["alg"]
        if alg == "topk_margin":
            return stats.margin
        return -stats.entropy if alg == "entropy" else stats.confidence

    def _origin(self, step: StepView, stats: LogitStats, score: torch.Tensor) -> Selection:
        bars = []
        for row in step.rows:
            times = self.times(row)
            last = row.step >= times.shape[0] - 2
            bars.append(2.0 if last else float(1 - times[row.step + 1] / times[row.step]))
        u = self.uniforms(step) if self.uniforms is not None else uniform(**step.key)
        return self.exactly(step, score, step.masked & (u < step.spread(step.per_entry(bars, torch.float32))))

    def finished(self, row, left: int, flag: int) -> bool:
        self._left[row.index] = left
        return left == 0
