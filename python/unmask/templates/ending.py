"""A decided null or end token ends its field: what is still undecided behind it is filled at once, on the device."""

from __future__ import annotations

from collections.abc import Sequence

import torch

Ends = torch.Tensor | Sequence[int | Sequence[int]]


def end_fields(canvas: torch.Tensor, masked: torch.Tensor, field: torch.Tensor, null_ids: Ends, fill_id: int) -> torch.Tensor:
    """Decides, in place, every undecided position that stands behind the first decided end of its field.

    canvas: int64 [B, L], written. masked: bool [B, L], True where undecided, written; what is not masked is never touched, and no position
    before the end is. field: int64 [B, L], the field of each position in 0..L-1, -1 for none (any other number is none too); a field is
    the positions of one row with one number.
    null_ids: what ends a field: int64 [N] on the same device, or numbers; among these a sequence of numbers is a run of tokens in successive
    positions of the field, all decided (a null that the tokenizer spells with several). None of them: nothing ends.
    fill_id: the token put behind an end.
    Returns bool [B, L], the positions filled. Reads nothing on the host, so it may be captured in a CUDA graph when null_ids are numbers
    or a tensor that stays. Raises RuntimeError for other shapes, dtypes and devices.
    Source: the null token of S3 (arXiv 2507.04504), which its released code leaves to the caller to strip; ending the field is ours.
    """
    _check(canvas, masked, field)
    length = canvas.shape[1]
    named = (field >= 0) & (field < length)
    slot = torch.where(named, field, length)  # all other positions share a field that never ends
    ends = _ends(canvas, ~masked & named, slot, null_ids)
    position = torch.arange(length, device=canvas.device).expand_as(canvas)
    first = torch.full((canvas.shape[0], length + 1), length, dtype=torch.int64, device=canvas.device)
    first.scatter_reduce_(1, slot, torch.where(ends, position, length), "amin")
    filled = masked & named & (position > first.gather(1, slot))
    canvas.masked_fill_(filled, fill_id)
    masked.masked_fill_(filled, False)
    return filled


def _ends(canvas: torch.Tensor, decided: torch.Tensor, slot: torch.Tensor, null_ids: Ends) -> torch.Tensor:
    """bool [B, L]: the last token of each decided end."""
    if isinstance(null_ids, torch.Tensor):
        return decided & (canvas.unsqueeze(2) == null_ids).any(2)
    length = canvas.shape[1]
    ends = torch.zeros_like(decided)
    for end in null_ids:
        run = (end,) if isinstance(end, int) else tuple(end)
        n = length - len(run) + 1
        if not run or n <= 0:
            continue
        last = len(run) - 1
        match = decided[:, last:] & (canvas[:, last:] == run[last])
        for i, token in enumerate(run[:last]):
            here = slice(i, i + n)
            match = match & decided[:, here] & (canvas[:, here] == token) & (slot[:, here] == slot[:, last:])
        ends[:, last:] |= match
    return ends


def _check(canvas: torch.Tensor, masked: torch.Tensor, field: torch.Tensor) -> None:
    for name, tensor, dtype in (("canvas", canvas, torch.int64), ("masked", masked, torch.bool), ("field", field, torch.int64)):
        kind = str(dtype).removeprefix("torch.")
        if tensor.dtype is not dtype or tensor.ndim != 2 or tensor.shape != canvas.shape:
            shape = "[B, L]" if name == "canvas" else f"[B, L] = {list(canvas.shape)}"
            raise RuntimeError(f"end_fields: {name} must be {kind} {shape}, got {str(tensor.dtype).removeprefix('torch.')} {list(tensor.shape)}")
        if tensor.device != canvas.device:
            raise RuntimeError(f"end_fields: {name} must be on {canvas.device} like canvas, got {tensor.device}")
