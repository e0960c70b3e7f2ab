"""The same values in another memory layout, for tests of "any strides"."""

from __future__ import annotations

import torch

LAYOUTS = ("dense", "offset", "step", "gap", "transposed")
ALL_LAYOUTS = (*LAYOUTS, "expanded")  # expanded changes values (row 0 everywhere) and must not be written to


def relayout(t: torch.Tensor, how: str) -> torch.Tensor:
    """A tensor of t's shape and (except "expanded") values: `offset` into its storage, every second element (`step`) or row (`gap`),
    first and last dimension swapped in memory (`transposed`), or stride 0 in dimension 0 (`expanded`)."""
    if how == "dense":
        return t.contiguous()
    if how == "expanded":
        return t[:1].expand(t.shape) if t.shape[0] else t
    if how == "transposed":
        return t.transpose(0, -1).contiguous().transpose(0, -1)
    if how == "offset":
        flat = torch.zeros(t.numel() + 3, dtype=t.dtype)
        flat[3:] = t.reshape(-1)
        return flat[3:].view(t.shape)
    if how == "step":
        wide = torch.zeros(*t.shape[:-1], t.shape[-1] * 2, dtype=t.dtype)
        wide[..., ::2] = t
        return wide[..., ::2]
    if how == "gap":
        tall = torch.zeros(t.shape[0] * 2, *t.shape[1:], dtype=t.dtype)
        tall[::2] = t
        return tall[::2]
    raise ValueError(f"how must be one of {ALL_LAYOUTS}, got {how!r}")
