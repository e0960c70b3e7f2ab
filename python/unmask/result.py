"""What generation returns and streams."""

from __future__ import annotations

import dataclasses
from typing import Any, ClassVar


@dataclasses.dataclass(frozen=True)
class Result:
    """One generated row.

    text: the generated text, cut at the first EOS and at a stop string; None when the model has no tokenizer. ids: the generated token
    ids before the first EOS (all of them with eos_stop=False). canvas: every token of the row, prompt included. prompt_ids: the prompt.
    nfe: forwards in which the row took part. rows_forwarded: positions that those forwards took through the layers, in all (a cache that
    goes by layers counts the mean over them; rows of the head do not count). tokens_per_forward: tokens before the first EOS / nfe. seconds: wall
    time until the row ended. finish_reason: "eos", "length", "stop" or "invalid" (only with on_invalid="skip"). exact: False where the cache is
    approximate. settings: every setting as resolved. trace: records of `decode.trace` if asked for, else None. log_prob: of the row's order
    and tokens, for policy="plackett_luce", else None. drafted, accepted: with speculate, the nodes that were verified beside the row itself, and
    those of them that counted (the plain run would have taken nfe + accepted forwards); with "s2d2" tokens that were verified and accepted.
    """

    text: str | None
    ids: list[int]
    canvas: list[int]
    prompt_ids: list[int]
    nfe: int
    rows_forwarded: float
    tokens_per_forward: float
    seconds: float
    finish_reason: str
    exact: bool
    settings: dict[str, Any]
    trace: list[dict[str, Any]] | None = None
    log_prob: float | None = None
    drafted: int = 0
    accepted: int = 0


@dataclasses.dataclass(frozen=True)
class Step:
    """One forward of the batch is done. forward counts from 0; masks_left: undecided positions per row in the rows' current blocks."""

    kind: ClassVar[str] = "step"
    forward: int
    seconds: float
    masks_left: dict[int, int]


@dataclasses.dataclass(frozen=True)
class Commit:
    """Positions that one forward settled in one row, most certain first. canvas: the row after it (mask id where undecided).
    step: counts from 0 in its block. nfe: forwards of this row so far, with this one."""

    kind: ClassVar[str] = "commit"
    row: int
    block: int
    step: int
    nfe: int
    positions: list[int]
    ids: list[int]
    scores: list[float]
    masks_left: int
    canvas: list[int]


@dataclasses.dataclass(frozen=True)
class Done:
    """The end: `result` is what `generate` would have returned (a Result, or a list for a batch)."""

    kind: ClassVar[str] = "done"
    result: Any
