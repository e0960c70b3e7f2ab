"""LLaDA2.1's token editing (arXiv 2602.08676, equations 1 to 3): masks commit and decided tokens are corrected in one forward."""

from __future__ import annotations

import torch

from ...ops import LogitStats
from .base import Rule, Run, Selection, StepView


class Edit(Rule):
    """Masks by LLaDA2.0's rule; a decided, not given token of the block is replaced where another has p > edit_threshold. A block ends with a
    forward that began without masks and edited nothing, or with the max_post_steps-th one that began without masks."""

    revises = True
    edits = True

    def __init__(self, run: Run):
        super().__init__(run)
        self._edited: torch.Tensor | None = None
        self._post: dict[int, int] = {}

    def wanted(self, step: StepView) -> torch.Tensor:
        return ~step.given

    def select(self, step: StepView, stats: LogitStats, score: torch.Tensor) -> Selection:
        above = step.count(step.masked & (score.double() > float(self.knobs["threshold"])))
        # an edit is decided by the token's probability, whatever orders the masks
        return Selection(
            torch.where(step.masked, score.double(), stats.confidence), quota=above.clamp_min(self.knobs["minimum"]), params=[0.0, float(self.knobs["edit_threshold"])],
            editable=~step.masked & ~step.given,
        )  # fmt: skip

    def after(self, step: StepView, stats: LogitStats, selection: Selection, committed: torch.Tensor) -> None:
        self._edited = step.count(committed & ~step.masked) + (step.count(step.masked) << 32)  # edits, and masks before the step

    def flags(self, step: StepView) -> torch.Tensor | None:
        return self._edited

    def finished(self, row, left: int, flag: int) -> bool:
        edits, masks_before = flag & 0xFFFFFFFF, flag >> 32
        if row.step <= 1:
            self._post[row.index] = 0
        if left:
            return False
        most = self.knobs["max_post_steps"]
        if masks_before:
            return most == 0 or self.knobs["edit_threshold"] >= 1.0  # nothing could be edited
        self._post[row.index] += 1
        return edits == 0 or self._post[row.index] >= most
