"""A policy is data: which score orders positions, which rule counts how many commit, and the options of both.

| policy | rule | source |
|---|---|---|
| quota | a fixed number of steps per block, n_k = N div S + (k < N mod S) | LLaDA, arXiv 2502.09992, generate.py |
| threshold | every position with score >= threshold, at least one | Fast-dLLM, arXiv 2505.22618, algorithm 1 |
| factor | largest n with (n + 1)(1 - score_(n)) < factor, at least one | Fast-dLLM, arXiv 2505.22618, theorem 1 |

Scores: confidence (probability of the chosen token), margin (p1 - p2), entropy (negative, nats) and random (uniform), as in LLaDA and
arXiv 2502.06768. Confidence is ordered and compared in float64. All scores come from the clean softmax: temperature and noise change the token, never the score.
"""

from __future__ import annotations

import dataclasses
import math
import numbers
import operator

import torch

from ..errors import SettingError, check_names
from ..ops import LogitStats, Rule, uniform

POLICIES = ("quota", "threshold", "factor")
SCORES = ("confidence", "margin", "entropy", "random")
MAX_TEMPERATURE = 1e30  # beyond it the noise would leave float32


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
    rounded: the confidence has the precision of the model's logits, as LLaDA's code computes it, instead of float64, as Fast-dLLM's does;
    positions that round to the same value are then taken in order.
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
    rounded: bool = False
    strict: bool = True

    def __post_init__(self):
        check_names("policy", [self.rule], POLICIES)
        check_names("score", [self.score], SCORES)
        number("temperature", self.temperature, 0.0, MAX_TEMPERATURE)
        if self.rule == "threshold":
            if not self.strict:
                number("threshold", self.threshold, -math.inf, math.inf, finite=False)
            elif self.score == "entropy":
                number("threshold (for score='entropy', in nats)", self.threshold, -math.inf, 0.0)
            else:
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

    def scores(
        self, stats: LogitStats, logits_dtype: torch.dtype, seed: torch.Tensor, step: torch.Tensor, pos: torch.Tensor
    ) -> torch.Tensor:
        """float64 (confidence) or float32 [N]: what orders the candidates. seed, step, pos: int64 [N], the key of the random score."""
        if self.score == "confidence":
            return stats.p.to(logits_dtype).float() if self.rounded else stats.confidence
        if self.score == "margin":
            return stats.margin
        if self.score == "entropy":
            return -stats.entropy
        return uniform(seed, step, pos)


def number(name: str, value: object, low: float, high: float, *, open_low: bool = False, finite: bool = True) -> float:
    """The value as a float inside [low, high]; raises SettingError with the range otherwise. NumPy's and torch's scalars are numbers."""
    x = math.nan
    if isinstance(value, numbers.Real) or _is_scalar_tensor(value):
        try:
            x = math.nan if isinstance(value, bool) else float(value)  # type: ignore[arg-type]
        except OverflowError:
            pass
    ok = low <= x <= high and not (math.isinf(x) and finite) and not (open_low and x == low)
    if not ok:
        bounds = f"{'(' if open_low or math.isinf(low) else '['}{low:g}, {high:g}{')' if math.isinf(high) else ']'}"
        raise SettingError(f"{name} must be a number in {bounds}, got {value!r}")
    return x


def integer(name: str, value: object, low: int, high: int | None = None) -> int:
    """The value as an int in low..high; raises SettingError with the range otherwise."""
    x = as_integer(value)
    if x is None or x < low or (high is not None and x > high):
        raise SettingError(f"{name} must be an integer {f'in {low}..{high}' if high is not None else f'>= {low}'}, got {value!r}")
    return x


def as_integer(value: object) -> int | None:
    """The value as an int if it is one (NumPy's and torch's integers too, bool not), else None."""
    if isinstance(value, bool) or (isinstance(value, torch.Tensor) and (value.dim() > 0 or value.dtype is torch.bool)):
        return None
    try:
        return operator.index(value)  # type: ignore[arg-type]
    except (TypeError, RuntimeError):
        return None


def plain(value: object) -> object:
    """NumPy's and torch's scalars as the int or float that JSON knows; anything else as it is."""
    x = as_integer(value)
    if x is not None or isinstance(value, (bool, float)):
        return value if x is None else x
    return float(value) if isinstance(value, numbers.Real) or _is_scalar_tensor(value) else value  # type: ignore[arg-type]


def _is_scalar_tensor(value: object) -> bool:
    return isinstance(value, torch.Tensor) and value.dim() == 0 and value.dtype is not torch.bool and not value.is_complex()


def quota_schedule(masks: int, steps: int) -> list[int]:
    """How many positions each of `steps` steps commits: as equal as possible, the surplus first (LLaDA generate.py).

    >>> quota_schedule(10, 4)
    [3, 3, 2, 2]
    >>> quota_schedule(3, 5)
    [1, 1, 1, 0, 0]
    """
    each, extra = divmod(masks, steps)
    return [each + (i < extra) for i in range(steps)]
