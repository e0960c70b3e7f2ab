"""How a step gets its statistics: from a native model (packed forward, K/V cache, fused head) or from any module that returns logits."""

from __future__ import annotations

import dataclasses

import torch

from .. import ops
from ..errors import SettingError
from ..models.backbone import Forward
from ..models.model import Model
from ..ops import LogitStats
from ..ops.head_stats import head_stats
from ..ops.linear import pad_rows
from .state import DecodeState


@dataclasses.dataclass(frozen=True)
class Plan:
    """The shape of a step: which positions are forwarded and which are candidates. Reused while the rows stay in the same windows.

    flat: int64 [T0] indices of the forwarded positions in the flattened canvas, row after row. candidates: entry e = e-th active row;
    cand_entry, cand_row, cand_pos, cand_flat: int64 [N] (entry, canvas row, position, index in the flattened canvas) of each position of
    each row's block; cand_query: int64 [N], its index among the forwarded tokens. cu: int64 [B+1], row: int64 [B].
    """

    entries: tuple[tuple[int, int, int, int, int], ...]  # (row, window start, window end, block start, block end)
    flat: torch.Tensor
    token_row: torch.Tensor
    token_pos: torch.Tensor
    cu_q: torch.Tensor
    row: torch.Tensor
    cu: torch.Tensor
    cand_entry: torch.Tensor
    cand_row: torch.Tensor
    cand_pos: torch.Tensor
    cand_flat: torch.Tensor
    cand_query: torch.Tensor


def make_plan(state: DecodeState, entries: tuple[tuple[int, int, int, int, int], ...]) -> Plan:
    length = state.canvas.shape[1]
    device = state.canvas.device

    def cat(parts: list[torch.Tensor]) -> torch.Tensor:
        return torch.cat(parts).to(device)

    def prefix(sizes: list[int]) -> torch.Tensor:
        return torch.tensor([0, *sizes]).cumsum(0).to(device)

    windows = [torch.arange(s, e) for _, s, e, _, _ in entries]
    blocks = [torch.arange(bs, be) for _, _, _, bs, be in entries]
    cu_q = prefix([w.numel() for w in windows])
    rows = [r for r, *_ in entries]
    query = [b - s + int(first) for b, (_, s, *_), first in zip(blocks, entries, cu_q[:-1].tolist(), strict=True)]
    return Plan(
        entries=entries,
        flat=cat([w + r * length for r, w in zip(rows, windows, strict=True)]),
        token_row=cat([torch.full_like(w, r) for r, w in zip(rows, windows, strict=True)]),
        token_pos=cat(windows),
        cu_q=cu_q,
        row=torch.tensor(rows, device=device),
        cu=prefix([b.numel() for b in blocks]),
        cand_entry=cat([torch.full_like(b, i) for i, b in enumerate(blocks)]),
        cand_row=cat([torch.full_like(b, r) for r, b in zip(rows, blocks, strict=True)]),
        cand_pos=cat(blocks),
        cand_flat=cat([b + r * length for r, b in zip(rows, blocks, strict=True)]),
        cand_query=cat(query),
    )


class NativeBackend:
    """A `Model`: one packed forward per step; classifier-free guidance doubles its entries, not its forwards.

    Guidance combines hidden states, not logits: the head is linear, so head(u + (w + 1)(c - u)) = u' + (w + 1)(c' - u') (LLaDA's rule)
    with half the head's work and no [rows, V] tensor.
    """

    def __init__(self, model: Model, state: DecodeState, mask_id: int, cfg_scale: float = 0.0):
        self.model, self.state, self.mask_id, self.cfg_scale = model, state, mask_id, cfg_scale
        b, length = state.canvas.shape
        self.cache = model.new_cache(b * (2 if cfg_scale else 1), length)
        self.forbid = torch.tensor([mask_id], device=state.canvas.device)
        self._plan: Plan | None = None
        self._forward: Forward | None = None

    @property
    def logits_dtype(self) -> torch.dtype:
        return self.model.dtype

    def stats(self, plan: Plan, live: torch.Tensor, **options) -> LogitStats:
        """Runs the forward of `plan` and reduces the logits of its live candidates. live: bool [N]. options: of `head_stats`."""
        if plan is not self._plan:
            self._plan, self._forward = plan, self._packed(plan)
        forward = self._forward
        assert forward is not None
        n = plan.flat.shape[0]
        flat_ids = self.state.canvas.view(-1).index_select(0, plan.flat)
        forward.ids[:n] = flat_ids
        if self.cfg_scale:
            given = self.state.given.view(-1).index_select(0, plan.flat)
            forward.ids[n : 2 * n] = torch.where(given, self.mask_id, flat_ids)
        self.hidden = self.model(forward, self.cache)
        return self.reduce(plan, live, **options)

    def reduce(self, plan: Plan, live: torch.Tensor, **options) -> LogitStats:
        """The reduction alone, over the hidden states of the last forward."""
        if not self.cfg_scale:
            rows = torch.where(live, plan.cand_query, -1)
            return head_stats(self.hidden, self.model.head, rows, forbid=self.forbid, **options)
        c = self.hidden.index_select(0, plan.cand_query).float()
        u = self.hidden.index_select(0, plan.cand_query + plan.flat.shape[0]).float()
        guided = (u + (self.cfg_scale + 1.0) * (c - u)).to(self.hidden.dtype)
        rows = torch.where(live, torch.arange(live.shape[0], device=live.device), -1)
        return head_stats(guided, self.model.head, rows, forbid=self.forbid, **options)

    def _packed(self, plan: Plan) -> Forward:
        copies = 2 if self.cfg_scale else 1
        n, b = plan.flat.shape[0], self.state.canvas.shape[0]
        total = pad_rows(copies * n)
        device = plan.flat.device
        ids = torch.zeros(total, dtype=torch.int64, device=device)
        row = torch.full((total,), -1, dtype=torch.int64, device=device)
        pos = torch.zeros(total, dtype=torch.int64, device=device)
        for i in range(copies):  # the unconditional copy has its own cache rows, b further down
            row[i * n : (i + 1) * n] = plan.token_row + i * b
            pos[i * n : (i + 1) * n] = plan.token_pos
        cu_q = torch.cat([plan.cu_q, plan.cu_q[1:] + n]) if copies == 2 else plan.cu_q
        kv_row = torch.cat([plan.row + i * b for i in range(copies)])
        ends = torch.tensor([self.state.rows[r].end for r, *_ in plan.entries], device=device).repeat(copies)
        seg = torch.stack([torch.zeros_like(ends), ends], dim=1).unsqueeze(1)
        return Forward(ids, row, pos, pos, cu_q, kv_row, seg)


