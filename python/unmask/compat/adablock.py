"""AdaBlock-dLLM's samplers (lgxi24/AdaBlock-dLLM, llada/generate_adablock.py, dream/model/generation_utils_adablock.py and
generation_utils_block.py; arXiv 2509.26432) on unmask's ops.

For LLaDA: `generate_adablock`, `generate_adablock_prefix_cache`, `generate_adablock_dual_cache`. For Dream, where the authors bind one of three
`_sample` methods beside `diffusion_generate`: `dream_generate` (adaptive blocks; dual_cache=True for the cached one) and
`dream_generate_parallel` (fixed blocks, left to right, no cache). The Dream functions can be bound:
`model.diffusion_generate = types.MethodType(unmask.compat.adablock.dream_generate, model)`.

A block ends at the most confident predicted delimiter within the next int(0.25 * new tokens) positions, if that confidence reaches
delimiter_threshold, else after the default length; a threshold of inf means blocks of the default length.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch

from ..decode.policy import Policy
from ..decode.schedule import AdaBlock, FixedBlocks
from ..errors import SettingError
from ..models.foreign import Foreign
from ..values import integer, number
from . import _loop
from ._dream_options import DreamModelOutput, Options, block_size, flag
from .dream import _prepare

WINDOW = 0.25
DREAM_DELIMITERS = (
    198, 271, 280, 319, 340, 382, 401, 532, 624, 630, 692, 698, 921, 1248, 1837, 1939, 2219, 2533, 3276, 3876, 4894, 5267, 14750, 68327,
)  # fmt: skip
"""Tokens of Dream's vocabulary that hold a line break; the authors hard-code them."""


@_loop.wrapped_mask
def generate_adablock(
    model: torch.nn.Module | Foreign, prompt: torch.Tensor, steps: int = 128, gen_length: int = 128, init_block_length: int = 128,
    temperature: float = 0.0, remasking: str = "low_confidence", mask_id: int = 126336, threshold: float | None = None,
    delimiter_ids: Sequence[int] = (198,), delimiter_threshold: float = math.inf,
) -> tuple[torch.Tensor, list, list]:  # fmt: skip
    """Without a cache. Returns (x int64 [B, P + gen_length], nfe_history, block_history): forwards and length of each block.

    The authors take one prompt. A batch works here, every row with its own blocks, and then both histories are a list per row.
    model: from `unmask.load` or `unmask.wrap`, or any module that returns logits. threshold: commit every position with confidence >= threshold, at
    least one; it must be given. steps is not used. init_block_length: the default length. delimiter_ids: token ids, none = fixed blocks. temperature
    > 0: delimiters are looked for among the sampled tokens. Raises SettingError (a ValueError) for bad arguments.
    """
    return _generate(
        model, prompt, steps, gen_length, init_block_length, temperature, remasking, mask_id, threshold, delimiter_ids, delimiter_threshold, "none"
    )


@_loop.wrapped_mask
def generate_adablock_prefix_cache(
    model: torch.nn.Module | Foreign, prompt: torch.Tensor, steps: int = 128, gen_length: int = 128, init_block_length: int = 128,
    temperature: float = 0.0, remasking: str = "low_confidence", mask_id: int = 126336, threshold: float | None = None,
    delimiter_ids: Sequence[int] = (198,), delimiter_threshold: float = math.inf,
) -> tuple[torch.Tensor, list, list]:  # fmt: skip
    """K/V of everything before the block is kept from the forward that measured it. Arguments and return values as in `generate_adablock`.

    model: from `unmask.load`, or a module whose forward takes past_key_values and use_cache, as the authors' LLaDA class.
    """
    return _generate(
        model, prompt, steps, gen_length, init_block_length, temperature, remasking, mask_id, threshold, delimiter_ids, delimiter_threshold, "prefix"
    )


@_loop.wrapped_mask
def generate_adablock_dual_cache(
    model: torch.nn.Module | Foreign, prompt: torch.Tensor, steps: int = 128, gen_length: int = 128, init_block_length: int = 128,
    temperature: float = 0.0, remasking: str = "low_confidence", mask_id: int = 126336, threshold: float | None = None,
    delimiter_ids: Sequence[int] = (198,), delimiter_threshold: float = math.inf,
) -> tuple[torch.Tensor, list, list]:  # fmt: skip
    """K/V of everything outside the block is kept from the forward that measured it. Arguments and return values as in `generate_adablock`.

    model: from `unmask.load`, or a module whose forward takes past_key_values, use_cache and replace_position, as the authors' LLaDA class.
    """
    return _generate(
        model, prompt, steps, gen_length, init_block_length, temperature, remasking, mask_id, threshold, delimiter_ids, delimiter_threshold, "dual"
    )


