"""When each position was settled: what caches go by that forward single positions. It costs one read of the canvases per step."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from .base import Cache, CacheRule, CacheRun, Runs, runs_of

if TYPE_CHECKING:
    from ...ops import LogitStats
    from ..rules.base import StepView
    from ..state import Row

GIVEN, NEVER = -1, 1 << 40


class SettledCache(Cache):
    """Keeps, on the host, the forward in which each position of each row got the token that it holds.

    settled: int64 [B, L], `Row.nfe` at that forward (from 0); GIVEN for given positions, NEVER for undecided ones. A decided token that is
    replaced (policy edit) is settled anew: its K and V are those of the old token.
    """

    windowed = False

    def __init__(self, rule: CacheRule, run: CacheRun):
        super().__init__(rule, run)
        self.edits = run.policy.rule == "edit"
        self._held = self._now().cpu()
        self.settled = torch.where(self._held < 0, NEVER, GIVEN)

    def _now(self) -> torch.Tensor:
        """int64 [B, L] on the device: tokens, -1 = undecided."""
        return self.run.state.canvas.masked_fill(self.run.state.masked, -1)

    @torch.inference_mode()
    def joined(self, row: Row) -> None:
        self._held[row.index] = self._now()[row.index].cpu()
        self.settled[row.index] = torch.where(self._held[row.index] < 0, NEVER, GIVEN)

    def committed(self, step: StepView, stats: LogitStats, committed: torch.Tensor) -> None:
        self.note(step)

    def note(self, step: StepView, more: torch.Tensor | None = None) -> torch.Tensor | None:
        """Reads what the step settled. more: int64 [B] that comes with the same read; returned on the host."""
        now = self._now()
        if more is not None:
            now = torch.cat([now, more[:, None]], 1)
        now = now.cpu()
        length = self._held.shape[1]
        tokens = now[:, :length]
        for row in step.rows:
            own = self.settled[row.index]
            own[tokens[row.index] != self._held[row.index]] = row.nfe
            own[tokens[row.index] < 0] = NEVER
        self._held = tokens.clone()
        return None if more is None else now[:, length]

    def whole(self, row: Row) -> Runs:
        return ((0, row.end),)

    def undecided(self, row: Row) -> torch.Tensor:
        """bool [end]."""
        return self.settled[row.index, : row.end] == NEVER

    def open(self, row: Row) -> bool:
        """Whether the row's block holds undecided positions. A rule may go on without any (policy edit): the forward is then a whole one."""
        return bool(self.undecided(row)[row.block_start : row.block_end].any())

    def as_runs(self, row: Row, chosen: torch.Tensor) -> Runs:
        """The chosen positions, bool [end], as runs: with the rest of the block where the rule predicts decided positions again, and, where
        logits are shifted, with what predicts the candidates among them."""
        wanted = self.undecided(row)
        if self.edits:
            wanted[row.block_start : row.block_end] = True
            chosen[row.block_start : row.block_end] = True
        if self.run.lag:
            chosen[:-1] |= (chosen & wanted)[1:]
        return runs_of(chosen)
