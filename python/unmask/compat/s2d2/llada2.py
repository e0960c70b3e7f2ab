"""LLaDA2.0 and 2.1 with S2D2 (phymhan/S2D2, LLaDA2/generate_utils.py, generate_ssd_policy) on unmask's ops."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from ...decode.engine import Commit
from ...speculate.acceptance import Transform
from .._blocks import filters
from .._llada2 import Call
from . import _run

ESTIMATORS = ("hard_margin_threshold", "soft_entropy_negexp", "soft_renyi_2_entropy")
UNTEMPERED = 1e-6  # the authors' q is that of temperature 0 up to here, their draft is not
POLICIES = ("mask_span_length", "score_threshold", "score_hysteresis")


def generate_ssd_policy(
    model: torch.nn.Module,
    input_ids: torch.Tensor,
    attention_mask: torch.Tensor | None = None,
    temperature: float = 0.0,
    block_length: int = 32,
    gen_length: int = 2048,
    max_gen_toks: int | None = None,
    top_p: float | None = None,
    top_k: int | None = None,
    eos_early_stop: bool = False,
    eos_id: int = 156892,
    mask_id: int = 156895,
    threshold: float = 0.95,
    editing_threshold: float = 0.9,
    min_ssd_span_length: int = 1,
    legacy_ssd_span_strategy: bool = False,
    ssd_ratio_tempering_factor: float = 1.0,
    record_decoding_order: bool = False,
    return_stats: bool = True,
    do_verify_policy: str = "mask_span_length",
    do_verify_score_threshold: float = 0.0,
    hysteresis_threshold_on: float = 0.0,
    hysteresis_threshold_off: float = -1.0,
    do_verify_score_type: str = "difference_dynamic",
    score_penalty_coef: float = 2.0,
    token_acceptance_estimator: str = "hard_margin_threshold",
    ssd_confidence_margin_threshold: float = 0.05,
    ssd_entropy_temperature: float = 1.0,
    num_to_transfer: int = 1,
    max_post_steps: int = 16,
    *,
    uniforms: Sequence[Sequence[float]] | None = None,
    resampled: Sequence[int] | None = None,
    **kwargs: object,
) -> torch.Tensor | tuple[torch.Tensor, dict]:
    """`generate_cached` with verification: edits happen in the draft forward, before it, and are part of what the verifier reads. Returns
    (x int64 [1, P + new], {"nfe"}), with record_decoding_order also "decoding_order": per draft forward {"edit": [(position, old, new)], "unmask":
    [-n accepted, -n - 0.5 drawn anew, n by the threshold]}; x alone with return_stats=False.

    The other arguments are those of `compat.llada2.generate_cached` and options of `unmask.speculate.s2d2_options` by the authors' names. A forward
    on a block without masks turns hysteresis off, as in the authors' code. Further keywords and attention_mask are ignored, as there.
    Differences: as of `compat.llada2`; the verification forwards no token behind the span, which changes nothing; ratio and uniform are compared in
    float64. Raises SettingError (a ValueError) for bad arguments.
    """
    call = Call(
        model, input_ids, temperature, block_length, gen_length, max_gen_toks, top_p, top_k, eos_early_stop, threshold, editing_threshold,
        max_post_steps, eos_id, mask_id, num_to_transfer,
    )  # fmt: skip
    options = _run.read(
        dict(
            min_ssd_span_length=min_ssd_span_length, legacy_ssd_span_strategy=legacy_ssd_span_strategy,
            ssd_ratio_tempering_factor=ssd_ratio_tempering_factor, do_verify_score_threshold=do_verify_score_threshold,
            hysteresis_threshold_on=hysteresis_threshold_on, hysteresis_threshold_off=hysteresis_threshold_off, score_penalty_coef=score_penalty_coef,
            ssd_confidence_margin_threshold=ssd_confidence_margin_threshold, ssd_entropy_temperature=ssd_entropy_temperature,
        ),
        do_verify_policy=do_verify_policy, do_verify_score_type=do_verify_score_type, token_acceptance_estimator=token_acceptance_estimator,
        estimators=ESTIMATORS, routes=POLICIES,
    )  # fmt: skip

    def note(c: Commit) -> dict[str, list]:
        parts = loop.parts
        settled = [-n for n in parts.accepted] + [-n - 0.5 for n in parts.replaced] + sorted(parts.rule)
        return {"edit": sorted((position, old, new) for position, old, new, _ in c.edited), "unmask": settled}

    # top_p and top_k shape q and the estimators at temperature 0 too
    kept_k, kept_p = filters(top_k, top_p)
    transform = Transform(float(temperature) if temperature > UNTEMPERED else 0.0, kept_p or 1.0, kept_k or 0, True)
    loop = call.start(
        _run.prepare, options, uniforms=uniforms, resampled=resampled, transform=transform, block_done=call.store, note=note, empty_turns_off=True
    )
    loop.prefill(call.given)
    return call.run(record_decoding_order, return_stats)
