"""Fast-dLLM v1's three samplers (NVlabs/Fast-dLLM, llada/generate.py; arXiv 2505.22618) on unmask's ops.

All three take the authors' arguments and return (x, nfe). The revisions of the authors' code differ in one forward: in the first one, the
cached samplers run at least one cached forward per block, even if the block's full forward has finished it; the later one, which added
`factor` (AdaBlock's loops derive from it), tests first. `superfluous_forward` chooses; by default the later behaviour wherever `factor` is
passed, None included, and the first one where it is left out.
"""

from __future__ import annotations

import functools

import torch

from ..decode.policy import Policy
from ..decode.schedule import FixedBlocks
from ..errors import SettingError
from ..models.foreign import Foreign
from ..values import number
from . import _loop


def _revision(sampler):
    """Decides superfluous_forward where the caller does not: only the wrapper sees whether `factor` was passed."""

    @functools.wraps(sampler)
    def call(*args, superfluous_forward: bool | None = None, **kwargs):
        if superfluous_forward is None:
            superfluous_forward = not ("factor" in kwargs or len(args) >= 10)
        return sampler(*args, superfluous_forward=superfluous_forward, **kwargs)

    return call


@_loop.wrapped_mask
def generate(
    model: torch.nn.Module | Foreign, prompt: torch.Tensor, steps: int = 128, gen_length: int = 128, block_length: int = 128,
    temperature: float = 0.0, remasking: str = "low_confidence", mask_id: int = 126336, threshold: float | None = None, factor: float | None = None,
) -> tuple[torch.Tensor, int]:  # fmt: skip
    """Without a cache. Returns (x int64 [B, P + gen_length], nfe).

    model: from `unmask.load` or `unmask.wrap`, or any module that returns logits. threshold: commit every position with confidence >= threshold, at
    least one (steps is then ignored). factor: the authors' factor rule, its off-by-one included. Neither: `steps` forwards, fixed quotas. A block
    ends as soon as it holds no mask. Raises SettingError (a ValueError) for bad arguments.
    """
    return _run(model, prompt, steps, gen_length, block_length, temperature, remasking, mask_id, threshold, factor, "none", False)


@_loop.wrapped_mask
@_revision
def generate_with_prefix_cache(
    model: torch.nn.Module | Foreign, prompt: torch.Tensor, steps: int = 128, gen_length: int = 128, block_length: int = 128,
    temperature: float = 0.0, remasking: str = "low_confidence", mask_id: int = 126336, threshold: float | None = None, factor: float | None = None,
    *, superfluous_forward: bool | None = None,
) -> tuple[torch.Tensor, int]:  # fmt: skip
    """K/V of everything before the block is kept from the block's first, full forward. Arguments and return value as in `generate`.

    model: from `unmask.load`, or a module whose forward takes what the authors' LLaDA class takes: past_key_values and use_cache.
    """
    return _run(
        model, prompt, steps, gen_length, block_length, temperature, remasking, mask_id, threshold, factor, "prefix", superfluous_forward
    )


@_loop.wrapped_mask
@_revision
def generate_with_dual_cache(
    model: torch.nn.Module | Foreign, prompt: torch.Tensor, steps: int = 128, gen_length: int = 128, block_length: int = 128,
    temperature: float = 0.0, remasking: str = "low_confidence", mask_id: int = 126336, threshold: float | None = None, factor: float | None = None,
    *, superfluous_forward: bool | None = None,
) -> tuple[torch.Tensor, int]:  # fmt: skip
    """K/V of everything outside the block is kept from the block's first, full forward. Arguments and return value as in `generate`.

    model: from `unmask.load`, or a module whose forward takes what the authors' LLaDA class takes: past_key_values, use_cache
    and replace_position.
    """
    return _run(
        model, prompt, steps, gen_length, block_length, temperature, remasking, mask_id, threshold, factor, "dual", superfluous_forward
    )


def _run(
    model, prompt, steps, gen_length, block_length, temperature, remasking, mask_id, threshold, factor, cache, superfluous
) -> tuple[torch.Tensor, int]:
    _loop.check_model(model)
    if threshold is not None and factor is not None:
        raise SettingError("give threshold or factor, not both")
    rule = "threshold" if threshold is not None else "factor" if factor is not None else "quota"
    _loop.check_arguments(prompt, steps, gen_length, block_length, temperature, remasking, mask_id, quota=rule == "quota")
    if factor is not None:
        number("factor", factor, 0.0, 1e30, open_low=True)
    knobs = {"threshold": dict(threshold=threshold), "factor": dict(factor=factor, factor_off_by_one=True), "quota": {}}[rule]
    policy = Policy(
        rule=rule,
        score=_loop.REMASKING[remasking],
        knobs=knobs,
        temperature=float(temperature),
        strict=False,
    )
    least = 2 if superfluous and cache != "none" else 0
    return _loop.prepare(
        model, prompt, policy, gen_length=gen_length, mask_id=mask_id, schedule=FixedBlocks(block_length),
        steps=steps if rule == "quota" else None, cache=cache, min_steps=lambda row: least,
    ).run()  # fmt: skip
