"""The policy table: every decoding rule by name, with its source, its knobs, and what it needs of a model. Documentation is made from it.

A knob that is not given takes its default; a knob that belongs to another rule is refused. `class_path` is the code that lowers the rule to
arguments of the fused ops (decode/rules/).
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping
from typing import Any

from ..errors import SettingError, check_names
from ..values import integer, number

SCORES = ("confidence", "margin", "entropy", "random", "leftmost", "pc")
UNIT_SCORES = ("confidence", "margin", "random")
"""Scores that lie in [0, 1], as a threshold or a factor needs."""
NEGATIVE_SCORES = ("entropy", "leftmost")


@dataclasses.dataclass(frozen=True)
class Knob:
    """One option of a rule. kind: number | integer | flag | choice | object (checked by the rule itself). None is allowed where it is the default."""

    name: str
    default: Any
    kind: str
    doc: str
    low: float = -math.inf
    high: float = math.inf
    open_low: bool = False
    choices: tuple[str, ...] = ()

    def check(self, value: Any) -> Any:
        """The value as it is used; raises SettingError naming the knob, the value and what is allowed."""
        if value is None and self.default is None:
            return None
        if self.kind == "number":
            return number(self.name, value, self.low, self.high, open_low=self.open_low)
        if self.kind == "integer":
            return integer(self.name, value, int(self.low), None if math.isinf(self.high) else int(self.high))
        if self.kind == "flag":
            if not isinstance(value, bool):
                raise SettingError(f"{self.name} must be True or False, got {value!r}")
            return value
        if self.kind == "choice":
            check_names(self.name, [value], self.choices)
            return value
        return value

    @property
    def range(self) -> str:
        """What is allowed, for the table of the documentation."""
        if self.kind == "choice":
            return " | ".join(self.choices)
        if self.kind == "flag":
            return "True | False"
        if self.kind == "object":
            return ""
        low = "" if math.isinf(self.low) else f"{'> ' if self.open_low else '>= '}{self.low:g}"
        high = "" if math.isinf(self.high) else f"<= {self.high:g}"
        return ", ".join(x for x in (low, high) if x)


@dataclasses.dataclass(frozen=True)
class RuleSpec:
    """One row of the policy table. scores: what may order its candidates; the first is the default. needs: what a model or cache must offer:
    "model" (one from unmask.load), "no cache", "unshifted". uses_steps: `steps` spreads its quota over a block."""

    name: str
    title: str
    source: str
    doc: str
    class_path: str
    knobs: tuple[Knob, ...] = ()
    scores: tuple[str, ...] = ("confidence", "margin", "entropy", "random", "leftmost")
    needs: tuple[str, ...] = ()
    uses_steps: bool = False

    def resolve(self, given: Mapping[str, Any]) -> dict[str, Any]:
        """Every knob, defaults filled in, checked."""
        return {k.name: k.check(given.get(k.name, k.default)) for k in self.knobs}


def _threshold(default: float, doc: str = "commit where the score is at least this") -> Knob:
    return Knob("threshold", default, "number", doc, 0.0, 1.0)


_STEPS = Knob("steps", None, "integer", "forwards in all, spread over the blocks, the surplus first; default one position per forward", 1, 1 << 20)
_MINIMUM = Knob("minimum", 1, "integer", "positions committed at least, per step", 1, 1 << 20)
_RULES = "unmask.decode.rules"

_TABLE = (
    RuleSpec(
        "quota", "Fixed steps", "LLaDA, arXiv 2502.09992 (generate.py)",
        "Step k of S commits N div S + (k < N mod S) positions of the block.", f"{_RULES}.counts:Quota",
        (_STEPS, Knob("variant", None, "choice", "d2cache: its cached windows of shifted models", choices=("d2cache",))), uses_steps=True,
    ),
    RuleSpec(
        "threshold", "Confidence threshold", "Fast-dLLM, arXiv 2505.22618, algorithm 1",
        "Every position with score >= threshold, and always the best.", f"{_RULES}.counts:Threshold",
        (
            Knob("threshold", 0.9, "object", "commit where the score is at least this; in nats, at most 0, for score='entropy'"),
            _MINIMUM,
            Knob("variant", None, "choice", "dinfer: near ties of the best (1e-5) commit with it", choices=("dinfer", "d2cache")),
        ),
    ),
    RuleSpec(
        "factor", "Factor", "Fast-dLLM, arXiv 2505.22618, theorem 1",
        "The largest n with (n + 1)(1 - score_(n)) < factor, at least one.", f"{_RULES}.counts:Factor",
        (
            Knob("factor", 1.0, "number", "the bound", 0.0, math.inf, open_low=True),
            Knob("factor_off_by_one", False, "flag", "as the authors' code: the last candidate commits even when it alone fails"),
            Knob("variant", None, "choice", "d2cache: one fewer where no candidate fails", choices=("d2cache",)),
        ),
        scores=UNIT_SCORES,
    ),
    RuleSpec(
        "eb", "EB-Sampler", "arXiv 2505.24857",
        "The most positions, in the score's order, whose entropies sum to at most gamma, the largest left out; at least one.",
        f"{_RULES}.counts:EntropyBound",
        (
            Knob("gamma", 0.1, "number", "bound on the summed entropy, in nats", 0.0),
            Knob("variant", None, "choice", "d2cache: the newest position is left out of the sum, not the largest", choices=("d2cache",)),
        ),
        scores=("entropy", "confidence", "margin"),
    ),
    RuleSpec(
        "pc", "PC-Sampler", "arXiv 2508.13021",
        "Fixed steps over exp(-lambda (i - s)) min(alpha, -p ln f): confident, informative and early positions first.",
        f"{_RULES}.counts:Quota",
        (
            _STEPS,
            Knob("frequencies", None, "object", "corpus frequency of every token, float [V], or a safetensors file holding one tensor"),
            Knob("clip", 10.0, "number", "alpha, the highest information score", 0.0, math.inf, open_low=True),
            Knob("decay", 0.25, "number", "lambda, per position from the block's start", 0.0),
            Knob("variant", None, "choice", "d2cache: no decay, 1e-10 in the logarithm", choices=("d2cache",)),
        ),
        scores=("pc",), uses_steps=True,
    ),
    RuleSpec(
        "dus", "Dilated unmasking", "arXiv 2506.19037",
        "Step t commits the block's positions that are multiples of block / base^t: far apart first.", f"{_RULES}.dus:Dilated",
        (
            Knob("base", 2, "integer", "stride shrinks by this factor a step", 2, 1 << 16),
            Knob("skip_below", None, "number", "positions scored below are left for the next step; the last step takes all", 0.0, 1.0),
            Knob("merge_last", False, "flag", "a last group smaller than the one before joins it"),
        ),
    ),
    RuleSpec(
        "klass", "KLASS", "arXiv 2511.05664",
        "Every position that is confident and whose distribution has stopped moving (KL between steps), else the best.",
        f"{_RULES}.klass:Klass",
        (
            _threshold(0.9),
            Knob("kl_threshold", 0.01, "number", "KL divergence in nats below which a step counts as still", 0.0, math.inf, open_low=True),
            Knob("history", 2, "integer", "steps that must be still in a row", 1, 64),
            Knob("minimum", 1, "integer", "positions committed where none is confident and still", 1, 1 << 20),
            Knob("variant", None, "choice", "d2cache: positions beyond the block keep a history too, score >= threshold", choices=("d2cache",)),
        ),
        scores=("confidence", "margin"),
    ),
    RuleSpec(
        "slowfast", "SlowFast", "arXiv 2506.10848",
        "Explore until the end of the confident stretch settles, then decode that stretch in parallel; cycles within a block.",
        f"{_RULES}.slowfast:SlowFast",
        (
            _threshold(0.9, "positions at or above commit together where there are two or more, else the best one"),
            Knob("explore_steps", 6, "integer", "forwards of the slow phase", 1, 1 << 16),
            Knob("explore_threshold", 0.3, "number", "a position at least this confident may end the stretch", 0.0, 1.0),
            Knob("window", 2, "integer", "estimates that are compared", 2, 1 << 10),
            Knob("deviation", 1.0, "number", "below this standard deviation the last estimate counts, else the mean", 0.0),
        ),
        scores=("confidence",),
    ),
    RuleSpec(
        "sdar_static", "SDAR static", "SDAR, JetAstra/SDAR generate.py",
        "Fixed steps; score='leftmost' is its sequential order.", f"{_RULES}.counts:Quota", (_STEPS,), uses_steps=True,
    ),
    RuleSpec(
        "sdar_dynamic", "SDAR dynamic", "SDAR, JetAstra/SDAR generate.py",
        "Every position with score > threshold if they are at least the step's quota, else the quota's best.", f"{_RULES}.counts:Dynamic",
        (_threshold(0.85, "commit where the score is above this"), _STEPS), scores=("confidence", "margin"), uses_steps=True,
    ),
    RuleSpec(
        "llada2", "LLaDA2.0", "arXiv 2512.15745, section 5.4",
        "Every position with score > threshold, else the best `minimum`.", f"{_RULES}.counts:Dynamic",
        (_threshold(0.95, "commit where the score is above this"), _MINIMUM), scores=("confidence", "margin"),
    ),
    RuleSpec(
        "sprint", "SPRINT", "LLaDA2.0-Uni, README of inclusionAI/LLaDA2.0-Uni",
        "The ceil(undecided / steps left) best, and every position with p > threshold, whatever the score.", f"{_RULES}.sprint:Sprint",
        (_threshold(0.93, "commit where the probability is above this"), _STEPS), scores=("confidence", "margin", "entropy"), uses_steps=True,
    ),
    RuleSpec(
        "edit", "LLaDA2.1 token editing", "arXiv 2602.08676, equations 1 to 3",
        "As llada2, and decided tokens of the block whose prediction differs with p > edit_threshold are replaced.", f"{_RULES}.edit:Edit",
        (
            _threshold(0.95, "commit where the score is above this"),
            Knob("edit_threshold", 0.9, "number", "replace a decided token where the other one's probability is above this; above 1 = off", 0.0, 1e30),
            Knob("max_post_steps", 16, "integer", "forwards at most after the block holds no mask", 0, 1 << 16),
            _MINIMUM,
        ),
        scores=("confidence",),
    ),
    RuleSpec(
        "hierarchy", "dInfer hierarchical", "inclusionAI/dInfer, parallel_strategy.py",
        "Of each run of masks the best above low_threshold, everything above threshold, and always the best.", f"{_RULES}.hierarchy:Hierarchy",
        (
            _threshold(0.9, "commit where the score is above this; 1 = never"),
            Knob("low_threshold", 0.4, "number", "what the best of a run must be above", 0.0, 1.0),
        ),
        scores=("confidence", "margin"),
    ),
    RuleSpec(
        "credit", "CreditDecoding", "arXiv 2510.06133; inclusionAI/dInfer",
        "Tokens that were predicted before gain credit: logits + alpha ln(1 + credit); then dInfer's threshold.", f"{_RULES}.credit:Credit",
        (
            _threshold(0.9),
            Knob("credit_alpha", 0.7, "number", "weight of the credit", 0.0),
            Knob("boost_gamma", 0.2, "number", "exponent of the probability that is credited", 0.0),
            Knob("decay_beta", 0.8, "number", "what is left of a credit after a step", 0.0, 1.0),
        ),
        scores=("confidence",),
    ),
    RuleSpec(
        "osdt", "OSDT", "arXiv 2511.02077",
        "Threshold per block (and step) from the confidences of one calibration sequence, capped at kappa, with slack epsilon.",
        f"{_RULES}.osdt:Osdt",
        (
            Knob("table", None, "object", "an unmask.decode.osdt.Table, or the file it was saved to"),
            Knob("cap", 0.9, "number", "kappa: no threshold is above it", 0.0, 1.0),
            Knob("slack", 0.0, "number", "epsilon: thresholds are multiplied by 1 - epsilon", 0.0, 1.0),
        ),
        scores=("confidence", "margin"),
    ),
    RuleSpec(
        "dream", "Dream", "arXiv 2508.15487; HKUNLP/Dream generation_utils",
        "Timesteps from 1 to eps: step i commits int(masks (1 - s / t)) positions, the last one all; origin: each with probability 1 - s / t.",
        f"{_RULES}.dream:Dream",
        (
            Knob("alg", "entropy", "choice", "what orders positions", choices=("origin", "maskgit_plus", "topk_margin", "entropy")),
            Knob("steps", None, "integer", "timesteps of a block; default as many as it has masks", 1, 1 << 20),
            Knob("eps", 1e-3, "number", "the last timestep", 0.0, 1.0),
            Knob("alg_temp", None, "number", "0 or None: the best; else drawn without replacement from softmax(score / alg_temp)", 0.0, 1e30),
        ),
        scores=("dream",),
    ),
    RuleSpec(
        "plackett_luce", "Plackett-Luce order (LLaDOU)", "DCoLT, arXiv 2505.10446",
        "Fixed steps; the order is drawn without replacement from a softmax of order logits, with its log-probability.",
        f"{_RULES}.plackett_luce:PlackettLuce",
        (
            _STEPS,
            Knob("order_logits", None, "object", "a function of a StepView giving float [N], the order logits of the candidates"),
            Knob("sample", True, "flag", "draw the order (Gumbel top-k); False takes the highest"),
        ),
        scores=("order",), uses_steps=True,
    ),
    RuleSpec(
        "wino", "WINO", "arXiv 2507.18578",
        "Commit wide (score > wide_in), and return decided tokens to masks where a shadow block, blind to them, gives them less than narrow_out.",
        f"{_RULES}.wino:Wino",
        (
            Knob("wide_in", 0.6, "number", "commit where the score is above this, at most 0.7 of the masks (5 to 20)", 0.0, 1.0),
            Knob("narrow_out", 0.9, "number", "back to a mask where the blind probability is below this", 0.0, 1.0),
            Knob("variant", None, "choice", "d2cache: its port's details", choices=("d2cache",)),
        ),
        scores=("confidence",), needs=("model", "no cache", "no guidance"),
    ),
    RuleSpec(
        "remdm", "ReMDM", "arXiv 2503.00307",
        "The remasking posterior of masked diffusion: at every step decided tokens return to masks with probability sigma_t.",
        f"{_RULES}.remdm:ReMDM",
        (
            Knob("strategy", "cap", "choice", "how sigma_t is chosen", choices=("cap", "rescale", "conf", "loop")),
            Knob("steps", None, "integer", "forwards of a block; default twice its masks", 1, 1 << 20),
            Knob("eta", None, "number", "scale of sigma; default 0.008 cap, 0.015 rescale and conf, 0.02 loop", 0.0, 1.0),
            Knob("t_on", 0.55, "number", "loop begins", 0.0, 1.0),
            Knob("t_off", 0.05, "number", "loop ends", 0.0, 1.0),
            Knob("alpha_on", 0.9, "number", "share of decided tokens during the loop", 0.0, 1.0, open_low=True),
        ),
        scores=("confidence",), needs=("no cache",),
    ),
    RuleSpec(
        "remask", "Low-confidence remasking", "NEUIR/PC-Sampler, src/generate.py",
        "Fill start_ratio of the block one by one, then loop: k decided tokens of the lowest current probability return, the k best refill.",
        f"{_RULES}.remask:Remask",
        (
            Knob("k", 1, "integer", "tokens that return to masks at a time", 1, 1 << 16),
            Knob("loop_steps", 32, "integer", "how often", 0, 1 << 16),
            Knob("start_ratio", 0.875, "number", "share of the block that is filled first", 0.0, 1.0),
        ),
        scores=("confidence", "margin"), needs=("no cache",),
    ),
)  # fmt: skip

RULES: dict[str, RuleSpec] = {spec.name: spec for spec in _TABLE}
POLICIES = tuple(RULES)
KNOBS = tuple(dict.fromkeys(k.name for spec in _TABLE for k in spec.knobs))
"""Every knob's name, each once."""


def owners(knob: str) -> list[str]:
    """The rules that have this knob."""
    return [spec.name for spec in _TABLE if any(k.name == knob for k in spec.knobs)]


Hook = Callable[..., Any]
