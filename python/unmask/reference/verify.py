"""`verify_greedy` and `verify_ratio` as plain code, the latter's softmaxes in float64: the definition. The noise is the kernels' own, bit for bit."""

from __future__ import annotations

import math

import torch

from ..ops.info import Status
from ..ops.verify import GreedyResult, RatioResult
from . import _check
from .noise import exponential, log_positive
from .uniform import philox

_GREEDY, _RATIO = "verify_greedy", "verify_ratio"
_ACCEPT_STREAM, _RESIDUAL_STREAM = 2, 3  # last counter word; 0: logit_stats, 1: uniform
_SMALLEST = 2.0**-126


# ---- verify_greedy -----------------------------------------------------------------------------------------------------
def verify_greedy(node, after, parent, count, mask_id=-1, subset=False, status=None) -> GreedyResult:
    """See `unmask.ops.verify_greedy`."""
    _check_greedy(node, after, parent, count, subset, status)
    last, length = torch.full_like(count, -1), torch.zeros_like(count)
    for b in range(node.shape[0]):
        n = int(count[b])
        parents = None
        if 0 <= n <= node.shape[1]:
            parents = list(range(-1, n - 1)) if parent is None else parent[b, :n].tolist()
        if parents is None or any(p < -1 or p >= j for j, p in enumerate(parents)):
            if status is not None:
                status[b] |= int(Status.BAD_SEGMENT)
            continue
        path = _subset_path(node[b], after[b], n, mask_id) if subset else _tree_path(node[b], after[b], parents)
        last[b], length[b] = path[-1] if path else -1, len(path)
    return GreedyResult(last, length)


def _tree_path(node: torch.Tensor, after: torch.Tensor, parents: list[int]) -> list[int]:
    path = [0] if parents else []
    while path:
        equal = [j for j, p in enumerate(parents) if p == path[-1] and torch.equal(after[p], node[j])]
        if not equal:
            break
        path.append(equal[0])
    return path


def _subset_path(node: torch.Tensor, after: torch.Tensor, n: int, mask_id: int) -> list[int]:
    path = [0] if n else []
    while path:
        agree = [j for j in range(path[-1] + 1, n) if bool(((node[j] == mask_id) | (node[j] == after[path[-1]])).all())]
        if not agree:
            break
        path.append(agree[-1])
    return path


def _check_greedy(node, after, parent, count, subset, status) -> None:
    """Same checks and words as csrc/common/verify_greedy_args.h."""
    _check.dtype(_GREEDY, torch.int64, node=node, after=after, parent=parent, count=count)
    _check.dtype(_GREEDY, torch.int32, status=status)
    _check.shape(_GREEDY, "node", node, "[B, N, W]", (-1, -1, -1))
    rows, nodes, _ = node.shape
    _check.shape(_GREEDY, "after", after, "[B, N, W]", tuple(node.shape))
    _check.shape(_GREEDY, "parent", parent, "[B, N]", (rows, nodes))
    _check.shape(_GREEDY, "count", count, "[B]", (rows,))
    _check.shape(_GREEDY, "status", status, "[B]", (rows,))
    if subset and parent is not None:
        _check.fail(_GREEDY, "parent", "None when subset is set", "a tensor")
    _check.writable(_GREEDY, "status", status)


# ---- verify_ratio ------------------------------------------------------------------------------------------------------
def verify_ratio(
    p_logits,
    q_logits,
    p_row,
    q_row,
    token,
    cu,
    seed=None,
    step=None,
    pos=None,
    *,
    temper=1.0,
    temperature=1.0,
    uniforms=None,
    forbid=None,
    resample=True,
) -> RatioResult:
    """See `unmask.ops.verify_ratio`."""
    _check_ratio(p_logits, q_logits, p_row, q_row, token, cu, seed, step, pos, temper, temperature, uniforms, forbid, resample)
    n, spans, vocab = p_row.shape[0], cu.shape[0] - 1, p_logits.shape[1]
    log_ratio, faults = torch.zeros(n), [0] * n
    log_p, log_q, yes = [None] * n, [None] * n, [False] * n
    for i in range(n):
        if -1 in (int(p_row[i]), int(q_row[i])):
            continue
        faults[i] = _entry_fault(i, p_logits, q_logits, p_row, q_row, token)
        if not faults[i]:
            log_p[i] = log_softmax(p_logits[p_row[i]], temperature, forbid)
            log_q[i] = log_softmax(q_logits[q_row[i]], temperature, forbid)
            faults[i] = _row_fault(log_p[i]) | _row_fault(log_q[i])
            if uniforms is not None and not 0.0 <= float(uniforms[i]) <= 1.0:
                faults[i] |= int(Status.NAN_SCORE)
        if faults[i]:
            log_ratio[i] = math.nan
            continue
        a, b = float(log_p[i][token[i]]), float(log_q[i][token[i]])
        ratio = torch.tensor(b if b == -math.inf else temper * (b - a), dtype=torch.float64)
        log_ratio[i] = ratio.float()  # infinite where fp32 ends
        log_u = log_of_uniform(seed[i], step[i], pos[i]) if uniforms is None else _log(float(uniforms[i]))
        yes[i] = log_u < min(0.0, float(log_ratio[i]))

    accepted, following = torch.zeros(spans, dtype=torch.int64), torch.full((spans,), -1)
    status = torch.zeros(spans, dtype=torch.int32)
    if forbid is not None and bool((forbid >= vocab).any()):
        status |= int(Status.BAD_ID)
    for b in range(spans):
        begin, end = int(cu[b]), int(cu[b + 1])
        if not 0 <= begin <= end <= n:
            status[b] |= int(Status.BAD_SEGMENT)
            continue
        span = list(range(begin, end))
        stop = next((i for i in span if -1 in (int(p_row[i]), int(q_row[i]))), end)
        span = span[: stop - begin]
        bits = 0
        for i in span:
            bits |= faults[i]
        if bits:
            status[b] |= bits
            continue
        rejected = next((i for i in span if not yes[i]), None)
        accepted[b] = (stop if rejected is None else rejected) - begin
        if rejected is not None and resample:
            i = rejected
            following[b] = residual_scores(log_p[i], log_q[i], seed[i], step[i], pos[i]).argmax()  # the first of equals
    return RatioResult(accepted, following, log_ratio, status)


