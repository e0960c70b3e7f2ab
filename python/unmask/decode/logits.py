"""Logits at hand [M, V], a module's or kept ones: the check that they are logits, the rows asked for, their reduction."""

from __future__ import annotations

from typing import Any

import torch

from .. import ops
from ..errors import SettingError
from ..ops import LogitStats
from .guided import GuidedLogits


class Kept:
    """Logits of candidates that a rule reads again at the next step. logits: [M, V]; rows: int64 [N], row of each candidate, -1 = none."""

    def __init__(self, logits: torch.Tensor, rows: torch.Tensor):
        self.logits, self.rows = logits, rows


def reduce_logits(
    logits: torch.Tensor | GuidedLogits, rows: torch.Tensor, forbid: torch.Tensor, filters: dict[str, Any] | None, options: dict[str, Any]
) -> LogitStats:
    """Statistics of materialised or guided logits [M, V] for rows [N]."""
    if isinstance(logits, GuidedLogits):
        if filters is None:
            return logits.stats(rows, forbid=forbid, **options)
        kept = gathered(logits, rows)
        logits, rows = kept.logits, kept.rows
    if filters is None:
        return ops.logit_stats(logits, rows, forbid=forbid, **options)
    own, more = split_options(options)
    stats = ops.filtered_stats(logits, rows, forbid=forbid, **filters, **own)
    return joined_stats(stats, ops.logit_stats(logits, rows, forbid=forbid, **more)) if more else stats


def split_options(options: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """(what the filtered reduction takes, what a second, plain one must add: logits at ids and top-k)."""
    extra = {n: v for n, v in options.items() if n in ("ids", "topk")}
    shared = {n: v for n, v in options.items() if n in ("suppress", "bias_ids", "bias")}
    return {n: v for n, v in options.items() if n not in extra}, shared | extra if extra else {}


def joined_stats(stats: LogitStats, plain: LogitStats) -> LogitStats:
    """The filtered statistics, with what only the plain reduction reports."""
    ids = torch.cat([stats.ids[:, :1], plain.ids[:, 1:]], 1)
    return LogitStats(ids, torch.cat([stats.stats, plain.values[:, stats.stats.shape[1] :]], 1), stats.status | plain.status)


def gathered(logits: torch.Tensor | GuidedLogits, rows: torch.Tensor) -> Kept:
    """A copy of the rows asked for (all candidates on CUDA, where they are not counted on the host)."""
    if rows.device.type != "cpu":
        return Kept(logits.index_select(0, rows.clamp_min(0)), torch.where(rows < 0, -1, torch.arange(rows.shape[0], device=rows.device)))
    live = torch.nonzero(rows >= 0).flatten()
    place = torch.full_like(rows, -1)
    place[live] = torch.arange(live.shape[0])
    return Kept(logits.index_select(0, rows[live]), place)


def logits_of(out: object, module: str) -> torch.Tensor:
    """The logits in what a module returned."""
    logits = out if isinstance(out, torch.Tensor) else getattr(out, "logits", None)
    if not isinstance(logits, torch.Tensor):
        raise SettingError(f"{module} must return logits [B, L, V] or an object with .logits, got {type(out).__name__}")
    if logits.dtype not in (torch.float32, torch.bfloat16, torch.float16):
        raise SettingError(f"the logits of {module} must be float32, bfloat16 or float16, got {logits.dtype}")
    return logits
