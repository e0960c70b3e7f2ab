"""Fast-dLLM v2 with S2D2 (phymhan/S2D2, Fast-dLLM-v2/generate_policy_utils.py, generate_ssd_policy) on unmask's ops."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import torch

from ...decode.caches import Cache, CacheRule, CacheRun, Dual, attention_block, part_start
from ...decode.engine import Commit
from ...decode.policy import MAX_TEMPERATURE, Policy
from ...decode.state import Row
from ...errors import SettingError
from ...speculate.acceptance import Transform
from ...values import integer, number
from .. import _blocks
from ..fast_dllm_v2 import Output, _new_tokens
from . import _run
from .llada2 import ESTIMATORS


def generate_ssd_policy(
    model: torch.nn.Module,
    input_ids: torch.Tensor,
    *,
    max_new_tokens: int | None = None,
    max_gen_toks: int | None = None,
    max_length: int | None = None,
    tokenizer: object = None,
    mask_id: int = 151665,
    threshold: float = 1.0,
    small_block_size: int = 8,
    block_size: int = 32,
    stop_token: int = 151645,
    stopping_criteria: object = None,
    top_p: float | None = 0.95,
    temperature: float = 0.0,
    use_block_cache: bool = False,
    use_ssd_cache: bool = False,
    ssd_ratio_tempering_factor: float = 1.0,
    min_ssd_span_length: int = 1,
    allow_resample: bool = True,
    return_decoding_order: bool = False,
    return_dict_in_generate: bool = False,
    output_scores: bool = False,
    output_hidden_states: bool = False,
    cache_ver: bool = False,
    draft_ver: bool = False,
    use_attention_mask: bool = False,
    do_verify_policy: str = "mask_span_length",
    do_verify_score_threshold: float = 0.0,
    hysteresis_threshold_on: float = 0.0,
    hysteresis_threshold_off: float = -1.0,
    token_acceptance_estimator: str = "hard_margin_threshold",
    ssd_confidence_margin_threshold: float = 0.05,
    ssd_entropy_temperature: float = 1.0,
    ucb_beta: float = 1.0,
    ucb_span_length_bins: int = 2,
    ucb_block_progress_bins: int = 2,
    ucb_entropy_bins: int = 2,
    ucb_entropy_source: str = "span",
    do_verify_score_type: str = "difference_dynamic",
    score_penalty_coef: float = 2.0,
    uniforms: Sequence[Sequence[float]] | None = None,
    resampled: Sequence[int] | None = None,
    **kwargs: object,
) -> torch.Tensor | Output | tuple[torch.Tensor | Output, dict]:
    """`generate` with verification of the first run of masks of a sub-block, by a token-causal forward of the block up to the sub-block's end.
    Returns x int64 [1, P + new] (an Output with return_dict_in_generate), with return_decoding_order also {"decoding_order", "total_forward_steps"}:
    per draft forward positions n accepted, n + 0.5 drawn anew, -n by the threshold; -(n + 0.5) for a token that opens a block.

    The other arguments are those of `compat.fast_dllm_v2.generate` and options of `unmask.speculate.s2d2_options` by the authors' names. top_p
    shapes q and the estimators at temperature 0 too, while p is the plain softmax then, as in the authors' code. allow_resample=False: the
    first rejected position stays a mask, and where nothing was accepted the threshold rule decides. use_block_cache: once a block was forwarded
    whole, its sub-blocks are forwarded alone (`generate` waits until their first position is known). draft_ver: as the authors' code, which
    counts the tokens that see causally from the block's start by the place of the first mask in its sub-block. use_attention_mask changes
    nothing without draft_ver. Further keywords, tokenizer and stopping_criteria are ignored, as there.
    Differences: as of `compat.fast_dllm_v2`; ratio and uniform are compared in float64; the token before the block is forwarded with it, so a block's
    first position can be predicted. Refused: use_ssd_cache (not implemented there either), output_scores, output_hidden_states, draft_ver with
    use_block_cache (the authors' mask does not fit). Raises SettingError (a ValueError) for bad arguments.
    """
    for name, given in (("use_ssd_cache", use_ssd_cache), ("output_scores", output_scores), ("output_hidden_states", output_hidden_states)):
        if given:
            raise SettingError(f"{name} must be False: {'the authors have not written it' if name == 'use_ssd_cache' else 'it is not kept'}")
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
    if top_p is not None:
        number("top_p", top_p, 0.0, 1.0, open_low=True)
    policy = Policy(
        rule="llada2", knobs=dict(threshold=_blocks.bar("threshold", threshold)), temperature=float(temperature), top_p=top_p if sampled else None,
        tempered=sampled,
    )  # fmt: skip
    options = _run.read(
        dict(
            ssd_ratio_tempering_factor=ssd_ratio_tempering_factor, min_ssd_span_length=min_ssd_span_length, cache_ver=cache_ver, draft_ver=draft_ver,
            do_verify_score_threshold=do_verify_score_threshold, hysteresis_threshold_on=hysteresis_threshold_on,
            hysteresis_threshold_off=hysteresis_threshold_off, ssd_confidence_margin_threshold=ssd_confidence_margin_threshold,
            ssd_entropy_temperature=ssd_entropy_temperature, ucb_beta=ucb_beta, ucb_span_length_bins=ucb_span_length_bins,
            ucb_block_progress_bins=ucb_block_progress_bins, ucb_entropy_bins=ucb_entropy_bins, ucb_entropy_source=ucb_entropy_source,
            score_penalty_coef=score_penalty_coef,
        ),
        do_verify_policy=do_verify_policy, do_verify_score_type=do_verify_score_type, token_acceptance_estimator=token_acceptance_estimator,
        estimators=ESTIMATORS, rejected="resample" if allow_resample else "leave", ucb_progress="filled",
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

    def note(c: Commit) -> list:
        parts = loop.parts
        return parts.accepted + [n + 0.5 for n in parts.replaced] + [-n for n in sorted(parts.rule)]

    loop = _run.prepare(
        model, prompt, policy, options, length=canvas, mask_id=mask_id, block=block_size, sub_block=small_block_size,
        uniforms=uniforms, resampled=resampled, transform=Transform(float(temperature), 1.0 if top_p is None else top_p),
        cache=_BlockCache() if use_block_cache else "block", eos_ids=(stop_token,), shifted_window="block", block_done=done, note=note,
    )  # fmt: skip
    if draft_ver:
        loop.backend.causal_until = _Causal(loop, block_size, small_block_size)
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


@dataclasses.dataclass(frozen=True)
class _BlockCache(Dual):
    """use_block_cache as this loop has it: once a block was forwarded whole, its sub-blocks are forwarded alone, whatever is known of them."""

    def start(self, run: CacheRun) -> Cache:
        return _Parts(self, run)


class _Parts(Cache):
    def __init__(self, rule: CacheRule, run: CacheRun):
        super().__init__(rule, run)
        self.size: int = run.backend.attention_block

    def window(self, row: Row) -> tuple[int, int]:
        begin, end = attention_block(row, self.size)
        if row.opened == begin:
            return part_start(row, self.size, self.run.part), row.block_end
        return min(row.stored, begin), end

    def forwarded(self, row: Row) -> None:
        row.stored = row.opened = attention_block(row, self.size)[0]


class _Causal:
    """The authors' draft_ver: the first n tokens of a block see causally, n the most that the first mask's place in its sub-block has been."""

    def __init__(self, loop: _run.SpeculativeLoop, block: int, part: int):
        self.loop, self.block, self.part = loop, block, part
        self._begin, self._most = -1, 0

    def __call__(self, row: Row) -> int:
        begin = row.block_start // self.block * self.block
        if begin != self._begin:
            self._begin, self._most = begin, 0
        part = row.block_start // self.part * self.part
        masks = torch.nonzero(self.loop.state.masked[0, part : row.block_end]).flatten()
        self._most = max(self._most, int(masks[0]) if masks.numel() else 0)
        return begin + self._most
