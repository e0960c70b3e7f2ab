"""OSDT (arXiv 2511.02077): thresholds per block, or per block and step, measured on one sequence of the task."""

from __future__ import annotations

import torch

from ...errors import SettingError
from ...ops import LogitStats
from ...ops import Rule as CommitRule
from ..osdt import Table
from .base import Rule, Run, Selection, StepView


class Osdt(Rule):
    """Fast-dLLM's threshold rule with tau = min(table, cap) (1 - slack) of the row's block and step."""

    def __init__(self, run: Run):
        super().__init__(run)
        table = self.knobs["table"]
        if table is None:
            raise SettingError("policy='osdt' needs table: an unmask.decode.osdt.Table from Table.calibrate(result), or the file it was saved to")
        self.table = table if isinstance(table, Table) else Table.load(table)

    def select(self, step: StepView, stats: LogitStats, score: torch.Tensor) -> Selection:
        cap, slack = float(self.knobs["cap"]), float(self.knobs["slack"])
        bars = [min(self.table.threshold(r.block, r.step), cap) * (1.0 - slack) for r in step.rows]
        return Selection(score, CommitRule.THRESHOLD, threshold=step.per_entry(bars, torch.float64))
