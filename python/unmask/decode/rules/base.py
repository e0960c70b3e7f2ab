"""What a rule sees of a step, and what it answers. Every tensor stays on the device; nothing here waits for it.

Shapes: N candidate positions of the step, packed row after row; B entries, one per active row.
"""

from __future__ import annotations

import dataclasses
from functools import cached_property
from typing import TYPE_CHECKING, Any

import torch

from ...ops import LogitStats
from ...ops import Rule as CommitRule

if TYPE_CHECKING:
    from ..backend import Plan
    from ..policy import Policy
    from ..state import DecodeState, Row

LOWEST = torch.finfo(torch.float64).min
"""Orders behind every score that a model gives."""


@dataclasses.dataclass(frozen=True)
class Run:
    """What a rule knows of its run: policy, state, the mask token, the dtype of the model's logits, and the backend (for rules with a
    forward of their own)."""

    policy: Policy
    state: DecodeState
    mask_id: int
    backend: Any = None

    @property
    def device(self) -> torch.device:
        return self.state.canvas.device


class StepView:
    """One step: the candidates of the active rows, with what was decided before it.

    entry, pos, flat: int64 [N]: entry of each candidate, its position, its index in the flattened canvas. masked: bool [N], undecided and
    reached by the forward (a cache may leave positions out: they wait).
    token, stats: after the reduction, `stats` is the LogitStats of the candidates (zeros where none was wanted).
    """

    def __init__(self, state: DecodeState, rows: list[Row], plan: Plan, sampled: bool):
        self.state, self.rows, self.plan, self.sampled = state, rows, plan, sampled
        self.stats: LogitStats | None = None

    @property
    def entry(self) -> torch.Tensor:
        return self.plan.cand_entry

    @property
    def pos(self) -> torch.Tensor:
        return self.plan.cand_pos

    @property
    def flat(self) -> torch.Tensor:
        return self.plan.cand_flat

    @property
    def entries(self) -> int:
        return self.plan.row.shape[0]

    @property
    def device(self) -> torch.device:
        return self.plan.cu.device

    @cached_property
    def masked(self) -> torch.Tensor:
        masked = self.state.masked.view(-1).index_select(0, self.flat)
        return masked if self.plan.reached is None else masked & self.plan.reached

    @cached_property
    def given(self) -> torch.Tensor:
        return self.state.given.view(-1).index_select(0, self.flat)

    @cached_property
    def canvas(self) -> torch.Tensor:
        """int64 [N]: the candidates' tokens before the step."""
        return self.state.canvas.view(-1).index_select(0, self.flat)

    @cached_property
    def inside(self) -> torch.Tensor:
        """bool [N]: within the row's block (a rule may look at candidates behind it)."""
        return self.pos < self.spread(self.per_entry([r.block_end for r in self.rows]))

    @cached_property
    def offset(self) -> torch.Tensor:
        """int64 [N]: positions behind the block's start."""
        return self.pos - self.spread(self.per_entry([r.block_start for r in self.rows]))

    @cached_property
    def key(self) -> dict[str, torch.Tensor]:
        """Randomness is keyed by the row's own seed, its forward count and the position: never by the batch."""
        if not self.sampled:
            return dict(seed=self.plan.cand_row, step=self.plan.cand_row, pos=self.pos)  # not read
        step = self.per_entry([r.nfe for r in self.rows])
        return dict(seed=self.state.seeds.index_select(0, self.plan.cand_row), step=self.spread(step), pos=self.pos)

    def per_entry(self, values: list, dtype: torch.dtype = torch.int64) -> torch.Tensor:
        """[B] from one number per active row."""
        return torch.tensor(values, dtype=dtype, device=self.device)

    def spread(self, value: torch.Tensor) -> torch.Tensor:
        """[B] -> [N]: every candidate gets its entry's value."""
        return value.index_select(0, self.entry)

    def count(self, chosen: torch.Tensor) -> torch.Tensor:
        """int64 [B]: how many of the candidates of each entry are chosen (bool [N])."""
        if self.entries == 1:
            return chosen.sum(0, keepdim=True)
        return torch.zeros(self.entries, dtype=torch.int64, device=self.device).index_add_(0, self.entry, chosen.long())

    def highest(self, value: torch.Tensor, among: torch.Tensor) -> torch.Tensor:
        """[B]: the largest value among the chosen candidates of each entry, -inf where there is none."""
        low = torch.full((self.entries,), -torch.inf, dtype=value.dtype, device=self.device)
        return low.scatter_reduce_(0, self.entry, value.masked_fill(~among, -torch.inf), "amax")

    def rank(self, score: torch.Tensor, among: torch.Tensor) -> torch.Tensor:
        """int64 [N]: place of each chosen candidate in commit order (score desc, position asc) within its entry, from 0; others come after.

        Candidates of an entry lie in rising positions, so stable sorts give the order. The lowest number stands for a NaN or -inf that is
        chosen, so that what is not chosen comes behind it.
        """
        key = torch.where(among, score.double().nan_to_num(LOWEST, torch.inf, LOWEST), -torch.inf)
        order = torch.argsort(key, descending=True, stable=True)
        if self.entries > 1:
            order = order[torch.argsort(self.entry[order], stable=True)]
        place = torch.empty_like(order)
        place[order] = torch.arange(order.shape[0], device=self.device)
        return place - self.spread(self.plan.cu[:-1]) if self.entries > 1 else place

    def total(self, value: torch.Tensor) -> torch.Tensor:
        """[B]: sum of a value over the candidates of each entry, one by one in order, so that its bits do not depend on other entries."""
        if self.entries == 1:
            return value[None, :].cumsum(1)[:, -1]
        return self.table(value, torch.arange(value.shape[0], device=self.device) - self.spread(self.plan.cu[:-1])).cumsum(1)[:, -1]

    def table(self, value: torch.Tensor, place: torch.Tensor, fill: float = 0.0) -> torch.Tensor:
        """[B, width]: value of each candidate in column `place` of its entry's row; so that sums along a row never see other entries."""
        sizes = [e[4] - e[3] for e in self.plan.entries]
        out = value.new_full((self.entries, max(sizes)), fill)
        out[self.entry, place] = value
        return out

    def best(self, score: torch.Tensor, among: torch.Tensor) -> torch.Tensor:
        """bool [N]: the first of each entry in commit order, among the chosen ones."""
        return among & (self.rank(score, among) == 0)


