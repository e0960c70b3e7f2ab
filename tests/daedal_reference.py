"""DAEDAL (arXiv 2508.00819) as plain lists and dense logits, one row at a time: what decode/daedal.py must equal at temperature 0."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence

import torch


@dataclasses.dataclass(frozen=True)
class Constants:
    """longest: L_max; the others as the settings of generate. guidance: the weight w of u + w (c - u), None = off; negative: what stands before
    the answer in the null input, None: as many masks as the prompt is long."""

    longest: int
    initial: int
    block: int
    high: float
    low: float
    eos: float
    expand: float
    expansion: int
    window: int
    guidance: float | None = None
    negative: list[int] | None = None


@dataclasses.dataclass
class Outcome:
    """canvas: prompt and answer. lengths: of the answer after every forward. inserted: (position, masks of the run) by forward, None for none.
    committed: [(position, token)] by forward, positions before the forward's insertion. measured: forwards of stage 1. margin: the smallest
    difference between numbers that were compared; where it is tiny, other roundings may decide otherwise."""

    canvas: list[int]
    lengths: list[int] = dataclasses.field(default_factory=list)
    inserted: list[tuple[int, int] | None] = dataclasses.field(default_factory=list)
    committed: list[list[tuple[int, int]]] = dataclasses.field(default_factory=list)
    measured: int = 0
    margin: float = math.inf

    @property
    def nfe(self) -> int:
        return len(self.lengths)


def predict(logits: torch.Tensor, mask_id: int) -> tuple[list[int], list[float]]:
    """Best token of every position, never the mask, and its share of the whole softmax."""
    p = logits.double().softmax(-1)
    token = logits.index_fill(-1, torch.tensor([mask_id]), -torch.inf).argmax(-1)
    return token.tolist(), p.gather(-1, token[:, None])[:, 0].tolist()


def closest(values: Sequence[float], bars: Sequence[float]) -> float:
    """The smallest difference of two of the values, or of one and a bar."""
    ordered = sorted(values)
    return min([b - a for a, b in zip(ordered, ordered[1:], strict=False)] + [abs(v - bar) for v in values for bar in bars], default=math.inf)


def eos_confidence(tokens: Sequence[int], p: Sequence[float], eos_id: int, window: int) -> float:
    """From the last position of the answer leftwards: the p of at most `window` positions whose best token is EOS, over `window`."""
    found = [p[i] for i in range(len(tokens) - 1, -1, -1) if tokens[i] == eos_id]
    return sum(found[:window]) / window


def daedal(logits_of: Callable[[list[int]], torch.Tensor], prompt: list[int], mask_id: int, eos_id: int, c: Constants) -> Outcome:
    """logits_of: ids of a whole canvas -> [L, V], row i predicting position i. The prompt may hold mask_id: it is given, and stays."""
    first, out = len(prompt), Outcome([])

    def forward(answer: list[int], guided: bool) -> tuple[list[int], list[float], float]:
        logits = logits_of(prompt + answer)[first:]
        if guided and c.guidance is not None:
            before = [mask_id] * first if c.negative is None else c.negative
            null = logits_of(before + answer)[len(before) :]
            logits = null + c.guidance * (logits - null)
        tokens, p = predict(logits, mask_id)
        confidence = eos_confidence(tokens, p, eos_id, c.window)
        best = logits.index_fill(-1, torch.tensor([mask_id]), -torch.inf).topk(2).values
        near = [float((best[:, 0] - best[:, 1]).min())] + ([abs(confidence - (c.expand if guided else c.eos))] if confidence else [])
        out.margin = min(out.margin, *near)
        return tokens, p, confidence

    # stage 1: lengthen until the model sees its answer end inside
    length = c.initial
    while True:
        _, _, confidence = forward([mask_id] * length, guided=False)
        out.measured += 1
        out.committed.append([])
        if confidence < c.eos and length < c.longest:
            longer = min(length + c.expansion, c.longest)
            out.inserted.append((first + length, longer - length))
            length = longer
            out.lengths.append(length)
        else:
            break
    total = min(length + c.window // 2, c.longest)
    answer = [mask_id] * length + [eos_id] * (total - length)
    undecided = [True] * length + [False] * (total - length)
    out.inserted.append(None)
    out.lengths.append(total)

    # stage 2: decide and, where the model is lost, make room
    current = 0
    while current < len(answer):
        tokens, p, confidence = forward(answer, guided=True)
        block = range(current, min(current + c.block, len(answer)))
        open_ = [i for i in block if undecided[i]]
        out.margin = min(out.margin, closest([p[i] for i in open_], [c.high, c.low]))
        chosen = [i for i in open_ if p[i] > c.high] or [max(open_, key=lambda i: (p[i], -i))]
        lost = [i for i in open_ if i not in chosen and p[i] < c.low]
        for i in chosen:
            answer[i], undecided[i] = tokens[i], False
        out.committed.append(sorted((first + i, tokens[i]) for i in chosen))
        run = None
        if confidence < c.expand and len(answer) < c.longest and lost:
            at = min(lost, key=lambda i: (p[i], i))
            answer = (answer[:at] + [mask_id] * c.expansion + answer[at + 1 :])[: c.longest]
            undecided = (undecided[:at] + [True] * c.expansion + undecided[at + 1 :])[: c.longest]
            run = (first + at, min(c.expansion, len(answer) - at))
        out.inserted.append(run)
        out.lengths.append(len(answer))
        while current < len(answer) and not any(undecided[current : current + c.block]):
            current += c.block
    out.canvas = prompt + answer
    return out
