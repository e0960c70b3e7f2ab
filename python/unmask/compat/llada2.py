"""LLaDA2.0's and 2.1's samplers (phymhan/S2D2, LLaDA2/generate_utils.py, after inclusionAI's LLaDA2.X; arXiv 2512.15745, 2602.08676) on
unmask's ops."""

from __future__ import annotations

import torch

from ..decode.engine import Commit
from ..decode.policy import MAX_TEMPERATURE, Policy
from ..decode.state import Row
from ..values import integer, number
from . import _blocks


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
    code. Blocks are aligned to multiples of block_length from the first token, which is also the attention's block. threshold: masks with
    p > threshold commit, and if they are fewer than num_to_transfer, the best num_to_transfer instead. editing_threshold: decided
    tokens of the block, the prompt's excepted, are replaced where another has a higher p than this; from 1 on nothing is. max_post_steps:
    forwards at most of a block without masks. max_gen_toks: gen_length by another name. eos_early_stop: stop at the end of a block that holds eos_id. Forwards: one for the prompt's whole blocks, the
    steps, and one that stores each block but the last. temperature > 0 samples, filtered by top_k, then top_p.
    Differences: the mask token is never predicted, prompt positions never change even if they hold mask_id, ties go to the lowest index,
    and samples come from a counter-based generator seeded from torch's default one. The block mask is a mask: the authors' copy adds zeros
    and ones to the scores where several blocks are forwarded. Raises SettingError (a ValueError) for bad arguments.
    """
    return _run(
        model, input_ids, temperature, block_length, gen_length, max_gen_toks, top_p, top_k, eos_early_stop, threshold, editing_threshold,
        max_post_steps, eos_id, mask_id, num_to_transfer, record_decoding_order, return_stats, cached=True,
    )  # fmt: skip


def generate(
    model: torch.nn.Module, input_ids: torch.Tensor, attention_mask: torch.Tensor | None = None, temperature: float = 0.0,
    block_length: int = 32, gen_length: int = 2048, max_gen_toks: int | None = None, top_p: float | None = None, top_k: int | None = None,
    eos_early_stop: bool = False, threshold: float = 0.95, editing_threshold: float = 0.9, max_post_steps: int = 16, eos_id: int = 156892,
    mask_id: int = 156895, num_to_transfer: int = 1, record_decoding_order: bool = False, return_stats: bool = True, **kwargs: object,
) -> torch.Tensor | tuple[torch.Tensor, dict]:  # fmt: skip
    """Without a cache: every forward takes everything up to the block's end. Arguments, return value and errors as in `generate_cached`."""
    return _run(
        model, input_ids, temperature, block_length, gen_length, max_gen_toks, top_p, top_k, eos_early_stop, threshold, editing_threshold,
        max_post_steps, eos_id, mask_id, num_to_transfer, record_decoding_order, return_stats, cached=False,
    )  # fmt: skip


def _run(
    model, input_ids, temperature, block_length, gen_length, max_gen_toks, top_p, top_k, eos_early_stop, threshold, editing_threshold,
    max_post_steps, eos_id, mask_id, num_to_transfer, record_decoding_order, return_stats, *, cached,
):  # fmt: skip
    model = _blocks.check_model(model, shifted=False)
    gen_length = gen_length if max_gen_toks is None else max_gen_toks
    _blocks.check_lengths(block_length=block_length, gen_length=gen_length)
    prompt = _blocks.check_one_prompt(model, input_ids, mask_id)
    integer("eos_id", eos_id, 0, (1 << 31) - 1)
    integer("max_post_steps", max_post_steps, 0, 1 << 16)
    sampled = float(number("temperature", temperature, 0.0, MAX_TEMPERATURE)) > 0
    knobs = dict(threshold=_blocks.bar("threshold", threshold), minimum=integer("num_to_transfer", num_to_transfer, 1, 1 << 20))
    edits = number("editing_threshold", editing_threshold, 0.0, 1e30) < 1.0
    if edits:
        knobs.update(edit_threshold=float(editing_threshold), max_post_steps=max_post_steps)
    policy = Policy(
        rule="edit" if edits else "llada2", knobs=knobs, temperature=float(temperature), top_p=top_p if sampled else None,
        top_k=(top_k or None) if sampled else None, top_k_first=True, tempered=sampled,
    )  # fmt: skip
    p = prompt.shape[1]

    def store(row: Row) -> None:
        if cached and row.block_end < row.end:
            loop.store_block(row)

    loop = _blocks.prepare(
        model, prompt, policy, length=_blocks.ceil_to(p + gen_length, block_length), mask_id=mask_id, block=block_length,
        cache="block" if cached else "none", eos_ids=(eos_id,) if eos_early_stop else (), eos_at_block_end=True, block_done=store,
        min_steps=_OneMore() if not edits and max_post_steps else lambda row: 0, note=_note if record_decoding_order else None,
    )  # fmt: skip
    if cached:
        loop.prefill(p)
    x = loop.run()[: p + gen_length]
    end = next((i + 1 for i in range(p, len(x)) if x[i] == eos_id), len(x))
    out = torch.tensor([x[:end]], dtype=torch.int64, device=model.device)
    if not return_stats:
        return out
    return out, {"nfe": loop.forwards} | ({"decoding_order": loop.order} if record_decoding_order else {})


class _OneMore:
    """The forward that the authors' loop runs on a block without masks where editing is off: it edits nothing and ends the block."""

    def __init__(self):
        self._full = -1  # the last block that was found without masks

    def __call__(self, row: Row) -> int:
        first, self._full = self._full != row.block, row.block
        return row.step + 1 if first else 0


def _note(c: Commit) -> dict[str, list]:
    return {"edit": sorted((position, old, new) for position, old, new, _ in c.edited), "unmask": sorted(c.positions)}
