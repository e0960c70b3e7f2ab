"""Acceptance of draft tokens: the distributions p (draft) and q (verifier), the ratio test, and the residual that replaces a rejected token.

Speculative sampling (Leviathan et al., arXiv 2211.17192): a draft token x drawn from p is kept with probability min(1, q(x) / p(x)); else a
token is drawn from (q - p)+ normalised. What comes out is distributed as q.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import TYPE_CHECKING, Protocol

import torch

from .. import ops
from ..errors import SettingError
from ..values import integer, number

if TYPE_CHECKING:
    from ..decode.policy import Policy

LEAST = 1e-12  # the authors divide by no less
ENTROPY_FLOOR = 1e-12


@dataclasses.dataclass(frozen=True)
class Transform:
    """What is done to logits before the softmax: temperature, top-k and top-p with the meaning of `ops.filtered_stats`; 0 = as they are."""

    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0
    top_k_first: bool = False

    @classmethod
    def of(cls, policy: Policy) -> Transform:
        """The distribution that the policy draws tokens from; for argmax without filters the plain softmax."""
        return cls(policy.temperature, policy.top_p or 1.0, policy.top_k or 0, policy.top_k_first)

    @property
    def filters(self) -> bool:
        return self.top_p < 1.0 or self.top_k > 0

    def probabilities(self, logits: torch.Tensor) -> torch.Tensor:
        """float64 [N, V] of logits [N, V]."""
        x = logits.double()
        if self.temperature > 0:
            x = x / self.temperature
        if self.top_p >= 1.0 and not 0 < self.top_k < x.shape[1]:
            return x.softmax(1)
        ranked, order = x.sort(dim=1, descending=True, stable=True)
        kept = torch.ones_like(ranked, dtype=torch.bool)
        if 0 < self.top_k < x.shape[1]:
            kept = ranked >= ranked[:, self.top_k - 1 : self.top_k]
        mass = ranked.softmax(1)
        if self.top_p < 1.0:
            if self.top_k_first:
                mass = torch.where(kept, mass, 0.0)
            before = mass.cumsum(1) - mass
            kept = kept & (before <= self.top_p * mass.sum(1, keepdim=True))
        return x.masked_fill(~torch.zeros_like(kept).scatter(1, order, kept), -torch.inf).softmax(1)


def ratios(q: torch.Tensor, p: torch.Tensor, tempering: float = 1.0) -> torch.Tensor:
    """min(1, (q / p)^tempering), float64, of the probabilities that verifier and draft give the draft tokens."""
    ratio = q.double() / p.double().clamp_min(LEAST)
    return (ratio if tempering == 1.0 else ratio**tempering).clamp_max(1.0)


def accepted(flags: Sequence[bool]) -> int:
    """Length of the accepted prefix."""
    return next((i for i, kept in enumerate(flags) if not kept), len(flags))


def residual(q: torch.Tensor, p: torch.Tensor, mask_id: int) -> torch.Tensor:
    """Weights [N, V] that a rejected token is drawn from: (q - p)+, or q where that is empty; never the mask token."""
    rest = (q - p).clamp_min(0.0)
    rest[:, mask_id] = 0.0
    whole = q.clone()
    whole[:, mask_id] = 0.0
    return torch.where(rest.sum(1, keepdim=True) > 0, rest, whole)


def draw(weights: torch.Tensor, seed: torch.Tensor, step: torch.Tensor, pos: torch.Tensor) -> torch.Tensor:
    """int64 [N]: one id per row of weights [N, V], with probabilities proportional to them; a function of the key alone."""
    return ops.logit_stats(weights.log().float(), temperature=1.0, seed=seed, step=step, pos=pos).token


def entropy(probabilities: torch.Tensor) -> torch.Tensor:
    """Entropy / ln V, [N]."""
    p = probabilities
    scale = torch.log(torch.tensor(float(max(p.shape[1], 2)), dtype=p.dtype, device=p.device))
    return -(p * p.clamp_min(ENTROPY_FLOOR).log()).sum(1) / scale


class Draws(Protocol):
    """Where the random numbers of a verification come from: keyed by row, forward and position, or recorded.

    uniforms: one float per draft token of a row's span. resample: the token at a rejected position, None = draw it by `draw`."""

    def uniforms(self, row: int, forward: int, positions: Sequence[int]) -> list[float]: ...
    def resample(self, row: int, forward: int, position: int) -> int | None: ...


class Keyed:
    """Counter-based: a function of the row's seed, its forward count and the position, never of the batch. seeds: int64 [rows]."""

    def __init__(self, seeds: torch.Tensor):
        self.seeds = seeds

    def uniforms(self, row: int, forward: int, positions: Sequence[int]) -> list[float]:
        pos = torch.tensor(list(positions), dtype=torch.int64)
        return ops.uniform(torch.full_like(pos, int(self.seeds[row])), torch.full_like(pos, forward), pos).tolist()

    def resample(self, row: int, forward: int, position: int) -> int | None:
        return None


class Recorded:
    """The numbers of a recorded run of one row, in order. uniforms: per verification one number in [0, 1) per token of the span; None = keyed.
    resampled: the tokens drawn at first rejections; None = drawn by key."""

    def __init__(self, keyed: Keyed, uniforms: Sequence[Sequence[float]] | None, resampled: Sequence[int] | None, vocab: int):
        self.keyed, self._verify, self._token = keyed, 0, 0
        try:
            self._uniforms = None if uniforms is None else [[number(f"a number of uniforms[{i}]", u, 0.0, 1.0) for u in row] for i, row in enumerate(uniforms)]
            self._tokens = None if resampled is None else [integer(f"resampled[{i}]", t, 0, vocab - 1) for i, t in enumerate(resampled)]
        except TypeError as error:
            raise SettingError(f"uniforms must be a list of numbers per verification, resampled a list of token ids: {error}") from None

    def uniforms(self, row: int, forward: int, positions: Sequence[int]) -> list[float]:
        if self._uniforms is None:
            return self.keyed.uniforms(row, forward, positions)
        at, self._verify = self._verify, self._verify + 1
        if at >= len(self._uniforms):
            raise SettingError(f"uniforms must hold a list per verification, got {at}, and the run is not done")
        if len(self._uniforms[at]) != len(positions):
            raise SettingError(f"uniforms[{at}] must hold {len(positions)} numbers, one per token of the span, got {len(self._uniforms[at])}")
        return self._uniforms[at]

    def resample(self, row: int, forward: int, position: int) -> int | None:
        if self._tokens is None:
            return None
        at, self._token = self._token, self._token + 1
        if at >= len(self._tokens):
            raise SettingError(f"resampled must hold a token per rejection, got {at}, and the run is not done")
        return self._tokens[at]

