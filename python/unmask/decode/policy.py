"""A policy is data: which score orders positions, which rule counts how many commit, and the options of both.

| policy | rule | source |
|---|---|---|
| quota | a fixed number of steps per block, n_k = N div S + (k < N mod S) | LLaDA, arXiv 2502.09992, generate.py |
| threshold | every position with score >= threshold, at least one | Fast-dLLM, arXiv 2505.22618, algorithm 1 |
| factor | largest n with (n + 1)(1 - score_(n)) < factor, at least one | Fast-dLLM, arXiv 2505.22618, theorem 1 |

Scores: confidence (probability of the chosen token), margin (p1 - p2), entropy (negative, nats) and random (uniform), as in LLaDA and
arXiv 2502.06768. All of them come from the clean softmax: temperature and noise change the token, never the score.
"""

from __future__ import annotations

import dataclasses
import math

import torch

from ..errors import SettingError, check_names
from ..ops import LogitStats, Rule, uniform

POLICIES = ("quota", "threshold", "factor")
SCORES = ("confidence", "margin", "entropy", "random")


@dataclasses.dataclass(frozen=True)
class Policy:
    """Score + rule + options. Validates itself; lowered to arguments of `logit_stats` and `commit` by the engine.

    rule: quota | threshold | factor. score: confidence | margin | entropy | random.
    threshold: for rule threshold: in [0, 1] for confidence, margin and random; at most 0 (nats) for entropy.
    factor: for rule factor, > 0. off_by_one: the authors' implementation of it, which commits the last candidate even when that alone
    fails its bar.
    temperature: Gumbel noise scale for the token choice, >= 0 (0 = argmax).
    confidence_drops: ids whose probability is removed, after the token was chosen, before the score is read (LLaDA's
    confidence_eos_eot_inf); a position that chose one of them scores 0.
    strict: False lifts the range of `threshold` (the authors' loops take any number).
    """

    rule: str = "threshold"
    score: str = "confidence"
    threshold: float = 0.9
    factor: float = 1.0
    off_by_one: bool = False
    temperature: float = 0.0
    suppress: tuple[int, ...] = ()
    confidence_drops: tuple[int, ...] = ()
    strict: bool = True

    def __post_init__(self):
        check_names("policy", [self.rule], POLICIES)
        check_names("score", [self.score], SCORES)
        number("temperature", self.temperature, 0.0, math.inf)
        if self.rule == "threshold":
            if not isinstance(self.threshold, (int, float)) or math.isnan(self.threshold):
                raise SettingError(f"threshold must be a number, got {self.threshold!r}")
            if self.strict and self.score == "entropy":
                number("threshold (for score='entropy', in nats)", self.threshold, -math.inf, 0.0)
            elif self.strict:
                number("threshold", self.threshold, 0.0, 1.0)
        if self.rule == "factor":
            number("factor", self.factor, 0.0, math.inf, open_low=True)
            if self.score == "entropy":
                raise SettingError("policy='factor' needs a score in [0, 1]: confidence, margin or random; got score='entropy'")

    @property
    def rule_id(self) -> int:
        if self.rule == "factor":
            return int(Rule.FACTOR_AUTHORS if self.off_by_one else Rule.FACTOR)
        return int(Rule.QUOTA if self.rule == "quota" else Rule.THRESHOLD)

    @property
    def params(self) -> list[float]:
        return [float(self.factor)] if self.rule == "factor" else []

    def scores(self, stats: LogitStats, seed: torch.Tensor, step: torch.Tensor, pos: torch.Tensor) -> torch.Tensor:
        """float32 [N]: what orders the candidates. seed, step, pos: int64 [N], the key of the random score."""
        if self.score == "confidence":
            return stats.p
        if self.score == "margin":
            return stats.margin
        if self.score == "entropy":
            return -stats.entropy
        return uniform(seed, step, pos)


def number(name: str, value: object, low: float, high: float, *, open_low: bool = False) -> float:
    """The value as a float inside [low, high]; raises SettingError with the range otherwise."""
    ok = isinstance(value, (int, float)) and not isinstance(value, bool) and not math.isnan(value) and low <= value <= high
    if ok and (math.isinf(value) or (open_low and value == low)):
        ok = False
    if not ok:
        bounds = f"{'(' if open_low or math.isinf(low) else '['}{low:g}, {high:g}{')' if math.isinf(high) else ']'}"
        raise SettingError(f"{name} must be a number in {bounds}, got {value!r}")
    return float(value)


def integer(name: str, value: object, low: int, high: int | None = None) -> int:
    """The value as an int in low..high; raises SettingError with the range otherwise."""
    ok = isinstance(value, int) and not isinstance(value, bool) and value >= low and (high is None or value <= high)
    if not ok:
        raise SettingError(f"{name} must be an integer {f'in {low}..{high}' if high is not None else f'>= {low}'}, got {value!r}")
    return int(value)


def quota_schedule(masks: int, steps: int) -> list[int]:
    """How many positions each of `steps` steps commits: as equal as possible, the surplus first (LLaDA generate.py).

    >>> quota_schedule(10, 4)
    [3, 3, 2, 2]
    >>> quota_schedule(3, 5)
    [1, 1, 1, 0, 0]
    """
    each, extra = divmod(masks, steps)
    return [each + (i < extra) for i in range(steps)]
