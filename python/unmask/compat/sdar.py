"""SDAR's `block_diffusion_generate` (JetAstra/SDAR, generate.py) and its greedy port (phymhan/S2D2, SDAR/generate.py) on unmask's ops."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from ..decode.engine import Commit
from ..decode.rules.base import StepView
from ..errors import SettingError
from ..ops import LogitStats
from . import _blocks
from ._sdar import Call


def block_diffusion_generate(
    model: torch.nn.Module,
    prompt: Mapping[str, torch.Tensor] | torch.Tensor,
    mask_id: int = 151669,
    gen_length: int = 128,
    block_length: int = 8,
    denoising_steps: int = 8,
    temperature: float = 1.0,
    top_k: int = 0,
    top_p: float = 1.0,
    remasking_strategy: str = "low_confidence_dynamic",
    confidence_threshold: float = 0.85,
    stopping_criteria_idx: Sequence[int] | None = None,
    *,
    do_sample: bool = True,
    trim_stop_tokens: bool = False,
    return_forward_stats: bool = False,
    max_gen_toks: int | None = None,
    sampled_tokens: Sequence[Sequence[int]] | None = None,
) -> torch.Tensor | tuple[torch.Tensor, dict]:
    """Block after block with the K/V of finished blocks kept. Returns x int64 [1, whole blocks], mask_id where nothing was decided.

    model: block-causal, from `unmask.load`. prompt: the tokenizer's output, or its input_ids int64 [1, P]. gen_length is rounded up so that
    the last block is whole. denoising_steps: quotas of a block's steps, block_length spread as evenly as possible, the surplus first.
    remasking_strategy: "low_confidence_static": the quota's best; "low_confidence_dynamic": everything with p > confidence_threshold if
    that is at least the quota, else the quota's best; "sequential": the leftmost. Tokens are sampled after temperature, top_k and top_p,
    in this order, and p is of that distribution; temperature=0 (which the authors' code turns into NaN) or do_sample=False: argmax and
    the plain softmax. stopping_criteria_idx: ids that end the generation once a finished block holds one of them. Forwards: one for the prompt's
    whole blocks, the steps, and one that stores each finished block.
    S2D2's port has do_sample, trim_stop_tokens (cut before the first stopping id, and behind the last decided token), return_forward_stats
    (x, {"decoding_order": per step the positions, with "|" first in a block's first step, "total_forward_steps"}) and max_gen_toks, another
    name for gen_length; its own defaults of the first two are False and True.
    sampled_tokens: replays a recorded run: per step the block's block_length tokens that were drawn; needs temperature=1, top_k=0, top_p=1.
    Differences: where a step's quota exceeds the masks that are left, all of them commit and nothing else (the authors' top-k overwrites
    decided and prompt tokens); the mask token is never predicted; prompt positions never change; ties go to the lowest index; samples come
    from a counter-based generator seeded from torch's default one; the softmax is fp32 (JetAstra's is of the logits' dtype). Raises SettingError (a ValueError) for bad arguments.
    """
    call = Call(
        model, prompt.get("input_ids") if isinstance(prompt, Mapping) else prompt, mask_id, gen_length, max_gen_toks, block_length,
        denoising_steps, temperature, top_k, top_p, remasking_strategy, confidence_threshold, stopping_criteria_idx, do_sample, name="prompt",
        replay=sampled_tokens is not None,
    )  # fmt: skip
    loop = call.start(_blocks.prepare, note=_note if return_forward_stats else None)
    if sampled_tokens is not None:
        _Replay(loop, sampled_tokens)
    return call.run(trim_stop_tokens, return_forward_stats)


class _Replay:
    """Puts recorded tokens, with the model's probabilities for them, in place of drawn ones."""

    def __init__(self, loop: _blocks.BlockLoop, tokens: Sequence[Sequence[int]]):
        self.size, self.step, vocab = loop.size, 0, loop.backend.model.config.vocab_size
        try:
            self.tokens = torch.tensor(tokens, dtype=torch.int64, device=loop.state.canvas.device)
        except (TypeError, ValueError, RuntimeError) as error:
            raise SettingError(f"sampled_tokens must hold {self.size} token ids per step: {error}") from None
        if self.tokens.dim() != 2 or self.tokens.shape[1] != self.size or bool(((self.tokens < 0) | (self.tokens >= vocab)).any()):
            raise SettingError(f"sampled_tokens must hold {self.size} token ids below {vocab} per step, got {list(self.tokens.shape)}")
        if bool((self.tokens == loop.state.mask_id).any()):
            raise SettingError(f"sampled_tokens must not hold the mask token {loop.state.mask_id}: it is never predicted here")
        rule: Any = loop.engine.rule
        rule.options, rule.scored = self.options, self.scored

    def _drawn(self, step: StepView) -> torch.Tensor:
        if self.step >= self.tokens.shape[0]:
            raise SettingError(f"sampled_tokens must hold the tokens of every step, got those of {self.tokens.shape[0]}, and the run is not done")
        return self.tokens[self.step].index_select(0, step.pos % self.size)

    def options(self, step: StepView) -> dict[str, Any]:
        return dict(ids=self._drawn(step)[:, None].contiguous())

    def scored(self, step: StepView, stats: LogitStats) -> LogitStats:
        log_p = stats.at_ids[:, 0, 0]
        stats.p.copy_(log_p.exp())
        stats.p_rest.copy_(-torch.expm1(log_p))
        stats.token.copy_(torch.where(stats.token < 0, -1, self._drawn(step)))
        self.step += 1
        return stats


def _note(c: Commit) -> list[Any]:
    return ([] if c.step else ["|"]) + c.positions
