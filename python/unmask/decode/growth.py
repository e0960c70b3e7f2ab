"""The arithmetic of answers that grow, on the device and for all rows at once: nothing here waits for the host.

Shapes: N candidates packed row after row; B rows of the step; canvases and maps [B, L], L positions of the longest canvas that may come about.
"""

from __future__ import annotations

import torch


def eos_confidence(ends: torch.Tensor, p: torch.Tensor, entry: torch.Tensor, cu: torch.Tensor, window: int) -> torch.Tensor:
    """float64 [B]: how sure the model is that its answer ends inside the canvas (DAEDAL, arXiv 2508.00819).

    Of the positions whose best token is end-of-sequence (ends, bool [N]) the last `window`: the sum of their p (float64 [N]) over `window`,
    so that positions which are missing count 0. entry: int64 [N]; cu: int64 [B+1], no entry empty. Summed from the last one leftwards, one
    by one, so that a row's value does not depend on the others.
    """
    running = ends.long().cumsum(0)
    after = running.index_select(0, cu[1:] - 1).index_select(0, entry) - running  # ends behind this position, in its own row
    kept = ends & (after < window)
    table = p.new_zeros((cu.shape[0] - 1, window + 1))  # the last column takes what is not kept, all zeros
    table[entry, torch.where(kept, after, window)] = torch.where(kept, p, 0.0)
    return table[:, :window].cumsum(1)[:, -1] / window


def lowest(score: torch.Tensor, among: torch.Tensor, entry: torch.Tensor, pos: torch.Tensor, rows: int, none: int) -> torch.Tensor:
    """int64 [rows]: position of each row's lowest score (float [N]) among the chosen candidates, the first on ties; `none` without one."""
    value = score.masked_fill(~among, torch.inf)
    least = torch.full((rows,), torch.inf, dtype=score.dtype, device=score.device).scatter_reduce_(0, entry, value, "amin")
    hit = among & (score == least.index_select(0, entry))
    return torch.full((rows,), none, dtype=torch.int64, device=score.device).scatter_reduce_(0, entry, torch.where(hit, pos, none), "amin")


def insertion_source(at: torch.Tensor, count: int, length: int) -> torch.Tensor:
    """int64 [B, length]: where each position of a row comes from once the token at `at` (int64 [B]; >= length: no insertion) has become
    `count` copies of itself and what stood behind it has moved count - 1 to the right."""
    position = torch.arange(length, device=at.device).expand(at.shape[0], length)
    at = at.unsqueeze(1)
    moved = torch.maximum(position - (count - 1), at)
    return torch.where(position <= at, position, moved)


def first_masked(masked: torch.Tensor) -> torch.Tensor:
    """int64 [B]: the first undecided position of each row of bool [B, L], L where there is none."""
    length = masked.shape[1]
    return torch.where(masked, torch.arange(length, device=masked.device), length).amin(1)
