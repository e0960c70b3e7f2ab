"""What the three families' functions share: the authors' argument names as options, and the loop with speculation in it."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import torch

from ...decode.engine import Commit
from ...decode.policy import Policy
from ...errors import SettingError, check_names
from ...models.model import Model
from ...speculate.acceptance import Keyed, Recorded, Transform
from ...speculate.s2d2 import Parts, S2D2Backend, S2D2Engine
from ...speculate.s2d2_options import ESTIMATORS, Options
from ...values import as_integer
from .._blocks import BlockLoop, one_row

ROUTES = {
    "mask_span_length": "span", "score_threshold": "score", "score_hysteresis": "hysteresis", "contextual_bandit_ucb": "ucb",
}  # fmt: skip
COSTS = {"difference_dynamic": "dynamic", "difference_static": "static"}
NAMES = {
    "min_ssd_span_length": "min_span", "legacy_ssd_span_strategy": "legacy_span", "do_verify_score_threshold": "score_threshold",
    "hysteresis_threshold_on": "on", "hysteresis_threshold_off": "off", "ssd_entropy_temperature": "entropy_temperature",
    "ssd_confidence_margin_threshold": "margin_threshold", "ssd_confidence_power": "confidence_power", "ssd_confidence_margin_coef": "margin_coef",
    "ssd_entropy_threshold": "entropy_threshold", "score_penalty_coef": "cost_coef", "ucb_beta": "ucb_beta", "ucb_span_length_bins": "ucb_span_bins",
    "ucb_block_progress_bins": "ucb_progress_bins", "ucb_entropy_bins": "ucb_entropy_bins", "ucb_entropy_source": "ucb_entropy_source",
    "ssd_ratio_tempering_factor": "tempering", "ssd_threshold_all_spans": "ratio_all_spans", "always_check_high_confidence": "always_high_confidence",
    "cache_ver": "cache_ver", "draft_ver": "draft_ver",
}  # fmt: skip
"""The authors' argument -> our option."""
COUNTS = ("min_span", "ucb_span_bins", "ucb_progress_bins", "ucb_entropy_bins")
MOST = 1 << 20  # of these counts; more is the same, since no block is as long


def read(
    authors: dict[str, Any], *, do_verify_policy: str, do_verify_score_type: str, token_acceptance_estimator: str, estimators: Sequence[str] = ESTIMATORS,
    routes: Sequence[str] = tuple(ROUTES), **ours: Any,
) -> Options:  # fmt: skip
    """Options from the authors' arguments, with errors in the authors' names. estimators, routes: those of the family's code."""
    check_names("do_verify_policy", [do_verify_policy], routes)
    check_names("do_verify_score_type", [do_verify_score_type], COSTS)
    check_names("token_acceptance_estimator", [token_acceptance_estimator], estimators)
    options = {NAMES[name]: value for name, value in authors.items()}
    for name in COUNTS:  # none is the least that means anything, and the authors take what is below for it
        value = as_integer(options.get(name))
        if value is not None:
            options[name] = min(max(value, 1), MOST)
    try:
        options.update(route=ROUTES[do_verify_policy], cost=COSTS[do_verify_score_type], estimator=token_acceptance_estimator, **ours)
        return Options(**options)
    except SettingError as error:
        text = str(error)
        for theirs, mine in NAMES.items():
            if text.startswith(f"{mine} must") and theirs in authors:
                raise SettingError(theirs + text[len(mine) :]) from None
        raise


@dataclasses.dataclass
class SpeculativeLoop(BlockLoop):
    """A BlockLoop whose engine speculates."""

    engine: S2D2Engine

    @property
    def parts(self) -> Parts:
        """What the step settled, and how."""
        return self.engine.parts[0]


def prepare(
    model: Model,
    prompt: torch.Tensor,
    policy: Policy,
    options: Options,
    *,
    length: int,
    mask_id: int,
    block: int,
    uniforms: Sequence[Sequence[float]] | None,
    resampled: Sequence[int] | None,
    transform: Transform,
    sub_block: int | None = None,
    cache: str = "block",
    quotas: list[int] | None = None,
    note: Callable[[Commit], object] | None = None,
    stores_as_drafted: bool = False,
    **engine: Any,
) -> SpeculativeLoop:
    """As `_blocks.prepare`. transform: the verifier's. stores_as_drafted: as of S2D2Backend."""
    keyed = policy.sampled or uniforms is None or resampled is None
    state = one_row(model, prompt, length, mask_id, sub_block or block, quotas, keyed)
    backend = S2D2Backend(model, state, mask_id, options, attention_block=block)
    backend.stores_as_drafted = stores_as_drafted
    draws = Recorded(Keyed(state.seeds), uniforms, resampled, model.config.vocab_size)

    def verified() -> None:
        loop.forwards += 1

    run = S2D2Engine(
        state, backend, policy, cache=cache, record=True, options=options, draws=draws, transform=transform, on_verify=verified, **engine
    )
    loop = SpeculativeLoop(state, run, backend, block, note)
    return loop
