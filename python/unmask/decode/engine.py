"""The denoising loop: plan, forward, reduce, commit, advance. One forward per step for the whole batch."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Iterator
from typing import Protocol

import torch

from .. import ops
from ..errors import InvalidLogits, SettingError
from ..ops import LogitStats
from ..ops.info import Status
from .backend import Plan, make_plan
from .cache import window
from .policy import Policy
from .state import DecodeState, Row


class Backend(Protocol):
    """What the loop needs of a model. live: bool [N], the candidates whose statistics are wanted."""

    @property
    def logits_dtype(self) -> torch.dtype: ...
    def stats(self, plan: Plan, live: torch.Tensor, **options) -> LogitStats: ...
    def reduce(self, plan: Plan, live: torch.Tensor, **options) -> LogitStats: ...


@dataclasses.dataclass(frozen=True)
class Commit:
    """What one forward settled in one row, in order of (score desc, position asc). nfe: forwards of this row so far, with this one."""

    row: int
    block: int
    step: int
    nfe: int
    positions: list[int]
    ids: list[int]
    scores: list[float]
    masks_left: int


@dataclasses.dataclass(frozen=True)
class StepRecord:
    """One forward of the whole batch. commits is filled only when records are asked for."""

    forward: int
    seconds: float
    commits: list[Commit]


@dataclasses.dataclass
class Engine:
    """Runs a DecodeState to its end.

    cache: none | prefix | dual. eos_ids: ids that end a row once every position before them is decided; empty = never.
    min_steps: forwards that a block takes at least (the authors' loops run some that commit nothing). on_invalid: raise | skip.
    settled: called after a step with a row whose decided prefix may have grown; returns a finish reason or None (stop strings).
    """

    state: DecodeState
    backend: Backend
    policy: Policy
    cache: str = "none"
    eos_ids: tuple[int, ...] = ()
    min_steps: Callable[[Row], int] = lambda row: 0
    on_invalid: str = "raise"
    settled: Callable[[Row], str | None] | None = None
    record: bool = False

    def __post_init__(self):
        if self.on_invalid not in ("raise", "skip"):
            raise SettingError(f"on_invalid must be 'raise' or 'skip', got {self.on_invalid!r}")
        device = self.state.canvas.device
        self._eos = torch.tensor(self.eos_ids, dtype=torch.int64, device=device) if self.eos_ids else None
        self._suppress = torch.tensor(self.policy.suppress, dtype=torch.int64, device=device) if self.policy.suppress else None
        drops = self.policy.confidence_drops
        self._drops = torch.tensor([*drops, *self.policy.suppress], dtype=torch.int64, device=device) if drops else None
        self._plan: Plan | None = None

    def run(self) -> Iterator[StepRecord]:
        """Yields after every forward until no row is active."""
        forward = 0
        while rows := self.state.active:
            began = time.perf_counter()
            commits = self._step(rows)
            yield StepRecord(forward, time.perf_counter() - began, commits)
            forward += 1

    @torch.inference_mode()
    def _step(self, rows: list[Row]) -> list[Commit]:
        state, policy = self.state, self.policy
        entries = tuple(
            (r.index, *window(self.cache, r.step == 0, r.block_start, r.block_end, r.end), r.block_start, r.block_end) for r in rows
        )
        if self._plan is None or self._plan.entries != entries:
            self._plan = make_plan(state, entries)
        plan = self._plan

        live = state.masked.view(-1).index_select(0, plan.cand_flat)
        key = self._key(plan, rows)
        noise = dict(temperature=policy.temperature, **key) if policy.temperature > 0 else {}
        stats = self.backend.stats(plan, live, suppress=self._suppress, **noise)
        eligible = self._check(stats, plan, rows)
        if self._drops is not None:
            # the probability of the chosen token once the dropped ids are gone: 0 for a dropped id itself
            clean = self.backend.reduce(plan, live, suppress=self._drops, ids=stats.token.unsqueeze(1))
            log_p = clean.at_ids[:, 0, 0]
            stats.p.copy_(log_p.exp())
            stats.p_rest.copy_(-torch.expm1(log_p))
        score = policy.scores(stats, self.backend.logits_dtype, **key)
        result = ops.commit(
            state.canvas, state.masked, plan.cu, plan.row, plan.cand_pos, stats.token, score,
            rule=policy.rule_id, params=policy.params, eligible=eligible, quota=self._quota(rows), threshold=self._threshold(rows),
        )  # fmt: skip
        return self._advance(plan, rows, stats, score, result)

    def _key(self, plan: Plan, rows: list[Row]) -> dict[str, torch.Tensor]:
        """Randomness is keyed by the row's own seed, its forward count and the position: never by the batch."""
        if self.policy.temperature <= 0 and self.policy.score != "random":
            return dict(seed=plan.cand_row, step=plan.cand_row, pos=plan.cand_pos)  # not read
        step = torch.tensor([r.nfe for r in rows], dtype=torch.int64, device=plan.cu.device)
        return dict(
            seed=self.state.seeds.index_select(0, plan.cand_row), step=step.index_select(0, plan.cand_entry), pos=plan.cand_pos
        )

    def _quota(self, rows: list[Row]) -> torch.Tensor | None:
        if self.policy.rule != "quota":
            return None
        quota = [r.quotas[r.step] if r.step < len(r.quotas) else 0 for r in rows]
        return torch.tensor(quota, dtype=torch.int64, device=self.state.canvas.device)

    def _threshold(self, rows: list[Row]) -> torch.Tensor | None:
        if self.policy.rule != "threshold":
            return None
        return torch.full((len(rows),), float(self.policy.threshold), dtype=torch.float64, device=self.state.canvas.device)

    def _check(self, stats: LogitStats, plan: Plan, rows: list[Row]) -> torch.Tensor | None:
        """Invalid logits: raise, or end their rows and return which candidates may still commit."""
        if not bool(stats.status.any()):
            return None
        bad = torch.nonzero(stats.status).flatten()
        if self.on_invalid == "raise":
            i = int(bad[0])
            row = rows[int(plan.cand_entry[i])]
            raise InvalidLogits(
                f"row {row.index}, step {row.nfe}, position {int(plan.cand_pos[i])}: {Status(int(stats.status[i])).describe()}; "
                "on_invalid='skip' ends such rows and goes on with the others"
            )
        ended = plan.cand_entry[bad].unique()
        for entry in ended.tolist():
            rows[entry].finish_reason = "invalid"
        return state_eligible(self.state, plan) & ~torch.isin(plan.cand_entry, ended)

    def _advance(self, plan: Plan, rows: list[Row], stats: LogitStats, score: torch.Tensor, result: ops.CommitResult) -> list[Commit]:
        left = result.left.tolist()
        commits = self._records(plan, rows, stats, score, result, left) if self.record else []
        ended = self._eos_reached(plan) if self._eos is not None else None
        for entry, row in enumerate(rows):
            row.nfe += 1
            row.step += 1
            if not row.active:
                continue
            if self.settled is not None and (reason := self.settled(row)):
                row.finish_reason = reason  # a stop string stands before the EOS that came in the same step
            elif ended is not None and ended[entry]:
                row.finish_reason = "eos"
            elif left[entry] == 0 and row.step >= self.min_steps(row):
                self.state.next_block(row)
        return commits

    def _eos_reached(self, plan: Plan) -> list[bool]:
        """Per entry: is there an end-of-sequence id that was decided, with every position before it decided too?"""
        canvas, masked = self.state.canvas.index_select(0, plan.row), self.state.masked.index_select(0, plan.row)
        decided = ~self.state.given.index_select(0, plan.row)
        length = canvas.shape[1]
        eos = torch.isin(canvas, self._eos) & decided & ~masked
        position = torch.arange(length, device=canvas.device)
        first_eos = torch.where(eos, position, length).amin(1)
        first_mask = torch.where(masked, position, length).amin(1)
        return (first_eos < first_mask).tolist() if length else [False] * plan.row.shape[0]

    def _records(self, plan, rows, stats, score, result, left) -> list[Commit]:
        out = []
        bounds = plan.cu.tolist()
        for entry, row in enumerate(rows):
            span = slice(bounds[entry], bounds[entry + 1])
            chosen = torch.nonzero(result.committed[span]).flatten()
            triples = sorted(
                zip(
                    (-score[span][chosen]).tolist(), plan.cand_pos[span][chosen].tolist(), stats.token[span][chosen].tolist(), strict=True
                )
            )
            out.append(
                Commit(
                    row.index, row.block, row.step, row.nfe + 1, [p for _, p, _ in triples], [t for _, _, t in triples],
                    [-s for s, _, _ in triples], left[entry],
                )  # fmt: skip
            )
        return out


def state_eligible(state: DecodeState, plan: Plan) -> torch.Tensor:
    """bool [N]: candidates that are still undecided."""
    return state.masked.view(-1).index_select(0, plan.cand_flat)
