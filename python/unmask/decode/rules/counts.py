"""Rules that take a prefix of the order: quota, threshold, factor, entropy bound, and SDAR's and LLaDA2.0's mixture of two."""

from __future__ import annotations

import torch

from ...ops import LogitStats
from ...ops import Rule as CommitRule
from .base import Rule, Selection, StepView

NEAR_TIE = 1e-5  # dInfer: what lies this close below the best commits with it


def step_quota(step: StepView) -> torch.Tensor:
    """int64 [B]: positions of this step by the rows' quota schedules; behind their ends whatever is left, so that every block ends."""
    return step.per_entry([r.quotas[r.step] if r.step < len(r.quotas) else r.masks for r in step.rows])


class Quota(Rule):
    """LLaDA's fixed steps; PC-Sampler and SDAR's static rule count the same way."""

    def select(self, step: StepView, stats: LogitStats, score: torch.Tensor) -> Selection:
        return Selection(score, quota=step_quota(step))


class Threshold(Rule):
    """Fast-dLLM's threshold (score >= t, the best always). variant dinfer: the bar is min(t, best - 1e-5)."""

    def select(self, step: StepView, stats: LogitStats, score: torch.Tensor) -> Selection:
        bar = torch.full((step.entries,), float(self.knobs["threshold"]), dtype=torch.float64, device=step.device)
        if self.knobs["variant"] == "dinfer":
            bar = torch.minimum(bar, step.highest(score.double(), step.masked) - NEAR_TIE)
        if self.knobs["minimum"] > 1:
            above = step.masked & (score.double() >= step.spread(bar))
            return Selection(score, quota=step.count(above).clamp_min(self.knobs["minimum"]))
        return Selection(score, CommitRule.THRESHOLD, threshold=bar)


class Factor(Rule):
    """Fast-dLLM's factor rule, as the paper has it, as its code has it, or as d2Cache's port has it.

    The port stops at the first n with (n + 1)(1 - score_(n)) >= factor and commits the n - 1 before it; where none fails it commits all but
    one; at least one. The paper's count is the same but for that last case.
    """

    def select(self, step: StepView, stats: LogitStats, score: torch.Tensor) -> Selection:
        factor = float(self.knobs["factor"])
        if self.knobs["variant"] == "d2cache":
            place = step.rank(score, step.masked).double()
            fails = step.masked & ((place + 2.0) * (1.0 - score.double()) >= factor)
            first = -step.highest(-place, fails)  # +inf where none fails
            total = step.count(step.masked)
            count = torch.where(first.isinf(), total - 1, first.clamp_max(1e9).long()).clamp_min(1)
            return Selection(score, quota=count)
        rule = CommitRule.FACTOR_AUTHORS if self.knobs["factor_off_by_one"] else CommitRule.FACTOR
        return Selection(score, rule, params=[factor])


class EntropyBound(Rule):
    """EB-Sampler: entropies, in the score's order, may sum to gamma without the largest. The d2Cache port leaves out the newest instead."""

    def select(self, step: StepView, stats: LogitStats, score: torch.Tensor) -> Selection:
        gamma = float(self.knobs["gamma"])
        if self.knobs["variant"] != "d2cache":
            return Selection(score, CommitRule.ENTROPY_BOUND, params=[gamma], cost=stats.entropy.contiguous())
        place = step.rank(score, step.masked)
        cost = step.table(torch.where(step.masked, stats.entropy.double(), 0.0), place)
        before = (cost.cumsum(1) - cost)[step.entry, place]
        fits = step.masked & (before <= gamma)
        return Selection(score, quota=step.count(fits).clamp_min(1))


class Dynamic(Rule):
    """SDAR's dynamic rule and LLaDA2.0's: everything above the threshold if that is at least n positions, else the n best."""

    def select(self, step: StepView, stats: LogitStats, score: torch.Tensor) -> Selection:
        least = step_quota(step).clamp_min(1) if self.run.policy.spec.uses_steps else self.knobs["minimum"]
        above = step.count(step.masked & (score.double() > float(self.knobs["threshold"])))
        return Selection(score, quota=torch.maximum(above, least) if isinstance(least, torch.Tensor) else above.clamp_min(least))
