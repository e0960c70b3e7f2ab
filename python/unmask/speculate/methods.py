"""Lossless self-speculation: its methods as data, and what they refuse.

| method | draft | accepted | source |
|---|---|---|---|
| ssd | the plain steps as the last forward's statistics foresee them, a chain or a small tree | a node that equals what its parent became | SSD, arXiv 2510.04147 |
| freedave | the same chain | the largest node that is a subset of what the current one became, until none is | FreeDave, arXiv 2510.00294 |
| auto | ssd's chain, its length chosen before each forward (auto.py) | as ssd | |

These decode what the plain run decodes: tokens, their order and the end. s2d2 (s2d2.py, arXiv 2603.25702) does not: what it accepts is the
choice of the same model read with block size 1.
"""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Any, ClassVar

from ..decode.caches import Block, CacheRule, Dual, NoCache, Prefix
from ..errors import SettingError, check_names
from ..settings_text import read_named
from .s2d2_options import OPTIONS, Options, read_options

if TYPE_CHECKING:
    from ..decode.policy import Policy

MAX_NODES = 64
TREES = ("chain", "positions", "tokens")
ATTENTIONS = ("batch", "tree")


@dataclasses.dataclass(frozen=True)
class Method:
    """attention: how the nodes of a row are verified in one forward: "batch", an entry per node, or "tree", one entry with a mask over their
    windows. subset: FreeDave's acceptance."""

    attention: str = "batch"
    name: ClassVar[str]
    subset: ClassVar[bool] = False
    tree: ClassVar[str] = "chain"

    def __post_init__(self):
        check_names("speculate: attention", [self.attention], ATTENTIONS)

    def __str__(self) -> str:
        given = {f.name: getattr(self, f.name) for f in dataclasses.fields(self) if getattr(self, f.name) != f.default}
        return self.name + (":" + ",".join(f"{n}={v}" for n, v in given.items()) if given else "")


@dataclasses.dataclass(frozen=True)
class SSD(Method):
    """tree: "chain"; "positions" and "tokens" spend half of the nodes on second guesses: at each depth of a shorter chain a node where the
    least certain position of the step is replaced by the next one in the order, or takes its second token."""

    tree: str = "chain"  # type: ignore[misc]
    name: ClassVar[str] = "ssd"

    def __post_init__(self):
        super().__post_init__()
        check_names("speculate: tree", [self.tree], TREES)


@dataclasses.dataclass(frozen=True)
class FreeDave(Method):
    name: ClassVar[str] = "freedave"
    subset: ClassVar[bool] = True


@dataclasses.dataclass(frozen=True)
class Auto(Method):
    name: ClassVar[str] = "auto"


@dataclasses.dataclass(frozen=True)
class S2D2:
    """S2D2 (s2d2.py), for block-causal models: its options. Not lossless: the verifier is the model read with block size 1."""

    options: Options = dataclasses.field(default_factory=Options)
    name: ClassVar[str] = "s2d2"

    def __post_init__(self):
        object.__setattr__(self, "options", read_options(self.options))

    def __str__(self) -> str:
        given = {k.name: getattr(self.options, k.name) for k in OPTIONS if getattr(self.options, k.name) != k.default}
        return self.name + (":" + ",".join(f"{n}={v}" for n, v in given.items()) if given else "")


METHODS: dict[str, type[Method]] = {m.name: m for m in (SSD, FreeDave, Auto)}
NAMES = (*METHODS, S2D2.name)


def read_method(given: object) -> Method | S2D2:
    """A method as the setting `speculate` gives it: "name" or "name:setting=value,...". Raises SettingError."""
    if isinstance(given, Method | S2D2) and type(given) is not Method:
        return given
    if not isinstance(given, str):
        raise SettingError(f"speculate must be a name ({', '.join(NAMES)}) or 'name:setting=value', got {given!r}")
    options = {k.name: k for k in OPTIONS}
    name, texts = read_named(
        "speculate", given, NAMES, lambda n: list(options) if n == S2D2.name else [f.name for f in dataclasses.fields(METHODS[n])]
    )
    if name == S2D2.name:
        return S2D2(Options(**{key: _typed(options[key].kind, value) for key, value in texts.items()}))
    return METHODS[name](**texts)


