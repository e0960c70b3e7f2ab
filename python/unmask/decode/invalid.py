"""What a step does with invalid logits: NaN, or nothing but -inf."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from ..errors import InvalidLogits
from ..ops import LogitStats
from ..ops.info import Status

if TYPE_CHECKING:
    from .rules.base import StepView


def report_invalid(step: StepView, stats: LogitStats, invalid: list[int], on_invalid: str) -> None:
    """Raises InvalidLogits, or with on_invalid="skip" ends the rows concerned. invalid: per entry, not 0 where a candidate's logits are."""
    if not any(invalid):
        return
    if on_invalid == "raise":
        i = int(torch.nonzero(stats.status).flatten()[0])
        row = step.rows[int(step.entry[i])]
        raise InvalidLogits(
            f"row {row.index}, step {row.nfe}, position {int(step.pos[i])}: {Status(int(stats.status[i])).describe()}; "
            "on_invalid='skip' ends such rows and goes on with the others"
        )
    for row, bad in zip(step.rows, invalid, strict=True):
        if bad:
            row.finish_reason = "invalid"
