"""WINO (arXiv 2507.18578, Feng-Hong/WINO-DLLM): draft widely, then take back what the context, blind to it, does not support.

A shadow block of masks at the block's positions sees everything but the token it re-predicts (decode/shadow.py). Wide in: what is above
wide_in commits, at most int(0.7 masks) within 5 to 20, at least the best. Narrow out, where more than one committed: decided tokens of earlier
steps with blind probability below narrow_out return to masks, fewer than the step before committed, so that every pair of steps gains.
Given tokens are never taken back. After BOUND steps per position of a block nothing is taken back any more: it ends whatever the model says.
"""

from __future__ import annotations

from typing import Any

import torch

from ...errors import SettingError
from ...ops import LogitStats
from .base import Rule, Run, Selection, StepView

BOUND = 4
FIRST_ACCEPT = 30


class Wino(Rule):
    """variant d2cache: its port compares with >=, limits what is taken back by what this step commits, takes shifted logits too, and loses
    positions: one that was decided once is open no more, the block shrinks to the stretch of those that still are, and it ends without what
    was taken back. Such positions stay masks, in the output too."""

    revises = True
    shadow = True

    def __init__(self, run: Run):
        super().__init__(run)
        self.like_d2cache = self.knobs["variant"] == "d2cache"
        if run.backend.shifted and not self.like_d2cache:
            raise SettingError("policy='wino' needs logits that are not shifted: a shifted model's blind row sees its token; variant='d2cache' does it anyway")
        self._accepted = torch.full((run.state.canvas.shape[0],), FIRST_ACCEPT, dtype=torch.int64, device=run.device)
        self._open = torch.ones_like(run.state.masked)
        self._stretch: dict[int, tuple[int, int]] = {}

    def joined(self, row) -> None:
        self._accepted[row.index], self._open[row.index] = FIRST_ACCEPT, True

    def candidates(self, row) -> tuple[int, int]:
        if self.like_d2cache and row.step > 0:
            return self._stretch[row.index]
        return super().candidates(row)

    def wanted(self, step: StepView) -> torch.Tensor:
        return step.masked | ~step.given

    def options(self, step: StepView) -> dict[str, Any]:
        return dict(ids=torch.where(step.masked, -1, step.canvas)[:, None].contiguous())

    def select(self, step: StepView, stats: LogitStats, score: torch.Tensor) -> Selection:
        bar, masks = float(self.knobs["wide_in"]), step.count(step.masked)
        wide = step.count(step.masked & ((score.double() >= bar) if self.like_d2cache else (score.double() > bar)))
        share = (masks.float() * 0.7) if self.like_d2cache else (masks.double() * 0.7)
        most = share.long().clamp(5, 20)
        return Selection(score, quota=torch.minimum(wide, most).clamp_min(1))

    def after(self, step: StepView, stats: LogitStats, selection: Selection, committed: torch.Tensor) -> torch.Tensor:
        accepted = step.count(committed)
        before = accepted if self.like_d2cache else self._accepted.index_select(0, step.plan.row)
        self._accepted.index_copy_(0, step.plan.row, accepted)
        decided = ~step.masked & ~step.given
        blind = torch.where(decided, stats.at_ids[:, 0, 0].exp(), torch.inf)
        weak = decided & (blind < float(self.knobs["narrow_out"]))
        weakest = step.rank(-blind, decided)
        capped = decided & (weakest < step.spread(before - 1))
        weak = torch.where(step.spread(step.count(weak) >= before), capped, weak)
        open_ = step.per_entry([r.step < BOUND * (r.block_end - r.block_start) for r in step.rows], torch.bool)
        weak = weak & step.spread((accepted > 1) & open_)
        if self.like_d2cache:
            flat = self._open.view(-1)
            flat.index_copy_(0, step.flat, flat.index_select(0, step.flat) & step.masked)
        return weak

    def flags(self, step: StepView) -> torch.Tensor | None:
        """Where the open stretch of each entry lies, for the next step: start, end, and whether it holds a mask still."""
        if not self.like_d2cache:
            return None
        open_ = self._open.view(-1).index_select(0, step.flat)
        still = step.count(open_ & self.run.state.masked.view(-1).index_select(0, step.flat)) > 0
        start = -step.highest(-step.pos.double(), open_)
        end = step.highest(step.pos.double(), open_) + 1.0
        bounds = torch.stack([start, end]).nan_to_num(0.0, 0.0, 0.0).long()
        return (bounds[0] << 32) | (bounds[1] << 1) | still.long()

    def finished(self, row, left: int, flag: int) -> bool:
        if not self.like_d2cache:
            return left == 0
        self._stretch[row.index] = (flag >> 32, (flag >> 1) & 0x7FFFFFFF)
        return not flag & 1
