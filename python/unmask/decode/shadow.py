"""The shadow block of WINO (arXiv 2507.18578, figure 2b): a second copy of the block, all masks, that re-predicts every position blind to it.

Packed per entry: the whole canvas, then the block's b shadow tokens, at the block's positions and in cache slots behind the canvas. Keys are
joined as [0, s) [e, L) [s, e) [shadow], so that the small mask over the last 2 b keys says all: a canvas token sees the block and none of the
shadow; shadow token j sees the block without position j, and the whole shadow.
"""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING

import torch

from ..models.backbone import Forward
from ..ops.linear import pad_rows

if TYPE_CHECKING:
    from .backend import Plan
    from .policy import Policy
    from .state import DecodeState


@dataclasses.dataclass(frozen=True)
class ShadowForward:
    """forward: ids hold masks in the shadow, zeros elsewhere. real: int64 [T0], where the plan's tokens stand among the packed ones.
    first, shadow, start: int64 [B], per entry the packed tokens that begin its canvas and its shadow, and the position that the shadow
    begins at. shifted: logits at i predict position i + 1."""

    forward: Forward
    real: torch.Tensor
    first: torch.Tensor
    shadow: torch.Tensor
    start: torch.Tensor
    shifted: bool

    def query(self, plan: Plan, masked: torch.Tensor) -> torch.Tensor:
        """int64 [N]: the token that predicts each candidate of a plan with the same entries: on the canvas where it is masked, else in the
        shadow block (with shifted logits the block's first position then reads the canvas's last token)."""
        first, shadow, start = (x.index_select(0, plan.cand_entry) for x in (self.first, self.shadow, self.start))
        real = first + (plan.cand_pos - int(self.shifted)).clamp_min(0)
        return torch.where(masked, real, shadow + plan.cand_pos - start - int(self.shifted))


def pack_shadow(state: DecodeState, plan: Plan, mask_id: int, shifted: bool) -> ShadowForward:
    """plan: whole canvases, candidates = blocks."""
    device, length = plan.flat.device, state.canvas.shape[1]
    ends = [e for _, _, e, _, _ in plan.entries]
    blocks = [(s, e) for *_, s, e in plan.entries]
    sizes = [e - s for s, e in blocks]
    first = torch.tensor([0, *(n + b for n, b in zip(ends, sizes, strict=True))]).cumsum(0).tolist()
    total, window = pad_rows(first[-1]), 2 * max(sizes)
    ids, row, pos = (torch.full((total,), fill, dtype=torch.int64) for fill in (0, -1, 0))
    slot = torch.full((total,), -1, dtype=torch.int64)
    mask = torch.ones((len(ends), max(n + b for n, b in zip(ends, sizes, strict=True)), window), dtype=torch.bool)
    seg = torch.zeros((len(ends), 4, 2), dtype=torch.int64)
    real = []
    for i, ((r, *_), (s, e), n, b) in enumerate(zip(plan.entries, blocks, ends, sizes, strict=True)):
        begin, shadow = first[i], first[i] + n
        real.append(torch.arange(begin, shadow))
        ids[shadow : shadow + b] = mask_id
        row[begin : shadow + b] = r
        pos[begin:shadow], pos[shadow : shadow + b] = torch.arange(n), torch.arange(s, e)
        slot[begin:shadow], slot[shadow : shadow + b] = torch.arange(n), torch.arange(length, length + b)
        seg[i] = torch.tensor([[0, s], [e, n - e], [s, b], [length, b]])
        mask[i, :n, window - b :] = False
        mask[i, n : n + b, window - 2 * b : window - b] = ~torch.eye(b, dtype=torch.bool)
    forward = Forward(
        ids.to(device), row.to(device), pos.to(device), slot.to(device), torch.tensor(first, device=device), plan.row, seg.to(device), None,
        mask.to(device),
    )  # fmt: skip
    begins = torch.tensor(first[:-1], device=device)
    shadows = begins + torch.tensor(ends, device=device)
    return ShadowForward(forward, torch.cat(real).to(device), begins, shadows, torch.tensor([s for s, _ in blocks], device=device), shifted)


def shadow_slots(policy: Policy, state: DecodeState) -> int:
    """Cache slots behind the canvas that the policy's shadow block needs: its longest possible block, 0 for policies without one."""
    if policy.rule != "wino":
        return 0
    schedule, longest = state.schedule, 0
    for row in state.rows:
        start, end = (row.start, row.end) if row.end else (0, state.canvas.shape[1])  # a place that a row may join at: any canvas
        begun = dataclasses.replace(row, start=start, end=end, block_start=start, block_end=schedule.next_end(start, end))
        longest = max(longest, schedule.look(begun) - start)
    return longest
