"""`logit_stats` as plain tensor code: the definition. The softmax runs in float64 and is rounded once, so it is also the accuracy oracle.

`stats_tile` and `stats_finish` have no reference of their own: over any tiling they equal `logit_stats` of the whole row, bit for bit.
"""

from __future__ import annotations

import torch

from ..ops.info import Status
from ..ops.logit_stats import TOPK_MAX, LogitStats
from . import _check
from .noise import fma, gumbel

_OP = "logit_stats"
_INF = float("inf")


def logit_stats(
    logits, rows=None, forbid=None, suppress=None, bias_ids=None, bias=None, ids=None, topk=0, temperature=0.0,
    seed=None, step=None, pos=None, null_logits=None, guidance=1.0,
) -> LogitStats:  # fmt: skip
    """See `unmask.ops.logit_stats`."""
    entries = _check_arguments(
        logits, rows, forbid, suppress, bias_ids, bias, ids, topk, temperature, seed, step, pos, null_logits, guidance
    )
    if null_logits is not None:
        logits = null_logits + guidance * (logits - null_logits)
    n, vocab = logits.shape
    rows = torch.arange(n) if rows is None else rows
    none, bad_row = rows == -1, (rows < -1) | (rows >= n)
    status = torch.where(bad_row, int(Status.BAD_ROW), 0)

    x = torch.zeros(entries, vocab)
    x[~none & ~bad_row] = logits[rows[~none & ~bad_row]].float()
    for j in range(0 if bias is None else bias.shape[1]):  # a repeated id adds up in order
        at = bias_ids[:, j]
        hit = torch.nonzero((at >= 0) & (at < vocab)).flatten()
        x[hit, at[hit]] = x[hit, at[hit]] + bias[hit, j]
    x[:, _inside(suppress, vocab)] = -_INF
    candidates = x.clone()
    candidates[:, _inside(forbid, vocab)] = -_INF

    bad_id = sum(int((t >= vocab).sum()) for t in (forbid, suppress) if t is not None) > 0
    bad_id = torch.full((entries,), bad_id)
    for t in (bias_ids, ids):
        if t is not None:
            bad_id = bad_id | (t >= vocab).any(1)
    has_nan = x.isnan().any(1)
    no_candidate = ~has_nan & (candidates == -_INF).all(1)
    for bit, bad in ((Status.NAN, has_nan), (Status.ALL_INF, no_candidate), (Status.BAD_ID, bad_id)):
        status = status | torch.where(bad & ~bad_row & ~none, int(bit), 0)

    token = _first_max(candidates)
    if temperature > 0:
        noise = gumbel(seed, step, pos, torch.arange(vocab))
        token = _first_max(fma(noise, torch.tensor(temperature, dtype=torch.float32), candidates))
    order = torch.sort(candidates, dim=1, descending=True, stable=True)

    probability, entropy, logsumexp, log_p = _softmax(x.double())
    best = order.indices[:, : min(2, vocab)]
    p12 = torch.where(candidates.gather(1, best) > -_INF, probability.gather(1, best), 0.0)
    p12 = torch.nn.functional.pad(p12, (0, 2 - p12.shape[1]))
    p = probability.gather(1, token[:, None])
    others = torch.where(torch.arange(vocab) == token[:, None], 0.0, probability).sum(1, keepdim=True)
    stats = torch.cat((p, p12, entropy[:, None], logsumexp[:, None], others), dim=1).float()

    wanted = torch.full((entries, 0), -1) if ids is None else ids
    inside, at = (wanted >= 0) & (wanted < vocab), wanted.clamp(0, vocab - 1)
    at_ids = torch.stack((log_p.gather(1, at).float(), x.gather(1, at)), dim=2)
    at_ids = torch.where(inside[:, :, None], at_ids, -_INF)

    k = min(topk, vocab)
    topk_id = torch.full((entries, topk), -1)
    topk_logit = torch.full((entries, topk), -_INF)
    topk_logit[:, :k] = order.values[:, :k]
    topk_id[:, :k] = torch.where(topk_logit[:, :k] > -_INF, order.indices[:, :k], -1)

    invalid = (status & ~int(Status.BAD_ID)) != 0
    for bad, value in ((invalid, float("nan")), (none, 0.0)):
        stats[bad], at_ids[bad] = value, value
        token[bad], topk_id[bad], topk_logit[bad] = -1, -1, -_INF
    return LogitStats.pack(token, stats, status.int(), at_ids, topk_id, topk_logit)


