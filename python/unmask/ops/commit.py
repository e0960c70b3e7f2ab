"""`commit`: which positions of each row are decided at this step, and the write of their tokens."""

from __future__ import annotations

import enum
from collections.abc import Sequence
from typing import NamedTuple

import torch

from .. import _library as _library  # noqa: F401  (loads _C)


class Rule(enum.IntEnum):
    """How many of the ordered candidates commit (csrc/common/commit_rules.h)."""

    QUOTA = 0  # min(quota[b], live)
    THRESHOLD = 1  # score >= threshold[b], at least 1
    THRESHOLD_STRICT = 2  # score > threshold[b], at least 1
    FACTOR = 3  # largest n with (n + 1)(1 - score_(n)) < params[0], at least 1
    FACTOR_AUTHORS = 4  # FACTOR as Fast-dLLM's code has it (off by one at the last rank)
    ENTROPY_BOUND = 5  # largest k with sum(cost[:k]) - max(cost[:k]) <= params[0], at least 1


class CommitResult(NamedTuple):
    committed: torch.Tensor  # bool [N]: written at this call (edits too)
    count: torch.Tensor  # int64 [B]: masked positions that were decided
    left: torch.Tensor  # int64 [B]: candidates of the entry that are still masked


def commit(
    canvas: torch.Tensor,
    masked: torch.Tensor,
    cu: torch.Tensor,
    row: torch.Tensor,
    pos: torch.Tensor,
    token: torch.Tensor,
    score: torch.Tensor,
    *,
    rule: Rule | int,
    params: Sequence[float] = (),
    cost: torch.Tensor | None = None,
    eligible: torch.Tensor | None = None,
    editable: torch.Tensor | None = None,
    quota: torch.Tensor | None = None,
    threshold: torch.Tensor | None = None,
    status: torch.Tensor | None = None,
) -> CommitResult:
    """Orders each entry's live candidates by (score descending, position ascending), lets `rule` say how many, writes their tokens.

    canvas: int64 [R, L] and masked: bool [R, L] are written in place (`canvas = token`, `masked = False`). Entry b owns candidates
    cu[b]:cu[b+1] (cu int64 [B+1], rising) on canvas row row[b] (int64 [B]; -1 = skip). pos, token: int64 [N]; score: float32 or float64 [N].

    A candidate is live where its position is masked, `eligible` (bool [N], default all) is set, token >= 0 and score is not NaN. Of
    several live candidates for one position only the best counts (score, then lowest token). Rules in double precision:

    - QUOTA: `quota` int64 [B]. THRESHOLD, THRESHOLD_STRICT: `threshold` float32 or float64 [B]. FACTOR, FACTOR_AUTHORS: params[0] > 0.
      ENTROPY_BOUND: `cost` float32 [N] and params[0] >= 0. A tensor or number that the rule does not use is not read.
    - `editable` (bool [N]) lets decided positions change: not masked, editable, token >= 0 and different, score > params[1]: overwritten
      and reported in `committed`, not in `count`.

    Every rule but QUOTA commits at least one live candidate. Positions that are not masked and not editable never change; entries do
    not influence each other.

    Bad contents set bits in status[b] (int32 [B], bits are added) and leave the entry alone, outputs 0: row out of range BAD_ROW, a
    position out of range BAD_SLOT, cu out of range or falling, or a negative quota BAD_SEGMENT, a NaN threshold NAN_SCORE. A NaN
    score (or cost, under ENTROPY_BOUND) of a candidate sets NAN_SCORE and skips that candidate only.

    RuntimeError for wrong dtypes, devices, shapes, an unknown rule or a missing argument.
    """
    return CommitResult(
        *torch.ops.unmask.commit(
            canvas, masked, cu, row, pos, token, score, cost, eligible, editable, int(rule), params, quota, threshold, status
        )
    )


@torch.library.register_fake("unmask::commit")
def _(
    canvas, masked, cu, row, pos, token, score, cost, eligible, editable, rule, params, quota, threshold, status=None
):
    return (
        canvas.new_empty(pos.shape, dtype=torch.bool),
        canvas.new_empty(row.shape, dtype=torch.int64),
        canvas.new_empty(row.shape, dtype=torch.int64),
    )
