"""The backend of S2D2: a model's, with room behind the canvas for verifications and the two variants of who sees what."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import torch

from ..decode.backend import NativeBackend, Plan
from ..decode.caches import attention_block
from ..decode.state import DecodeState, Row
from ..models.backbone import Forward
from ..models.model import Model
from .s2d2_options import Options
from .verifier import scratch_slots


class S2D2Backend(NativeBackend):
    """A model with room behind its canvas for verifications, and, with cache_ver or draft_ver, the forwards that these ask for.

    causal_until: for draft_ver, up to which position (exclusive) the tokens of a row's block see token-causally; None = its first mask.
    stores_as_drafted: without cache_ver a finished block is stored as its last draft saw it, not seeing all of itself (SDAR's code does).
    """

    def __init__(self, model: Model, state: DecodeState, mask_id: int, options: Options, attention_block: int | None = None):
        size = attention_block or model.config.block_size or 1
        super().__init__(model, state, mask_id, extra_slots=scratch_slots(state, size))
        if attention_block is not None:
            self.attention_block = attention_block
        self.options = options
        self.causal_until: Callable[[Row], int] | None = None
        self.stores_as_drafted = False
        self._storing = False
        self._drafted: dict[int, tuple[int, int | torch.Tensor]] = {}  # per row: its block's begin, and `until` of its last draft

    def store(self, row: int, start: int, end: int) -> torch.Tensor:
        self._storing = True
        try:
            return super().store(row, start, end)
        finally:
            self._storing = False

    def _run(self, plan: Plan, shadow: bool = False) -> None:
        if self.options.draft_ver or self.options.cache_ver:
            self._plan = None  # who sees what changes from step to step
        super()._run(plan, shadow)

    def _packed(self, plan: Plan) -> Forward:
        forward = super()._packed(plan)
        if not (self.options.draft_ver or self.options.cache_ver):
            return forward
        assert forward.q_end is not None and self.attention_block is not None
        causal = torch.zeros_like(forward.q_end, dtype=torch.bool)
        first = 0
        for (index, *_), size in zip(plan.entries, plan.sizes, strict=True):
            own = slice(first, first + size)
            first += size
            causal[own] = self._causal(self.state.rows[index], forward.pos[own])
        return dataclasses.replace(forward, q_end=torch.where(causal, forward.pos + 1, forward.q_end))

    def _causal(self, row: Row, pos: torch.Tensor) -> torch.Tensor:
        """bool [n]: which of a row's forwarded positions see no further than themselves."""
        if self._storing:
            return self._stored_causal(row, pos)
        begin, end = attention_block(row, self.attention_block)
        before = pos < begin
        causal = before if self.options.cache_ver else torch.zeros_like(before)
        if not self.options.draft_ver:
            return causal
        until: int | torch.Tensor
        if self.causal_until is not None:
            until = self.causal_until(row)
        else:  # stays on the device
            place = torch.arange(begin, end, device=pos.device)
            until = torch.where(self.state.masked[row.index, begin:end], place, end).amin()
        self._drafted[row.index] = begin, until
        return causal | (~before & (pos < until))

    def _stored_causal(self, row: Row, pos: torch.Tensor) -> torch.Tensor:
        """The same for positions that are stored: a whole prompt, or a finished block."""
        begin, until = self._drafted.get(row.index, (-1, 0))
        if self.options.cache_ver or not self.stores_as_drafted or row.stored != begin:
            return torch.full_like(pos, self.options.cache_ver, dtype=torch.bool)
        return (pos >= begin) & (pos < until)
