"""Scores: what orders the candidates of a step. Each is float [N] from their statistics, on the device.

| score | of a candidate | source |
|---|---|---|
| confidence | probability of its token | LLaDA, arXiv 2502.09992 |
| margin | p1 - p2 | arXiv 2502.06768 |
| entropy | negative entropy in nats | arXiv 2502.06768, Dream |
| random | uniform, keyed by seed, step and position | LLaDA |
| leftmost | minus its position | SDAR (sequential) |
| pc | exp(-lambda (i - s)) min(alpha, -p ln f(token)) | PC-Sampler, arXiv 2508.13021 |
| a function | what it returns for a StepView | |
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import torch

from ..errors import SettingError
from ..ops import LogitStats, uniform

if TYPE_CHECKING:
    from .rules.base import Run, StepView

PC_EPSILON, PC_EPSILON_D2CACHE = 1e-9, 1e-10


class Score:
    """The score of one run's policy. logits_dtype: of the model's logits, for `rounded`."""

    def __init__(self, run: Run):
        policy = run.policy
        self.policy, self.state = policy, run.state
        self.name = policy.score if isinstance(policy.score, str) else "hook"
        self.log_frequency: torch.Tensor | None = None
        if self.name == "pc":
            f = read_frequencies(policy.knobs.get("frequencies"), run.device)
            self.backend = run.backend
            model = getattr(run.backend, "model", None)
            if model is not None:
                check_vocabulary(f, model.config.vocab_size)
            epsilon = PC_EPSILON_D2CACHE if policy.knobs.get("variant") == "d2cache" else PC_EPSILON
            self.log_frequency = torch.log(f + epsilon)
        self._first = True

    def __call__(self, step: StepView, stats: LogitStats, logits_dtype: torch.dtype) -> torch.Tensor:
        """float64 or float32 [N]."""
        score = self.plain(step, stats, logits_dtype)
        if self.policy.certainty_sigma is not None:
            score = score.double() * self.certainty(step)
        if self.policy.position_bias:
            score = score.double() - self.policy.position_bias * step.offset.double()
        # a position that a function scores NaN comes last: left out, it would stay masked for ever
        return torch.where(score.isnan(), -torch.inf, score) if self.name == "hook" else score

    def plain(self, step: StepView, stats: LogitStats, logits_dtype: torch.dtype) -> torch.Tensor:
        """Without certainty density and position bias."""
        if self.name == "hook":
            return hook_result(self.policy.score, step, "the score function")
        if self.name == "confidence":
            return stats.p.to(logits_dtype).float() if self.policy.rounded else stats.confidence
        if self.name == "margin":
            return stats.margin
        if self.name == "entropy":
            return -stats.entropy
        if self.name == "random":
            return uniform(**step.key)
        if self.name == "leftmost":
            return -step.pos.double()
        if self.name == "pc":
            return self._pc(step, stats)
        return stats.confidence  # the rule orders by itself

    def _pc(self, step: StepView, stats: LogitStats) -> torch.Tensor:
        assert self.log_frequency is not None
        if self._first and hasattr(self.backend, "vocab"):  # a module's vocabulary shows in its first logits
            check_vocabulary(self.log_frequency, self.backend.vocab)
        self._first = False
        knobs = self.policy.knobs
        rare = -stats.p.double() * self.log_frequency[stats.token.clamp_min(0)]
        score = rare.clamp_max(float(knobs["clip"]))
        if knobs["variant"] == "d2cache" or not knobs["decay"]:
            return score
        return score * torch.exp(-float(knobs["decay"]) * step.offset.double())

    def certainty(self, step: StepView) -> torch.Tensor:
        """float64 [N]: Gaussian-weighted share of decided positions around each candidate, over its row's generated region [start, end).

        What lies left of the region counts as decided, for as far as the region is long; what lies right of it does if its last position
        is. Weights are normalised by their sum over three region lengths to either side (d2Cache, src/utils, certainty_density).
        """
        sigma = float(self.policy.certainty_sigma)  # type: ignore[arg-type]
        length = self.state.canvas.shape[1]
        position = torch.arange(length, device=step.device)
        start = step.per_entry([r.start for r in step.rows])
        end = step.per_entry([r.end for r in step.rows])
        size = end - start
        inside = (position >= start[:, None]) & (position < end[:, None])
        decided = inside & ~self.state.masked.index_select(0, step.plan.row)
        last = decided.gather(1, (end - 1)[:, None])[:, 0]
        distance = (step.pos[:, None] - position).double()
        weight = torch.exp(-(distance**2) / (2 * sigma**2))
        near = (weight * decided.index_select(0, step.entry)).cumsum(1)[:, -1]  # one by one: rows of other lengths change no bit
        # the two flanks and the norm are sums of the same Gaussian over whole ranges: differences of its running sums from distance 0
        reach = 3 * length
        steps = torch.arange(reach + 1, device=step.device).double()
        running = torch.cat([steps.new_zeros(1), torch.exp(-(steps**2) / (2 * sigma**2)).cumsum(0)])

        def below(high: torch.Tensor) -> torch.Tensor:
            """Sum over distances 0 .. high - 1; for high < 0 minus the sum over high .. -1."""
            return torch.where(high >= 0, running[high.clamp(0, reach + 1)], running[1] - running[(1 - high).clamp(0, reach + 1)])

        def over(low: torch.Tensor, high: torch.Tensor) -> torch.Tensor:
            """Sum of the Gaussian over integer distances low .. high - 1."""
            return below(high) - below(low)

        begin, stop, wide = (step.spread(x) for x in (start, end, size))
        left = over(step.pos - begin + 1, step.pos - begin + 1 + wide)
        right = over(step.pos - stop + 1 - wide, step.pos - stop + 1)
        norm = over(-3 * wide, 3 * wide).clamp_min(1e-8)
        return (near + left + torch.where(step.spread(last), right, 0.0)) / norm


def hook_result(hook, step: StepView, what: str) -> torch.Tensor:
    """What a user's function returned, checked: float32 or float64 [N] on the step's device."""
    value = hook(step)
    n = step.pos.shape[0]
    ok = isinstance(value, torch.Tensor) and value.shape == (n,) and value.dtype in (torch.float32, torch.float64)
    if not ok or value.device != step.device:
        got = f"{value.dtype} {list(value.shape)} on {value.device}" if isinstance(value, torch.Tensor) else type(value).__name__
        raise SettingError(f"{what} must return float32 or float64 [N] = [{n}] on {step.device}, got {got}")
    return value


def check_vocabulary(frequencies: torch.Tensor, vocab: int) -> None:
    if frequencies.shape[0] != vocab:
        raise SettingError(f"frequencies must hold one number per token of the vocabulary, {vocab} here, got {frequencies.shape[0]}")


def read_frequencies(source: object, device: torch.device) -> torch.Tensor:
    """float64 [V]: PC-Sampler's table, from a tensor or a safetensors file of one tensor. Raises SettingError for anything else."""
    if source is None:
        raise SettingError("policy='pc' needs frequencies: the corpus frequency of every token, float [V], or a safetensors file of one tensor")
    if isinstance(source, (str, Path)):
        from safetensors import SafetensorError
        from safetensors.torch import load_file

        try:
            tensors = load_file(source)
        except (OSError, SafetensorError) as error:
            raise SettingError(f"frequencies: cannot read {source}: {error}") from None
        if len(tensors) != 1:
            raise SettingError(f"frequencies: {source} must hold one tensor, got {len(tensors)}")
        source = next(iter(tensors.values()))
    if not isinstance(source, torch.Tensor) or source.dim() != 1 or not source.is_floating_point():
        got = f"{source.dtype} {list(source.shape)}" if isinstance(source, torch.Tensor) else type(source).__name__
        raise SettingError(f"frequencies must be a float tensor [V] or a safetensors file, got {got}")
    f = source.to(device=device, dtype=torch.float64)
    if not bool((f.isfinite() & (f >= 0)).all()):
        raise SettingError("frequencies must be finite and not negative")
    return f
