"""LLaDA2.0's and 2.1's samplers (phymhan/S2D2, LLaDA2/generate_utils.py, after inclusionAI's LLaDA2.X; arXiv 2512.15745, 2602.08676) on
unmask's ops."""

from __future__ import annotations

import torch

from ..decode.engine import Commit
from . import _blocks
from ._llada2 import Call


def generate_cached(
    model: torch.nn.Module, input_ids: torch.Tensor, attention_mask: torch.Tensor | None = None, temperature: float = 0.0,
    block_length: int = 32, gen_length: int = 2048, max_gen_toks: int | None = None, top_p: float | None = None, top_k: int | None = None,
    eos_early_stop: bool = False, threshold: float = 0.95, editing_threshold: float = 0.9, max_post_steps: int = 16, eos_id: int = 156892,
    mask_id: int = 156895, num_to_transfer: int = 1, record_decoding_order: bool = False, return_stats: bool = True, **kwargs: object,
) -> torch.Tensor | tuple[torch.Tensor, dict]:  # fmt: skip
    """Block after block with the K/V of finished blocks kept. Returns (x int64 [1, P + new], {"nfe": forwards}), cut behind the first EOS,
    or x alone with return_stats=False; record_decoding_order adds "decoding_order": per forward of a block {"edit": [(position, old id,
    new id)], "unmask": [position]}.

    model: block-causal, from `unmask.load`. input_ids: int64 [1, P]. attention_mask and further keywords are ignored, as in the authors'
    code; so is LLaDA2.0's own `steps`, whose results are those of at least block_length steps. Blocks are aligned to multiples of
    block_length from the first token, which is also the attention's block. threshold: masks with
    p > threshold commit, and if they are fewer than num_to_transfer, the best num_to_transfer instead. editing_threshold: decided
    tokens of the block, the prompt's excepted, are replaced where another has a higher p than this; from 1 on nothing is. max_post_steps:
    forwards at most of a block without masks. max_gen_toks: gen_length by another name. eos_early_stop: stop at the end of a block that holds eos_id. Forwards: one for the prompt's whole blocks, the
    steps, and one that stores each block but the last. temperature > 0 samples, filtered by top_k, then top_p.
    Differences: the mask token is never predicted, prompt positions never change even if they hold mask_id, ties go to the lowest index,
    and samples come from a counter-based generator seeded from torch's default one. The block mask is a mask: the authors' copy adds zeros
    and ones to the scores where several blocks are forwarded. Raises SettingError (a ValueError) for bad arguments.
    """
    call = Call(
        model, input_ids, temperature, block_length, gen_length, max_gen_toks, top_p, top_k, eos_early_stop, threshold, editing_threshold,
        max_post_steps, eos_id, mask_id, num_to_transfer,
    )  # fmt: skip
    return _run(call, record_decoding_order, return_stats, cached=True)


def generate(
    model: torch.nn.Module, input_ids: torch.Tensor, attention_mask: torch.Tensor | None = None, temperature: float = 0.0,
    block_length: int = 32, gen_length: int = 2048, max_gen_toks: int | None = None, top_p: float | None = None, top_k: int | None = None,
    eos_early_stop: bool = False, threshold: float = 0.95, editing_threshold: float = 0.9, max_post_steps: int = 16, eos_id: int = 156892,
    mask_id: int = 156895, num_to_transfer: int = 1, record_decoding_order: bool = False, return_stats: bool = True, **kwargs: object,
) -> torch.Tensor | tuple[torch.Tensor, dict]:  # fmt: skip
    """Without a cache: every forward takes everything up to the block's end. Arguments, return value and errors as in `generate_cached`."""
    call = Call(
        model, input_ids, temperature, block_length, gen_length, max_gen_toks, top_p, top_k, eos_early_stop, threshold, editing_threshold,
        max_post_steps, eos_id, mask_id, num_to_transfer,
    )  # fmt: skip
    return _run(call, record_decoding_order, return_stats, cached=False)


def _run(call: Call, record: bool, stats: bool, *, cached: bool) -> torch.Tensor | tuple[torch.Tensor, dict]:
    loop = call.start(
        _blocks.prepare, cache="block" if cached else "none", block_done=call.store if cached else None, note=_note if record else None
    )
    if cached:
        loop.prefill(call.given)
    return call.run(record, stats)


def _note(c: Commit) -> dict[str, list]:
    return {"edit": sorted((position, old, new) for position, old, new, _ in c.edited), "unmask": sorted(c.positions)}
