"""S2D2 (arXiv 2603.25702): a block-diffusion model drafts a block and verifies the draft itself, read with block size 1.

One step of a row: the draft forward and its statistics, as always; a decision whether to verify (routing.py); the verification forward
(verifier.py); the accepted prefix of the first run of masks, and at the first rejection another token (acceptance.py); where that is less than
the step's quota, the policy's own rule for the rest. Rows that do not verify take the policy's rule alone. All of it sits between the engine's
reduction and its commit (s2d2_rule.py): `S2D2Engine` is the engine with its rule wrapped.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

from ..decode.backend import NativeBackend
from ..decode.caches import read_cache
from ..decode.engine import Engine
from ..decode.policy import Policy
from ..decode.rules.base import Rule
from ..errors import SettingError
from ..models.config import ModelConfig
from .acceptance import Draws, Transform
from .s2d2_backend import S2D2Backend
from .s2d2_options import Options, read_options
from .s2d2_records import Counts, Parts, Verification
from .s2d2_rule import Speculation

__all__ = ["POLICIES", "Counts", "Options", "Parts", "S2D2Backend", "S2D2Engine", "Verification", "check", "read_options"]

POLICIES = ("sdar_dynamic", "sdar_static", "llada2", "edit", "threshold", "quota", "factor", "eb", "hierarchy")
"""Policies whose rule may decide what is not verified: they read one step's statistics and never take a decided token back."""


def check(config: ModelConfig, policy: Policy, cache: str, *, guidance: bool = False, soft_masks: bool = False) -> None:
    """Raises SettingError, with the reason, for what a verifier cannot serve."""
    if config.visibility != "block_causal":
        raise SettingError(
            f"S2D2 needs a block-causal model (SDAR, LLaDA2, Fast-dLLM v2): {config.family} is bidirectional, so with block size 1 it is no "
            "autoregressive model that could verify its drafts"
        )
    if cache not in ("none", "block", "dual"):
        raise SettingError(f"S2D2 needs cache='block', 'dual' or 'none': with cache={cache!r} the verifier would read K and V of other tokens")
    if policy.rule not in POLICIES:
        raise SettingError(f"S2D2 falls back on a policy that only commits masks by one step's scores: {', '.join(POLICIES)}; got policy={policy.rule!r}")
    for what, given in (
        ("guidance", guidance), ("soft_masks", soft_masks), ("repetition_penalty", policy.repetition_penalty != 1.0),
        ("confidence_drops", bool(policy.confidence_drops)), ("forced_first", policy.forced_first),
    ):  # fmt: skip
        if given:
            raise SettingError(f"S2D2 does not go with {what}: the verifier's distribution has none, so q / p would compare two different things")


@dataclasses.dataclass
class S2D2Engine(Engine):
    """The engine with speculation. backend: an S2D2Backend. options: an Options. draws: where random numbers come from (default: keyed by
    row seed, forward and position). transform: the distribution of q, of the residual's p and of the estimators (default: what the policy draws
    from). empty_turns_off: see routing.Router. on_verify: called after each verification forward of the batch.

    Row.nfe and Row.forwarded count verifications too. counts: per row. verifications: of every one, with record=True. parts: by row, of the
    last step.
    """

    options: Options = dataclasses.field(default_factory=Options)
    draws: Draws | None = None
    transform: Transform | None = None
    empty_turns_off: bool = False
    on_verify: Callable[[], None] | None = None

    def __post_init__(self):
        backend: Any = self.backend
        if not isinstance(backend, NativeBackend):
            raise SettingError("S2D2 needs a model from unmask.load: another module's logits cannot be read with block size 1")
        cache = read_cache(self.cache).name
        check(backend.model.config, self.policy, cache, guidance=backend.guidance is not None, soft_masks=backend.soft is not None)
        if not isinstance(backend, S2D2Backend):
            raise SettingError("S2D2 needs an S2D2Backend: a verification's K and V need room behind the canvas")
        if self.options.draft_ver and cache == "dual":
            raise SettingError("draft_ver does not go with cache='dual': a part that is forwarded alone cannot change what the rest of its block saw")
        super().__post_init__()
        self.speculation = Speculation(self, self.rule)
        self.rule: Rule = self.speculation  # type: ignore[assignment]
        self.backend.keep_logits = self.rule.wants_logits

    @property
    def counts(self) -> list[Counts]:
        return self.speculation.counts

    @property
    def verifications(self) -> list[Verification]:
        return self.speculation.verifications

    @property
    def parts(self) -> dict[int, Parts]:
        return self.speculation.parts

    @property
    def verify_forwards(self) -> int:
        """Verification forwards of the batch so far (a row's own number stands in its Counts)."""
        return self.speculation.forwards
