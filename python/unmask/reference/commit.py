"""`commit` as plain Python over lists: order, rule, write."""

from __future__ import annotations

import math

import torch

from ..ops.commit import CommitResult, Rule
from ..ops.info import Status
from . import _check

_OP = "commit"


def count_quota(scores: list[float], quota: int) -> int:
    return min(quota, len(scores))


def count_threshold(scores: list[float], threshold: float, *, strict: bool) -> int:
    passing = sum(s > threshold if strict else s >= threshold for s in scores)
    return max(passing, min(1, len(scores)))


def count_factor(scores: list[float], factor: float) -> int:
    """Largest n with (n + 1)(1 - score_n) < factor (Fast-dLLM, theorem 1), at least 1."""
    passing = [n for n, s in enumerate(scores, 1) if (n + 1) * (1.0 - s) < factor]
    return max([*passing, min(1, len(scores))])


def count_factor_authors(scores: list[float], factor: float) -> int:
    """Fast-dLLM's code: bar 1 - factor / (n + 1) at rank n, none at rank 1; a first failure at the last rank commits that rank too."""
    failures = [i for i, s in enumerate(scores) if i > 0 and s < 1.0 - factor / (i + 2)]
    if not failures or failures[0] == len(scores) - 1:
        return len(scores)
    return failures[0]


def count_entropy_bound(costs: list[float], gamma: float) -> int:
    """Largest k with sum(costs[:k]) - max(costs[:k]) <= gamma, at least 1 (EB-Sampler)."""
    passing = [k for k in range(1, len(costs) + 1) if math.fsum(costs[:k]) - max(costs[:k]) <= gamma]
    return max([*passing, min(1, len(costs))])


def _best_per_position(found: list[tuple[float, int, int, int, float]]) -> list[tuple[float, int, int, int, float]]:
    """Of the (score, position, token, index, cost) of one position keeps the best: highest score, lowest token, first."""
    best: dict[int, tuple[float, int, int, int, float]] = {}
    for item in sorted(found, key=lambda c: (-c[0], c[2], c[3])):
        best.setdefault(item[1], item)
    return list(best.values())


def commit(
    canvas,
    masked,
    cu,
    row,
    pos,
    token,
    score,
    *,
    rule,
    params=(),
    cost=None,
    eligible=None,
    editable=None,
    quota=None,
    threshold=None,
    status=None,
) -> CommitResult:
    """See `unmask.ops.commit`."""
    _check_arguments(
        canvas, masked, cu, row, pos, token, score, cost, eligible, editable, rule, params, quota, threshold, status
    )
    rule = Rule(rule)
    n, batch = pos.shape[0], row.shape[0]
    committed = torch.zeros(n, dtype=torch.bool)
    count, left = torch.zeros(batch, dtype=torch.int64), torch.zeros(batch, dtype=torch.int64)
    bounds, highest = cu.tolist(), 0
    for b in range(batch):
        begin, end, r = bounds[b], bounds[b + 1], int(row[b])
        highest = max(highest, begin)
        bits = _entry_fault(canvas, begin, end, highest, n, r, pos, rule, quota, threshold, b)
        if r == -1 and bits != Status.BAD_SEGMENT:
            continue
        if bits == Status.OK:
            live, edits = [], []
            for i in range(begin, end):
                p, new, s = int(pos[i]), int(token[i]), float(score[i])
                c = float(cost[i]) if rule is Rule.ENTROPY_BOUND else 0.0
                is_masked = bool(masked[r, p])
                if is_masked:
                    wanted = eligible is None or bool(eligible[i])
                else:
                    wanted = editable is not None and bool(editable[i])
                if not wanted or new < 0:
                    continue
                if math.isnan(s) or (is_masked and math.isnan(c)):
                    bits |= Status.NAN_SCORE
                elif is_masked:
                    live.append((s, p, new, i, c))
                elif new != int(canvas[r, p]) and s > params[1]:
                    edits.append((s, p, new, i, c))
            live = sorted(_best_per_position(live), key=lambda c: (-c[0], c[1]))
            chosen = live[: _how_many(rule, [c[0] for c in live], [c[4] for c in live], params, quota, threshold, b)]
            for _, p, new, i, _ in chosen + _best_per_position(edits):
                canvas[r, p], masked[r, p], committed[i] = new, False, True
            count[b] = len(chosen)
            left[b] = sum(bool(masked[r, int(p)]) for p in pos[begin:end])
        if bits and status is not None:
            status[b] |= int(bits)
    return CommitResult(committed, count, left)


