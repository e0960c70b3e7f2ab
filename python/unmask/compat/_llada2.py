"""LLaDA2's samplers, cached or not, with and without speculation: what they check, when a block is done, and what they give back."""

from __future__ import annotations

import torch

from ..decode.policy import MAX_TEMPERATURE, Policy
from ..decode.state import Row
from ..values import integer, number
from . import _blocks


class Call(_blocks.Call):
    def __init__(
        self, model: object, input_ids: object, temperature: float, block_length: int, gen_length: int, max_gen_toks: int | None,
        top_p: float | None, top_k: int | None, eos_early_stop: bool, threshold: float, editing_threshold: float, max_post_steps: int, eos_id: int,
        mask_id: int, num_to_transfer: int,
    ):  # fmt: skip
        self.model = _blocks.check_model(model, shifted=False)
        gen_length = gen_length if max_gen_toks is None else max_gen_toks
        _blocks.check_lengths(block_length=block_length, gen_length=gen_length)
        self.prompt = _blocks.check_one_prompt(self.model, input_ids, mask_id)
        integer("eos_id", eos_id, -1, (1 << 31) - 1)  # -1: never
        integer("max_post_steps", max_post_steps, 0, 1 << 16)
        sampled = float(number("temperature", temperature, 0.0, MAX_TEMPERATURE)) > 0
        knobs = dict(threshold=_blocks.bar("threshold", threshold), minimum=integer("num_to_transfer", num_to_transfer, 1, 1 << 20))
        kept_k, kept_p = _blocks.filters(top_k, top_p)
        edit_threshold = _blocks.bar("editing_threshold", editing_threshold)
        edits = edit_threshold < 1.0
        if edits:
            knobs.update(edit_threshold=edit_threshold, max_post_steps=max_post_steps)
        self.policy = Policy(
            rule="edit" if edits else "llada2", knobs=knobs, temperature=float(temperature), top_p=kept_p if sampled else None,
            top_k=kept_k if sampled else None, top_k_first=True, tempered=sampled,
        )  # fmt: skip
        self.eos_id, self.end = eos_id, self.given + gen_length
        self.arguments = dict(
            length=_blocks.ceil_to(self.end, block_length), mask_id=mask_id, block=block_length, eos_ids=(eos_id,) if eos_early_stop and eos_id >= 0 else (),
            eos_at_block_end=True, min_steps=_OneMore() if not edits and max_post_steps else lambda row: 0,
        )  # fmt: skip

    def store(self, row: Row) -> None:
        """Stores a finished block, but the last one."""
        if row.block_end < row.end:
            self.loop.store_block(row)

    def run(self, record: bool, stats: bool) -> torch.Tensor | tuple[torch.Tensor, dict]:
        loop = self.loop
        x = _blocks.cut(loop.run()[: self.end], self.given, self.eos_id)
        out = torch.tensor([x], dtype=torch.int64, device=self.model.device)
        if not stats:
            return out
        return out, {"nfe": loop.forwards} | ({"decoding_order": loop.order} if record else {})


class _OneMore:
    """The forward that the authors' loop runs on a block without masks where editing is off: it edits nothing and ends the block."""

    def __init__(self):
        self._full = -1  # the last block that was found without masks

    def __call__(self, row: Row) -> int:
        first, self._full = self._full != row.block, row.block
        return row.step + 1 if first else 0
