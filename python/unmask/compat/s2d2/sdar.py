"""SDAR with S2D2 (phymhan/S2D2, SDAR/generate_ssd_policy.py) on unmask's ops."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from ...decode.engine import Commit
from ...speculate.acceptance import Transform
from .._blocks import bar, filters
from .._sdar import GREEDY, Call
from . import _run


def block_diffusion_generate(
    model: torch.nn.Module,
    input_ids: torch.Tensor,
    attention_mask: torch.Tensor | None = None,
    mask_id: int = 151669,
    gen_length: int = 128,
    max_gen_toks: int | None = None,
    block_length: int = 8,
    denoising_steps: int = 8,
    temperature: float = 1.0,
    top_k: int = 0,
    top_p: float = 1.0,
    remasking_strategy: str = "low_confidence_dynamic",
    confidence_threshold: float = 0.85,
    eb_threshold: float | None = None,
    stopping_criteria_idx: Sequence[int] | None = None,
    return_forward_stats: bool = False,
    do_sample: bool = False,
    trim_stop_tokens: bool = True,
    cache_ver: bool = False,
    draft_ver: bool = False,
    min_ssd_span_length: int = 1,
    ssd_ratio_tempering_factor: float = 1.0,
    ssd_ratio_threshold: float | None = -1.0,
    ssd_threshold_all_spans: bool = False,
    always_check_high_confidence: bool = False,
    legacy_ssd_span_strategy: bool = False,
    allow_resample: bool = True,
    do_verify_policy: str = "mask_span_length",
    do_verify_score_threshold: float = -1.0,
    hysteresis_threshold_on: float = 0.0,
    hysteresis_threshold_off: float = -1.0,
    token_acceptance_estimator: str = "hard_margin_threshold",
    ssd_confidence_margin_threshold: float = 0.05,
    ssd_confidence_power: float = 1.0,
    ssd_entropy_threshold: float = 0.5,
    ssd_confidence_margin_coef: float = 1.0,
    ssd_entropy_temperature: float = 1.0,
    ucb_beta: float = 1.0,
    ucb_span_length_bins: int = 2,
    ucb_block_progress_bins: int = 2,
    ucb_entropy_bins: int = 2,
    ucb_entropy_source: str = "span",
    do_verify_score_type: str = "difference_dynamic",
    score_penalty_coef: float = 2.0,
    *,
    uniforms: Sequence[Sequence[float]] | None = None,
    resampled: Sequence[int] | None = None,
    **kwargs: object,
) -> torch.Tensor | tuple[torch.Tensor, dict]:
    """Block after block; of each draft the first run of masks may be verified. Returns x int64 [1, P + new], and with return_forward_stats
    {"decoding_order", "total_forward_steps"} too.

    The first arguments are those of `compat.sdar.block_diffusion_generate`; the rest are options of `unmask.speculate.s2d2_options` by the
    authors' names. decoding_order: per step, "|" first where nothing of the block is decided yet, then positions: n accepted, n + 0.5 drawn anew,
    n + 0.2 by ssd_ratio_threshold, -n - 0.4 by always_check_high_confidence, -n by the remasking strategy. With do_sample=False drafts are argmax
    and p the plain softmax, while the verifier's q follows temperature, top_k and top_p unless temperature is 0, as in the authors' code.
    allow_resample=False: the first rejected position gets the draft token. draft_ver without cache_ver: a finished block is stored as its last
    draft saw it, token-causally up to the first mask of then, as in the authors' code. Further keywords and attention_mask are ignored, as there.
    Differences: as of `compat.sdar`; the verification forwards no token behind the span, which changes nothing; a step always commits
    something; remasking_strategy="entropy_bounded" is refused (the authors' sums a probability, not a distribution); ratio and uniform are
    compared in float64. Raises SettingError (a ValueError) for bad arguments.
    """
    call = Call(
        model, input_ids, mask_id, gen_length, max_gen_toks, block_length, denoising_steps, temperature, top_k, top_p, remasking_strategy,
        confidence_threshold, stopping_criteria_idx, do_sample,
    )  # fmt: skip
    by_ratio = ssd_ratio_threshold is not None and ssd_ratio_threshold >= 0
    options = _run.read(
        dict(
            min_ssd_span_length=min_ssd_span_length, legacy_ssd_span_strategy=legacy_ssd_span_strategy,
            do_verify_score_threshold=do_verify_score_threshold, hysteresis_threshold_on=hysteresis_threshold_on,
            hysteresis_threshold_off=hysteresis_threshold_off, ssd_entropy_temperature=ssd_entropy_temperature,
            ssd_confidence_margin_threshold=ssd_confidence_margin_threshold, ssd_confidence_power=ssd_confidence_power,
            ssd_confidence_margin_coef=ssd_confidence_margin_coef, ssd_entropy_threshold=ssd_entropy_threshold,
            score_penalty_coef=score_penalty_coef, ucb_beta=ucb_beta, ucb_span_length_bins=ucb_span_length_bins,
            ucb_block_progress_bins=ucb_block_progress_bins, ucb_entropy_bins=ucb_entropy_bins, ucb_entropy_source=ucb_entropy_source,
            ssd_ratio_tempering_factor=ssd_ratio_tempering_factor, ssd_threshold_all_spans=bool(ssd_threshold_all_spans and by_ratio),
            always_check_high_confidence=always_check_high_confidence, cache_ver=cache_ver, draft_ver=draft_ver,
        ),
        do_verify_policy=do_verify_policy, do_verify_score_type=do_verify_score_type, token_acceptance_estimator=token_acceptance_estimator,
        rejected="resample" if allow_resample else "draft", ratio_threshold=ssd_ratio_threshold if by_ratio else None,
        high_confidence=bar("confidence_threshold", confidence_threshold),
    )  # fmt: skip

    def note(c: Commit) -> list:
        parts = loop.parts
        out: list = ["|"] if c.block != opened[0] else []
        if parts.all:
            opened[0] = c.block
        out += parts.accepted + [n + 0.5 for n in parts.replaced] + [n + 0.2 for n in parts.by_ratio]
        return out + [-n - 0.4 for n in parts.confident] + [-n for n in parts.rule]

    opened = [-1]
    plain = temperature < GREEDY
    kept_k, kept_p = filters(top_k, top_p)
    loop = call.start(
        _run.prepare, options, uniforms=uniforms, resampled=resampled, note=note, stores_as_drafted=True,
        transform=Transform() if plain else Transform(float(temperature), kept_p or 1.0, kept_k or 0, True),
    )  # fmt: skip
    return call.run(trim_stop_tokens, return_forward_stats)
