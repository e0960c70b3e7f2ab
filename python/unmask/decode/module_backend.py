"""The backend of a module that is not ours: whole canvases in, logits out, no cache (module_cache.py: with one)."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from ..errors import SettingError
from ..ops import LogitStats
from .guided import GuidedLogits
from .logits import Kept, gathered, logits_of, reduce_logits
from .state import DecodeState

if TYPE_CHECKING:
    from .backend import Guidance, Plan


class ModuleBackend:
    """Any `nn.Module`: `module(ids)` returning logits [B, L, V], or an object with `.logits`. Whole canvases of equal length, no cache.

    attention_mask: int or bool [B, L] or None, passed on as `attention_mask=` only when given. shifted: logits at i predict position i + 1.
    """

    def __init__(
        self, module: torch.nn.Module, state: DecodeState, mask_id: int, guidance: Guidance | None = None,
        attention_mask: torch.Tensor | None = None, shifted: bool = False,
    ):  # fmt: skip
        self.module, self.state, self.mask_id, self.guidance, self.attention_mask = module, state, mask_id, guidance, attention_mask
        if guidance is not None and guidance.negative is not None:
            raise SettingError("negative_prompt needs a model from unmask.load: a module's rows must be equally long")
        self.forbid = torch.tensor([mask_id], device=state.canvas.device)
        self.vocab = -1
        self.attention_block = None
        self.shifted = shifted
        self.keep_logits = False
        self.kept: Kept | None = None

    @property
    def logits_dtype(self) -> torch.dtype:
        return self.logits.dtype

    def _check_ids(self, suppress: torch.Tensor | None) -> None:
        for name, ids in (("mask_id", self.forbid), ("an id to suppress", suppress)):
            if ids is not None and bool((ids >= self.vocab).any()):
                raise SettingError(f"{name} must be below the module's vocabulary size {self.vocab}, got {int(ids.max())}")

    def stats(self, plan: Plan, live: torch.Tensor, shadow: bool = False, **options) -> LogitStats:
        """Runs the module on the canvases of the active rows and reduces the logits of the live candidates."""
        assert not shadow, "checked before the run: a shadow block needs a model from unmask.load"
        self.logits = self._call(plan.row, self.state.canvas.shape[1])
        self._check_vocabulary(options.get("suppress"))
        return self.reduce(plan, live, **options)

    def _call(self, rows: torch.Tensor, length: int) -> torch.Tensor | GuidedLogits:
        """Logits [B, length, V] of the first `length` positions of these rows (int64 [B]), guided if asked for."""
        x = self.state.canvas.index_select(0, rows)[:, :length]
        if self.guidance:
            x = torch.cat([x, torch.where(self.state.given.index_select(0, rows)[:, :length], self.mask_id, x)])
        kwargs = {}
        if self.attention_mask is not None:
            mask = self.attention_mask.index_select(0, rows)[:, :length]
            kwargs["attention_mask"] = torch.cat([mask, mask]) if self.guidance else mask
        logits = logits_of(self.module(x, **kwargs), type(self.module).__name__)
        if self.guidance:
            logits = GuidedLogits(*logits.chunk(2), self.guidance.weight)
        if logits.dim() != 3 or logits.shape[:2] != (rows.shape[0], length):
            raise SettingError(f"the module must return logits [B, L, V] = [{rows.shape[0]}, {length}, any], got {list(logits.shape)}")
        return logits

    def _check_vocabulary(self, suppress: torch.Tensor | None) -> None:
        """Once: what the module's vocabulary is shows in its first logits only."""
        if self.vocab != self.logits.shape[-1]:
            self.vocab = self.logits.shape[-1]
            self._check_ids(suppress)

    def rows_forwarded(self, plan: Plan) -> list[float]:
        """Positions that the last forward of this plan took, per entry: whole canvases, the null inputs too."""
        return [float(self.state.canvas.shape[1] * (2 if self.guidance else 1))] * len(plan.entries)

    def reduce(self, plan: Plan, live: torch.Tensor, filters: dict[str, Any] | None = None, **options) -> LogitStats:
        """The reduction alone, over the logits of the last forward."""
        rows = torch.where(live, self._query(plan), -1)
        flat = self.logits.reshape(-1, self.logits.shape[-1])
        if self.keep_logits:
            self.kept = gathered(flat, rows)
            return reduce_logits(self.kept.logits, self.kept.rows, self.forbid, filters, options)
        return reduce_logits(flat, rows, self.forbid, filters, options)

    def _query(self, plan: Plan) -> torch.Tensor:
        """int64 [N]: the row of the flattened logits that predicts each candidate."""
        return plan.cand_entry * self.state.canvas.shape[1] + (plan.cand_pos - int(self.shifted)).clamp_min(0)
