"""Where the nodes of a row stand in the K/V cache: candidates are more query tokens with K/V of their own for their window, and nothing else.

Node 0 writes the canvas's slots, as a plain step does. The others write scratch slots behind the canvas, and see the row's keys with their own
in the window's place, in the same order, so that every sum has the terms and the order of the plain run:

    canvas  [0 ....... s)[s ... e)[e ........ L)   node 0 writes its window
    scratch                              [node 1][node 2] ...
    node 1 sees [0, s) [node 1] [e, L)

As a tree (FreeDave) the windows of a row are one entry: keys are [0, s) [e, L) [node 0's window] [node 1] ..., and a mask over the last ones
lets each token see its own node's.
"""

from __future__ import annotations

import dataclasses

import torch

from ..decode.backend import Placed, Plan, visible_ends
from .nodes import NodeState


def place(state: NodeState, plan: Plan, attention_size: int | None, tree: bool) -> Plan:
    """The plan with its tokens placed. plan: entries in order of (row, node), windows; the nodes of a row other than 0 share one window.

    attention_size: length of the blocks of a block-causal model.
    """
    length, batch = state.canvas.shape[1], state.batch
    ends = visible_ends(state, plan, attention_size).tolist()
    slots, segments, used = [], [], dict.fromkeys(range(batch), length)
    for (v, start, end, _, _), visible in zip(plan.entries, ends, strict=True):
        row, n = v % batch, end - start
        if v < batch:
            slots.append(torch.arange(start, end))
            segments.append([(0, visible)])
            continue
        own = used[row]
        used[row] = own + n
        slots.append(torch.arange(own, own + n))
        segments.append([(0, start), (own, n), (end, visible - end)])
    device = plan.flat.device
    rows = plan.row % batch
    owned = dataclasses.replace(plan, token_row=plan.token_row % batch)
    q_end = None if attention_size is None else (plan.token_pos // attention_size + 1) * attention_size
    slot = torch.cat(slots).to(device)
    if tree and len(plan.entries) > len({v % batch for v, *_ in plan.entries}):
        return dataclasses.replace(owned, placed=_as_tree(state, plan, slots, segments, ends, attention_size))
    return dataclasses.replace(owned, placed=Placed(slot, plan.cu_q, rows, _padded(segments, device), q_end))


def _padded(segments: list[list[tuple[int, int]]], device: torch.device) -> torch.Tensor:
    """int64 [B, G, 2]."""
    most = max(len(s) for s in segments)
    return torch.tensor([s + [(0, 0)] * (most - len(s)) for s in segments], dtype=torch.int64, device=device)


def _as_tree(
    state: NodeState, plan: Plan, slots: list[torch.Tensor], segments: list[list[tuple[int, int]]], ends: list[int], attention_size: int | None
) -> Placed:
    """One entry per row."""
    batch, device = state.batch, plan.flat.device
    groups: dict[int, list[int]] = {}
    for entry, (v, *_) in enumerate(plan.entries):
        groups.setdefault(v % batch, []).append(entry)
    kept: list[list[tuple[int, int]]] = []
    masks, cu, limits = [], [0], []
    for own in groups.values():
        visible = ends[own[0]]
        windows = [plan.entries[e][1:3] for e in own]
        if len(own) == 1:
            pos = torch.arange(*windows[0])
            kept.append(segments[own[0]])
            masks.append(torch.ones((pos.shape[0], 0), dtype=torch.bool))
            limits.append(_limit(pos, attention_size, visible))
            cu.append(cu[-1] + pos.shape[0])
            continue
        (first, last) = windows[1]
        assert all(w == (first, last) for w in windows[1:]), "the nodes of a row share one window"
        width, behind = last - first, visible - last
        kept.append([(0, first), (last, behind), (first, width), *(segments[e][1] for e in own[1:])])
        # columns: what lies behind the window where attention is block-causal (elsewhere every token sees it), then each node's window
        more = behind if attention_size is not None else 0
        key = torch.cat([torch.arange(last, last + more), *[torch.arange(first, last)] * len(own)])
        node = torch.cat([torch.full((more,), -1), torch.arange(len(own)).repeat_interleave(width)])
        parts, bounds = [], []
        for j, (start, end) in enumerate(windows):
            pos = torch.arange(start, end)
            limit = _limit(pos, attention_size, visible)
            parts.append(((node == j) | (node < 0)) & (key < limit[:, None]))
            # a token of an earlier block sees keys before the window only
            bounds.append(torch.where(limit <= first, limit, visible + len(own) * width))
        masks.append(torch.cat(parts))
        limits.append(torch.cat(bounds))
        cu.append(cu[-1] + masks[-1].shape[0])
    columns, longest = max(m.shape[1] for m in masks), max(m.shape[0] for m in masks)
    mask = torch.ones((len(masks), longest, columns), dtype=torch.bool)
    for i, m in enumerate(masks):
        mask[i, : m.shape[0], columns - m.shape[1] :] = m
    q_end = None if attention_size is None else torch.cat(limits).to(device)
    rows = torch.tensor(list(groups), device=device)
    return Placed(torch.cat(slots).to(device), torch.tensor(cu, device=device), rows, _padded(kept, device), q_end, mask.to(device))


def _limit(pos: torch.Tensor, attention_size: int | None, visible: int) -> torch.Tensor:
    """Keys that each position sees: all before this one."""
    if attention_size is None:
        return torch.full_like(pos, visible)
    return ((pos // attention_size + 1) * attention_size).clamp_max(visible)
