"""CreditDecoding (arXiv 2510.06133; inclusionAI/dInfer): a token that keeps being predicted gains credit, and credit lifts its logit.

Each step multiplies the credits of a position by beta and adds p^gamma to that of its likeliest token; the decision uses z + alpha ln(1 + C). At
most one token gains per step and position, so a position has at most as many credits as its block has had steps: (token, credit) pairs, never
[L, V]. One reduction serves both softmaxes: it reports the logits of the credited tokens, and lifting them changes the sum by what they gain.
The likeliest token always is credited, so the winner is one of them.
"""

from __future__ import annotations

from typing import Any

import torch

from ...errors import SettingError
from ...ops import LogitStats
from .base import Rule, Run, Selection, StepView
from .counts import NEAR_TIE


def _sum(value: torch.Tensor) -> torch.Tensor:
    """[N]: sum of each row's columns one by one: how many columns there are depends on the batch, their sum must not."""
    return value.cumsum(1)[:, -1]


class Credit(Rule):
    """tokens int64, credits float64 [B L, S]: the pairs of every canvas position; -1 = none. Cleared when a block begins."""

    def __init__(self, run: Run):
        super().__init__(run)
        if run.policy.temperature > 0 or run.policy.filtered:
            raise SettingError("policy='credit' needs temperature=0 and no top_p or top_k: its credits belong to the plain softmax")
        n = run.state.canvas.numel()
        self._tokens = torch.empty((n, 0), dtype=torch.int64, device=run.device)
        self._credits = torch.empty((n, 0), dtype=torch.float64, device=run.device)

    def wanted(self, step: StepView) -> torch.Tensor:
        # every step adds a column, so what a row's block has gathered stands in the last `row.step` of them
        past = self._tokens.shape[1] - max(r.step for r in step.rows)
        self._tokens, self._credits = self._tokens[:, past:], self._credits[:, past:]
        return step.masked

    def options(self, step: StepView) -> dict[str, Any]:
        opens = step.spread(step.per_entry([r.step == 0 for r in step.rows], torch.bool))[:, None]
        self._now = torch.where(opens, -1, self._tokens.index_select(0, step.flat))
        self._flat = step.flat
        return dict(topk=1, **({"ids": self._now} if self._now.shape[1] else {}))

    def scored(self, step: StepView, stats: LogitStats) -> LogitStats:
        k = self.knobs
        tokens = self._now
        if self._flat is not step.flat:  # an adaptive schedule cut the candidates
            opens = step.spread(step.per_entry([r.step == 0 for r in step.rows], torch.bool))[:, None]
            tokens = torch.where(opens, -1, self._tokens.index_select(0, step.flat))
        credits = torch.where(tokens < 0, 0.0, self._credits.index_select(0, step.flat) * float(k["decay_beta"]))
        best, gain = stats.topk_id[:, 0], stats.p1.double() ** float(k["boost_gamma"])
        known = tokens == best[:, None]
        credits = credits + torch.where(known & step.masked[:, None], gain[:, None], 0.0)
        new = step.masked & (best >= 0) & ~known.any(1)
        tokens = torch.cat([tokens, torch.where(new, best, -1)[:, None]], 1)
        credits = torch.cat([credits, torch.where(new, gain, 0.0)[:, None]], 1)
        self._grow(step, tokens, credits)

        if not k["credit_alpha"]:
            return stats
        logit = torch.cat([stats.at_ids[:, :, 1].double(), stats.topk_logit[:, :1].double()], 1)
        gap = (logit - stats.topk_logit[:, :1].double()).nan_to_num(0.0)  # to the likeliest token; two of them at +inf are level
        gap = torch.where(tokens >= 0, gap, -torch.inf)
        lifted = gap + float(k["credit_alpha"]) * credits.log1p()
        top = lifted.max(1, keepdim=True).values
        first = torch.where((lifted == top) & (tokens >= 0), tokens, torch.iinfo(torch.int64).max).amin(1)  # ties: lowest id
        # masses in units of the winner's; what no credit touches keeps p_rest's precision, where 1 - p would lose it
        p_best = stats.p1.double().clamp_min(1e-300)
        others = _sum(torch.where(tokens == first[:, None], 0.0, torch.exp(lifted - top)))
        known = _sum(torch.where(tokens == best[:, None], 0.0, p_best[:, None] * torch.exp(gap)))
        others = others + (stats.p_rest.double() - known).clamp_min(0.0) / p_best * torch.exp(-top[:, 0])
        valid = step.masked & (best >= 0)
        stats.ids[:, 0] = torch.where(valid, first, stats.token)
        stats.values[:, 0] = torch.where(valid, 1.0 / (1.0 + others), stats.p.double()).float()
        stats.values[:, 5] = torch.where(valid, others / (1.0 + others), stats.p_rest.double()).float()
        return stats

    def _grow(self, step: StepView, tokens: torch.Tensor, credits: torch.Tensor) -> None:
        """Stores the pairs of the candidates; other positions keep theirs."""
        n, width = self._tokens.shape[0], tokens.shape[1]
        pad = width - self._tokens.shape[1]
        self._tokens = torch.cat([self._tokens, self._tokens.new_full((n, pad), -1)], 1).index_copy_(0, step.flat, tokens)
        self._credits = torch.cat([self._credits, self._credits.new_zeros((n, pad))], 1).index_copy_(0, step.flat, credits)

    def select(self, step: StepView, stats: LogitStats, score: torch.Tensor) -> Selection:
        from ...ops import Rule as CommitRule

        bar = torch.full((step.entries,), float(self.knobs["threshold"]), dtype=torch.float64, device=step.device)
        bar = torch.minimum(bar, step.highest(score.double(), step.masked) - NEAR_TIE)
        return Selection(score, CommitRule.THRESHOLD, threshold=bar)
