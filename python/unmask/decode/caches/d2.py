"""d2Cache (arXiv 2509.23094; Kamichanw/d2Cache, src/cache/d2cache.py): which positions are worth recomputing is chosen anew at every step.

The first forward of a row takes everything. After a step, the next one forwards the union of

1. the current_k undecided positions of the highest confidence times certainty density, those of the row's block first. They are looked for
   from the block's start to the current_k-th undecided position, rounded up to a multiple of m positions from the region's start, where m is
   the number of positions that the block had undecided at this step. Confidence is the policy's score (confidence, margin, entropy, pc; for
   others the confidence) at the row's first forward. (Both are what the authors' code does: its block mask holds undecided positions only,
   and its update of the confidences never takes effect.) Density: Gaussian share of decided positions around it, as of
   Settings.certainty_sigma. Entropies are negative: what the authors' code adds to put the block's positions first puts them back there, and
   does so here;
2. the positions that this step decided;
3. of all others the smallest set that attention rollout gives the share rollout_p of what it gives them all, at least one: with A the mean of
   a layer's attention over its heads, the product over layers of (A + I) / 2 (rows that were not forwarded: I), summed over queries;
4. with inflate_w > 0 everything between two chosen positions at most that far apart.

K and V of what is forwarded are rewritten; those of all others stay as they are, and are seen. With shifted logits position i is predicted at
i - 1, so (1) forwards that one instead of i, and the last position before the region only where (1) wants it, as the authors' Dream code does.

Differences from the authors' code: rows of a batch forward sets of their own sizes (they top up the smaller ones to the largest); a position
that was not recomputed is no candidate (there it has probability 1 / vocabulary); (1) takes at least one position of the row's block; where
tokens are drawn, confidence is still that of the likeliest.
One read of the device per step more than without a cache: the positions chosen.
"""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, ClassVar

import torch

from ...errors import SettingError
from ..rules.base import StepView
from ..scores import Score
from ._layers import QueryKeeper, received
from .base import Cache, CacheRule, CacheRun, Runs, runs_of

if TYPE_CHECKING:
    from ...models.config import ModelConfig
    from ...ops import LogitStats
    from ..backend import Plan
    from ..policy import Policy
    from ..state import Row

SCORED = ("margin", "entropy", "pc")
"""Scores of a policy that take the place of the confidence."""
REFUSED = {
    "slowfast": "its stretch may hold none of the positions that this cache recomputes",
    "edit": "it corrects decided tokens, and this cache recomputes few of them",
}


@dataclasses.dataclass(frozen=True)
class D2(CacheRule):
    """d2Cache. rollout_p: share of the rollout, 0..1. current_k: undecided positions recomputed per step. sigma: width of the density, in
    positions, 0.01..10000. inflate_w: 0 (as the authors' configurations) or the gap that is filled (their class says 4). refresh: everything at
    every refresh-th forward of a row (0: only at its first; 1: always, which is exact)."""

    rollout_p: float = 0.1
    current_k: int = 32
    sigma: float = 10.0
    inflate_w: int = 0
    refresh: int = 0
    name: ClassVar[str] = "d2"
    source: ClassVar[str] = "d2Cache, arXiv 2509.23094"
    forwards: ClassVar[str] = "everything at a row's first step, then likely masks, what was just decided, and what attention rollout points to"
    every_position: ClassVar[bool] = False

    def __post_init__(self):
        self._number("rollout_p", 0.0, 1.0)
        self._integer("current_k", 1)
        self._number("sigma", 0.01, 1e4)
        self._integer("inflate_w", 0)
        self._integer("refresh", 0)

    def exact(self, config: ModelConfig) -> bool:
        return self.refresh == 1

    def check(self, policy: Policy, config: ModelConfig) -> None:
        if not self.exact(config):
            refuse_partial(self, policy)

    def start(self, run: CacheRun) -> Cache:
        return _D2(self, run)


def refuse_partial(rule: CacheRule, policy: Policy) -> None:
    """Raises SettingError for policies that need positions which this cache may leave out."""
    if policy.rule in REFUSED:
        why = REFUSED[policy.rule]
        raise SettingError(f"policy={policy.rule!r} needs a cache that forwards its whole block, got cache={str(rule)!r}: {why}; use cache='dual'")


