"""A policy is data: which score orders positions, which rule says how many commit (decode/table.py), and how tokens are drawn.

Confidence is ordered and compared in float64. Scores come from the clean softmax (temperature and noise change the token, never the score)
unless `tempered`: then temperature, top-p and top-k shape the distribution that is scored too, as in Dream and SDAR.
"""

from __future__ import annotations

import dataclasses
import importlib
import math
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

from ..errors import SettingError, check_names
from ..values import as_integer, integer, number, plain
from .table import KNOBS, NEGATIVE_SCORES, POLICIES, RULES, SCORES, UNIT_SCORES, RuleSpec, owners

if TYPE_CHECKING:
    from .rules.base import Rule, Run

MAX_TEMPERATURE = 1e30  # beyond it the noise would leave float32

__all__ = ["KNOBS", "MAX_TEMPERATURE", "POLICIES", "SCORES", "Policy", "as_integer", "integer", "number", "plain", "quota_schedule"]


@dataclasses.dataclass(frozen=True)
class Policy:
    """Score + rule + options. Validates itself; lowered to arguments of the ops by the rule's class.

    rule: a name of decode.table.RULES. score: a name of decode.table.SCORES that the rule takes, or a function of a StepView returning
    float [N] on the device (logic- or user-guided order); None = the rule's default. knobs: the rule's own options, by name.
    position_bias: lambda >= 0; -lambda (i - s) is added to the score of the position i - s behind its block's start.
    certainty_sigma: None, or the standard deviation in positions of the Gaussian share of decided neighbours that multiplies the score
    (certainty prior, d2Cache, arXiv 2509.23094).
    temperature: Gumbel noise scale for the token choice, >= 0 (0 = argmax). top_p, top_k: filters of the distribution (None = off);
    top_k_first: SDAR's order instead of Dream's. They make the policy `tempered`.
    repetition_penalty: > 0, 1 = off: logits of tokens that the row holds are divided by it where positive, multiplied where negative.
    suppress: ids that are never chosen and take no probability. confidence_drops: ids whose probability is removed, after the token was
    chosen, before the score is read (LLaDA's confidence_eos_eot_inf); a position that chose one of them scores 0.
    rounded: the confidence has the precision of the model's logits, as LLaDA's code computes it, instead of float64, as Fast-dLLM's does;
    positions that round to the same value are then taken in order.
    forced_first: a block's first forward commits the block's first position, and nothing else, whatever its score (Fast-dLLM's Dream).
    strict: False lifts the range of `threshold` (the authors' loops take any number).
    """

    rule: str = "threshold"
    score: str | Callable[..., Any] | None = None
    knobs: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    position_bias: float = 0.0
    certainty_sigma: float | None = None
    temperature: float = 0.0
    top_p: float | None = None
    top_k: int | None = None
    top_k_first: bool = False
    tempered: bool = False
    repetition_penalty: float = 1.0
    suppress: tuple[int, ...] = ()
    confidence_drops: tuple[int, ...] = ()
    rounded: bool = False
    forced_first: bool = False
    strict: bool = True

    def __post_init__(self):
        check_names("policy", [self.rule], POLICIES)
        spec = self.spec
        score = spec.scores[0] if self.score is None else self.score
        if isinstance(score, str) or not callable(score):
            check_names("score", [score], SCORES if score in SCORES or not isinstance(score, str) else (*SCORES, *spec.scores))
            if score not in spec.scores:
                hint = " in [0, 1]" if spec.scores == UNIT_SCORES else ""
                raise SettingError(f"policy={self.rule!r} needs a score{hint}: {', '.join(spec.scores)}; got score={score!r}")
        object.__setattr__(self, "score", score)
        if self.rule in ("dream", "plackett_luce"):  # their own code scores, or reports, the distribution that tokens are drawn from
            object.__setattr__(self, "tempered", True)
        check_knobs(self.rule, self.knobs)
        knobs = spec.resolve(self.knobs)
        if self.rule == "threshold":
            knobs["threshold"] = self._threshold(knobs["threshold"])
        object.__setattr__(self, "knobs", knobs)
        number("position_bias", self.position_bias, 0.0, math.inf)
        if self.certainty_sigma is not None:
            number("certainty_sigma", self.certainty_sigma, 0.0, math.inf, open_low=True)
            if score in NEGATIVE_SCORES or score == "dream":  # a larger share would lower it
                raise SettingError(f"certainty_sigma multiplies the score, so it needs one that is not negative: confidence, margin, random or pc; got score={score!r}")
        number("temperature", self.temperature, 0.0, MAX_TEMPERATURE)
        if self.top_p is not None:
            number("top_p", self.top_p, 0.0, 1.0, open_low=True)
        if self.top_k is not None:
            integer("top_k", self.top_k, 1)
        number("repetition_penalty", self.repetition_penalty, 0.0, 1e6, open_low=True)

    def _threshold(self, value: object) -> float:
        if not self.strict or callable(self.score):
            return number("threshold", value, -math.inf, math.inf, finite=False)
        if self.score == "entropy":
            return number("threshold (for score='entropy', in nats)", value, -math.inf, 0.0)
        return number("threshold", value, 0.0, 1.0)

    @property
    def spec(self) -> RuleSpec:
        return RULES[self.rule]

    @property
    def filtered(self) -> bool:
        """Whether the scored distribution is another than the plain softmax."""
        return (self.tempered and self.temperature > 0) or (self.top_p or 1.0) < 1.0 or self.top_k is not None

    @property
    def filters(self) -> dict[str, Any] | None:
        """Arguments of `filtered_stats`, None for the plain softmax."""
        return dict(top_p=self.top_p or 1.0, top_k=self.top_k or 0, top_k_first=self.top_k_first) if self.filtered else None

    @property
    def sampled(self) -> bool:
        """Whether the run draws random numbers."""
        if self.temperature > 0 or self.score == "random" or self.rule == "remdm":
            return True
        if self.rule == "dream":
            return self.knobs["alg"] == "origin" or bool(self.knobs["alg_temp"])
        return self.rule == "plackett_luce" and self.knobs["sample"]

    def lower(self, run: Run) -> Rule:
        """The rule's code, with its state for one run."""
        module, name = self.spec.class_path.split(":")
        return getattr(importlib.import_module(module), name)(run)


def check_knobs(rule: str, given: Mapping[str, Any]) -> None:
    """Raises SettingError for a knob that is unknown or belongs to other rules."""
    check_names("setting", given, KNOBS)
    own = {k.name for k in RULES[rule].knobs}
    for name in given:
        if name not in own:
            fits = ", ".join(repr(r) for r in owners(name))
            raise SettingError(f"{name} is for policy={fits}, got policy={rule!r}; leave it out or change the policy")


def quota_schedule(masks: int, steps: int) -> list[int]:
    """How many positions each of `steps` steps commits: as equal as possible, the surplus first (LLaDA generate.py).

    >>> quota_schedule(10, 4)
    [3, 3, 2, 2]
    >>> quota_schedule(3, 5)
    [1, 1, 1, 0, 0]
    """
    each, extra = divmod(masks, steps)
    return [each + (i < extra) for i in range(steps)]
