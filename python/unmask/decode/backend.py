"""How a step gets its statistics: its plan, and the backend of a native model (packed forward, K/V cache, fused head)."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from itertools import accumulate
from typing import TYPE_CHECKING, Any

import torch

from ..models.backbone import Forward, LayerRunner
from ..models.model import Model
from ..ops import LogitStats
from ..ops.head_stats import head_stats
from ..ops.linear import pad_rows
from .caches.base import Runs
from .logits import Kept, joined_stats, reduce_logits, split_options
from .shadow import ShadowForward, pack_shadow
from .state import DecodeState

if TYPE_CHECKING:
    from .soft import SoftState


@dataclasses.dataclass(frozen=True)
class Placed:
    """Where the tokens of a plan stand in the K/V cache and what they see, where that does not follow from the plan (speculate/layout.py).

    slot: int64 [T0]; the cache row is the plan's token_row. cu_q, kv_row, seg, q_end, mask: as in `ops.block_attention`, over the T0 tokens;
    its entries need not be the plan's.
    """

    slot: torch.Tensor
    cu_q: torch.Tensor
    kv_row: torch.Tensor
    seg: torch.Tensor
    q_end: torch.Tensor | None = None
    mask: torch.Tensor | None = None


@dataclasses.dataclass(frozen=True)
class Plan:
    """The shape of a step: which positions are forwarded and which are candidates. Reused while the rows stay in the same windows.

    flat: int64 [T0] indices of the forwarded positions in the flattened canvas, row after row. candidates: entry e = e-th active row;
    cand_entry, cand_row, cand_pos, cand_flat: int64 [N] (entry, canvas row, position, index in the flattened canvas) of each position of
    each row's block; cand_query: int64 [N], the forwarded token whose output predicts it: its own, or with shifted logits the one before
    (its own where a window begins with it). cu: int64 [B+1], row: int64 [B].

    runs: per entry the forwarded positions, where they are no window; then the window of `entries` is their hull, and reached, bool [N], says
    which candidates can be predicted (None: all). keys: per entry the cache slots that it sees, None = everything that exists. placed: where
    K and V go and what is seen, in place of all that.
    """

    entries: tuple[tuple[int, int, int, int, int], ...]  # (row, window start, window end, first candidate, end of candidates)
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
    runs: tuple[Runs, ...] | None = None
    keys: tuple[Runs | None, ...] | None = None
    reached: torch.Tensor | None = None
    placed: Placed | None = None

    @property
    def sizes(self) -> list[int]:
        """Forwarded positions of each entry."""
        if self.runs is None:
            return [end - start for _, start, end, _, _ in self.entries]
        return [sum(end - start for start, end in runs) for runs in self.runs]

    @property
    def bounds(self) -> list[int]:
        """`cu`, without a read of the device."""
        return [0, *accumulate(last - first for *_, first, last in self.entries)]


def make_plan(
    state: DecodeState, entries: tuple[tuple[int, int, int, int, int], ...], shifted: bool = False, runs: tuple[Runs, ...] | None = None,
    keys: tuple[Runs | None, ...] | None = None,
) -> Plan:  # fmt: skip
    """entries, runs, keys: see Plan. With shifted logits the output of position i predicts position i + 1."""
    length = state.canvas.shape[1]
    device = state.canvas.device

    def cat(parts: list[torch.Tensor]) -> torch.Tensor:
        return torch.cat(parts).to(device)

    def prefix(sizes: list[int]) -> torch.Tensor:
        return torch.tensor([0, *sizes]).cumsum(0).to(device)

    if runs is None:
        windows = [torch.arange(s, e) for _, s, e, _, _ in entries]
    else:
        windows = [torch.cat([torch.arange(s, e) for s, e in own]) for own in runs]
    blocks = [torch.arange(cs, ce) for _, _, _, cs, ce in entries]
    cu_q = prefix([w.numel() for w in windows])
    rows = [r for r, *_ in entries]
    reached = None
    firsts = [0, *accumulate(w.numel() for w in windows)][:-1]  # as cu_q, which is on the device
    if runs is None:
        query = [(b - int(shifted)).clamp_min(s) - s + first for b, (_, s, *_), first in zip(blocks, entries, firsts, strict=True)]
    else:
        places = [_places(w, (b - int(shifted)).clamp_min(0)) for w, b in zip(windows, blocks, strict=True)]
        reached = cat([p >= 0 for p in places])
        query = [p.clamp_min(0) + first for p, first in zip(places, firsts, strict=True)]
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
        runs=runs,
        keys=keys,
        reached=reached,
    )


def _places(window: torch.Tensor, wanted: torch.Tensor) -> torch.Tensor:
    """int64 [N]: where in the rising positions `window` each wanted position stands, -1 = nowhere."""
    if not window.numel():
        return torch.full_like(wanted, -1)
    at = torch.searchsorted(window, wanted).clamp_max(window.numel() - 1)
    return torch.where(window[at] == wanted, at, -1)


@dataclasses.dataclass(frozen=True)
class Guidance:
    """Classifier-free guidance: logits u + weight (c - u), with u from a null input.

    weight: LLaDA's scale w is weight w + 1 (off at w = 0), Dream's evaluation code's is w itself (off at w = 1). negative: per row the ids
    that stand in the null input in place of everything before the row's first undecided position; None: every given token is masked there.
    """

    weight: float
    negative: Sequence[Sequence[int]] | None = None


class NativeBackend:
    """A `Model`: one packed forward per step; classifier-free guidance doubles its entries, not its forwards.

    Guidance combines hidden states, not logits: the head is linear, so head(u + w (c - u)) = u' + w (c' - u') with half the head's work and
    no [rows, V] tensor. kv_rows: rows of the K/V cache (default: the canvas rows); fewer where canvas rows share one (Plan.placed).
    """

    def __init__(
        self, model: Model, state: DecodeState, mask_id: int, guidance: Guidance | None = None, extra_slots: int = 0,
        soft: SoftState | None = None, kv_rows: int | None = None,
    ):  # fmt: skip
        self.model, self.state, self.mask_id, self.guidance, self.soft = model, state, mask_id, guidance, soft
        b, length = state.canvas.shape
        longest = length
        if guidance is not None and guidance.negative is not None:
            spans = [len(n) + r.end - r.start for n, r in zip(guidance.negative, state.rows, strict=True)]
            longest = max(length, *spans, 0) if spans else length
        self.kv_rows = b if kv_rows is None else kv_rows
        self.cache = model.new_cache(self.kv_rows * (2 if guidance else 1), longest + extra_slots)
        self.forbid = torch.tensor([mask_id], device=state.canvas.device)
        self.shifted = model.config.shifted
        self.attention_block = model.config.block_size if model.config.visibility == "block_causal" else None
        self.keep_logits = False
        self.kept: Kept | None = None
        self.runner: LayerRunner | None = None  # a cache that goes by layers runs them
        self._plan: Plan | None = None
        self._forward: Forward | None = None
        self._null: _NullEntries | None = None
        self._shadow: ShadowForward | None = None

    @property
    def logits_dtype(self) -> torch.dtype:
        return self.model.dtype

    def add_slots(self, extra: int) -> int:
        """Makes the K/V cache anew with `extra` more slots per row and returns the first of them. Before the first forward: what the old one
        held is gone. The old one goes first, so that the two are never both in memory."""
        assert self._plan is None, "a forward has written to the cache"
        rows, slots = self.cache.rows, self.cache.slots
        del self.cache
        self.cache = self.model.new_cache(rows, slots + extra)
        return slots

    def stats(self, plan: Plan, live: torch.Tensor, shadow: bool = False, **options) -> LogitStats:
        """Runs the forward of `plan` and reduces the logits of its live candidates. live: bool [N]. options: of `reduce`. shadow: candidates
        that are decided are read from a shadow block that does not see them (WINO)."""
        self._run(plan, shadow)
        return self.reduce(plan, live, **options)

    @torch.inference_mode()
    def store(self, row: int, start: int, end: int) -> torch.Tensor:
        """Forwards positions [start, end) of one row as they stand, which makes their K and V those of the tokens there now; hidden states
        [end - start, d_model]. For the authors' loops, which store prompts and finished blocks by forwards of their own."""
        self._run(make_plan(self.state, ((row, start, end, start, start),), self.shifted))
        return self.hidden[: end - start]

    def _run(self, plan: Plan, shadow: bool = False) -> None:
        """The forward of `plan`; its hidden states are kept."""
        if plan is not self._plan:
            self._plan = plan
            self._shadow = pack_shadow(self.state, plan, self.mask_id, self.shifted) if shadow else None
            self._forward = self._shadow.forward if self._shadow else self._packed(plan)
        forward = self._forward
        assert forward is not None
        n = plan.flat.shape[0]
        flat_ids = self.state.canvas.view(-1).index_select(0, plan.flat)
        if self._shadow is not None:
            forward.ids[self._shadow.real] = flat_ids
        else:
            forward.ids[:n] = flat_ids
        if self._null is not None:
            self._null.fill(forward.ids, n, self.state, flat_ids, plan, self.mask_id)
        if self.soft is not None:
            forward = self.soft.mixed(forward, plan, None if self._shadow is None else self._shadow.real)
        more = {} if self.runner is None else dict(runner=self.runner)
        self.hidden = self.model(forward, self.cache, **more)

    def rows_forwarded(self, plan: Plan) -> list[float]:
        """Positions that the last forward of this plan took, per entry: null inputs and shadow blocks count."""
        rows = [float(n) for n in plan.sizes]
        if self._null is not None:
            rows = [n + more for n, more in zip(rows, self._null.sizes, strict=True)]
        if self._shadow is not None:
            rows = [n + end - start for n, (*_, start, end) in zip(rows, plan.entries, strict=True)]
        return rows

    def reduce(self, plan: Plan, live: torch.Tensor, filters: dict[str, Any] | None = None, **options) -> LogitStats:
        """The reduction alone, over the hidden states of the last forward. filters: top_p, top_k, top_k_first; None = the clean softmax."""
        hidden, query = self._candidates(plan)
        rows = torch.where(live, query, -1)
        if self.keep_logits:
            self.kept = self._keep(hidden, rows)
            return reduce_logits(self.kept.logits, self.kept.rows, self.forbid, filters, options)
        head = self.model.head
        if filters is None:
            return head_stats(hidden, head, rows, forbid=self.forbid, **options)
        from ..ops.head_stats import head_filtered_stats

        own, more = split_options(options)
        stats = head_filtered_stats(hidden, head, rows, forbid=self.forbid, **filters, **own)
        return joined_stats(stats, head_stats(hidden, head, rows, forbid=self.forbid, **more)) if more else stats

    def _candidates(self, plan: Plan) -> tuple[torch.Tensor, torch.Tensor]:
        """Hidden states, and for each candidate the one that predicts it."""
        if self._shadow is not None:
            masked = self.state.masked.view(-1).index_select(0, plan.cand_flat)
            return self.hidden, self._shadow.query(plan, masked)
        if self.guidance is None:
            return self.hidden, plan.cand_query
        assert self._null is not None
        c = self.hidden.index_select(0, plan.cand_query).float()
        u = self.hidden.index_select(0, self._null.query(plan)).float()
        guided = (u + self.guidance.weight * (c - u)).to(self.hidden.dtype)
        return guided, torch.arange(guided.shape[0], device=guided.device)

    def _keep(self, hidden: torch.Tensor, rows: torch.Tensor) -> Kept:
        """Logits of the rows asked for: on the CPU of those alone, on CUDA of all candidates, which needs no count on the host."""
        if rows.device.type != "cpu":
            return Kept(self.model.head.logits(hidden.index_select(0, rows.clamp_min(0))), torch.where(rows < 0, -1, torch.arange(rows.shape[0], device=rows.device)))
        live = torch.nonzero(rows >= 0).flatten()
        place = torch.full_like(rows, -1)
        place[live] = torch.arange(live.shape[0])
        return Kept(self.model.head.logits(hidden.index_select(0, rows[live])), place)

    def _packed(self, plan: Plan) -> Forward:
        if plan.placed is not None:
            return self._packed_as_placed(plan, plan.placed)
        n, b = plan.flat.shape[0], self.kv_rows
        device = plan.flat.device
        visible = visible_ends(self.state, plan, self.attention_block)
        ends = visible.to(device)
        row, pos, cu_q, kv_row = [plan.token_row], [plan.token_pos], [plan.cu_q], [plan.row]
        spans = [ends]
        self._null = None
        if self.guidance is not None:  # the null copy has its own cache rows, b further down
            self._null = _NullEntries(self.state, plan, self.guidance, self.shifted)
            row.append(self._null.token_row + b)
            pos.append(self._null.token_pos)
            cu_q.append(self._null.cu[1:] + n)
            kv_row.append(plan.row + b)
            spans.append(ends if self.attention_block else self._null.ends)
        tokens = sum(r.shape[0] for r in row)
        total = pad_rows(tokens)
        row.append(torch.full((total - tokens,), -1, dtype=torch.int64, device=device))
        pos.append(torch.zeros(total - tokens, dtype=torch.int64, device=device))
        end = torch.cat(spans)
        seg = torch.stack([torch.zeros_like(end), end], dim=1).unsqueeze(1) if plan.keys is None else _segments(plan.keys, visible).to(device)
        position = torch.cat(pos)
        ids = torch.zeros(total, dtype=torch.int64, device=device)
        q_end = None if self.attention_block is None else (position // self.attention_block + 1) * self.attention_block
        return Forward(ids, torch.cat(row), position, position, torch.cat(cu_q), torch.cat(kv_row), seg, q_end)

    def _packed_as_placed(self, plan: Plan, placed: Placed) -> Forward:
        """The null copy of guidance is laid out as the conditional tokens are, kv_rows further down."""
        n, device = plan.flat.shape[0], plan.flat.device
        self._null = None if self.guidance is None else _NullEntries(self.state, plan, self.guidance, self.shifted)
        copies = 1 if self._null is None else 2
        total = pad_rows(n * copies)

        def tokens(value: torch.Tensor, fill: int) -> torch.Tensor:
            return torch.nn.functional.pad(value.repeat(copies), (0, total - n * copies), value=fill)

        row = torch.cat([plan.token_row + i * self.kv_rows for i in range(copies)])
        return Forward(
            torch.zeros(total, dtype=torch.int64, device=device),
            torch.nn.functional.pad(row, (0, total - row.shape[0]), value=-1),
            tokens(plan.token_pos, 0),
            tokens(placed.slot, -1),
            torch.cat([placed.cu_q, placed.cu_q[1:] + n]) if copies == 2 else placed.cu_q,
            torch.cat([placed.kv_row + i * self.kv_rows for i in range(copies)]),
            placed.seg.repeat(copies, 1, 1),
            None if placed.q_end is None else tokens(placed.q_end, 0),
            None if placed.mask is None else placed.mask.repeat(copies, 1, 1),
        )


def _segments(keys: tuple[Runs | None, ...], end: torch.Tensor) -> torch.Tensor:
    """int64 [B, G, 2]: (start, length) of what each entry sees; None: [0, end). On the host, as end is: caches that name keys take no guidance."""
    lists = [[(0, e)] if own is None else list(own) for own, e in zip(keys, end.tolist(), strict=True)]
    most = max(len(own) for own in lists)
    padded = [[(s, e - s) for s, e in own] + [(0, 0)] * (most - len(own)) for own in lists]
    return torch.tensor(padded, dtype=torch.int64)


def visible_ends(state: DecodeState, plan: Plan, attention_block: int | None) -> torch.Tensor:
    """int64 [B]: keys that exist for each entry: its canvas, or in a block-causal model what has been forwarded, up to the attention block's
    end (each token's own end then stands in q_end)."""
    if attention_block is None:
        return torch.tensor([state.rows[r].end for r, *_ in plan.entries])
    return torch.tensor([min(-(-e // attention_block) * attention_block, state.rows[r].end) for r, _, e, _, _ in plan.entries])


class _NullEntries:
    """The null input of guidance: the same windows with given tokens masked, or a negative prompt before each row's region (whole canvas).

    token_row, token_pos: int64 [T1]; cu: int64 [B+1] from 0; ends: int64 [B], visible keys. Null tokens follow the T0 conditional ones.
    """

    def __init__(self, state: DecodeState, plan: Plan, guidance: Guidance, shifted: bool):
        device = plan.flat.device
        self.negative: torch.Tensor | None = None
        self._shifted = shifted
        if guidance.negative is None:
            self.token_row, self.token_pos, self.cu = plan.token_row, plan.token_pos, plan.cu_q
            self.sizes = plan.sizes
            self.ends = torch.tensor([state.rows[r].end for r, *_ in plan.entries], device=device)
            return
        rows = [state.rows[r] for r, *_ in plan.entries]
        prompts = [list(guidance.negative[r.index]) for r in rows]
        self.sizes = sizes = [len(p) + r.end - r.start for p, r in zip(prompts, rows, strict=True)]
        self.cu = torch.tensor([0, *sizes]).cumsum(0).to(device)
        self.ends = torch.tensor(sizes, device=device)
        self.token_pos = torch.cat([torch.arange(s) for s in sizes]).to(device)
        self.token_row = torch.cat([torch.full((s,), r.index) for s, r in zip(sizes, rows, strict=True)]).to(device)
        length = state.canvas.shape[1]
        # source of each null token: an index of the flattened canvas, or -1 - i for the i-th id of the negative prompts
        self.negative = torch.tensor([t for p in prompts for t in p], dtype=torch.int64, device=device)
        source, seen = [], 0
        for p, r in zip(prompts, rows, strict=True):
            source.append(-1 - torch.arange(seen, seen + len(p)))
            source.append(torch.arange(r.start, r.end) + r.index * length)
            seen += len(p)
        self.source = torch.cat(source).to(device)
        self._offset = torch.tensor([len(p) - r.start for p, r in zip(prompts, rows, strict=True)], device=device) + self.cu[:-1]

    def query(self, plan: Plan) -> torch.Tensor:
        """int64 [N]: the token of the whole forward that predicts each candidate of a plan with the same windows."""
        n = plan.flat.shape[0]
        if self.negative is None:
            return plan.cand_query + n
        first = self.cu.index_select(0, plan.cand_entry)
        own = self._offset.index_select(0, plan.cand_entry) + plan.cand_pos
        return torch.maximum(own - int(self._shifted), first) + n

    def fill(self, ids: torch.Tensor, n: int, state: DecodeState, flat_ids: torch.Tensor, plan: Plan, mask_id: int) -> None:
        """Writes the null tokens behind the n conditional ones."""
        if self.negative is None:
            given = state.given.view(-1).index_select(0, plan.flat)
            ids[n : 2 * n] = torch.where(given, mask_id, flat_ids)
            return
        canvas = state.canvas.view(-1).index_select(0, self.source.clamp_min(0))
        prompt = self.negative.index_select(0, (-1 - self.source).clamp_min(0)) if self.negative.numel() else canvas
        ids[n : n + self.source.shape[0]] = torch.where(self.source >= 0, canvas, prompt)
