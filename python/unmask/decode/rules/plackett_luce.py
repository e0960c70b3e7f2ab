"""Plackett-Luce order (DCoLT / LLaDOU, arXiv 2505.10446): positions are drawn in order, without replacement, from a softmax of order logits.

The draw is Gumbel top-k: the K highest of h + g, in order. Its log-probability is sum_j [h_(j) - logsumexp over what was left], by one running
logsumexp from the end, so nothing overflows. A step that takes every candidate has position term 0: as a set it was certain.
"""

from __future__ import annotations

import torch

from ...errors import SettingError
from ...ops import LogitStats
from ..scores import hook_result
from .base import Rule, Run, Selection, StepView
from .counts import step_quota
from .dream import order_gumbel


def plackett_luce_log_prob(h: torch.Tensor, order: torch.Tensor | list[int]) -> torch.Tensor:
    """Log-probability that softmax(h), drawn without replacement, gives `order` (indices) first. h: float [M]; returns a float64 scalar.

    >>> round(float(plackett_luce_log_prob(torch.tensor([0.5, -1.0, 2.0, 0.0]), [2, 0])), 6)
    -0.94648
    """
    order = torch.as_tensor(order)
    rest = torch.ones(h.shape[0], dtype=torch.bool).index_fill(0, order, False)
    listed = torch.cat([h.double()[order], h.double()[rest]])
    return (listed - listed.flip(0).logcumsumexp(0).flip(0))[: order.shape[0]].sum()


class PlackettLuce(Rule):
    """log_prob: float64 [R], per canvas row, summed over the run: of the orders drawn, and of the tokens (at the temperature in use)."""

    def __init__(self, run: Run):
        super().__init__(run)
        if not callable(self.knobs["order_logits"]):
            raise SettingError("policy='plackett_luce' needs order_logits: a function of a StepView that returns float [N] on the device")
        self.log_prob = torch.zeros(run.state.canvas.shape[0], dtype=torch.float64, device=run.device)

    def joined(self, row) -> None:
        self.log_prob[row.index] = 0.0

    def select(self, step: StepView, stats: LogitStats, score: torch.Tensor) -> Selection:
        h = hook_result(self.knobs["order_logits"], step, "order_logits").double()
        h = h.nan_to_num(-torch.inf, torch.inf, -torch.inf)  # comes last; left out, it would stay masked for ever
        key = h + order_gumbel(**step.key) if self.knobs["sample"] else h
        quota = step_quota(step)
        masks = step.count(step.masked)
        place = step.rank(key, step.masked)
        listed = step.table(torch.where(step.masked, h, -torch.inf), place, -torch.inf)
        left = listed.flip(1).logcumsumexp(1).flip(1)
        column = torch.arange(listed.shape[1], device=step.device)
        drawn = column < torch.where(quota >= masks, 0, quota)[:, None]
        order = torch.where(drawn, listed - left, 0.0).cumsum(1)[:, -1]  # one by one: rows of other widths change no bit
        token = torch.where(step.masked & (place < step.spread(quota)), stats.p.double().clamp_min(1e-300).log(), 0.0)
        self.log_prob.index_add_(0, step.plan.row, order + step.total(token))
        return Selection(key, quota=quota)
