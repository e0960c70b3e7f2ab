"""KLASS (arXiv 2511.05664): a position commits when it is confident and its distribution has stopped moving between forwards.

KL(p_t || p_{t-1}) needs the last forward's logits of the positions that were undecided then; those rows alone are kept, in the model's dtype.
A position without a predecessor (its block just began) counts as moving.
"""

from __future__ import annotations

import torch

from ...ops import LogitStats, kl_stats, logit_stats
from .base import Rule, Run, Selection, StepView


class Klass(Rule):
    """Every confident, stable position; where there is none, the best `minimum`."""

    wants_logits = True

    def __init__(self, run: Run):
        super().__init__(run)
        self.like_d2cache = self.knobs["variant"] == "d2cache"
        self.scope = "canvas" if self.like_d2cache else "block"
        canvas = run.state.canvas
        self._history = torch.full((canvas.numel(), self.knobs["history"]), torch.inf, dtype=torch.float32, device=canvas.device)
        self._logits: torch.Tensor | None = None
        self._lse = torch.zeros(canvas.numel(), dtype=torch.float32, device=canvas.device)  # of each canvas position's last logits
        self._row = torch.full((canvas.numel(),), -1, dtype=torch.int64, device=canvas.device)  # row of each canvas position in _logits

    def joined(self, row) -> None:
        length = self.run.state.canvas.shape[1]
        span = slice(row.index * length, (row.index + 1) * length)
        self._history[span], self._row[span] = torch.inf, -1

    def select(self, step: StepView, stats: LogitStats, score: torch.Tensor) -> Selection:
        kept = self.run.backend.kept
        if kept.rows.shape[0] != step.pos.shape[0]:  # an adaptive schedule cut the candidates after the forward
            kept = type(kept)(kept.logits, self._rows_of(step))
        history = self._history.index_select(0, step.flat)
        lse = self._logsumexp(stats, kept)
        if self._logits is not None:
            before = self._row.index_select(0, step.flat)
            kl = kl_stats(kept.logits, self._logits, kept.rows, before, lse=lse, previous_lse=self._lse.index_select(0, step.flat))
        else:
            kl = torch.full_like(lse, torch.inf)
        history = torch.cat([history[:, 1:], kl[:, None]], 1)
        self._history.index_copy_(0, step.flat, history)
        self._logits = kept.logits
        self._lse.index_copy_(0, step.flat, lse)
        self._row.fill_(-1)
        self._row.index_copy_(0, step.flat, kept.rows)

        among = step.masked & step.inside if self.scope == "canvas" else step.masked
        bar = float(self.knobs["threshold"])
        confident = score.double() >= bar if self.like_d2cache else score.double() > bar
        chosen = among & confident & (history < float(self.knobs["kl_threshold"])).all(1)
        some = step.count(chosen)
        eligible = torch.where(step.spread(some > 0), chosen, among)
        return Selection(score, quota=some.clamp_min(self.knobs["minimum"]), eligible=eligible)

    def _logsumexp(self, stats: LogitStats, kept) -> torch.Tensor:
        """float32 [N]: logsumexp of the kept rows: that of the statistics, where these are of the logits as they are."""
        policy = self.run.policy
        if policy.filtered or policy.suppress or policy.repetition_penalty != 1.0:
            return logit_stats(kept.logits, kept.rows).logsumexp.contiguous()
        return stats.logsumexp.contiguous()

    def _rows_of(self, step: StepView) -> torch.Tensor:
        """Rows of the kept logits for the candidates that an adaptive schedule left."""
        wide = self.run.backend.kept
        place = torch.full_like(self._row, -1)
        place.index_copy_(0, self.wide.flat, wide.rows)
        return place.index_select(0, step.flat)

    def wanted(self, step: StepView) -> torch.Tensor:
        self.wide = step
        return step.masked
