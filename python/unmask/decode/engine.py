"""The denoising loop: plan, forward, reduce, score, commit, revise, advance. One forward per step for the whole batch."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Protocol

import torch

from .. import ops
from ..errors import SettingError
from ..ops import LogitStats
from .backend import Plan, make_plan
from .caches import CacheRule, CacheRun, Runs, read_cache
from .invalid import report_invalid
from .policy import Policy
from .rules.base import Run, Selection, StepView
from .scores import Score
from .state import DecodeState, Row


class Backend(Protocol):
    """What the loop needs of a model. live: bool [N], the candidates whose statistics are wanted."""

    shifted: bool
    keep_logits: bool
    attention_block: int | None  # length of the blocks of a block-causal model

    @property
    def logits_dtype(self) -> torch.dtype: ...
    def stats(self, plan: Plan, live: torch.Tensor, shadow: bool = False, **options) -> LogitStats: ...
    def reduce(self, plan: Plan, live: torch.Tensor, **options) -> LogitStats: ...
    def rows_forwarded(self, plan: Plan) -> list[float]: ...


@dataclasses.dataclass(frozen=True)
class Commit:
    """What one forward settled in one row, in order of (score desc, position asc). nfe: forwards of this row so far, with this one.

    edited: (position, old id, new id, score) of decided tokens that were replaced. remasked: (position, old id) of decided tokens that
    returned to masks. rows: positions that the forward took of this row. filled: the whole canvas with every undecided position's prediction, before the commit, if asked for.
    drafted, accepted: speculation, of the forward's first commit of this row: nodes beside the row itself, and those that counted.
    """

    row: int
    block: int
    step: int
    nfe: int
    positions: list[int]
    ids: list[int]
    scores: list[float]
    masks_left: int
    edited: list[tuple[int, int, int, float]] = dataclasses.field(default_factory=list)
    remasked: list[tuple[int, int]] = dataclasses.field(default_factory=list)
    filled: list[int] | None = None
    rows: float = 0.0
    drafted: int | None = None
    accepted: int = 0


@dataclasses.dataclass(frozen=True)
class StepRecord:
    """One forward of the whole batch. commits is filled only when records are asked for."""

    forward: int
    seconds: float
    commits: list[Commit]


@dataclasses.dataclass
class Engine:
    """Runs a DecodeState to its end.

    cache: a CacheRule or its name (decode/caches). eos_ids: ids that end a row once every position before them is decided; empty = never.
    eos_at_block_end: only when the row's block is done.
    min_steps: forwards that a block takes at least (the authors' loops run some that commit nothing); max_steps: forwards after which a
    block ends even with masks left (None: no limit). on_invalid: raise | skip. settled: called after a step with a row whose decided
    prefix may have grown; returns a finish reason or None (stop strings). after_commit: called once the step's tokens are written (templates
    settle their fields there). predictions: records hold the canvas filled with every prediction. shifted_window: how a cached window takes
    account of shifted logits: "extended" begins one position earlier, so that every candidate is predicted by the right token; "block"
    does not, and its first position predicts itself (Fast-dLLM's Dream); "moved" begins and ends one earlier (d2Cache). block_done: called
    with a row whose block is done, before it moves on (the authors' loops store a finished block by a forward of its own there).
    """

    state: DecodeState
    backend: Backend
    policy: Policy
    cache: str | CacheRule = "none"
    eos_ids: tuple[int, ...] = ()
    eos_at_block_end: bool = False
    min_steps: Callable[[Row], int] = lambda row: 0
    max_steps: Callable[[Row], int | None] = lambda row: None
    on_invalid: str = "raise"
    settled: Callable[[Row], str | None] | None = None
    after_commit: Callable[[StepView], None] | None = None
    record: bool = False
    predictions: bool = False
    shifted_window: str = "extended"
    block_done: Callable[[Row], None] | None = None

    def __post_init__(self):
        if self.on_invalid not in ("raise", "skip"):
            raise SettingError(f"on_invalid must be 'raise' or 'skip', got {self.on_invalid!r}")
        device = self.state.canvas.device
        policy = self.policy
        self._eos = torch.tensor(self.eos_ids, dtype=torch.int64, device=device) if self.eos_ids else None
        self._suppress = torch.tensor(policy.suppress, dtype=torch.int64, device=device) if policy.suppress else None
        drops = policy.confidence_drops
        self._drops = torch.tensor([*drops, *policy.suppress], dtype=torch.int64, device=device) if drops else None
        self._filters = policy.filters
        run = Run(policy, self.state, int(self.backend.mask_id), self.backend)
        self.rule = policy.lower(run)
        self.backend.keep_logits = self.rule.wants_logits
        self._score = Score(run)
        self._soft = getattr(self.backend, "soft", None)
        # d2Cache knows no block-causal models: there finished blocks stay exact, whatever the variant
        ported = policy.knobs.get("variant") == "d2cache" and self.backend.attention_block is None
        moved = self.shifted_window == "moved" or ported
        self._lag = 1 if self.backend.shifted and (moved or self.shifted_window == "extended") else 0
        self._cut = 1 if self.backend.shifted and moved else 0
        self._plans: dict[tuple, Plan] = {}
        shift = int(self.backend.shifted)
        self._cache = read_cache(self.cache).start(CacheRun(self.state, self.backend, policy, shift, self.state.schedule.block_size))
        if self._cache.runner is not None:
            self.backend.runner = self._cache.runner
        self.filled = self.state.canvas.clone() if self.predictions else None

    def run(self) -> Iterator[StepRecord]:
        """Yields after every forward until no row is active."""
        forward = 0
        while rows := self.state.active:
            began = time.perf_counter()
            commits = self._step(rows)
            yield StepRecord(forward, time.perf_counter() - began, commits)
            forward += 1

    def join(self, ids: Sequence[int], given: Sequence[bool], seed: int = 0) -> Row:
        """A new row joins the batch between two steps, in the place of a finished one (or of one that the state was made with room for). It gets
        the tokens that it gets alone. ids, given: its canvas, as in DecodeState. Raises ValueError where there is no room, SettingError where
        guidance was asked for (null inputs are laid out for the whole run)."""
        if getattr(self.backend, "guidance", None) is not None:
            raise SettingError("rows cannot join a batch with guidance; start another one, or leave cfg_scale out")
        row = self.state.join(ids, given, seed)
        for part in (self.rule, self._cache, self._soft):
            if part is not None:
                part.joined(row)
        if self.filled is not None:
            self.filled[row.index] = self.state.canvas[row.index]
        self._plans.clear()
        return row

    def _plan(self, rows: list[Row], candidates: Callable[[Row], tuple[int, int]]) -> Plan:
        """The plan of a step; rows mostly stay in the same windows, so the last few are kept."""
        cache, runs = self._cache, []
        entries = tuple(self._entry(r, candidates, runs) for r in rows)
        keys = tuple(cache.keys(r) for r in rows)
        key = entries, tuple(runs), keys
        plan = self._plans.get(key)
        if plan is None:
            if len(self._plans) >= 4:
                self._plans.clear()
            seen = keys if any(k is not None for k in keys) else None
            plan = self._plans[key] = make_plan(self.state, entries, self.backend.shifted, tuple(runs) or None, seen)
        return plan

    def _entry(self, row: Row, candidates: Callable[[Row], tuple[int, int]], runs: list[Runs]) -> tuple[int, int, int, int, int]:
        """The row's entry of a plan; where the cache forwards no window, its positions are appended to `runs`."""
        cache = self._cache
        first, last = candidates(row)
        if cache.windowed:
            start, end = cache.window(row)
            if start:
                start, end = start - self._lag, end - self._cut
            last = min(last, end + self._cut)
        else:
            runs.append(cache.runs(row))
            start, end = runs[-1][0][0], runs[-1][-1][1]
        return row.index, start, end, first, last

    @torch.inference_mode()
    def _step(self, rows: list[Row]) -> list[Commit]:
        step, stats, invalid, entropy = self._measure(rows)
        stats, selection = self._choose(step, stats)
        valid = self._valid(step, invalid)
        before = step.masked, step.canvas  # what the candidates held, read before the write
        result = self._write(step, stats, selection, valid)
        remasked = self.rule.after(step, stats, selection, result.committed)
        if remasked is not None:
            remasked = remasked & valid
            _remask(self.state, step, remasked, self.backend.mask_id)
        if self.after_commit is not None:
            self.after_commit(step)
        if self._soft is not None:
            self._soft.note(step, stats, entropy)
        self._cache.committed(step, stats, result.committed)
        return self._advance(step, stats, selection, result, remasked, before, invalid)

    def _measure(self, rows: list[Row]) -> tuple[StepView, LogitStats, torch.Tensor, torch.Tensor]:
        """The forward and its statistics: (step, stats, bool [B] entries with invalid logits, entropies that soft masks weigh by)."""
        state, policy, rule = self.state, self.policy, self.rule
        opening = [state.schedule.adaptive and r.step == 0 for r in rows]
        if any(opening):
            looks = dict(zip((r.index for r in rows), opening, strict=True))
            plan = self._plan(rows, lambda r: self._wide(r) if looks[r.index] else rule.candidates(r))
        else:
            plan = self._plan(rows, rule.candidates)
        step = StepView(state, rows, plan, policy.sampled)
        live = rule.wanted(step)
        shared = dict(suppress=self._suppress, filters=self._filters, **rule.options(step))
        if self._soft is not None:
            shared |= self._soft.options()
        noise = dict(temperature=policy.temperature, **step.key) if policy.temperature > 0 else {}
        shadow = dict(shadow=True) if getattr(rule, "shadow", False) else {}
        self._cache.begin(plan)
        stats = self.backend.stats(plan, live, **shadow, **shared, **noise)
        if policy.repetition_penalty != 1.0:
            stats = self.backend.reduce(plan, live, **self._penalised(step, stats, live, shared), **noise)
        invalid = self._invalid(step, stats)
        if self.filled is not None:
            self._fill(step, stats)
        if any(opening):
            if bool(invalid.any()):  # an adaptive schedule reads the device here anyway
                self._report(step, stats, invalid.tolist())
            step, stats, plan, live = self._settle(step, stats, opening, live)
        entropy = stats.entropy
        if self._soft is not None and self._filters is not None:  # soft masks weigh by the whole distribution, whatever tokens are drawn from
            entropy = self.backend.reduce(plan, live, suppress=self._suppress).entropy
        if self._drops is not None:
            # the probability of the chosen token once the dropped ids are gone: 0 for a dropped id itself
            clean = self.backend.reduce(plan, live, suppress=self._drops, ids=stats.token.unsqueeze(1))
            log_p = clean.at_ids[:, 0, 0]
            stats.p.copy_(log_p.exp())
            stats.p_rest.copy_(-torch.expm1(log_p))
        return step, stats, invalid, entropy

    def _choose(self, step: StepView, stats: LogitStats) -> tuple[LogitStats, Selection]:
        """The statistics as the rule reads them, and what it selects."""
        stats = self.rule.scored(step, stats)
        step.stats = stats
        selection = self.rule.select(step, stats, self._score(step, stats, self.backend.logits_dtype))
        return stats, _forced_first(step, selection) if self.policy.forced_first else selection

    def _valid(self, step: StepView, invalid: torch.Tensor) -> torch.Tensor:
        """bool [N]: candidates of entries without invalid logits, where the forward reached them."""
        valid = ~step.spread(invalid)
        return valid if step.plan.reached is None else valid & step.plan.reached

    def _write(self, step: StepView, stats: LogitStats, selection: Selection, valid: torch.Tensor) -> ops.CommitResult:
        """Commits what is selected, among the valid candidates (bool [N])."""
        state, plan = self.state, step.plan
        eligible = valid if selection.eligible is None else selection.eligible & valid
        if selection.editable is not None:
            selection.editable = selection.editable & valid
        return ops.commit(
            state.canvas, state.masked, plan.cu, plan.row, plan.cand_pos, stats.token, selection.score,
            rule=selection.rule, params=selection.params, cost=selection.cost, eligible=eligible, editable=selection.editable,
            quota=selection.quota, threshold=selection.threshold,
        )  # fmt: skip

    def _wide(self, row: Row) -> tuple[int, int]:
        """Candidates of a row whose schedule is about to decide where its block ends."""
        first, last = self.rule.candidates(row)
        return first, max(self.state.schedule.look(row), last)

    def _settle(self, step: StepView, stats: LogitStats, opening: list[bool], live: torch.Tensor):
        """An adaptive schedule decides where blocks end; what lies behind them is no candidate of this step."""
        state, rows = self.state, step.rows
        plain = state.schedule.plain and (self.policy.temperature > 0 or self._filters is not None)
        ends = state.schedule.settle(step, self.backend.reduce(step.plan, live, suppress=self._suppress) if plain else stats, opening)
        for row, end, opens in zip(rows, ends, opening, strict=True):
            if opens:
                state.settle_block(row, end)
        entries, kept, begin = [], [], 0
        for (*where, first, last), row, opens in zip(step.plan.entries, rows, opening, strict=True):
            end = min(self.rule.candidates(row)[1], last) if opens else last
            entries.append((*where, first, end))
            kept.append(torch.arange(begin, begin + end - first))
            begin += last - first
        keep = torch.cat(kept).to(step.device)
        plan = make_plan(state, tuple(entries), self.backend.shifted, step.plan.runs, step.plan.keys)
        stats = LogitStats(*(t.index_select(0, keep) for t in stats))
        return StepView(state, rows, plan, self.policy.sampled), stats, plan, live.index_select(0, keep)

    def _penalised(self, step: StepView, stats: LogitStats, live: torch.Tensor, shared: dict) -> dict:
        """Arguments of a second reduction with the repetition penalty as a bias on the ids that each row holds (CTRL, arXiv 1909.05858)."""
        state, penalty = self.state, self.policy.repetition_penalty
        held = state.canvas.masked_fill(state.masked, -1)
        length = torch.tensor([r.end for r in state.rows], device=held.device)
        held = held.masked_fill(torch.arange(held.shape[1], device=held.device) >= length[:, None], -1)
        held = held.sort(1).values
        held[:, 1:] = torch.where(held[:, 1:] == held[:, :-1], -1, held[:, 1:])  # each id once
        ids = held.index_select(0, step.plan.cand_row)
        # a decided token is not a repetition of itself: its own position does not count
        others = self._holders(step) - (~step.masked).long()
        ids = torch.where((ids == step.canvas[:, None]) & (others == 0)[:, None], -1, ids)
        raw = {k: v for k, v in shared.items() if k not in ("filters", "ids", "topk")}
        logit = self.backend.reduce(step.plan, live, **raw, ids=ids).at_ids[:, :, 1]
        finite = logit.isfinite() & (ids >= 0)
        bias = torch.where(finite, torch.where(logit > 0, logit / penalty, logit * penalty) - logit, 0.0)
        if "bias_ids" in shared:
            ids, bias = torch.cat([shared["bias_ids"], ids], 1), torch.cat([shared["bias"], bias], 1)
        return shared | dict(bias_ids=ids.contiguous(), bias=bias.contiguous())

    def _holders(self, step: StepView) -> torch.Tensor:
        """int64 [N]: at how many decided positions of its row each candidate's token stands."""
        state = self.state
        position = torch.arange(state.canvas.shape[1], device=step.device)
        end = step.per_entry([r.end for r in step.rows])
        decided = ~state.masked.index_select(0, step.plan.row) & (position < end[:, None])
        row = torch.where(decided, state.canvas.index_select(0, step.plan.row), -1)
        return (row.index_select(0, step.entry) == step.canvas[:, None]).sum(1)

    def _invalid(self, step: StepView, stats: LogitStats) -> torch.Tensor:
        """bool [B]: rows with invalid logits. They commit nothing at this step; the host learns of them when it reads the step's flags."""
        return step.count(stats.status != 0) > 0

    def _report(self, step: StepView, stats: LogitStats, invalid: list[int]) -> None:
        """Invalid logits: raise, or end their rows."""
        report_invalid(step, stats, invalid, self.on_invalid)

    def _advance(
        self, step: StepView, stats: LogitStats, selection: Selection, result: ops.CommitResult, remasked: torch.Tensor | None, before,
        invalid: torch.Tensor,
    ) -> list[Commit]:  # fmt: skip
        """Reads the step's flags, once for all of them, and moves the rows."""
        rule, rows = self.rule, step.rows
        inside = step.inside if rule.scope == "canvas" else None
        left_now = result.left
        if remasked is not None or inside is not None or self.after_commit is not None:
            now = self.state.masked.view(-1).index_select(0, step.flat)
            left_now = step.count(now if inside is None else now & inside)
        nothing = torch.zeros_like(left_now)
        flags = rule.flags(step)
        ended = self._eos_reached(step.plan) if self._eos is not None else nothing
        left, flag, over, bad = torch.stack([left_now, nothing if flags is None else flags, ended.long(), invalid.long()]).tolist()
        self._report(step, stats, bad)
        forwarded = self._cache.rows_forwarded(step.plan, self.backend.rows_forwarded(step.plan))
        commits = self._records(step, stats, selection, result, remasked, left, before, forwarded) if self.record else []
        for entry, row in enumerate(rows):
            row.nfe += 1
            row.forwarded += forwarded[entry]
            self._move(row, left[entry], flag[entry], bool(over[entry]))
        self._cache.moved([row for row in rows if row.active])
        return commits

    def _move(self, row: Row, left: int, flag: int, over: bool) -> None:
        """A step of the row is done. left: undecided positions of its block; flag: the rule's; over: an EOS ends it."""
        rule = self.rule
        row.step += 1
        self._cache.forwarded(row)
        if not row.active:
            return
        limit = self.max_steps(row)
        done = rule.finished(row, left, flag) and row.step >= self.min_steps(row)
        done = done or (limit is not None and row.step >= limit)
        if self.settled is not None and (done or not rule.revises) and (reason := self.settled(row)):
            row.finish_reason = reason  # a stop string stands before the EOS that came in the same step
        elif over and (done or not (rule.revises or self.eos_at_block_end)):
            row.finish_reason = "eos"
        elif done:
            if self.block_done is not None:
                self.block_done(row)
            self.state.next_block(row)

    def _eos_reached(self, plan: Plan) -> torch.Tensor:
        """bool [B]: is there an end-of-sequence id that was decided, with every position before it decided too?"""
        canvas, masked = self.state.canvas.index_select(0, plan.row), self.state.masked.index_select(0, plan.row)
        decided = ~self.state.given.index_select(0, plan.row)
        eos = torch.isin(canvas, self._eos) & decided & ~masked
        length = canvas.shape[1]
        position = torch.arange(length, device=canvas.device)
        return torch.where(eos, position, length).amin(1) < torch.where(masked, position, length).amin(1)

    def _fill(self, step: StepView, stats: LogitStats) -> None:
        """Notes the prediction of every undecided position that this forward reached; the others keep their last one."""
        assert self.filled is not None
        self.filled = torch.where(self.state.masked, self.filled, self.state.canvas)
        wide = self._plan(step.rows, lambda r: (r.block_start, r.end))
        masked = self.state.masked.view(-1).index_select(0, wide.cand_flat)
        if wide.reached is not None:
            masked = masked & wide.reached
        policy, rest = self.policy, stats
        if wide.entries != step.plan.entries or policy.temperature > 0 or policy.repetition_penalty != 1.0:
            # the model's own best tokens, and the rule's logits of this step stay as they are
            keep, self.backend.keep_logits = self.backend.keep_logits, False
            rest = self.backend.reduce(wide, masked, suppress=self._suppress)
            self.backend.keep_logits = keep
        flat = self.filled.view(-1)
        flat[wide.cand_flat] = torch.where(masked & (rest.token >= 0), rest.token, flat[wide.cand_flat])

    def _records(self, step: StepView, stats, selection, result, remasked, left, before, forwarded) -> list[Commit]:
        out = []
        bounds = step.plan.bounds
        score = selection.score
        was_masked, old = before
        for entry, row in enumerate(step.rows):
            span = slice(bounds[entry], bounds[entry + 1])
            committed, masked = result.committed[span], was_masked[span]
            chosen = torch.nonzero(committed & masked).flatten()
            pos, token = step.pos[span], stats.token[span]
            triples = sorted(zip((-score[span][chosen]).tolist(), pos[chosen].tolist(), token[chosen].tolist(), strict=True))
            edits = torch.nonzero(committed & ~masked).flatten()
            edited = list(zip(pos[edits].tolist(), old[span][edits].tolist(), token[edits].tolist(), score[span][edits].tolist(), strict=True))
            back: list[tuple[int, int]] = []
            if remasked is not None:
                gone = torch.nonzero(remasked[span]).flatten()
                back = list(zip(pos[gone].tolist(), old[span][gone].tolist(), strict=True))
            filled = self.filled[row.index, : row.end].tolist() if self.filled is not None else None
            out.append(
                Commit(
                    row.index, row.block, row.step, row.nfe + 1, [p for _, p, _ in triples], [t for _, _, t in triples],
                    [-s for s, _, _ in triples], left[entry], edited, back, filled, forwarded[entry],
                )  # fmt: skip
            )
        return out


def _forced_first(step: StepView, selection: Selection) -> Selection:
    """On a block's first step its first position alone commits, even where the rule takes none; on others the selection stands."""
    opens = step.per_entry([r.step == 0 for r in step.rows], torch.bool)
    chosen = torch.where(step.spread(opens), step.offset == 0, True if selection.eligible is None else selection.eligible)
    quota = None if selection.quota is None else torch.where(opens, selection.quota.clamp_min(1), selection.quota)
    return dataclasses.replace(selection, eligible=chosen, quota=quota)


def _remask(state: DecodeState, step: StepView, chosen: torch.Tensor, mask_id: int) -> None:
    """Decided candidates return to masks; given positions never do."""
    chosen = chosen & ~step.given
    canvas, masked = state.canvas.view(-1), state.masked.view(-1)
    now = canvas.index_select(0, step.flat)
    canvas.index_copy_(0, step.flat, torch.where(chosen, mask_id, now))
    masked.index_copy_(0, step.flat, masked.index_select(0, step.flat) | chosen)
