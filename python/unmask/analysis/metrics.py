"""How a run's intermediate answers wander, and how often it was right on the way but not at the end (arXiv 2508.09138)."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

from ..errors import SettingError
from .answers import clusters


def temporal_semantic_entropy(answers: Iterable[Any], same: Callable[[Any, Any], bool] | None = None) -> float:
    """TSE = -sum_c p_c ln p_c in nats, over clusters of one run's intermediate answers, every step weighing the same.

    answers: one per step (`intermediate_answers`); None, a step without an answer, is left out of the clusters and of the count, as in
    the authors' voting. same: as `clusters`. In [0, ln(number of clusters)]; 0 where all answers agree; nan where no step held one.
    """
    sizes = [len(members) for members in clusters(answers, same)]
    n = sum(sizes)
    if not n:
        return math.nan
    return math.fsum(size / n * math.log(n / size) for size in sizes)


class Passes(NamedTuple):
    """ever_pass: fraction of samples that were right at some step. full_pass: right at their last step. oscillation: the difference,
    the fraction that found the right answer and lost it."""

    ever_pass: float
    full_pass: float
    oscillation: float


def passes(correct: Iterable[Iterable[Any]]) -> Passes:
    """EverPass, FullPass and their difference over a set of runs.

    correct: samples x steps, True (or 1) where the answer at that step was right, as a list of rows (`correctness`) or a 2-D array;
    rows may differ in length, each ends with its own last step. A step without an answer is not right. Raises SettingError for no
    samples, a sample without steps, and other values.
    """
    if hasattr(correct, "tolist"):
        correct = correct.tolist()
    if not isinstance(correct, Iterable) or isinstance(correct, (str, bytes, dict)):
        raise SettingError(f"correct must be samples x steps of True or False, got {type(correct).__name__}")
    samples = [_sample(row, i) for i, row in enumerate(correct)]
    if not samples:
        raise SettingError("correct must hold at least one sample, got none")
    ever, full = sum(any(row) for row in samples), sum(row[-1] for row in samples)
    n = len(samples)
    return Passes(ever / n, full / n, (ever - full) / n)


def correctness(answers: Iterable[Any], right: Any) -> list[bool]:
    """Per step, whether the answer is right: equal to `right`, or `right(answer)` if that is a function. None is not."""
    check = right if callable(right) else lambda answer: answer == right
    return [answer is not None and bool(check(answer)) for answer in answers]


def _sample(row: Any, index: int) -> list[bool]:
    if hasattr(row, "tolist"):
        row = row.tolist()
    if not isinstance(row, Iterable) or isinstance(row, (str, bytes, dict)):
        raise SettingError(f"sample {index} must be a list of True or False, one per step, got {row!r}")
    values = [v.item() if hasattr(v, "item") else v for v in row]
    if not values:
        raise SettingError(f"sample {index} must hold at least one step, got none")
    for step, value in enumerate(values):
        if not isinstance(value, (bool, int, float)) or value not in (0, 1):
            hint = "; a step without an answer is False" if value is None else ""
            raise SettingError(f"sample {index}, step {step} must be True or False, got {value!r}{hint}")
    return [bool(v) for v in values]