class ModuleBackend:
    """Any `nn.Module`: `module(ids)` returning logits [B, L, V], or an object with `.logits`. Whole canvases of equal length, no cache.

    attention_mask: int or bool [B, L] or None, passed on as `attention_mask=` only when given.
    """

    def __init__(
        self, module: torch.nn.Module, state: DecodeState, mask_id: int, cfg_scale: float = 0.0, attention_mask: torch.Tensor | None = None
    ):
        self.module, self.state, self.mask_id, self.cfg_scale, self.attention_mask = module, state, mask_id, cfg_scale, attention_mask
        self.forbid = torch.tensor([mask_id], device=state.canvas.device)
        self.vocab = -1

    @property
    def logits_dtype(self) -> torch.dtype:
        return self.logits.dtype

    def _check_ids(self, suppress: torch.Tensor | None) -> None:
        for name, ids in (("mask_id", self.forbid), ("an id to suppress", suppress)):
            if ids is not None and bool((ids >= self.vocab).any()):
                raise SettingError(f"{name} must be below the module's vocabulary size {self.vocab}, got {int(ids.max())}")

    def stats(self, plan: Plan, live: torch.Tensor, **options) -> LogitStats:
        """Runs the module on the canvases of the active rows and reduces the logits of the live candidates."""
        x = self.state.canvas.index_select(0, plan.row)
        if self.cfg_scale:
            x = torch.cat([x, torch.where(self.state.given.index_select(0, plan.row), self.mask_id, x)])
        kwargs = {}
        if self.attention_mask is not None:
            mask = self.attention_mask.index_select(0, plan.row)
            kwargs["attention_mask"] = torch.cat([mask, mask]) if self.cfg_scale else mask
        logits = _logits_of(self.module(x, **kwargs), type(self.module).__name__)
        if self.cfg_scale:
            c, u = logits.chunk(2)
            logits = u + (self.cfg_scale + 1.0) * (c - u)
        if logits.dim() != 3 or logits.shape[:2] != (plan.row.shape[0], self.state.canvas.shape[1]):
            raise SettingError(
                f"the module must return logits [B, L, V] = [{plan.row.shape[0]}, {self.state.canvas.shape[1]}, any], got {list(logits.shape)}"
            )
        if self.vocab != logits.shape[2]:  # once: what the module's vocabulary is shows in its first logits only
            self.vocab = logits.shape[2]
            self._check_ids(options.get("suppress"))
        self.logits = logits
        return self.reduce(plan, live, **options)

    def reduce(self, plan: Plan, live: torch.Tensor, **options) -> LogitStats:
        """The reduction alone, over the logits of the last forward."""
        length = self.state.canvas.shape[1]
        rows = torch.where(live, plan.cand_entry * length + plan.cand_pos, -1)
        return ops.logit_stats(self.logits.reshape(-1, self.logits.shape[-1]), rows, forbid=self.forbid, **options)


def _logits_of(out: object, module: str) -> torch.Tensor:
    """The logits in what a module returned."""
    logits = out if isinstance(out, torch.Tensor) else getattr(out, "logits", None)
    if not isinstance(logits, torch.Tensor):
        raise SettingError(f"{module} must return logits [B, L, V] or an object with .logits, got {type(out).__name__}")
    if logits.dtype not in (torch.float32, torch.bfloat16, torch.float16):
        raise SettingError(f"the logits of {module} must be float32, bfloat16 or float16, got {logits.dtype}")
    return logits