def _inside(ids: torch.Tensor | None, vocab: int) -> torch.Tensor:
    return torch.zeros(0, dtype=torch.int64) if ids is None else ids[(ids >= 0) & (ids < vocab)]


def _first_max(x: torch.Tensor) -> torch.Tensor:
    """Lowest index of the row's maximum."""
    index = torch.arange(x.shape[1]).expand(x.shape)
    return torch.where(x == x.max(1, keepdim=True).values, index, x.shape[1] - 1).min(1).values


def _softmax(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Probabilities, entropy, logsumexp and log-probabilities; k ids at +inf share the mass."""
    m = x.max(1, keepdim=True).values
    d = torch.where(x == m, 0.0, x - m)
    e = d.exp()
    s = e.sum(1, keepdim=True)
    log_s = torch.log1p((x == m).sum(1, keepdim=True) - 1 + torch.where(x == m, 0.0, e).sum(1, keepdim=True))
    entropy = log_s - torch.where(e > 0, d * e, 0.0).sum(1, keepdim=True) / s
    return e / s, entropy[:, 0], (m + log_s)[:, 0], d - log_s


def _check_arguments(
    logits, rows, forbid, suppress, bias_ids, bias, ids, topk, temperature, seed, step, pos, null_logits=None, guidance=1.0
) -> int:
    """Same checks and words as csrc/cpu/logit_stats.cpp; returns T'."""
    _check.floating(_OP, "logits", logits)
    _check.shape(_OP, "logits", logits, "[N, V]", (-1, -1))
    entries, vocab = logits.shape
    if vocab < 1:
        _check.fail(_OP, "V of logits", "1 to 2147483647", vocab)
    int64 = torch.int64
    if rows is not None:
        _check.dtype(_OP, int64, rows=rows)
        _check.shape(_OP, "rows", rows, "[T']", (-1,))
        entries = rows.shape[0]
    if not 0 <= topk <= TOPK_MAX:
        _check.fail(_OP, "topk", "0 to 8", topk)
    if not 0 <= temperature <= 1e30:
        _check.fail(_OP, "temperature", "a number in [0, 1e30]", f"{temperature:f}")
    for name, t, spec in (("forbid", forbid, "[F]"), ("suppress", suppress, "[U]")):
        _check.dtype(_OP, int64, **{name: t})
        _check.shape(_OP, name, t, spec, (-1,))
    if bias_ids is None and bias is not None:
        _check.fail(_OP, "bias_ids", "given with bias", None)
    if bias is None and bias_ids is not None:
        _check.fail(_OP, "bias", "given with bias_ids", None)
    if bias is not None:
        _check.dtype(_OP, int64, bias_ids=bias_ids)
        _check.dtype(_OP, torch.float32, bias=bias)
        _check.shape(_OP, "bias_ids", bias_ids, "[T', J]", (entries, -1))
        _check.shape(_OP, "bias", bias, "[T', J]", (entries, bias_ids.shape[1]))
    _check.dtype(_OP, int64, ids=ids)
    _check.shape(_OP, "ids", ids, "[T', J]", (entries, -1))
    for name, t in (("seed", seed), ("step", step), ("pos", pos)):
        if t is None and temperature > 0:
            _check.fail(_OP, name, "given when temperature > 0", None)
        _check.dtype(_OP, int64, **{name: t})
        _check.shape(_OP, name, t, "[T']", (entries,))
    _check.dtype(_OP, logits.dtype, null_logits=null_logits)
    _check.shape(_OP, "null_logits", null_logits, "[N, V]", tuple(logits.shape))
    if not abs(guidance) <= torch.finfo(torch.float32).max:
        _check.fail(_OP, "guidance", "finite in float32", f"{guidance:f}")
    if null_logits is None and guidance != 1.0:
        _check.fail(_OP, "null_logits", "given when guidance is not 1", None)
    return entries
