"""Fast-dLLM v2's `generate` (NVlabs/Fast-dLLM, v2/, the model class's own; arXiv 2509.26328; read in phymhan/S2D2's copy) on unmask's ops."""

from __future__ import annotations

import torch

from ..decode.engine import Commit
from . import _blocks
from ._fast_dllm_v2 import Call, Output


def generate(
    model: torch.nn.Module, input_ids: torch.Tensor, max_new_tokens: int | None = None, max_length: int | None = None, tokenizer: object = None,
    mask_id: int = 151665, threshold: float = 1, small_block_size: int = 8, block_size: int = 32, stop_token: int = 151645,
    stopping_criteria: object = None, top_p: float = 0.95, temperature: float = 0, use_block_cache: bool = False,
    return_dict_in_generate: bool = False, *, max_gen_toks: int | None = None, return_decoding_order: bool = False,
) -> torch.Tensor | Output | tuple[torch.Tensor | Output, dict]:  # fmt: skip
    """Block after block, sub-block after sub-block. Returns x int64 [1, P + new], prompt included, cut behind the first stop_token.

    model: Fast-dLLM v2 (block-causal, shifted logits), from `unmask.load`. input_ids: int64 [1, P]. max_new_tokens, or max_length - P, or
    max_gen_toks, is rounded down to whole blocks, and the first block is shared with the prompt's tail. Blocks are aligned to multiples of
    block_size. In a sub-block everything with p > threshold commits, and always the best. A finished block is stored by a forward of its
    own, whose last logits give the first token of the next block: greedily, whatever threshold and temperature are. The last block leaves
    such a token behind it. use_block_cache: once the first position of a sub-block is known, its positions alone are forwarded against the
    K/V that the rest of the block had (approximate). temperature > 0 samples, filtered by top_p. Generation ends when stop_token is there
    and nothing before it is masked. tokenizer and stopping_criteria are ignored, as in the authors' code. return_decoding_order adds {"decoding_order": per forward minus
    the positions, minus (position + 0.5) for a token that opens a block, "total_forward_steps"}.
    Differences: a prompt of exactly block_size tokens is seen (the authors' code drops it: it prefills from block_size + 1 on); the mask
    token is never predicted; prompt positions never change; ties go to the lowest index; samples come from a counter-based generator seeded
    from torch's default one; attention is causal over blocks of block_size (the model class's own `generate` keeps to blocks of 32 where
    block_size does not divide 32; S2D2's copy does as here). Raises SettingError (a ValueError) for bad arguments.
    """
    call = Call(
        model, input_ids, max_new_tokens, max_gen_toks, max_length, mask_id, threshold, small_block_size, block_size, stop_token, top_p, temperature
    )
    call.start(_blocks.prepare, cache="dual" if use_block_cache else "block", note=_note if return_decoding_order else None)
    return call.run(return_dict_in_generate, return_decoding_order)


def _note(c: Commit) -> list[int]:
    return [-position for position in sorted(c.positions)]
