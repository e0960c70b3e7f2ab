"""The verifier of S2D2: the model with block size 1, which is autoregressive, reads a draft-filled block in one forward (arXiv 2603.25702).

Unshifted models: the draft-filled tokens of the block, token-causal, and for each position in question one mask token at that position, which
sees the tokens strictly before it and itself; its output is what block size 1 predicts there. With all positions in question these are the
authors' 2 L tokens; tokens behind the last one in question change nothing and are left out.
Shifted models: one token-causal pass over the draft-filled tokens; the output before a position predicts it.

Both read the K/V of everything before the block and write their own behind the canvas, in slots that nothing else reads, so a verification
leaves the cache as it was. Per entry the keys are joined as [0, first) [scratch], and the small mask over the last keys says who sees whom.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import torch

from ..decode.state import DecodeState
from ..models.backbone import Forward, KVCache
from ..models.model import Model
from ..ops.linear import pad_rows


@dataclasses.dataclass(frozen=True)
class Job:
    """One row's verification. begin: start of its attention block. targets: positions in question, rising, from begin on."""

    row: int
    begin: int
    targets: tuple[int, ...]

    def tokens(self, shifted: bool) -> tuple[int, int, tuple[int, ...]]:
        """[first, last) of the draft-filled positions, and the positions of the masks behind them."""
        last = max(self.targets)
        return (max(self.begin - 1, 0), last, ()) if shifted else (self.begin, last, self.targets)

    def size(self, shifted: bool) -> int:
        first, last, masks = self.tokens(shifted)
        return last - first + len(masks)


def scratch_slots(state: DecodeState, attention_block: int) -> int:
    """Cache slots behind the canvas that the largest possible verification of this run takes."""
    longest = -(-state.schedule.block_size // attention_block) * attention_block + attention_block
    if state.schedule.adaptive:
        longest = state.canvas.shape[1]
    return 2 * (min(longest, state.canvas.shape[1]) + 1)


def pack(jobs: Sequence[Job], filled: torch.Tensor, mask_id: int, shifted: bool) -> tuple[Forward, torch.Tensor]:
    """(forward, query): query int64 [sum of targets], the packed token that predicts each target, job after job. filled: int64 [B, L],
    canvases with drafts in place of masks."""
    length, device = filled.shape[1], filled.device
    sizes = [job.size(shifted) for job in jobs]
    assert min(sizes) > 0, "a shifted model has nothing before position 0 that could predict it"
    starts = torch.tensor([0, *sizes]).cumsum(0).tolist()
    total, widest = pad_rows(starts[-1]), max(sizes)
    row, pos, slot = (torch.full((total,), fill, dtype=torch.int64) for fill in (-1, 0, -1))
    source = torch.full((total,), -1, dtype=torch.int64)  # index of the flattened canvas, -1 = a mask
    mask = torch.ones((len(jobs), widest, widest), dtype=torch.bool)
    seg = torch.zeros((len(jobs), 2, 2), dtype=torch.int64)
    query: list[torch.Tensor] = []
    for i, (job, size, start) in enumerate(zip(jobs, sizes, starts, strict=False)):
        first, last, masks = job.tokens(shifted)
        targets, n = torch.tensor(job.targets), last - first
        own = slice(start, start + size)
        row[own] = job.row
        pos[own] = torch.cat([torch.arange(first, last), torch.tensor(masks, dtype=torch.int64)])
        slot[own] = torch.arange(length, length + size)
        source[start : start + n] = torch.arange(first, last) + job.row * length
        seg[i] = torch.tensor([[0, first], [length, size]])
        seen = mask[i, :size, widest - size :]
        seen[:n, :n] = torch.ones(n, n, dtype=torch.bool).tril()
        seen[:n, n:] = False
        if not shifted:
            seen[n:, :n] = torch.arange(first, last) < targets[:, None]
            seen[n:, n:] = torch.eye(len(masks), dtype=torch.bool)
        query.append(start + (targets - 1 - first if shifted else n + torch.arange(len(masks))))
    source = source.to(device)
    ids = torch.where(source < 0, mask_id, filled.reshape(-1).index_select(0, source.clamp_min(0)))
    rows = torch.tensor([job.row for job in jobs], device=device)
    forward = Forward(
        ids, row.to(device), pos.to(device), slot.to(device), torch.tensor(starts, device=device), rows, seg.to(device), None, mask.to(device)
    )
    return forward, torch.cat(query).to(device)


@torch.inference_mode()
def verify(model: Model, cache: KVCache, jobs: Sequence[Job], filled: torch.Tensor, mask_id: int) -> torch.Tensor:
    """Hidden states [sum of targets, d_model] that predict the targets, job after job. The K/V of everything before each job's block must be in
    the cache (which the row's last draft forward has seen to)."""
    forward, query = pack(jobs, filled, mask_id, model.config.shifted)
    return model(forward, cache).index_select(0, query)
