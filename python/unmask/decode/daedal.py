"""DAEDAL (Li et al., arXiv 2508.00819; Li-Jinsong/DAEDAL): the answer's length is found while decoding.

| stage | a forward |
|---|---|
| 1, measuring | sees the prompt and nothing but masks. Is the end-of-sequence confidence below eos_threshold: `expansion` more masks, again. Else eos_window / 2 end tokens follow the masks, and stage 2 begins |
| 2, denoising | commits the block's positions with p > high_threshold, else the best. Is the confidence below expand_threshold: the block's least sure position, if below low_threshold, becomes `expansion` masks |

The answer is never longer than max_new_tokens: growth stops there, tail and insertions are cut there. Every row goes through the stages at its
own pace (with guidance the batch measures first, because stage 1 is not guided, as in the authors' code). Rows run to their end; nothing stops
at an end-of-sequence token.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch

from .. import ops
from ..ops import LogitStats
from ..ops import Rule as CommitRule
from .backend import NativeBackend, Plan, make_plan
from .engine import Commit, StepRecord
from .growth import eos_confidence, first_masked, insertion_source, lowest
from .invalid import report_invalid
from .module_backend import ModuleBackend
from .policy import Policy
from .rules.base import StepView
from .state import DecodeState, Row

MEASURING = -1  # Row.block of a row in stage 1


@dataclasses.dataclass(frozen=True)
class Lengthening(Commit):
    """A Commit of a row that may have grown. block: -1 in stage 1. positions: before the step's insertion. inserted: (position, n): behind
    the commit, n masks stand from there on, in stage 1 behind the last position, in stage 2 in place of the mask that was there. length:
    positions of the answer after the step."""

    inserted: list[tuple[int, int]] = dataclasses.field(default_factory=list)
    length: int = 0


@dataclasses.dataclass(frozen=True)
class _Decided:
    """What a step found, all on the device: int64 or bool [B] per entry, [N] per candidate."""

    clean: LogitStats  # without noise, of the answers as far as they are looked at
    drawn: LogitStats  # with noise, of the undecided positions of the blocks
    sound: torch.Tensor  # rows whose logits are valid
    committed: torch.Tensor  # bool [N]
    at: torch.Tensor  # position that becomes masks, L where none
    grow: torch.Tensor  # stage 1 goes on with more masks
    settle: torch.Tensor  # stage 1 is over


class Daedal:
    """Runs a DecodeState to its end, as `Engine` does. Built on a state whose rows have all the positions that they may come to have.

    knobs: decode.daedal_knobs, resolved. eos_ids: at least one; an end is any of them, the tail is made of the first. stops: rows whose
    answer holds an end are reported as "eos". settled: as in `Engine`.
    """

    rule = None  # has no rule of the policy table: what commits is DAEDAL's own

    def __init__(
        self, state: DecodeState, backend: NativeBackend | ModuleBackend, policy: Policy, knobs: Mapping[str, Any], eos_ids: tuple[int, ...],
        *, stops: bool = True, on_invalid: str = "raise", settled: Callable[[Row], str | None] | None = None, record: bool = False,
    ):  # fmt: skip
        self.state, self.backend, self.policy, self.knobs = state, backend, policy, knobs
        self.stops, self.on_invalid, self.settled, self.record = stops, on_invalid, settled, record
        self.block_size = state.schedule.block_size
        device = state.canvas.device
        self._eos = torch.tensor(eos_ids, dtype=torch.int64, device=device)
        self._suppress = torch.tensor(policy.suppress, dtype=torch.int64, device=device) if policy.suppress else None
        self._guidance = backend.guidance
        self._last: tuple[object, Plan] | None = None
        self._limits = [row.end for row in state.rows]
        for row in state.active:
            row.end = row.block_end = row.start + knobs["initial_tokens"]
            row.block, row.block_start = MEASURING, row.start
        position = torch.arange(state.canvas.shape[1], device=device)
        start, end = (torch.tensor(x, dtype=torch.int64, device=device) for x in ([r.start for r in state.rows], [r.end for r in state.rows]))
        state.given &= position < start[:, None]
        state.masked &= position < end[:, None]

    def run(self) -> Iterator[StepRecord]:
        """Yields after every forward until no row is active."""
        forward = 0
        while rows := self._rows():
            began = time.perf_counter()
            commits = self._step(rows)
            yield StepRecord(forward, time.perf_counter() - began, commits)
            forward += 1

    def _rows(self) -> list[Row]:
        rows = self.state.active
        if self._guidance is None:
            return rows
        return [r for r in rows if r.block == MEASURING] or rows

    def _plan(self, rows: list[Row]) -> Plan:
        """Whole canvases, as long as they are now; every position of the answer is a candidate. Kept while no length changes."""
        entries = tuple((r.index, 0, r.end, r.start, r.end) for r in rows)
        key = entries, self.backend.guidance is None
        if self._last is None or self._last[0] != key:
            self._last = key, make_plan(self.state, entries, self.backend.shifted)
        return self._last[1]

    @torch.inference_mode()
    def _step(self, rows: list[Row]) -> list[Commit]:
        # with guidance all rows of a step are in the same stage
        self.backend.guidance = None if rows[0].block == MEASURING else self._guidance
        step = StepView(self.state, rows, self._plan(rows), self.policy.sampled)
        measuring = step.per_entry([r.block == MEASURING for r in rows], torch.bool)
        end = step.per_entry([r.end for r in rows])
        limit = step.per_entry([self._limits[r.index] for r in rows])
        decided = self._decide(step, measuring, end < limit)
        return self._rewrite(step, decided, measuring, end, limit)

    def _decide(self, step: StepView, measuring: torch.Tensor, roomy: torch.Tensor) -> _Decided:
        """The forward, the commit, and which rows grow. measuring, roomy: bool [B], in stage 1; shorter than they may be."""
        state, knobs, plan, temperature = self.state, self.knobs, step.plan, self.policy.temperature
        undecided = step.masked & step.inside & ~step.spread(measuring)
        # end-of-sequence confidence looks at the whole answer, unless nothing hangs on it
        looks = measuring | (roomy & (knobs["expand_threshold"] > 0))
        live = undecided | step.spread(looks)
        clean = self.backend.stats(plan, live, suppress=self._suppress)
        sound = step.count(clean.status != 0) == 0  # a row with invalid logits stays as it is; the host learns of it with the step's facts
        undecided = undecided & step.spread(sound)
        drawn = clean
        if temperature > 0:
            drawn = self.backend.reduce(plan, undecided, suppress=self._suppress, temperature=temperature, **step.key)
        sure = eos_confidence(torch.isin(clean.token, self._eos), clean.confidence, step.entry, plan.cu, knobs["eos_window"])
        score = drawn.confidence
        bar = torch.full_like(sure, knobs["high_threshold"])
        committed = ops.commit(
            state.canvas, state.masked, plan.cu, plan.row, plan.cand_pos, drawn.token, score,
            rule=CommitRule.THRESHOLD_STRICT, eligible=undecided, threshold=bar,
        ).committed  # fmt: skip
        lost = undecided & ~committed & (score < knobs["low_threshold"])
        opens = roomy & ~measuring & (sure < knobs["expand_threshold"])
        at = lowest(score, lost & step.spread(opens), step.entry, step.pos, step.entries, state.canvas.shape[1])
        grow = sound & roomy & measuring & (sure < knobs["eos_threshold"])
        return _Decided(clean, drawn, sound, committed, at, grow, sound & measuring & ~grow)

    def _rewrite(self, step: StepView, d: _Decided, measuring: torch.Tensor, end: torch.Tensor, limit: torch.Tensor) -> list[Commit]:
        """Lengthens canvas, masked and given together, then reads what the host has to know, once."""
        state, row, expansion = self.state, step.plan.row, self.knobs["expansion"]
        length = state.canvas.shape[1]
        inserts = d.at < length
        added = inserts * (expansion - 1) + d.grow * expansion + d.settle * (self.knobs["eos_window"] // 2)
        new_end = torch.minimum(end + added, limit)
        source = insertion_source(d.at, expansion, length)
        position = torch.arange(length, device=row.device)
        within = position < new_end[:, None]
        fresh = within & (position >= end[:, None]) & measuring[:, None]
        fill = torch.where(d.grow, self.backend.mask_id, self._eos[0])
        canvas = torch.where(fresh, fill[:, None], state.canvas.index_select(0, row).gather(1, source))
        masked = torch.where(fresh, d.grow[:, None], state.masked.index_select(0, row).gather(1, source)) & within
        given = state.given.index_select(0, row).gather(1, source) & within
        for whole, part in ((state.canvas, canvas), (state.masked, masked), (state.given, given)):
            whole.index_copy_(0, row, part)
        first = first_masked(masked)
        block_end = torch.where(measuring, new_end, step.per_entry([r.block_end for r in step.rows]))
        left = (masked & (position < block_end[:, None])).sum(1)
        holds_eos = (torch.isin(canvas, self._eos) & within & ~masked & ~given).any(1)
        facts = torch.stack([new_end, first, left, holds_eos.long(), d.grow.long(), d.at, (~d.sound).long()]).tolist()
        report_invalid(step, d.clean, facts.pop(), self.on_invalid)
        return self._advance(step, d, list(zip(*facts, strict=True)))

    def _advance(self, step: StepView, d: _Decided, facts: list[tuple[int, ...]]) -> list[Commit]:
        forwarded = self.backend.rows_forwarded(step.plan)
        commits = self._records(step, d, facts) if self.record else []
        commits = [dataclasses.replace(c, rows=n) for c, n in zip(commits, forwarded, strict=True)] if commits else commits
        for row, n, (end, first, _, holds_eos, grows, _) in zip(step.rows, forwarded, facts, strict=True):
            row.nfe += 1
            row.step += 1
            row.forwarded += n
            if not row.active:
                continue
            measured, row.end = row.block == MEASURING, end
            if measured and grows:
                row.block_end = end
            elif self.settled is not None and (reason := self.settled(row)):
                row.finish_reason = reason
            elif first >= end:
                row.finish_reason = "eos" if self.stops and holds_eos else "length"
            else:  # over blocks that hold no mask; no mask stands before the current one
                start = row.start if measured else row.block_start + (first - row.block_start) // self.block_size * self.block_size
                if measured or start != row.block_start:
                    row.step = 0
                row.block, row.block_start = (start - row.start) // self.block_size, start
                row.block_end = min(start + self.block_size, end)
        return commits

    def _records(self, step: StepView, d: _Decided, facts: list[tuple[int, ...]]) -> list[Commit]:
        bounds, score, out = step.plan.cu.tolist(), d.drawn.confidence, []
        for entry, (row, (end, _, left, _, grows, at)) in enumerate(zip(step.rows, facts, strict=True)):
            span = slice(bounds[entry], bounds[entry + 1])
            chosen = torch.nonzero(d.committed[span]).flatten()
            parts = (-score[span][chosen]).tolist(), step.pos[span][chosen].tolist(), d.drawn.token[span][chosen].tolist()
            triples = sorted(zip(*parts, strict=True))
            inserted = []
            if grows:
                inserted = [(row.end, end - row.end)]
            elif at < self.state.canvas.shape[1]:
                inserted = [(at, min(self.knobs["expansion"], end - at))]
            out.append(
                Lengthening(
                    row.index, row.block, row.step, row.nfe + 1, [p for _, p, _ in triples], [t for _, _, t in triples],
                    [-s for s, _, _ in triples], left, inserted=inserted, length=end - row.start,
                )  # fmt: skip
            )
        return out
