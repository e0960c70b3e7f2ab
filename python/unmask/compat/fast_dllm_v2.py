"""Fast-dLLM v2's `generate` (NVlabs/Fast-dLLM, v2/, the model class's own; arXiv 2509.26328; read in phymhan/S2D2's copy) on unmask's ops."""

from __future__ import annotations

import dataclasses

import torch

from ..decode.engine import Commit
from ..decode.policy import MAX_TEMPERATURE, Policy
from ..decode.state import Row
from ..errors import SettingError
from ..values import integer, number
from . import _blocks


@dataclasses.dataclass(frozen=True)
class Output:
    """What return_dict_in_generate=True returns. sequences: int64 [1, L]."""

    sequences: torch.Tensor


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
    from torch's default one. Raises SettingError (a ValueError) for bad arguments.
    """
    model = _blocks.check_model(model, shifted=True)
    prompt = _blocks.check_one_prompt(model, input_ids, mask_id)
    p = prompt.shape[1]
    new = _new_tokens(p, max_new_tokens if max_gen_toks is None else max_gen_toks, max_length)
    _blocks.check_lengths(max_new_tokens=new, block_size=block_size, small_block_size=small_block_size)
    integer("stop_token", stop_token, 0, (1 << 31) - 1)
    if block_size < 2 or block_size % small_block_size:
        raise SettingError(
            f"block_size must be at least 2 and a multiple of small_block_size, got block_size={block_size}, small_block_size={small_block_size}"
        )
    sampled = float(number("temperature", temperature, 0.0, MAX_TEMPERATURE)) > 0
    policy = Policy(
        rule="llada2", knobs=dict(threshold=_blocks.bar("threshold", threshold)), temperature=float(temperature), top_p=top_p if sampled else None,
        tempered=sampled,
    )  # fmt: skip
    blocks = new // block_size
    opens = p > 0 and p % block_size == 0  # the prefill's last logits give the token behind the prompt
    end = (p // block_size + blocks) * block_size
    canvas = end + 1 if blocks else p + int(opens)

    def append(position: int, hidden: torch.Tensor) -> None:
        """The greedy token of a stored block's last logits."""
        logits = model.head.logits(hidden[-1:])[0]
        logits[mask_id] = -torch.inf
        token = logits.argmax()
        loop.state.canvas[0, position], loop.state.masked[0, position] = token, False
        if int(token) == stop_token:
            loop.row.finish_reason = "eos"
        loop.note_later([-(position + 0.5)])

    def done(row: Row) -> None:
        if row.block_end % block_size == 0:
            append(row.block_end, loop.store_block(row))

    loop = _blocks.prepare(
        model, prompt, policy, length=canvas, mask_id=mask_id, block=block_size, sub_block=small_block_size,
        cache="dual" if use_block_cache else "block", eos_ids=(stop_token,), shifted_window="block", block_done=done,
        note=_note if return_decoding_order else None,
    )  # fmt: skip
    hidden = loop.prefill(p)
    if opens:
        assert hidden is not None
        append(p, hidden)
        loop.begin_again()
    x = loop.run()
    x = x[: next((i + 1 for i in range(p, len(x)) if x[i] == stop_token), len(x))]
    out: torch.Tensor | Output = torch.tensor([x], dtype=torch.int64, device=model.device)
    if return_dict_in_generate:
        assert isinstance(out, torch.Tensor)
        out = Output(out)
    return (out, {"decoding_order": loop.order, "total_forward_steps": loop.forwards}) if return_decoding_order else out


def _new_tokens(prompt: int, max_new_tokens: int | None, max_length: int | None) -> int:
    if max_new_tokens is not None:
        return max_new_tokens
    if max_length is None:
        raise SettingError("give max_new_tokens or max_length")
    return integer("max_length", max_length, prompt) - prompt


def _note(c: Commit) -> list[int]:
    return [-position for position in sorted(c.positions)]