class _D2(Cache):
    windowed = False

    def __init__(self, rule: D2, run: CacheRun):
        super().__init__(rule, run)
        self._queries = QueryKeeper()
        self.runner = None if rule.refresh == 1 else self._queries
        canvas = run.state.canvas
        self._suppress = torch.tensor(run.policy.suppress, dtype=torch.int64, device=run.device) if run.policy.suppress else None
        self._confidence = torch.full(canvas.shape, -torch.inf, dtype=torch.float32, device=run.device)  # of each position at its row's first forward
        self._score = Score(run) if run.policy.score in SCORED else None
        self._rollout = torch.zeros(canvas.shape, dtype=torch.float32, device=run.device)
        self._before, self._masked = canvas, run.state.masked  # as the last forward saw them
        self._block: dict[int, tuple[int, int]] = {}  # of each row, at its last forward
        self._next: dict[int, Runs] = {}

    def _whole(self, row: Row) -> bool:
        return row.nfe == 0 or bool(self.rule.refresh and row.nfe % self.rule.refresh == 0)

    def window(self, row: Row) -> tuple[int, int]:
        return 0, row.end

    def runs(self, row: Row) -> Runs:
        return ((0, row.end),) if self._whole(row) else self._next[row.index]

    def begin(self, plan: Plan) -> None:
        self._before, self._masked = self.run.state.canvas.clone(), self.run.state.masked.clone()

    def committed(self, step: StepView, stats: LogitStats, committed: torch.Tensor) -> None:
        if self.rule.refresh == 1:
            return
        self._note_confidence(step)
        self._block.update((row.index, (row.block_start, row.block_end)) for row in step.rows)
        model, state = self.run.backend.model, self.run.state
        first = 0
        for (index, *_), size in zip(step.plan.entries, step.plan.sizes, strict=True):
            span, end = slice(first, first + size), state.rows[index].end
            first += size
            where = step.plan.token_pos[span]
            share = torch.ones(end, dtype=torch.float32, device=step.device)
            for layer in reversed(range(len(model.backbone.layers))):
                k = self.run.backend.cache.k[layer, index, :, :end]
                own = share.index_select(0, where)
                given = received(self._queries.layers[layer], span, k, model.backbone.layers[layer].scale, own)
                share = share.index_copy(0, where, own / 2).add_(given, alpha=0.5)
            self._rollout[index, :end] = share
        self._queries.layers.clear()

    def _note_confidence(self, step: StepView) -> None:
        """The scores of the likeliest tokens, of every undecided position of the rows whose first forward this was."""
        from ..backend import make_plan  # which imports this package

        state, backend, plan = self.run.state, self.run.backend, step.plan
        if not any(row.nfe == 0 for row in step.rows):
            return
        spans = [(row.start, row.end if row.nfe == 0 else row.start) for row in step.rows]
        entries = tuple((*where, *span) for (*where, _, _), span in zip(plan.entries, spans, strict=True))
        wide = make_plan(state, entries, backend.shifted, plan.runs, plan.keys)
        keep, backend.keep_logits = backend.keep_logits, False  # a rule's logits of this step stay as they are
        masked = self._masked.view(-1).index_select(0, wide.cand_flat)
        stats = backend.reduce(wide, masked, suppress=self._suppress)
        backend.keep_logits = keep
        score = stats.confidence if self._score is None else self._score.plain(StepView(state, step.rows, wide, False), stats, backend.logits_dtype)
        self._confidence.view(-1).index_copy_(0, wide.cand_flat, torch.where(masked, score.float(), -torch.inf))

    def moved(self, rows: list[Row]) -> None:
        rows = [row for row in rows if not self._whole(row)]
        if not rows:
            return
        chosen = torch.zeros((len(rows), self.run.state.canvas.shape[1]), dtype=torch.bool, device=self.run.device)
        for place, row in enumerate(rows):
            chosen[place, : row.end] = self._choose(row)
        for row, own in zip(rows, chosen.cpu(), strict=True):
            self._next[row.index] = runs_of(own[: row.end])

    def _choose(self, row: Row) -> torch.Tensor:
        """bool [row.end]: what the row forwards next."""
        state, rule, start, end = self.run.state, self.rule, row.start, row.end
        masked, canvas = state.masked[row.index, :end], state.canvas[row.index, :end]
        picked = self._likely(row, masked)
        ahead = picked
        if self.run.backend.shifted:
            ahead = torch.cat([picked[1:], picked[:1] & False])
            ahead[0] |= picked[0]  # nothing predicts the first position but itself
        query = ahead | (canvas != self._before[row.index, :end])
        if self.run.backend.shifted and start:
            query[start - 1] = False
        query |= nucleus(self._rollout[row.index, :end], float(rule.rollout_p), ~query)
        if self.run.backend.shifted and start:
            query[start - 1] = picked[start]
        return inflated(query, rule.inflate_w) if rule.inflate_w else query

    def _likely(self, row: Row, masked: torch.Tensor) -> torch.Tensor:
        """bool [row.end]: the undecided positions that are recomputed."""
        start, end, k = row.start, row.end, self.rule.current_k
        region = masked[start:]
        place = torch.arange(end - start, device=region.device)
        begin, stop = self._block[row.index]
        step = self._masked[row.index, begin:stop].sum().clamp_min(1)
        last = (region.cumsum(0) < k).sum().clamp_max(end - start - 1)  # the k-th undecided position, the last one where there are fewer
        among = region & (place < (last // step + 1) * step)
        confidence = self._confidence[row.index, start:end].double()
        score = torch.where(confidence == -torch.inf, confidence, confidence * density(~region, float(self.rule.sigma)))
        order = self._ranked(score, among)
        first = self._first(order, among & (place < stop - start), k)
        if self.run.policy.score == "entropy":
            first = self._ranked(torch.where(place < stop - start, score + score.max(), score), among)[:k]
        own = among & (place < row.block_end - start)  # another block where the step ended the one before
        plain = first if stop == row.block_end else order[:k]
        chosen = torch.where(own[plain].any(), plain, self._first(order, own, k))
        picked = torch.zeros_like(masked)
        picked[start:].index_fill_(0, chosen, True)
        picked[start:] &= among
        return picked

    @staticmethod
    def _ranked(score: torch.Tensor, among: torch.Tensor) -> torch.Tensor:
        """int64 [n]: the positions, those of `among` first, in falling order of score."""
        return torch.argsort(torch.where(among, score, -torch.inf), descending=True, stable=True)

    @staticmethod
    def _first(order: torch.Tensor, preferred: torch.Tensor, k: int) -> torch.Tensor:
        """The first k of an order in which the preferred ones come first."""
        return order[torch.argsort((~preferred).long()[order], stable=True)][:k]


def density(decided: torch.Tensor, sigma: float) -> torch.Tensor:
    """float64 [n]: Gaussian-weighted share of decided positions around each of n. What lies left of them counts as decided for n positions,
    what lies right does if the last one is; weights are normalised by their sum over 3 n positions to either side."""
    n = decided.shape[0]
    flank = decided.new_ones(n)
    signal = torch.cat([flank, decided, flank & decided[-1]]).double()
    distance = torch.arange(3 * n, device=decided.device).double()
    kernel = torch.exp(-(distance**2) / (2 * sigma**2))
    both = torch.cat([kernel, kernel.new_zeros(1), kernel[1:].flip(0)])  # distances 0, 1, ..., none, ..., -1
    near = torch.fft.irfft(torch.fft.rfft(signal, both.shape[0]) * torch.fft.rfft(both), both.shape[0])[n : 2 * n]
    norm = 2 * kernel.sum() - kernel[0] + torch.exp(-distance.new_tensor(9.0 * n * n) / (2 * sigma**2))
    return near / norm.clamp_min(1e-8)


def nucleus(score: torch.Tensor, p: float, among: torch.Tensor) -> torch.Tensor:
    """bool [n]: of the positions in `among` those that lead, in falling order of score, while their shares sum to at most p; at least one."""
    share = torch.where(among, score, 0.0)
    share = share / (share.sum() + 1e-9)
    order = torch.argsort(share, descending=True, stable=True)
    chosen = share[order].cumsum(0) <= p
    chosen[:1] = True
    out = torch.zeros_like(among)
    out[order] = chosen
    return out & among


def inflated(chosen: torch.Tensor, width: int) -> torch.Tensor:
    """bool [n]: with the positions between two chosen ones at most `width` apart."""
    n = chosen.shape[0]
    place = torch.arange(n, device=chosen.device)
    before = torch.where(chosen, place, -1).cummax(0).values
    after = torch.where(chosen, place, n).flip(0).cummin(0).values.flip(0)
    return chosen | ((after - before <= width) & (before >= 0) & (after < n))
