"""dInfer's hierarchical rule (inclusionAI/dInfer, parallel_strategy.py): one decision per run of masks keeps commits apart."""

from __future__ import annotations

import torch

from ...ops import LogitStats
from .base import Rule, Selection, StepView


def best_of_groups(group: torch.Tensor, score: torch.Tensor, among: torch.Tensor) -> torch.Tensor:
    """bool [N]: of each group's chosen candidates the one with the highest score, the first on ties. group: int64 [N], rising."""
    order = torch.argsort(torch.where(among, score.double(), -torch.inf), descending=True, stable=True)
    order = order[torch.argsort((~among).long()[order], stable=True)]  # a chosen one may score -inf, too
    order = order[torch.argsort(group[order], stable=True)]
    first = torch.ones_like(among)
    sorted_group = group[order]
    first[1:] = sorted_group[1:] != sorted_group[:-1]
    best = torch.zeros_like(among)
    best[order] = first
    return best & among


class Hierarchy(Rule):
    """Of every maximal run of masked positions the best above low_threshold, everything above threshold, and the row's best."""

    def select(self, step: StepView, stats: LogitStats, score: torch.Tensor) -> Selection:
        masked = step.masked
        begins = masked.clone()
        same_row = step.entry[1:] == step.entry[:-1]
        begins[1:] &= ~(masked[:-1] & same_row)
        run = begins.long().cumsum(0)  # candidates of a block lie side by side, so a run is a stretch of masked ones
        chosen = best_of_groups(run, score, masked) & (score.double() > float(self.knobs["low_threshold"]))
        chosen |= masked & (score.double() > float(self.knobs["threshold"]))
        return self.exactly(step, score, chosen | best_of_groups(step.entry, score, masked))
