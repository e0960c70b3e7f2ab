"""`kl_stats` as plain tensor code in float64: the definition."""

from __future__ import annotations

import math

import torch

from . import _check

_OP = "kl_stats"
_FLOOR = math.log(1e-12)


def kl_stats(logits, previous, rows=None, previous_rows=None, lse=None, previous_lse=None) -> torch.Tensor:
    """See `unmask.ops.kl_stats`."""
    entries = _check_arguments(logits, previous, rows, previous_rows, lse, previous_lse)
    rows = torch.arange(entries) if rows is None else rows
    previous_rows = torch.arange(entries) if previous_rows is None else previous_rows
    inside = (rows >= 0) & (rows < logits.shape[0])
    both = inside & (previous_rows >= 0) & (previous_rows < previous.shape[0])

    log_p = logits[rows[both]].double() - lse[both, None].double()
    log_q = previous[previous_rows[both]].double() - previous_lse[both, None].double()
    out = torch.full((entries,), float("nan"), dtype=torch.float64)
    out[inside & (previous_rows == -1)] = float("inf")
    out[rows == -1] = 0.0
    out[both] = (log_p.exp() * (log_p.clamp(min=_FLOOR) - log_q.clamp(min=_FLOOR))).sum(1)
    return out.float()


def _check_arguments(logits, previous, rows, previous_rows, lse, previous_lse) -> int:
    """Same checks and words as csrc/common/kl_stats_args.h; returns T'."""
    _check.floating(_OP, "logits", logits)
    _check.dtype(_OP, logits.dtype, previous=previous)
    _check.shape(_OP, "logits", logits, "[N, V]", (-1, -1))
    n, vocab = logits.shape
    if vocab < 1:
        _check.fail(_OP, "V of logits", "1 to 2147483647", vocab)
    _check.shape(_OP, "previous", previous, "[M, V]", (-1, vocab))
    _check.dtype(_OP, torch.float32, lse=lse, previous_lse=previous_lse)
    _check.shape(_OP, "lse", lse, "[T']", (n if rows is None else -1,))
    entries = lse.shape[0]
    _check.shape(_OP, "previous_lse", previous_lse, "[T']", (entries,))
    for name, t in (("rows", rows), ("previous_rows", previous_rows)):
        _check.dtype(_OP, torch.int64, **{name: t})
        _check.shape(_OP, name, t, "[T']", (entries,))
    if previous_rows is None:
        _check.shape(_OP, "previous", previous, "[T', V] without previous_rows", (entries, vocab))
    return entries
