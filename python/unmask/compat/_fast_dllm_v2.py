"""Fast-dLLM v2's loop with and without speculation: what it checks, the token that opens a block, and what it gives back."""

from __future__ import annotations

import dataclasses

import torch

from ..decode.policy import MAX_TEMPERATURE, Policy
from ..decode.state import Row
from ..errors import SettingError
from ..values import integer, number
from . import _blocks


@dataclasses.dataclass(frozen=True)
class Output:
    """What return_dict_in_generate=True returns. sequences: int64 [1, L]."""

    sequences: torch.Tensor


class Call(_blocks.Call):
    def __init__(
        self, model: object, input_ids: object, max_new_tokens: int | None, max_gen_toks: int | None, max_length: int | None, mask_id: int,
        threshold: float, small_block_size: int, block_size: int, stop_token: int, top_p: float | None, temperature: float,
    ):  # fmt: skip
        self.model = _blocks.check_model(model, shifted=True)
        self.prompt = _blocks.check_one_prompt(self.model, input_ids, mask_id)
        p = self.given
        new = _new_tokens(p, max_new_tokens if max_gen_toks is None else max_gen_toks, max_length)
        _blocks.check_lengths(max_new_tokens=new, block_size=block_size, small_block_size=small_block_size)
        integer("stop_token", stop_token, -1, (1 << 31) - 1)  # -1: never
        _, kept_p = _blocks.filters(None, top_p)
        if block_size < 2 or block_size % small_block_size:
            raise SettingError(
                f"block_size must be at least 2 and a multiple of small_block_size, got block_size={block_size}, small_block_size={small_block_size}"
            )
        sampled = float(number("temperature", temperature, 0.0, MAX_TEMPERATURE)) > 0
        self.policy = Policy(
            rule="llada2", knobs=dict(threshold=_blocks.bar("threshold", threshold)), temperature=float(temperature),
            top_p=kept_p if sampled else None, tempered=sampled,
        )  # fmt: skip
        self.mask_id, self.stop_token = mask_id, stop_token
        self.opens = p > 0 and p % block_size == 0  # the prefill's last logits give the token behind the prompt
        blocks = new // block_size
        end = (p // block_size + blocks) * block_size
        self.arguments = dict(
            length=end + 1 if blocks else p + int(self.opens), mask_id=mask_id, block=block_size, sub_block=small_block_size,
            eos_ids=(stop_token,) if stop_token >= 0 else (), shifted_window="block", block_done=self._done,
        )  # fmt: skip

    def _done(self, row: Row) -> None:
        if row.block_end % self.loop.size == 0:
            self._append(row.block_end, self.loop.store_block(row))

    def _append(self, position: int, hidden: torch.Tensor) -> None:
        """The greedy token of a stored block's last logits."""
        loop = self.loop
        logits = self.model.head.logits(hidden[-1:])[0]
        logits[self.mask_id] = -torch.inf
        token = logits.argmax()
        loop.state.canvas[0, position], loop.state.masked[0, position] = token, False
        if int(token) == self.stop_token:
            loop.row.finish_reason = "eos"
        loop.note_later([-(position + 0.5)])

    def run(self, as_output: bool, order: bool) -> torch.Tensor | Output | tuple[torch.Tensor | Output, dict]:
        loop, p = self.loop, self.given
        hidden = loop.prefill(p)
        if self.opens:
            assert hidden is not None
            self._append(p, hidden)
            loop.begin_again()
        x = torch.tensor([_blocks.cut(loop.run(), p, self.stop_token)], dtype=torch.int64, device=self.model.device)
        out = Output(x) if as_output else x
        return (out, {"decoding_order": loop.order, "total_forward_steps": loop.forwards}) if order else out


def _new_tokens(prompt: int, max_new_tokens: int | None, max_length: int | None) -> int:
    if max_new_tokens is not None:
        return max_new_tokens
    if max_length is None:
        raise SettingError("give max_new_tokens or max_length")
    return integer("max_length", max_length, prompt) - prompt