def _entry_fault(canvas, begin, end, highest, n, r, pos, rule, quota, threshold, b) -> Status:
    rows, length = canvas.shape
    if not highest <= begin <= end <= n:
        return Status.BAD_SEGMENT
    if not 0 <= r < rows:
        return Status.BAD_ROW
    if any(not 0 <= int(p) < length for p in pos[begin:end]):
        return Status.BAD_SLOT
    if rule is Rule.QUOTA and int(quota[b]) < 0:
        return Status.BAD_SEGMENT
    if rule in (Rule.THRESHOLD, Rule.THRESHOLD_STRICT) and math.isnan(float(threshold[b])):
        return Status.NAN_SCORE
    return Status.OK


def _how_many(rule, scores, costs, params, quota, threshold, b) -> int:
    if rule is Rule.QUOTA:
        return count_quota(scores, int(quota[b]))
    if rule in (Rule.THRESHOLD, Rule.THRESHOLD_STRICT):
        return count_threshold(scores, float(threshold[b]), strict=rule is Rule.THRESHOLD_STRICT)
    if rule is Rule.FACTOR:
        return count_factor(scores, params[0])
    if rule is Rule.FACTOR_AUTHORS:
        return count_factor_authors(scores, params[0])
    if rule is Rule.ENTROPY_BOUND:
        return count_entropy_bound(costs, params[0])
    raise AssertionError(f"no case for {rule!r}")


def _check_arguments(
    canvas, masked, cu, row, pos, token, score, cost, eligible, editable, rule, params, quota, threshold, status
) -> None:
    _check.dtype(_OP, torch.int64, canvas=canvas)
    _check.dtype(_OP, torch.bool, masked=masked)
    _check.dtype(_OP, torch.int64, cu=cu, row=row, pos=pos, token=token)
    _check.real(_OP, score=score, threshold=threshold)
    _check.dtype(_OP, torch.float32, cost=cost)
    _check.dtype(_OP, torch.bool, eligible=eligible, editable=editable)
    _check.dtype(_OP, torch.int64, quota=quota)
    _check.dtype(_OP, torch.int32, status=status)
    _check.shape(_OP, "canvas", canvas, "[R, L]", (-1, -1))
    _check.shape(_OP, "masked", masked, "[R, L]", tuple(canvas.shape))
    _check.shape(_OP, "row", row, "[B]", (-1,))
    batch = row.shape[0]
    _check.shape(_OP, "cu", cu, "[B + 1]", (batch + 1,))
    _check.shape(_OP, "pos", pos, "[N]", (-1,))
    per_candidate = {"token": token, "score": score, "cost": cost, "eligible": eligible, "editable": editable}
    for name, t in per_candidate.items():
        _check.shape(_OP, name, t, "[N]", (pos.shape[0],))
    for name, t in (("quota", quota), ("threshold", threshold), ("status", status)):
        _check.shape(_OP, name, t, "[B]", (batch,))
    if not 0 <= rule < len(Rule):
        _check.fail(_OP, "rule", "0 to 5", int(rule))
    if rule == Rule.QUOTA and quota is None:
        _check.fail(_OP, "quota", "given for rule QUOTA", None)
    if rule in (Rule.THRESHOLD, Rule.THRESHOLD_STRICT) and threshold is None:
        _check.fail(_OP, "threshold", "given for the THRESHOLD rules", None)
    if rule == Rule.ENTROPY_BOUND and cost is None:
        _check.fail(_OP, "cost", "given for rule ENTROPY_BOUND", None)
    _check_params(rule, params, editable)
    for name, t in (("canvas", canvas), ("masked", masked), ("status", status)):
        _check.writable(_OP, name, t)


def _check_params(rule, params, editable) -> None:
    if len(params) > 2:
        _check.fail(_OP, "params", "at most 2 numbers", len(params))
    if rule in (Rule.FACTOR, Rule.FACTOR_AUTHORS, Rule.ENTROPY_BOUND):
        if not params:
            _check.fail(_OP, "params", "at least 1 number for this rule", len(params))
        if rule == Rule.ENTROPY_BOUND:
            if not (math.isfinite(params[0]) and params[0] >= 0):
                _check.fail(_OP, "params[0]", "a finite bound >= 0", f"{params[0]:f}")
        elif not (math.isfinite(params[0]) and params[0] > 0):
            _check.fail(_OP, "params[0]", "a finite factor > 0", f"{params[0]:f}")
    if editable is not None:
        if len(params) != 2:
            expected = "2 numbers when editable is given (the second is the edit threshold)"
            _check.fail(_OP, "params", expected, len(params))
        if math.isnan(params[1]):
            _check.fail(_OP, "params[1]", "an edit threshold", f"{params[1]:f}")
