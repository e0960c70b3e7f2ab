"""Mask samplers. A mask is a pure function of (seed, sample, position): replayable, equal bits on every device.

| kind | what is masked in a sample | weight | source |
|---|---|---|---|
| llada | exactly n positions, chosen uniformly; the n of a batch are stratified | length / n | LLaDA, arXiv 2502.09992, get_log_likelihood.py |
| dream | each position with probability p; the p of a batch are stratified | 1 / p | Dream, arXiv 2508.15487, eval/eval.py |
| ar | sample j: positions j and later, of which only j is scored | 1 | Dream's `ar_ftb`, the chain rule |
| coupled | everything; a random part; the rest | 1, 1/t, 1/(1 - t) | DiffuCoder, arXiv 2506.20639, coupled_grpo.py |

The sum over masked positions of log-probability times weight is one sample's estimate. In llada, ar and coupled masks every position is
covered alike, so that if the model ignored its context the mean of the estimates would be the sum of log-probabilities of all positions.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import torch

from ..decode.state import row_seeds
from ..errors import SettingError, check_names
from ..ops import uniform
from ..values import integer, number

ESTIMATORS = ("llada", "dream", "ar")
LONGEST = 1 << 20  # positions and samples; more is a mistake, not a request
EPS = 1e-3  # Dream's least masking probability
LOWEST_SEED, HIGHEST_SEED = -(1 << 63), (1 << 64) - 1


@dataclasses.dataclass(frozen=True)
class Masks:
    """N samples of which positions are masked.

    masked: bool [N, L]. weights: float64 [N]. replicate: rows that were drawn together, such as a stratified batch; only different
    replicates are independent, so standard errors come from their means. scored: bool [N, L], a part of masked, or None if all of masked
    is scored. additive: the rows' values add up to the estimate instead of being averaged. exact: no randomness is involved.
    """

    masked: torch.Tensor
    weights: torch.Tensor
    replicate: int = 1
    scored: torch.Tensor | None = None
    additive: bool = False
    exact: bool = False

    def __len__(self) -> int:
        return self.masked.shape[0]

    def after(self, prompt_length: int) -> Masks:
        """The same masks for sequences that start with a prompt, none of it masked: masked becomes bool [N, prompt_length + L]."""
        integer("prompt_length", prompt_length, 0, LONGEST)

        def shift(mask: torch.Tensor) -> torch.Tensor:
            return torch.cat([mask.new_zeros((mask.shape[0], prompt_length)), mask], dim=1)

        scored = None if self.scored is None else shift(self.scored)
        return dataclasses.replace(self, masked=shift(self.masked), scored=scored)

    def to(self, device: torch.device | str) -> Masks:
        """The same masks on another device."""
        scored = None if self.scored is None else self.scored.to(device)
        return dataclasses.replace(self, masked=self.masked.to(device), weights=self.weights.to(device), scored=scored)


def stratified_counts(length: int, batch: int, k: int) -> list[int]:
    """LLaDA's numbers of masked positions in a batch: r_i = k + i * length / batch, rounded half to even, wrapped into 1..length.

    length: positions of the answer. batch: samples in the batch. k: count of the first sample, in 1..length. The rounding is exact, in
    integers; the authors' float32 linspace can fall beside a half that is one. Where halves occur, rounding to even makes even counts more
    frequent than odd ones (in the authors' code too).

    >>> stratified_counts(5, 4, 3), stratified_counts(8, 4, 3)
    ([3, 4, 1, 2], [3, 5, 7, 1])

    Source: ML-GSAI/LLaDA, get_log_likelihood.py. Errors: SettingError.
    """
    length = integer("length", length, 1, LONGEST)
    batch = integer("batch", batch, 1, LONGEST)
    k = integer("k", k, 1, length)
    return [(_rounded_ratio(k * batch + i * length, batch) - 1) % length + 1 for i in range(batch)]


def stratified_times(u0: float, batch: int, eps: float = EPS) -> torch.Tensor:
    """Dream's masking probabilities of a batch, float64 [batch]: t_i = (u0 + i / batch) mod 1, then (1 - eps) t + eps.

    u0 in [0, 1]: the one random number. eps in [0, 1): the least probability; sorted, neighbours are (1 - eps) / batch apart.
    Source: DreamLM/Dream, eval/eval.py (arXiv 2508.15487); the sampler of MDLM (arXiv 2406.07524). Errors: SettingError.
    """
    u0 = number("u0", u0, 0.0, 1.0)
    batch = integer("batch", batch, 1, LONGEST)
    eps = _eps(eps)
    t = (u0 + torch.arange(batch, dtype=torch.float64) / batch) % 1.0
    return (1.0 - eps) * t + eps


def sample_masks(
    length: int,
    samples: int = 128,
    batch_size: int = 16,
    *,
    estimator: str = "llada",
    seed: int = 0,
    eps: float = EPS,
    protect: Sequence[int] = (),
    device: torch.device | str = "cpu",
) -> Masks:
    """Random masks over `length` positions, as LLaDA ("llada") or Dream ("dream") draw them.

    samples: a multiple of batch_size, which is the number of samples that are stratified together (1: independent samples). Sample i
    depends on (seed, batch_size, i) alone, so a longer run starts with the masks of a shorter one. eps, protect: for "dream": the least
    probability, and positions never masked.
    Returns Masks with masked bool [samples, length] on `device`. Errors: SettingError.
    """
    length = integer("length", length, 1, LONGEST)
    check_names("estimator", [estimator], ("llada", "dream"))
    batches = check_samples("samples", samples, batch_size)
    seed = check_seed(seed)
    eps = _eps(eps)
    protected = [integer(f"protect[{i}]", p, -length, length - 1) for i, p in enumerate(protect)]
    if estimator == "llada" and protected:
        raise SettingError("protect is for estimator='dream'; with estimator='llada' leave those positions out of length")
    field = _field(seed, samples, length, device)
    firsts = _draw(seed, _SCALARS, torch.zeros(batches, dtype=torch.int64), torch.arange(batches)).tolist()
    if estimator == "dream":
        p = torch.cat([stratified_times(u0, batch_size, eps) for u0 in firsts]).to(device)
        masked = field < p[:, None]
        masked[:, protected] = False
        return Masks(masked, 1.0 / p, batch_size)
    counts = torch.tensor([n for u in firsts for n in stratified_counts(length, batch_size, 1 + int(u * length))], device=device)
    chosen = torch.arange(length, device=device) < counts[:, None]
    masked = torch.zeros_like(chosen).scatter_(1, field.argsort(dim=1, stable=True), chosen)
    return Masks(masked, length / counts.double(), batch_size, exact=length == 1)


def chain_masks(length: int, device: torch.device | str = "cpu") -> Masks:
    """The chain rule: sample j of `length` masks positions j and later and scores j alone, so the samples add up to the log-probability of
    the answer written left to right. Source: Dream's `ar_ftb` (DreamLM/Dream, eval/eval.py). Errors: SettingError."""
    length = integer("length", length, 1, LONGEST)
    masked = torch.ones((length, length), dtype=torch.bool, device=device).triu()
    scored = torch.eye(length, dtype=torch.bool, device=device)
    return Masks(masked, torch.ones(length, dtype=torch.float64, device=device), length, scored, additive=True, exact=True)


def coupled_masks(
    length: int,
    t: float | None = None,
    *,
    field: torch.Tensor | None = None,
    seed: int = 0,
    device: torch.device | str = "cpu",
) -> Masks:
    """Coupled masks over a completion, 3 samples: all of it (weight 1), a random part (1 / t), the rest (1 / (1 - t)).

    The last two cover every token exactly once. t in (0, 1): the chance of a position to be in the first part; None draws it from
    U(0.2, 0.8), as the authors do. field: floating [length], the random numbers in [0, 1] that are compared with t (below: first part);
    None draws them from `seed`. Source: DiffuCoder, arXiv 2506.20639, apple/ml-diffucoder coupled_grpo.py. Errors: SettingError.
    """
    length = integer("length", length, 1, LONGEST)
    seed = check_seed(seed)
    if t is None:
        zero = torch.zeros(1, dtype=torch.int64)
        t = 0.2 + 0.6 * float(_draw(seed, _SCALARS, zero, zero))
    t = number("t", t, 0.0, 1.0, open_low=True)
    if t == 1.0:
        raise SettingError("t must be a number in (0, 1), got 1: the second part would be empty, with an infinite weight")
    if field is None:
        field = _field(seed, 1, length, device)[0]
    elif not isinstance(field, torch.Tensor) or field.shape != (length,) or not field.is_floating_point():
        what = f"{field.dtype} {list(field.shape)}" if isinstance(field, torch.Tensor) else type(field).__name__
        raise SettingError(f"field must be a floating point tensor [length] = [{length}], got {what}")
    first = field.to(device) < t
    weights = torch.tensor([1.0, 1.0 / t, 1.0 / (1.0 - t)], dtype=torch.float64, device=device)
    return Masks(torch.stack([torch.ones_like(first), first, ~first]), weights, 3)


def check_samples(name: str, samples: object, batch_size: object) -> int:
    """The number of batches; raises SettingError unless samples is a positive multiple of batch_size."""
    batch_size = integer("batch_size", batch_size, 1, LONGEST)
    samples = integer(name, samples, 1, LONGEST)
    if samples % batch_size:
        raise SettingError(
            f"{name} must be a positive multiple of batch_size, got {name}={samples}, batch_size={batch_size}; "
            f"the nearest: {name}={max(1, round(samples / batch_size)) * batch_size}"
        )
    return samples // batch_size


def check_seed(seed: object) -> int:
    return integer("seed", seed, LOWEST_SEED, HIGHEST_SEED)


def _eps(eps: object) -> float:
    eps = number("eps", eps, 0.0, 1.0)
    if eps == 1.0:
        raise SettingError("eps must be a number in [0, 1), got 1")
    return eps


def _rounded_ratio(a: int, b: int) -> int:
    """a / b for a, b > 0, rounded to the nearest integer, halves to even."""
    whole, rest = divmod(a, b)
    return whole + (2 * rest > b or (2 * rest == b and whole % 2 == 1))


_POSITIONS, _SCALARS = 0, 1  # streams of random numbers that share a user's seed


def _draw(seed: int, stream: int, step: torch.Tensor, pos: torch.Tensor) -> torch.Tensor:
    """float64 in (0, 1) per entry, a multiple of 2^-47: two draws of `ops.uniform`, since the 23 bits of one would tie in long rows."""
    high, low = (torch.full_like(step, s) for s in row_seeds(seed, None, 2 * stream + 2)[-2:])
    return (uniform(high, step, pos).double() - 2.0**-24) + uniform(low, step, pos).double() * 2.0**-23


def _field(seed: int, samples: int, length: int, device: torch.device | str) -> torch.Tensor:
    """float64 [samples, length]: a random number per sample and position."""
    step = torch.arange(samples, device=device).repeat_interleave(length)
    pos = torch.arange(length, device=device).repeat(samples)
    return _draw(seed, _POSITIONS, step, pos).view(samples, length)