def _typed(kind: str, text: str) -> Any:
    """An option's text as its kind; what does not read as that is left for the option's own check to refuse."""
    if kind == "flag":
        return {"true": True, "false": False}.get(text.lower(), text)
    for number in (int, float) if kind in ("integer", "number") else ():
        try:
            return number(text)
        except ValueError:
            continue
    return text


STATIC_RULES = ("quota", "pc", "sdar_static")
"""Rules whose steps commit a number of positions that is known beforehand: FreeDave's fixed point is lossless for these."""
SERVED_RULES = (*STATIC_RULES, "threshold", "factor", "eb", "dus", "sdar_dynamic", "llada2", "sprint", "hierarchy", "osdt")
"""Rules that decide a step from its own statistics and the canvas."""
_REVISES = "it may take decided tokens back, and a draft only ever adds tokens"
REFUSED_RULES = {
    "klass": "it compares each step's distributions with those of the steps before, which a drafted step does not have",
    "slowfast": "its phases depend on the estimates of the steps before, which a drafted step does not have",
    "credit": "its credits gather over the steps before, which a drafted step does not have",
    "dream": "it counts what each step has left for the next one",
    "plackett_luce": "it adds up the log-probability of every step that it sees, drafted ones too",
    "edit": _REVISES, "wino": _REVISES, "remdm": _REVISES, "remask": _REVISES,
}  # fmt: skip
UNKNOWN = "nobody has shown that its steps depend on nothing but their own statistics and canvas"
SERVED_CACHES = (NoCache, Prefix, Dual, Block)


def check(
    method: Method, policy: Policy, cache: CacheRule, *, native: bool, model: str, soft_masks: bool = False, negative_prompt: bool = False,
    fields: bool = False, predictions: bool = False, schedule: str = "fixed",
) -> None:  # fmt: skip
    """Raises SettingError, with the reason, for what cannot be verified exactly.

    native: a model from unmask.load. fields: templates whose fields end early. predictions: trace="predictions".
    """
    what = f"speculate={str(method)!r}"
    if not native:
        raise SettingError(
            f"{what} needs a model from unmask.load, got {model}: a module's logits may change in their last bits with the number of rows it is "
            "called with, and a verified token would then not be the one of the plain run"
        )
    if policy.rule not in SERVED_RULES:
        raise SettingError(f"{what} does not serve policy={policy.rule!r}: {REFUSED_RULES.get(policy.rule, UNKNOWN)}; served: {', '.join(SERVED_RULES)}")
    if method.subset and policy.rule not in STATIC_RULES:
        raise SettingError(
            f"{what} is lossless for rules that commit a fixed number of positions a step ({', '.join(STATIC_RULES)}), got policy={policy.rule!r}: "
            "a draft that is a subset of what the rule would commit is accepted, and is then less than that; use speculate='ssd'"
        )
    if callable(policy.score):
        raise SettingError(f"{what} does not serve a score function: it would be called for drafted steps too, and may remember them; use a score by name")
    if type(cache) not in SERVED_CACHES:
        names = ", ".join(c.name for c in SERVED_CACHES)
        raise SettingError(f"{what} does not serve cache={str(cache)!r}: what it keeps depends on the steps before; served: {names}")
    if schedule == "daedal":
        raise SettingError(f"{what} does not serve schedule='daedal': the canvas grows between its steps")
    for name, given, reason in (
        ("soft_masks", soft_masks, "a mask's embedding depends on the step before, which a drafted step does not have"),
        ("negative_prompt", negative_prompt, "its null input is a canvas of its own, which drafted steps would have to rewrite"),
        ("scaffolds", fields, "their fields are ended between two steps, and a drafted step knows nothing of it"),
        ("trace='predictions'", predictions, "a step that no forward of its own has made has no predictions"),
    ):
        if given:
            raise SettingError(f"{what} does not serve {name}: {reason}")
