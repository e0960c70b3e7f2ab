"""The options of S2D2 (arXiv 2603.25702): a table with range, meaning and source, and the object that holds checked values.

"paper" is arXiv 2603.25702, "code" is phymhan/S2D2, whose name of the option stands in brackets.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ..decode.table import Knob
from ..errors import SettingError, check_names

ROUTES = ("span", "score", "hysteresis", "ucb")
ESTIMATORS = (
    "soft_entropy_negexp", "hard_margin_threshold", "soft_confidence_power", "soft_clipped_linear_margin", "soft_renyi_2_entropy",
    "hard_entropy_threshold",
)  # fmt: skip

OPTIONS = (
    Knob("mode", "stochastic", "choice", "stochastic: accept with probability q/p, a rejected token is drawn anew (paper); greedy: accept while "
         "the draft is the "
         "verifier's argmax, the first other one becomes it (no random numbers; ours)", choices=("stochastic", "greedy")),
    Knob("route", "span", "choice", "when to verify: the span is long enough; its score is high enough; the score with hysteresis; a bandit "
         "(paper; code: do_verify_policy)",
         choices=ROUTES),
    Knob("min_span", 1, "integer", "span: masks in a row that are worth a verification (code: min_ssd_span_length)", 1, 1 << 20),
    Knob("legacy_span", False, "flag", "span: a short span is verified too while fewer than min_span masks are confident (code: legacy_ssd_span_strategy)"),
    Knob("score_threshold", 0.0, "number", "score: verify from this score on (paper: -5 to 0; code: do_verify_score_threshold)"),
    Knob("on", 0.0, "number", "hysteresis: verification begins above this score (paper: 1; code: hysteresis_threshold_on)"),
    Knob("off", -1.0, "number", "hysteresis: and ends below this one, which must be lower (paper: -5; code: hysteresis_threshold_off)"),
    Knob("estimator", "soft_entropy_negexp", "choice", "how likely a draft token is to be accepted, for the score (paper: the first; code: "
         "token_acceptance_estimator)",
         choices=ESTIMATORS),
    Knob("entropy_temperature", 1.0, "number", "soft_entropy_negexp: exp(-T H / ln V) (paper; code: ssd_entropy_temperature)", 0.0),
    Knob("margin_threshold", 0.05, "number", "hard_margin_threshold: 1 where p1 - p2 is above this (code: ssd_confidence_margin_threshold)"),
    Knob("confidence_power", 1.0, "number", "soft_confidence_power: p to this power (code: ssd_confidence_power)", 0.0),
    Knob("margin_coef", 1.0, "number", "soft_clipped_linear_margin: p1 - p2 times this, at most 1 (code: ssd_confidence_margin_coef)", 0.0),
    Knob("entropy_threshold", 0.5, "number", "hard_entropy_threshold: 1 where H / ln V is below this (code: ssd_entropy_threshold)"),
    Knob("cost", "static", "choice", "what the score takes off the expected number of accepted tokens: cost_coef, or cost_coef per confident "
         "mask (paper; code: do_verify_score_type)",
         choices=("static", "dynamic")),
    Knob("cost_coef", 1.0, "number", "c (paper: 0 to 4; code: score_penalty_coef)", 0.0),
    Knob("high_confidence", None, "number", "what counts as confident: above this; default the policy's threshold (code: confidence_threshold)"),
    Knob("ucb_beta", 1.0, "number", "ucb: weight of the exploration bonus sqrt(ln t / n) (paper, code)", 0.0),
    Knob("ucb_span_bins", 2, "integer", "ucb: bins of the span's length (code: ucb_span_length_bins)", 1, 1 << 10),
    Knob("ucb_progress_bins", 2, "integer", "ucb: bins of the decided share of the block (code: ucb_block_progress_bins)", 1, 1 << 10),
    Knob("ucb_entropy_bins", 2, "integer", "ucb: bins of the mean entropy / ln V (code)", 1, 1 << 10),
    Knob("ucb_entropy_source", "span", "choice", "ucb: entropy of the span's masks or of all masks of the block (code)", choices=("span", "masked")),
    Knob("ucb_progress", "decoded", "choice", "ucb: the share counts what was decoded, or everything that is no mask, prompt tokens too (code: "
         "SDAR the one, Fast-dLLM v2 the other)",
         choices=("decoded", "filled")),
    Knob("tempering", 1.0, "number", "exponent of the ratio q/p (code: ssd_ratio_tempering_factor); other than 1 the result is not the "
         "verifier's distribution", 0.0),
    Knob("rejected", "resample", "choice", "the first rejected position: a token from (q - p)+, in greedy mode the verifier's argmax; the draft "
         "token; or it stays a mask "
         "(code: allow_resample, SDAR's and Fast-dLLM v2's way without it)", choices=("resample", "draft", "leave")),
    Knob("ratio_threshold", None, "number", "behind the accepted prefix, positions with a ratio from this on commit too (code: "
         "ssd_ratio_threshold); None = none do", 0.0),
    Knob("ratio_all_spans", False, "flag", "ratio_threshold looks at all masks of the block, not at the span alone (code: ssd_threshold_all_spans)"),
    Knob("always_high_confidence", False, "flag", "masks with a confidence above high_confidence commit at every step, verified or not (code: "
         "always_check_high_confidence)"),
    Knob("min_commit", None, "integer", "positions that a step commits at least, the rest by the policy's rule (code: min_k); default the "
         "policy's quota or minimum", 1, 1 << 20),
    Knob("cache_ver", False, "flag", "K and V of prompts and finished blocks come from a token-causal forward, the verifier's own (code)"),
    Knob("draft_ver", False, "flag", "in drafts, tokens of the block before its first mask see token-causally (code)"),
)  # fmt: skip


class Options:
    """Checked values of OPTIONS, by attribute; what is not given has its default. Raises SettingError naming what is wrong."""

    mode: str
    route: str
    min_span: int
    legacy_span: bool
    score_threshold: float
    on: float
    off: float
    estimator: str
    entropy_temperature: float
    margin_threshold: float
    confidence_power: float
    margin_coef: float
    entropy_threshold: float
    cost: str
    cost_coef: float
    high_confidence: float | None
    ucb_beta: float
    ucb_span_bins: int
    ucb_progress_bins: int
    ucb_entropy_bins: int
    ucb_entropy_source: str
    ucb_progress: str
    tempering: float
    rejected: str
    ratio_threshold: float | None
    ratio_all_spans: bool
    always_high_confidence: bool
    min_commit: int | None
    cache_ver: bool
    draft_ver: bool

    def __init__(self, **given: Any):
        check_names("S2D2 option", given, [k.name for k in OPTIONS])
        for knob in OPTIONS:
            setattr(self, knob.name, knob.check(given.get(knob.name, knob.default)))
        if self.route == "hysteresis" and not self.on > self.off:
            raise SettingError(f"on must be above off, got on={self.on:g} and off={self.off:g}")
        if self.mode == "greedy" and (self.ratio_threshold is not None or self.tempering != 1.0):
            raise SettingError("ratio_threshold and tempering are for mode='stochastic': greedy acceptance has no ratio")
        if self.ratio_all_spans and self.ratio_threshold is None:
            raise SettingError("ratio_all_spans needs ratio_threshold")

    @property
    def looks_at_confidence(self) -> bool:
        """Whether high_confidence is read."""
        dynamic = self.cost == "dynamic" and self.route in ("score", "hysteresis")
        return dynamic or self.always_high_confidence or (self.legacy_span and self.route == "span")

    def settings(self) -> dict[str, Any]:
        return {k.name: getattr(self, k.name) for k in OPTIONS}

    def __repr__(self) -> str:
        changed = {k.name: getattr(self, k.name) for k in OPTIONS if getattr(self, k.name) != k.default}
        return f"Options({', '.join(f'{n}={v!r}' for n, v in changed.items())})"


def option_table() -> str:
    """The table of docs/speculate-s2d2.md."""
    lines = ["| option | default | range | what |", "|---|---|---|---|"]
    for k in OPTIONS:
        allowed = k.range.replace("|", "\\|") or "any number"
        lines.append(f"| `{k.name}` | {k.default} | {allowed} | {k.doc} |")
    return "\n".join(lines)


def read_options(given: Options | Mapping[str, Any] | None) -> Options:
    if isinstance(given, Options):
        return given
    if given is not None and not isinstance(given, Mapping):
        raise SettingError(f"S2D2 options must be a mapping or an Options, got {type(given).__name__}")
    return Options(**dict(given or {}))
