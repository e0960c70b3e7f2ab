"""Temporal self-consistency voting: the answer that a run held most, later steps weighing more (arXiv 2508.09138)."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from fractions import Fraction
from typing import Any, NamedTuple

from ..errors import SettingError, check_names
from ..values import integer, number
from .answers import clusters, intermediate_answers

_MAX_ALPHA = 500.0  # e^500 times any number of steps is still a double


class Vote(NamedTuple):
    """answer: the winner, None if no step held an answer. weight: its total. totals: (answer, total) of every answer, heaviest first,
    equal ones as first seen. answers: what each step held (None: nothing)."""

    answer: Any
    weight: float
    totals: list[tuple[Any, float]]
    answers: list[Any]


def vote(
    source: Any,
    parse: Callable[[Any], Any],
    *,
    weights: str = "exp",
    alpha: float = 5.0,
    steps: int | None = None,
    decode: Callable[[list[int]], str] | None = None,
    start: int = 0,
    same: Callable[[Any, Any], bool] | None = None,
) -> Vote:
    """Parses an answer from every step's prediction of the whole canvas and lets the steps vote.

    source, parse, decode, start: as `intermediate_answers`. weights, alpha, steps, same, ties: as `vote_answers`.
    """
    answers = intermediate_answers(source, parse, decode=decode, start=start)
    return vote_answers(answers, weights=weights, alpha=alpha, steps=steps, same=same)


def vote_answers(
    answers: Iterable[Any],
    *,
    weights: str = "exp",
    alpha: float = 5.0,
    steps: int | None = None,
    same: Callable[[Any, Any], bool] | None = None,
) -> Vote:
    """The vote over answers that are parsed already, one per step; None does not vote.

    weights, alpha, steps: as `vote_weights`; steps defaults to the number of answers and may be larger (a run that ended early).
    same: as `clusters`; a cluster stands as its first answer. Totals are exactly summed, and of equal totals the answer seen first wins
    (the authors' code leaves ties to the timing of threads). Source: arXiv 2508.09138, eval/generate.py of dLLM-MidTruth.
    """
    answers = list(answers)
    total = len(answers) if steps is None else integer("steps", steps, 0)
    if total < len(answers):
        raise SettingError(f"steps must be at least the number of answers, {len(answers)} here, got {total}")
    each = _weights(weights, total, alpha)
    totals = []
    for members in clusters(answers, same):
        votes = [each(step) for step in members]
        totals.append((answers[members[0]], math.fsum(votes) if weights == "exp" else float(sum(votes))))
    totals.sort(key=lambda pair: -pair[1])  # stable: equal totals stay in order of first sight
    answer, weight = totals[0] if totals else (None, 0.0)
    return Vote(answer, weight, totals, answers)


def vote_weights(weights: str, steps: int, alpha: float = 5.0) -> list[float]:
    """The weight of step k = 0..steps-1: "fixed" 1, "linear" (k + 1) / steps, "exp" e^(alpha k / steps). Source: arXiv 2508.09138.

    alpha: in [-500, 500], read for "exp" only. Raises SettingError for an unknown name or a number out of range.
    """
    steps = integer("steps", steps, 0)
    each = _weights(weights, steps, alpha)
    return [float(each(k)) for k in range(steps)]


def _weights(weights: str, steps: int, alpha: float) -> Callable[[int], Any]:
    """Fractions where the rule is rational, so that ties are ties."""
    check_names("weights", [weights], ("fixed", "linear", "exp"))
    if weights == "fixed":
        return lambda k: Fraction(1)
    if weights == "linear":
        return lambda k: Fraction(k + 1, steps)
    rate = number("alpha", alpha, -_MAX_ALPHA, _MAX_ALPHA)
    return lambda k: math.exp(rate * k / steps)
