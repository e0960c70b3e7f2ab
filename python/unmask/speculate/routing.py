"""Whether a row's draft is worth a verification forward: span length, expected acceptance, hysteresis on it, or a bandit (arXiv 2603.25702).

Everything here is a few numbers per row, on the host. A row keeps its own state, so it decides in a batch as it decides alone.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence

import torch

from .acceptance import entropy
from .s2d2_options import Options


@dataclasses.dataclass(frozen=True)
class Look:
    """What routing sees of a row. span: masks in the first run. masks: all of the block. confident: masks above high_confidence. alphas: of the
    span, estimated acceptance. length: of a block. decoded, filled: positions of the block decided so far, without and with the given ones.
    entropy: mean entropy / ln V."""

    span: int
    masks: int
    confident: int = 0
    alphas: Sequence[float] = ()
    length: int = 1
    decoded: int = 0
    filled: int = 0
    entropy: float = 0.0


def estimate(options: Options, p: torch.Tensor, margin: torch.Tensor | None, uncertainty: torch.Tensor | None, square: torch.Tensor | None) -> torch.Tensor:
    """Acceptance probability that the estimator gives each draft token, [N]. p: of the token; margin: p1 - p2; uncertainty: entropy / ln V;
    square: sum of p^2; each only where the estimator reads it."""
    name = options.estimator
    if name == "soft_confidence_power":
        return p.double().clamp(0.0, 1.0) ** options.confidence_power
    if name in ("hard_margin_threshold", "soft_clipped_linear_margin"):
        assert margin is not None
        if name == "hard_margin_threshold":
            return (margin > options.margin_threshold).double()
        return (options.margin_coef * margin.double()).clamp(0.0, 1.0)
    if name == "soft_renyi_2_entropy":
        assert square is not None
        return square.double().clamp(0.0, 1.0)
    assert uncertainty is not None
    if name == "hard_entropy_threshold":
        return (uncertainty < options.entropy_threshold).double()
    return torch.exp(-options.entropy_temperature * uncertainty.double())


def statistics(probabilities: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(p1 - p2, entropy / ln V, sum p^2) of distributions [N, V]."""
    top = probabilities.topk(min(2, probabilities.shape[1]), dim=1).values
    margin = top[:, 0] - (top[:, 1] if top.shape[1] > 1 else 0.0)
    return margin, entropy(probabilities), (probabilities**2).sum(1)


def expected(alphas: Sequence[float]) -> float:
    """E[K]: the number of tokens that are accepted if each is with its own probability, one after another."""
    total, all_so_far = 0.0, 1.0
    for a in alphas:
        all_so_far *= min(max(a, 0.0), 1.0)
        total += all_so_far
    return total


def score(options: Options, look: Look) -> float:
    """What a verification is expected to accept, less its cost."""
    return expected(look.alphas) - options.cost_coef * (look.confident if options.cost == "dynamic" else 1)


class _Bandit:
    """UCB1 over (leave, verify) per bucket of contexts; an arm that was never tried comes first, verify before leave."""

    def __init__(self, options: Options):
        self.options = options
        buckets = options.ucb_span_bins * options.ucb_progress_bins * options.ucb_entropy_bins
        self.count = [[0] * buckets, [0] * buckets]
        self.reward = [[0.0] * buckets, [0.0] * buckets]
        self.decisions = 0
        self.chosen: tuple[int, int] | None = None  # (arm, bucket), until its reward is known

    def decide(self, look: Look) -> bool:
        o = self.options
        self.decisions += 1
        progress = (look.decoded if o.ucb_progress == "decoded" else look.filled) / max(1, look.length)
        bucket = _bin(float(max(1, look.span)), 1.0, float(max(1, look.length)), o.ucb_span_bins)
        bucket = bucket * o.ucb_progress_bins + _bin(progress, 0.0, 1.0, o.ucb_progress_bins)
        bucket = bucket * o.ucb_entropy_bins + _bin(look.entropy, 0.0, 1.0, o.ucb_entropy_bins)
        values = []
        for arm in (0, 1):
            n = self.count[arm][bucket]
            bonus = o.ucb_beta * math.sqrt(math.log(self.decisions) / n) if n else 0.0
            values.append(self.reward[arm][bucket] / n + bonus if n else math.inf)
        arm = int(values[1] >= values[0])
        self.chosen = arm, bucket
        return bool(arm)

    def note(self, committed: int) -> None:
        """Tokens of the step, per forward that it took."""
        if self.chosen is not None:
            arm, bucket = self.chosen
            self.count[arm][bucket] += 1
            self.reward[arm][bucket] += committed / (1 + arm)
            self.chosen = None


def _bin(value: float, low: float, high: float, bins: int) -> int:
    if bins <= 1 or high <= low:
        return 0
    share = (min(max(value, low), high) - low) / (high - low)
    return min(bins - 1, int(share * bins))


class Router:
    """The decisions of one run. empty_turns_off: a forward without masks turns hysteresis off (S2D2's LLaDA2 loop runs such forwards)."""

    def __init__(self, options: Options, empty_turns_off: bool = False):
        self.options, self.empty_turns_off = options, empty_turns_off
        self._on: dict[int, bool] = {}
        self._bandits: dict[int, _Bandit] = {}

    def decide(self, row: int, look: Look) -> bool:
        o = self.options
        if not look.span:
            if self.empty_turns_off:
                self._on[row] = False
            return False
        if o.route == "span":
            short = look.span < o.min_span
            return not short or (o.legacy_span and look.confident < min(o.min_span, look.masks))
        if o.route == "ucb":
            return self._bandits.setdefault(row, _Bandit(o)).decide(look)
        value = score(o, look)
        if o.route == "score":
            return value >= o.score_threshold
        on = value >= o.off if self._on.get(row, False) else value > o.on  # the paper has >=, its code >
        self._on[row] = on
        return on

    def note(self, row: int, committed: int) -> None:
        """Called with the number of positions that the step decided in a row."""
        if row in self._bandits:
            self._bandits[row].note(committed)

    def forget(self, row: int) -> None:
        """A new row took this place."""
        self._on.pop(row, None)
        self._bandits.pop(row, None)
