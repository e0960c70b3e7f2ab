"""dKV-Cache (arXiv 2505.15781; horseee/dKV-Cache): delayed caching. K and V of a token are kept one step after it was decoded, not at once:
its hidden states still move much in the forward that first sees it instead of a mask.

| step of a block | `DKV()` (decode) | `DKV(greedy=True)` |
|---|---|---|
| 0 | whole canvas | whole canvas |
| 1 | whole canvas | as the others |
| a multiple of refresh_every | whole canvas | whole canvas |
| others | every position but those decided before the last forward | what the last forward decided, what this one will, windows of masks around the latter |

The prompt counts as decided. K and V of what is not forwarded stay in their slots, so everything that exists is seen at every step.

greedy needs to know what a step decides before its forward: it serves fixed steps in an order that no prediction enters (score random, as
the authors' code, or leftmost). `window` masks go with each such position: the nearest, the left one first where two are equally near.
"""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, ClassVar

import torch

from ...errors import SettingError
from ...ops import uniform
from .base import CacheRule, CacheRun, Runs
from .settled import NEVER, SettledCache

if TYPE_CHECKING:
    from ...models.config import ModelConfig
    from ..policy import Policy
    from ..state import Row

KNOWN_ORDERS = ("random", "leftmost")
COUNTED = ("quota", "sdar_static")


@dataclasses.dataclass(frozen=True)
class DKV(CacheRule):
    """refresh_every: steps of a block between whole forwards (the authors': 8 for LLaDA, 4 to 16 for Dream, 2 with greedy); 1 = always, which is
    exact. greedy, window: see the module."""

    refresh_every: int = 8
    greedy: bool = False
    window: int = 4
    name: ClassVar[str] = "dkv"
    source: ClassVar[str] = "dKV-Cache, arXiv 2505.15781"
    forwards: ClassVar[str] = "what was not decided before the last forward; the whole canvas at a block's first two steps and every refresh_every-th"

    def __post_init__(self):
        self._integer("refresh_every", 1)
        self._integer("window", 0)
        if not isinstance(self.greedy, bool):
            raise SettingError(f"dkv: greedy must be True or False, got {self.greedy!r}")

    def exact(self, config: ModelConfig) -> bool:
        return self.refresh_every == 1 or (config.n_layers == 1 and not self.greedy)

    def check(self, policy: Policy, config: ModelConfig) -> None:
        if not self.greedy:
            return
        if policy.rule not in COUNTED or policy.score not in KNOWN_ORDERS:
            raise SettingError(
                f"cache={str(self)!r} forwards what the step will decide, so that must be known before the forward: it needs policy="
                f"{' or '.join(map(repr, COUNTED))} with score={' or '.join(map(repr, KNOWN_ORDERS))}, got policy={policy.rule!r} with score={policy.score!r}"
            )
        if policy.certainty_sigma is not None:
            raise SettingError(f"cache={str(self)!r} does not take certainty_sigma: leave it out, or use cache='dkv'")

    def start(self, run: CacheRun) -> _Delayed:
        return (_Greedy if self.greedy else _Delayed)(self, run)


class _Delayed(SettledCache):
    rule: DKV
    whole_steps = 2

    def runs(self, row: Row) -> Runs:
        if row.step < self.whole_steps or row.step % self.rule.refresh_every == 0 or not self.open(row):
            return self.whole(row)
        return self.as_runs(row, self.chosen(row))

    def chosen(self, row: Row) -> torch.Tensor:
        """bool [end]: forwarded at a step that refreshes nothing."""
        return self.settled[row.index, : row.end] >= row.nfe - 1


class _Greedy(_Delayed):
    whole_steps = 1

    def __init__(self, rule: CacheRule, run: CacheRun):
        super().__init__(rule, run)
        self._seeds = run.state.seeds.cpu()

    def joined(self, row: Row) -> None:
        super().joined(row)
        self._seeds[row.index] = self.run.state.seeds[row.index].cpu()

    def chosen(self, row: Row) -> torch.Tensor:
        masks = self.undecided(row)
        chosen = self.settled[row.index, : row.end] == row.nfe - 1
        upcoming = self.upcoming(row)
        chosen[upcoming] = True
        for position in upcoming:
            near = torch.nonzero(masks & ~chosen).flatten()
            distance = (near - position).abs() * 2 + (near > position).long()
            chosen[near[distance.argsort()[: self.rule.window]]] = True
        return chosen

    def upcoming(self, row: Row) -> list[int]:
        """Positions that this step decides, in the rule's order."""
        inside = torch.nonzero(self.settled[row.index, row.block_start : row.block_end] == NEVER).flatten()
        pos = inside + row.block_start
        count = row.quotas[row.step] if row.step < len(row.quotas) else row.masks
        if self.run.policy.score == "leftmost":
            score = -pos.double()
        else:
            score = uniform(self._seeds[row.index].expand_as(pos).contiguous(), torch.full_like(pos, row.nfe), pos).double()
        score -= self.run.policy.position_bias * inside.double()
        return pos[score.argsort(descending=True, stable=True)[: max(count, 1)]].tolist()
