"""`filtered_stats` as plain tensor code: the definition. Sorts every row; the softmax runs in float64 and is rounded once."""

from __future__ import annotations

import torch

from ..ops.info import Status
from ..ops.logit_stats import LogitStats
from . import _check
from .logit_stats import _check_arguments, _first_max, _inside, _softmax
from .noise import fma, gumbel

_OP = "filtered_stats"
_INF = float("inf")


def filtered_stats(
    logits, rows=None, forbid=None, suppress=None, bias_ids=None, bias=None, temperature=0.0, top_p=1.0, top_k=0,
    top_k_first=False, seed=None, step=None, pos=None,
) -> LogitStats:  # fmt: skip
    """See `unmask.ops.filtered_stats`."""
    try:
        entries = _check_arguments(logits, rows, forbid, suppress, bias_ids, bias, None, 0, temperature, seed, step, pos)
    except RuntimeError as error:  # the same words under this op's name
        raise RuntimeError(str(error).replace("logit_stats:", f"{_OP}:", 1)) from None
    if not top_p >= 0:
        _check.fail(_OP, "top_p", "a number of at least 0 (1 or more: off)", f"{top_p:f}")
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
    allowed = x.clone()
    allowed[:, _inside(forbid, vocab)] = -_INF

    bad_id = sum(int((t >= vocab).sum()) for t in (forbid, suppress) if t is not None) > 0
    bad_id = torch.full((entries,), bad_id)
    if bias_ids is not None:
        bad_id = bad_id | (bias_ids >= vocab).any(1)
    has_nan = x.isnan().any(1)
    no_candidate = ~has_nan & (allowed == -_INF).all(1)
    for bit, bad in ((Status.NAN, has_nan), (Status.ALL_INF, no_candidate), (Status.BAD_ID, bad_id)):
        status = status | torch.where(bad & ~bad_row & ~none, int(bit), 0)

    heat = float(torch.tensor(temperature, dtype=torch.float32)) or 1.0
    kept = kept_ids(x, heat, top_p, top_k, top_k_first)
    kept |= torch.arange(vocab) == _first_max(allowed)[:, None]  # the best candidate
    allowed[~kept] = -_INF

    token = _first_max(allowed)
    if temperature > 0:
        noise = gumbel(seed, step, pos, torch.arange(vocab))
        token = _first_max(fma(noise, torch.tensor(temperature, dtype=torch.float32), allowed))
    probability, entropy, logsumexp, _ = _softmax(torch.where(kept, x, -_INF).double() / heat)
    best = torch.sort(allowed, dim=1, descending=True, stable=True).indices[:, : min(2, vocab)]
    p12 = torch.where(allowed.gather(1, best) > -_INF, probability.gather(1, best), 0.0)
    p12 = torch.nn.functional.pad(p12, (0, 2 - p12.shape[1]))
    p = probability.gather(1, token[:, None])
    others = torch.where(torch.arange(vocab) == token[:, None], 0.0, probability).sum(1, keepdim=True)
    stats = torch.cat((p, p12, entropy[:, None], logsumexp[:, None], others), dim=1).float()

    invalid = (status & ~int(Status.BAD_ID)) != 0
    for bad, value in ((invalid, float("nan")), (none, 0.0)):
        stats[bad], token[bad] = value, -1
    return LogitStats(token[:, None], stats, status.int())


def kept_ids(x: torch.Tensor, heat: float, top_p: float, top_k: int, top_k_first: bool) -> torch.Tensor:
    """bool [T', V]: what the two filters keep of float32 logits x, before the best candidate is added. Ids at -inf have no mass."""
    order = torch.sort(x, dim=1, descending=True, stable=True)  # ties: lowest id first
    ranked = order.values.double()
    first = ranked[:, :1]
    mass = torch.where(ranked == first, 0.0, (ranked - first) / heat).exp()
    if 0 < top_k < x.shape[1]:
        in_k = ranked >= ranked[:, top_k - 1 : top_k]
    else:
        in_k = torch.ones_like(ranked, dtype=torch.bool)
    if top_k_first:
        mass = torch.where(in_k, mass, 0.0)
    before = torch.nn.functional.pad(mass.cumsum(1)[:, :-1], (1, 0))
    in_p = before <= top_p * mass.sum(1, keepdim=True) if top_p < 1 else torch.ones_like(in_k)
    # top-k among what top-p left: its k-th largest logit is that of the whole row, or it has fewer than k ids and keeps them all
    return torch.zeros_like(in_k).scatter(1, order.indices, in_p & in_k & (ranked > -_INF))
