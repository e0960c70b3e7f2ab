"""Fast-dLLM v2 with S2D2 (phymhan/S2D2, Fast-dLLM-v2/generate_policy_utils.py, generate_ssd_policy) on unmask's ops."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import torch

from ...decode.caches import Cache, CacheRun, Dual, attention_block, part_start
from ...decode.caches.windows import BlockWindow
from ...decode.engine import Commit
from ...decode.state import Row
from ...errors import SettingError
from ...speculate.acceptance import Transform
from .._fast_dllm_v2 import Call, Output
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
    use_block_cache (the authors' mask then holds in a block's first forward only). Raises SettingError (a ValueError) for bad arguments.
    """
    for name, given in (("use_ssd_cache", use_ssd_cache), ("output_scores", output_scores), ("output_hidden_states", output_hidden_states)):
        if given:
            raise SettingError(f"{name} must be False: {'the authors have not written it' if name == 'use_ssd_cache' else 'it is not kept'}")
    call = Call(
        model, input_ids, max_new_tokens, max_gen_toks, max_length, mask_id, threshold, small_block_size, block_size, stop_token, top_p, temperature
    )
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

    def note(c: Commit) -> list:
        parts = loop.parts
        return parts.accepted + [n + 0.5 for n in parts.replaced] + [-n for n in sorted(parts.rule)]

    loop = call.start(
        _run.prepare, options, uniforms=uniforms, resampled=resampled, transform=Transform(float(temperature), 1.0 if top_p is None else top_p),
        cache=_BlockCache() if use_block_cache else "block", note=note,
    )  # fmt: skip
    if draft_ver:
        loop.backend.causal_until = _Causal(loop, block_size, small_block_size)
    return call.run(return_dict_in_generate, return_decoding_order)


@dataclasses.dataclass(frozen=True)
class _BlockCache(Dual):
    """use_block_cache as this loop has it: once a block was forwarded whole, its sub-blocks are forwarded alone, whatever is known of them."""

    def start(self, run: CacheRun) -> Cache:
        return _Parts(self, run)


class _Parts(BlockWindow):
    def window(self, row: Row) -> tuple[int, int]:
        if row.opened == attention_block(row, self.size)[0]:
            return part_start(row, self.size, self.run.part), row.block_end
        return super().window(row)


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
