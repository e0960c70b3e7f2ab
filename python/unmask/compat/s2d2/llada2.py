"""LLaDA2.0 and 2.1 with S2D2 (phymhan/S2D2, LLaDA2/generate_utils.py, generate_ssd_policy) on unmask's ops."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from ...decode.engine import Commit
from ...decode.policy import MAX_TEMPERATURE, Policy
from ...decode.state import Row
from ...speculate.acceptance import Transform
from ...values import integer, number
from .. import _blocks
from ..llada2 import _OneMore
from . import _run

ESTIMATORS = ("hard_margin_threshold", "soft_entropy_negexp", "soft_renyi_2_entropy")
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
    p = prompt.shape[1]

    def store(row: Row) -> None:
        if row.block_end < row.end:
            loop.store_block(row)

    def note(c: Commit) -> dict[str, list]:
        parts = loop.parts
        settled = [-n for n in parts.accepted] + [-n - 0.5 for n in parts.replaced] + sorted(parts.rule)
        return {"edit": sorted((position, old, new) for position, old, new, _ in c.edited), "unmask": settled}

    # top_p and top_k shape q and the estimators at temperature 0 too
    transform = Transform(float(temperature), 1.0 if top_p is None else top_p, top_k or 0, True)
    loop = _run.prepare(
        model, prompt, policy, options, length=_blocks.ceil_to(p + gen_length, block_length), mask_id=mask_id, block=block_length,
        uniforms=uniforms, resampled=resampled, transform=transform, eos_ids=(eos_id,) if eos_early_stop else (), eos_at_block_end=True,
        block_done=store, min_steps=_OneMore() if not edits and max_post_steps else lambda row: 0, note=note, empty_turns_off=True,
    )  # fmt: skip
    loop.prefill(p)
    x = loop.run()[: p + gen_length]
    end = next((i + 1 for i in range(p, len(x)) if x[i] == eos_id), len(x))
    out = torch.tensor([x[:end]], dtype=torch.int64, device=model.device)
    if not return_stats:
        return out
    return out, {"nfe": loop.forwards} | ({"decoding_order": loop.order} if record_decoding_order else {})
