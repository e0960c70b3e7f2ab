"""What bench/quality.py decodes with: every rule of the policy table, its main knob swept; and the comparisons of schedules and caches."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterable
from typing import Any

from unmask.decode.table import RULES

NEW_TOKENS = 32
DELIMITERS = ('",\u2581"', ',\u2581"', "):", "\u2581+")
"""Tokens where a part of an answer ends: a field of `json`, the head of a `function`, the first number of a `pair`. The other tasks have none."""


@dataclasses.dataclass(frozen=True)
class Config:
    """One way to decode. group: rules | orders | schedules | caches. knob: what is swept on its line, line: the rest of the settings in words.

    settings: arguments of `unmask.generate`, all JSON. Inputs that are not JSON are named there and made by bench/quality.py: frequencies
    "training", table "one sequence: mean" (a summary), order_logits or score "confidence" and so on, delimiters as the vocabulary spells them.
    """

    group: str
    rule: str
    line: str
    knob: str
    settings: dict[str, Any]

    @property
    def key(self) -> str:
        return json.dumps(dataclasses.asdict(self), sort_keys=True)

    @property
    def value(self) -> Any:
        return self.settings.get(self.knob)


def one_per_step() -> Config:
    """What every other configuration is compared with."""
    return _config("rules", "quota", "", "steps", steps=NEW_TOKENS)


def all_configs(quick: bool = False) -> list[Config]:
    """quick: the first point of each rule and group, for tests."""
    found = [*_rules(), *_orders(), *_schedules(), *_caches()]
    if quick:
        first = {(c.group, c.rule, c.settings.get("schedule")): c for c in reversed(found)}
        found = [c for c in found if c in first.values()]
    missing = set(RULES) - {c.rule for c in found}
    if missing:
        raise SystemExit(f"bench/quality_configs.py has no configuration for {sorted(missing)}")
    keys = [c.key for c in found]
    assert len(set(keys)) == len(keys), "two configurations are the same"
    return found


def _config(group: str, rule: str, line: str, knob: str, /, **settings: Any) -> Config:
    return Config(group, rule, line, knob, {"policy": rule, "block_size": NEW_TOKENS, **settings})


def _sweep(rule: str, knob: str, values: Iterable[Any], line: str = "", group: str = "rules", **fixed: Any) -> list[Config]:
    return [_config(group, rule, line, knob, **{**fixed, knob: v}) for v in values]


def _rules() -> list[Config]:
    steps = (16, 8)
    return [
        one_per_step(),
        *_sweep("quota", "steps", steps),
        *_sweep("threshold", "threshold", (0.5, 0.6, 0.7, 0.8, 0.9, 0.95, 0.99)),
        *_sweep("threshold", "threshold", (0.8, 0.95), "variant dinfer", variant="dinfer"),
        *_sweep("factor", "factor", (0.1, 0.25, 0.5, 0.75, 1.0, 2.0)),
        *_sweep("eb", "gamma", (0.001, 0.01, 0.1, 0.3, 0.6, 1.0)),
        *_sweep("pc", "steps", steps, frequencies="training"),
        *_sweep("pc", "decay", (0.0, 0.05), "16 steps", steps=16, frequencies="training"),
        *_sweep("dus", "skip_below", (0.3, 0.6, 0.9, 0.99)),
        *_sweep("dus", "base", (2, 4), "no skipping"),
        *_sweep("klass", "threshold", (0.5, 0.7, 0.9)),
        *_sweep("klass", "kl_threshold", (0.001, 0.1, 1.0), "history 1", history=1, threshold=0.7),
        *_sweep("slowfast", "threshold", (0.6, 0.8, 0.9, 0.95)),
        *_sweep("sdar_static", "steps", steps),
        *_sweep("sdar_dynamic", "threshold", (0.7, 0.85, 0.95), "32 steps", steps=NEW_TOKENS),
        *_sweep("llada2", "threshold", (0.7, 0.8, 0.9, 0.95, 0.99)),
        *_sweep("sprint", "threshold", (0.8, 0.93, 0.99), "16 steps", steps=16),
        *_sweep("edit", "edit_threshold", (0.9, 0.999), threshold=0.95),
        *_sweep("edit", "threshold", (0.8, 0.95), "editing off", edit_threshold=2.0),
        *_sweep("hierarchy", "low_threshold", (0.3, 0.4, 0.6, 0.8)),
        *_sweep("credit", "threshold", (0.7, 0.8, 0.9, 0.95)),
        *_sweep("osdt", "cap", (0.7, 0.9, 0.95), "mean", table="one sequence: mean"),
        *_sweep("osdt", "slack", (0.0, 0.2), "q1", table="one sequence: q1", cap=0.95),
        *_sweep("dream", "steps", (32, 16, 8), "alg entropy", alg="entropy"),
        *_sweep("dream", "steps", (16,), "alg origin", alg="origin"),
        *_sweep("dream", "alg_temp", (0.2,), "alg maskgit_plus, 16 steps", alg="maskgit_plus", steps=16),
        *_sweep("plackett_luce", "steps", steps, "order: confidence", order_logits="confidence"),
        *_sweep("plackett_luce", "steps", steps, "order: left to right", order_logits="leftmost", sample=False),
        *_sweep("wino", "wide_in", (0.6, 0.8, 0.95)),
        *_sweep("wino", "narrow_out", (0.5, 0.7), "wide_in 0.8", wide_in=0.8),
        *_sweep("remdm", "steps", (32, 16), "cap"),
        *_sweep("remdm", "strategy", ("conf", "loop"), "16 steps", steps=16),
        *_sweep("remask", "loop_steps", (0, 4), block_size=16),
    ]  # fmt: skip


def _orders() -> list[Config]:
    """What orders positions, at equal counts."""
    return [c for score in ("margin", "entropy", "random", "leftmost") for c in _sweep("quota", "steps", (16, 8), f"score {score}", "orders", score=score)] + [
        *_sweep("threshold", "threshold", (0.8, 0.95), "score margin", "orders", score="margin"),
        *_sweep("quota", "position_bias", (0.02, 0.2), "16 steps", "orders", steps=16),
        *_sweep("quota", "certainty_sigma", (2.0,), "16 steps", "orders", steps=16),
    ]


def _schedules() -> list[Config]:
    found = []
    for size in (4, 8, 16):
        for kind in ("fixed", "adablock"):
            more = dict(schedule="adablock", delimiters=list(DELIMITERS)) if kind == "adablock" else {}
            values = (0.7, 0.8, 0.9, 0.95, 0.99)
            found += _sweep("threshold", "threshold", values, f"{kind}, block {size}", "schedules", block_size=size, **more)
    return found


def _caches() -> list[Config]:
    runs = (("threshold", dict(threshold=0.9)), ("eb", dict(gamma=0.1)), ("factor", dict(factor=0.5)))
    return [
        _config("caches", rule, f"block 8, {', '.join(f'{k} {v}' for k, v in knobs.items())}", "cache", block_size=8, cache=cache, **knobs)
        for rule, knobs in runs
        for cache in ("none", "prefix", "dual")
    ]
