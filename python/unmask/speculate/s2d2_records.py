"""What a run of S2D2 says about itself."""

from __future__ import annotations

import dataclasses


@dataclasses.dataclass
class Counts:
    """Of one row: verification forwards, draft tokens they looked at, how many of them were accepted, tokens put in place of rejected ones,
    positions that the verifications forwarded."""

    verifies: int = 0
    drafted: int = 0
    accepted: int = 0
    replaced: int = 0
    rows_forwarded: int = 0


@dataclasses.dataclass(frozen=True)
class Verification:
    """One row's verification. span: the positions, draft: their draft tokens, p and q: their probabilities by draft and verifier (empty in
    greedy mode), ratio, uniforms: as compared; kept: length of the accepted prefix; token: what the first rejected position got, None = nothing."""

    row: int
    span: list[int]
    draft: list[int]
    p: list[float]
    q: list[float]
    ratio: list[float]
    uniforms: list[float]
    kept: int
    token: int | None


@dataclasses.dataclass
class Parts:
    """How one step settled a row's masks: accepted (the draft token of a rejected position too), replaced, by their ratio, as highly confident,
    by the policy's rule. Positions, in the order of commitment."""

    accepted: list[int] = dataclasses.field(default_factory=list)
    replaced: list[int] = dataclasses.field(default_factory=list)
    by_ratio: list[int] = dataclasses.field(default_factory=list)
    confident: list[int] = dataclasses.field(default_factory=list)
    rule: list[int] = dataclasses.field(default_factory=list)
    verified: bool = False

    @property
    def all(self) -> list[int]:
        return [*self.accepted, *self.replaced, *self.by_ratio, *self.confident, *self.rule]
