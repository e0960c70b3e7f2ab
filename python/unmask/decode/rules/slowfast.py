"""SlowFast sampling (arXiv 2506.10848, LiangrunFlora/Slow-Fast-Sampling): cycles of exploring and fast decoding within a block.

A cycle begins at `last`, the end of what is decoded. Slow phase: `explore_steps` forwards, each of which estimates where the confident stretch
ends, one behind the farthest masked position of [last, block end) with confidence >= explore_threshold; the cycle's end is the latest estimate
where the last `window` of them agree (standard deviation, over the window, below `deviation`), else their mean. Fast phase: [last, end) until
it is filled. Either phase commits, in its range, everything at the threshold where that is two or more, else the best. Where a row stands
lives on the device; the authors' cut of the forward behind the cycle's end (stale logits) is not taken over: every forward is full.
"""

from __future__ import annotations

import torch

from ...ops import LogitStats
from .base import Rule, Run, Selection, StepView


class SlowFast(Rule):
    """Device state per canvas row: block it belongs to, `last`, `end`, forwards of the cycle so far, and the window of estimates."""

    def __init__(self, run: Run):
        super().__init__(run)
        rows, device = run.state.canvas.shape[0], run.device
        self._last, self._end, self._done = (torch.zeros(rows, dtype=torch.int64, device=device) for _ in range(3))
        self._estimates = torch.zeros((rows, self.knobs["window"]), dtype=torch.float64, device=device)

    def select(self, step: StepView, stats: LogitStats, score: torch.Tensor) -> Selection:
        k, rows = self.knobs, step.plan.row
        opens = step.per_entry([r.step == 0 for r in step.rows], torch.bool)
        start, stop = (step.per_entry([getattr(r, name) for r in step.rows]) for name in ("block_start", "block_end"))
        last = torch.where(opens, start, self._last.index_select(0, rows))
        done = torch.where(opens, 0, self._done.index_select(0, rows))
        end = torch.where(opens, stop, self._end.index_select(0, rows))
        slow = done < k["explore_steps"]

        ahead = step.masked & (step.pos >= step.spread(last))
        far = step.highest(step.pos.double(), ahead & (score.double() >= k["explore_threshold"]))
        estimate = torch.where(far.isinf(), last + 1.0, far + 1.0)
        window = torch.where((done == 0)[:, None], torch.nan, self._estimates.index_select(0, rows))
        window = torch.cat([window[:, 1:], estimate[:, None]], 1)
        mean = window.nanmean(1)
        deviation = (window - mean[:, None]).square().nanmean(1).sqrt()
        found = torch.where(deviation < k["deviation"], estimate, mean.floor()).long()
        found = torch.minimum(torch.maximum(found, last + 1), stop)
        end = torch.where(slow, found, end)
        for state, value in ((self._last, last), (self._end, end), (self._done, done + 1)):
            state.index_copy_(0, rows, value)
        self._estimates.index_copy_(0, rows, torch.where(slow[:, None], window, self._estimates.index_select(0, rows)))

        among = ahead & (step.pos < step.spread(torch.where(slow, stop, end)))
        sure = step.count(among & (score.double() >= k["threshold"]))
        return Selection(score, quota=torch.where(sure >= 2, sure, 1), eligible=among)

    def after(self, step: StepView, stats: LogitStats, selection: Selection, committed: torch.Tensor) -> None:
        """A cycle whose slow phase is over and whose stretch is filled gives way to the next one."""
        rows = step.plan.row
        last, end, done = (s.index_select(0, rows) for s in (self._last, self._end, self._done))
        still = self.run.state.masked.view(-1).index_select(0, step.flat)
        left = step.count(still & (step.pos >= step.spread(last)) & (step.pos < step.spread(end)))
        over = (done >= self.knobs["explore_steps"]) & (left == 0)
        self._last.index_copy_(0, rows, torch.where(over, end, last))
        self._done.index_copy_(0, rows, torch.where(over, 0, done))
