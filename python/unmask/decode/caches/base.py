"""What a cache is: data that says when K and V are recomputed (`CacheRule`), and the object that follows it in one run (`Cache`).

A cache says which positions of a row are forwarded at a step, which keys they see, and, where a method goes by layers, how a layer runs.
The attention op never changes: positions are lists (`pos`, `slot`), keys are segments of the K/V cache, which is written in place.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, ClassVar

import torch

from ...errors import SettingError
from ...settings_text import read_named
from ...values import integer, number

if TYPE_CHECKING:
    from ...models.backbone import LayerRunner
    from ...models.config import ModelConfig
    from ...ops import LogitStats
    from ..backend import Plan
    from ..policy import Policy
    from ..rules.base import StepView
    from ..state import DecodeState, Row

Runs = tuple[tuple[int, int], ...]
"""Positions of a row as rising, disjoint, non-empty intervals [start, end)."""


def runs_of(positions: torch.Tensor) -> Runs:
    """The True places of bool [L] (on the host) as intervals."""
    edge = torch.diff(positions.int(), prepend=torch.zeros(1, dtype=torch.int32), append=torch.zeros(1, dtype=torch.int32))
    starts, ends = torch.nonzero(edge == 1).flatten().tolist(), torch.nonzero(edge == -1).flatten().tolist()
    return tuple(zip(starts, ends, strict=True))


@dataclasses.dataclass(frozen=True)
class CacheRun:
    """What a cache knows of its run. backend: NativeBackend, or a module's. lag: positions that a window must begin earlier because logits
    are shifted (0 or 1). part: length of the parts of a block that are decoded together."""

    state: DecodeState
    backend: Any
    policy: Policy
    lag: int
    part: int

    @property
    def device(self) -> torch.device:
        return self.state.canvas.device


@dataclasses.dataclass(frozen=True)
class CacheRule:
    """A refresh rule as data. Subclasses are frozen dataclasses whose fields are the rule's settings, checked when built.

    name: what `cache=` takes. source: where it was published. forwards: one sentence, what is forwarded when. visibility: attention of the
    models that it is for. every_position: the forward that opens a block reaches every position of the row. native: needs a model
    from unmask.load.
    """

    name: ClassVar[str]
    source: ClassVar[str]
    forwards: ClassVar[str]
    visibility: ClassVar[tuple[str, ...]] = ("bidirectional",)
    every_position: ClassVar[bool] = True
    native: ClassVar[bool] = True

    def exact(self, config: ModelConfig) -> bool:
        """True if decoding with it gives what recomputing everything gives."""
        return False

    def check(self, policy: Policy, config: ModelConfig) -> None:
        """Raises SettingError for a policy that it does not serve."""

    def start(self, run: CacheRun) -> Cache:
        raise NotImplementedError

    def settings(self) -> dict[str, Any]:
        return dataclasses.asdict(self)

    def __str__(self) -> str:
        given = {f.name: getattr(self, f.name) for f in dataclasses.fields(self) if getattr(self, f.name) != f.default}
        return self.name + (":" + ",".join(f"{n}={v}" for n, v in given.items()) if given else "")

    def _integer(self, name: str, lowest: int, highest: int = 1 << 20) -> None:
        integer(f"{self.name}: {name}", getattr(self, name), lowest, highest)

    def _number(self, name: str, lowest: float, highest: float) -> None:
        number(f"{self.name}: {name}", getattr(self, name), lowest, highest)


class Cache:
    """Follows a rule in one run. `row` is where a row stands (decode/state.py); every method is called on the host.

    windowed: `window` is all that is forwarded, and the loop moves its start by one where logits are shifted; else `runs` says which
    positions, that one included. runner: how a layer runs, None = as always.
    """

    windowed = True
    runner: LayerRunner | None = None

    def __init__(self, rule: CacheRule, run: CacheRun):
        self.rule, self.run = rule, run

    def window(self, row: Row) -> tuple[int, int]:
        """Positions [start, end) that a row forwards at this step."""
        raise NotImplementedError

    def runs(self, row: Row) -> Runs:
        """Positions that a row forwards at this step, where they are no window. At least one undecided position of the row's block (and, with
        shifted logits, the position before it) must be among them."""
        return (self.window(row),)

    def keys(self, row: Row) -> Runs | None:
        """Cache slots that the row's positions see; None: everything that exists."""
        return None

    def begin(self, plan: Plan) -> None:
        """Called before the forward of a step."""

    def rows_forwarded(self, plan: Plan, rows: list[float]) -> list[float]:
        """Positions forwarded, per entry of the plan; a method that goes by layers counts the mean over layers. rows: as the plan has them."""
        return rows

    def committed(self, step: StepView, stats: LogitStats, committed: torch.Tensor) -> None:
        """Called once the step's tokens are written. committed: bool [N], which candidates were."""

    def joined(self, row: Row) -> None:
        """Called with a row that takes the place of a finished one: nothing that was kept of row.index counts any more."""

    def forwarded(self, row: Row) -> None:
        """Called for every row of the step before it moves on; row.step counts the step that is done."""

    def moved(self, rows: list[Row]) -> None:
        """Called with the rows that go on, where they stand at the next step."""


def from_text(text: str, kinds: Mapping[str, type[CacheRule]]) -> CacheRule:
    """"name" or "name:setting=value,setting=value"."""
    name, given = read_named("cache", text, kinds, lambda n: [f.name for f in dataclasses.fields(kinds[n])])
    defaults = {f.name: f.default for f in dataclasses.fields(kinds[name])}
    return kinds[name](**{key: _value(text, key, value, defaults[key]) for key, value in given.items()})


def _value(text: str, key: str, value: str, default: Any) -> Any:
    """A setting's text as the type of its default."""
    try:
        if isinstance(default, bool):
            return {"true": True, "false": False}[value.lower()]
        return type(default)(value)
    except (ValueError, KeyError):
        allowed = {bool: "true or false", int: "an integer", float: "a number"}.get(type(default), f"a {type(default).__name__}")
        raise SettingError(f"cache={text!r}: {key} must be {allowed}, got {value!r}") from None