def dream_generate(
    model: torch.nn.Module | Foreign, inputs: torch.Tensor | None = None, generation_config: object = None, **kwargs: Any
) -> DreamModelOutput | torch.Tensor:
    """Dream with adaptive blocks. Arguments and return values as in `unmask.compat.dream.diffusion_generate`, and:

    alg must be "confidence_threshold" (the authors' code has no other); steps is not used. threshold 0.9. block_length: the default length
    (8; None = all new tokens). delimiter_threshold 0.3. delimiter_ids: default, the authors' 24 tokens that hold a line break.
    dual_cache=True: keeps K/V outside the block; the forward that measures a block then commits its first position and nothing else,
    where without the cache it commits by the threshold. The output's nfe_history and block_history: forwards and length of each block.
    Delimiters are looked for among the argmax tokens, whatever is sampled. No hooks, uniforms or leave_masked.
    """
    extra = ("threshold", "block_length", "dual_cache", "delimiter_threshold", "delimiter_ids")
    options = Options(model, inputs, generation_config, kwargs, extra, ("confidence_threshold",))
    dual = flag(options, "dual_cache")
    schedule = _schedule(
        block_size(options, 8, divide=False), options.extra.get("delimiter_ids", DREAM_DELIMITERS), options.extra.get("delimiter_threshold", 0.3), True
    )
    policy = options.policy("threshold", dict(threshold=options.threshold()), forced_first=dual)
    loop = _prepare(options, policy, schedule=schedule, cache="dual" if dual else "none", shifted_window="block")
    return options.output(loop)


def dream_generate_parallel(
    model: torch.nn.Module | Foreign, inputs: torch.Tensor | None = None, generation_config: object = None, **kwargs: Any
) -> DreamModelOutput | torch.Tensor:
    """Dream in fixed blocks from left to right, without a cache. Arguments and return values as in `unmask.compat.dream.diffusion_generate`, and:

    alg: "confidence_threshold" or "entropy" (Dream's schedule over negative entropy, which begins with its second step). threshold 0.9.
    block_length 32, None = one block; it divides the new tokens, and the number of blocks divides steps. dual_cache: taken, as by the
    authors, without effect. leave_masked=True: where steps equals the number of blocks, alg="entropy" commits nothing, as in the authors'
    code; by default that one forward commits the whole block. The output's nfe_history: forwards of each block. No hooks or uniforms.
    """
    options = Options(
        model, inputs, generation_config, kwargs, ("threshold", "block_length", "dual_cache", "leave_masked"), ("confidence_threshold", "entropy")
    )
    flag(options, "dual_cache")
    size = block_size(options, 32, divide=True)
    per_block = options.steps * size // options.new_tokens
    entropy = options.alg == "entropy"
    left = flag(options, "leave_masked") and entropy and per_block == 1
    if entropy:
        policy = options.policy("dream", dict(alg="entropy", steps=per_block, eps=options.eps, alg_temp=options.alg_temp))
    else:
        policy = options.policy("threshold", dict(threshold=options.threshold()))
    loop = _prepare(options, policy, schedule=FixedBlocks(size), max_steps=lambda row: 1 if left else None)
    if entropy:
        loop.engine.rule.first_step, loop.engine.rule.leave_masked = 1, left
    return options.output(loop)


def _generate(
    model, prompt, steps, gen_length, init_block_length, temperature, remasking, mask_id, threshold, delimiter_ids, delimiter_threshold, cache
) -> tuple[torch.Tensor, list, list]:
    _loop.check_model(model)
    _loop.check_arguments(prompt, steps, gen_length, 1, temperature, remasking, mask_id, quota=False)
    integer("init_block_length", init_block_length, 1, _loop.LONGEST)
    if threshold is None:
        raise SettingError("threshold must be given: a number, for example 0.9; 1.0 commits one position per forward")
    schedule = _schedule(init_block_length, delimiter_ids, delimiter_threshold, False)
    policy = Policy(
        rule="threshold", score=_loop.REMASKING[remasking], knobs=dict(threshold=threshold), temperature=float(temperature), strict=False
    )
    loop = _loop.prepare(model, prompt, policy, gen_length=gen_length, mask_id=mask_id, schedule=schedule, cache=cache)
    x, _ = loop.run()
    return x, *loop.histories()


def _schedule(size: int, delimiter_ids: object, threshold: object, plain: bool) -> FixedBlocks:
    number("delimiter_threshold", threshold, 0.0, math.inf, finite=False)
    try:
        ids = tuple(delimiter_ids)  # type: ignore[arg-type]
    except TypeError:
        raise SettingError(f"delimiter_ids must be token ids, got {delimiter_ids!r}") from None
    return AdaBlock(size, ids, float(threshold), WINDOW, plain) if ids else FixedBlocks(size)  # type: ignore[arg-type]