def log_softmax(row: torch.Tensor, temperature: float, forbid: torch.Tensor | None) -> torch.Tensor:
    """float64 [V]. All NaN for a NaN in the row (forbidden ids aside), all -inf if no id is above -inf; k ids at +inf share the mass."""
    x = row.double()
    if forbid is not None:
        x[forbid[(forbid >= 0) & (forbid < len(x))]] = -math.inf
    if bool(x.isnan().any()):
        return torch.full_like(x, math.nan)
    top = x.max()
    if top == -math.inf:
        return x
    d = torch.where(x == top, 0.0, (x - top) / float(torch.tensor(temperature, dtype=torch.float32)))
    return d - d.logsumexp(0)


def log_of_uniform(seed: torch.Tensor, step: torch.Tensor, pos: torch.Tensor) -> float:
    """ln u of one position's acceptance."""
    return -float(exponential(philox(seed, 0, pos, step, _ACCEPT_STREAM)[0]))


def residual_scores(log_p: torch.Tensor, log_q: torch.Tensor, seed: torch.Tensor, step: torch.Tensor, pos: torch.Tensor) -> torch.Tensor:
    """float64 [V]: ln(q - p)_+ + g, or ln q + g if no id has q > p."""
    ids = torch.arange(len(log_q))
    words = torch.stack(philox(seed, ids // 4, pos, step, _RESIDUAL_STREAM)).gather(0, (ids % 4)[None])[0]
    mass = log_q.exp() - log_p.exp()
    mass = mass if bool((mass >= _SMALLEST).any()) else log_q.exp()
    return torch.where(mass >= _SMALLEST, mass.log(), -math.inf) - log_positive(exponential(words)).double()


def _log(u: float) -> float:
    return math.log(u) if u >= _SMALLEST else -math.inf


def _entry_fault(i: int, p_logits, q_logits, p_row, q_row, token) -> int:
    bad_row = not (0 <= p_row[i] < p_logits.shape[0] and 0 <= q_row[i] < q_logits.shape[0])
    return int(Status.BAD_ROW) * bad_row | int(Status.BAD_ID) * (not 0 <= token[i] < p_logits.shape[1])


def _row_fault(log_softmax: torch.Tensor) -> int:
    if bool(log_softmax.isnan().any()):
        return int(Status.NAN)
    return int(Status.ALL_INF) * bool(log_softmax.max() == -math.inf)


def _check_ratio(p_logits, q_logits, p_row, q_row, token, cu, seed, step, pos, temper, temperature, uniforms, forbid, resample) -> None:
    """Same checks and words as csrc/common/verify_ratio_args.h."""
    keys = {"seed": seed, "step": step, "pos": pos}
    _check.floating(_RATIO, "p_logits", p_logits)
    _check.dtype(_RATIO, p_logits.dtype, q_logits=q_logits)
    _check.dtype(_RATIO, torch.int64, p_row=p_row, q_row=q_row, token=token, cu=cu)
    for name, key in keys.items():
        _check.dtype(_RATIO, torch.int64, **{name: key})
        if key is None and (uniforms is None or resample):
            _check.fail(_RATIO, name, "given unless uniforms are and resample is off", None)
    _check.real(_RATIO, uniforms=uniforms)
    _check.dtype(_RATIO, torch.int64, forbid=forbid)
    _check.shape(_RATIO, "p_logits", p_logits, "[P, V]", (-1, -1))
    vocab = p_logits.shape[1]
    if vocab < 1:
        _check.fail(_RATIO, "V of p_logits", "1 to 2147483647", vocab)
    _check.shape(_RATIO, "q_logits", q_logits, "[Q, V]", (-1, vocab))
    _check.shape(_RATIO, "p_row", p_row, "[N]", (-1,))
    n = p_row.shape[0]
    _check.shape(_RATIO, "q_row", q_row, "[N]", (n,))
    _check.shape(_RATIO, "token", token, "[N]", (n,))
    _check.shape(_RATIO, "cu", cu, "[B + 1]", (-1,))
    if cu.shape[0] < 1:
        _check.fail(_RATIO, "B + 1 of cu", "at least 1", 0)
    for name, key in keys.items():
        _check.shape(_RATIO, name, key, "[N]", (n,))
    _check.shape(_RATIO, "uniforms", uniforms, "[N]", (n,))
    _check.shape(_RATIO, "forbid", forbid, "[F]", (-1,))
    if not (math.isfinite(temper) and temper > 0):
        _check.fail(_RATIO, "temper", "a finite number > 0", f"{temper:f}")
    if not (float(torch.tensor(temperature, dtype=torch.float32)) > 0 and temperature <= 1e30):
        _check.fail(_RATIO, "temperature", "a number in (0, 1e30]", f"{temperature:f}")
