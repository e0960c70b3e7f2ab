"""Dilated unmasking (DUS, arXiv 2506.19037): positions far apart are decided together, in groups that about double."""

from __future__ import annotations

import functools

import torch

from ...ops import LogitStats
from .base import Rule, Selection, StepView


@functools.lru_cache(maxsize=256)
def dilated_groups(size: int, base: int = 2, merge_last: bool = False) -> tuple[int, ...]:
    """Group of each of `size` positions, from 0: group t holds the multiples of max(1, size // base^(t + 1)) that no earlier one holds.

    merge_last: a last group smaller than the one before joins it. Empty groups are left out.

    >>> dilated_groups(8)
    (0, 2, 1, 2, 0, 2, 1, 2)
    """
    groups, t, power = [-1] * size, 0, 1
    while any(g < 0 for g in groups):
        power *= base
        stride = max(1, size // power)
        taken = [k for k in range(0, size, stride) if groups[k] < 0]
        for k in taken:
            groups[k] = t
        t += bool(taken)
    last = groups.count(t - 1)
    if merge_last and t > 1 and last < groups.count(t - 2):
        groups = [min(g, t - 2) for g in groups]
    return tuple(groups)


class Dilated(Rule):
    """Commits the earliest group of the block that still holds masks. With skip_below, step t commits what is scored at least that in the
    groups up to t, possibly nothing, and the last step takes all."""

    def select(self, step: StepView, stats: LogitStats, score: torch.Tensor) -> Selection:
        blocks = [dilated_groups(r.block_end - r.block_start, self.knobs["base"], self.knobs["merge_last"]) for r in step.rows]
        group = torch.tensor([g for block in blocks for g in block], dtype=torch.float32, device=step.device)
        if self.knobs["skip_below"] is None:
            earliest = -step.highest(-group, step.masked)
            return self.exactly(step, score, step.masked & (group <= step.spread(earliest)))
        now = step.spread(step.per_entry([r.step for r in step.rows]))
        last = step.spread(step.per_entry([r.step >= max(g) for r, g in zip(step.rows, blocks, strict=True)], torch.bool))
        chosen = step.masked & (group <= now) & (score.double() >= float(self.knobs["skip_below"]))
        return self.exactly(step, score, torch.where(last, step.masked, chosen))