@dataclasses.dataclass
class Selection:
    """Arguments of the commit op: `chosen` (bool [N]) commits exactly those candidates; else the rule counts."""

    score: torch.Tensor
    rule: CommitRule = CommitRule.QUOTA
    quota: torch.Tensor | None = None
    threshold: torch.Tensor | None = None
    params: list[float] = dataclasses.field(default_factory=list)
    cost: torch.Tensor | None = None
    eligible: torch.Tensor | None = None
    editable: torch.Tensor | None = None


class Rule:
    """Base of the rules. A rule object belongs to one run and may keep device state between its steps."""

    revises = False  # may change decided positions: an EOS then counts only once its block is done
    edits = False  # decided positions of the block are candidates too
    wants_logits = False  # the backend keeps the logits of the candidates (KLASS)
    scope = "block"  # candidates: the row's block, or "canvas", everything from the block's start on

    def __init__(self, run: Run):
        self.run = run
        self.knobs = run.policy.knobs

    def joined(self, row: Row) -> None:
        """A new row takes the place of a finished one: what is kept over steps of row.index is forgotten."""

    def candidates(self, row: Row) -> tuple[int, int]:
        """[start, end) of the row's candidate positions at this step."""
        return row.block_start, row.end if self.scope == "canvas" else row.block_end

    def wanted(self, step: StepView) -> torch.Tensor:
        """bool [N]: candidates whose statistics are computed."""
        return step.masked

    def options(self, step: StepView) -> dict[str, Any]:
        """More arguments of the reduction."""
        return {}

    def scored(self, step: StepView, stats: LogitStats) -> LogitStats:
        """The statistics as this rule reads them: a rule may change token and p in place."""
        return stats

    def select(self, step: StepView, stats: LogitStats, score: torch.Tensor) -> Selection:
        raise NotImplementedError

    def after(self, step: StepView, stats: LogitStats, selection: Selection, committed: torch.Tensor) -> torch.Tensor | None:
        """Called once the tokens are written; bool [N]: decided candidates that return to masks, or None. committed: bool [N]."""
        return None

    def flags(self, step: StepView) -> torch.Tensor | None:
        """int64 [B] that `finished` wants, read together with the counts of masks."""
        return None

    def finished(self, row: Row, left: int, flag: int) -> bool:
        """Whether the row's block is done. left: undecided positions in it."""
        return left == 0

    def exactly(self, step: StepView, score: torch.Tensor, chosen: torch.Tensor) -> Selection:
        """Commits the chosen candidates, whatever their score."""
        return Selection(score, quota=torch.full((step.entries,), chosen.shape[0], dtype=torch.int64, device=step.device), eligible=chosen)
