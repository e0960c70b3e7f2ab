"""Settings of schedule="daedal" (DAEDAL, arXiv 2508.00819), and what of the other settings it does not go with."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from ..errors import SettingError, check_names
from .table import Knob

if TYPE_CHECKING:
    from ..settings import Settings

INITIAL = 64

KNOBS = (
    Knob("initial_tokens", None, "integer", "L0: masks that an answer begins with; default 64, or max_new_tokens where that is less", 1, 1 << 20),
    Knob("high_threshold", 0.9, "number", "commit where the probability is above this, else the best one", 0.0, 1.0),
    Knob("low_threshold", 0.1, "number", "only a position below this may become more masks", 0.0, 1.0),
    Knob("eos_threshold", 0.5, "number", "stage 1 lengthens while the end-of-sequence confidence is below this", 0.0, 1.0),
    Knob("expand_threshold", 0.9, "number", "stage 2 inserts only while the end-of-sequence confidence is below this", 0.0, 1.0),
    Knob("expansion", 8, "integer", "E: masks added at a time in stage 1, masks that one becomes in stage 2", 2, 1 << 20),
    Knob("eos_window", 32, "integer", "W: end tokens that count for the confidence; W / 2 of them follow the masks after stage 1", 1, 1 << 20),
)
NAMES = tuple(k.name for k in KNOBS)


def resolve(given: Mapping[str, Any], longest: int) -> dict[str, Any]:
    """Every setting, defaults filled in, checked. longest: max_new_tokens."""
    check_names("setting of schedule='daedal'", given, NAMES)
    values = {k.name: k.check(given.get(k.name, k.default)) for k in KNOBS}
    if values["initial_tokens"] is None:
        values["initial_tokens"] = min(INITIAL, longest)
    elif values["initial_tokens"] > longest:
        raise SettingError(f"initial_tokens must be at most max_new_tokens, {longest} here, got {values['initial_tokens']}")
    return values


def check_model(name: str, eos_ids: Sequence[int], suppress: Sequence[int]) -> None:
    """Raises SettingError where a model's answers have no end that could be measured."""
    if not eos_ids:
        raise SettingError(f"schedule='daedal' needs an end-of-sequence id, and the config of {name} names none")
    barred = [i for i in eos_ids if i in suppress]
    if barred:
        raise SettingError(f"schedule='daedal' reads the answer's length from the probability of its end: suppress must not hold end ids, got {barred}")


def check_alone(settings: Settings) -> None:
    """Raises SettingError for settings that DAEDAL has no place for: it brings its own score, commit rule and blocks, and moves tokens."""
    if settings.policy != "threshold":
        raise SettingError(f"schedule='daedal' brings its own commit rule, got policy={settings.policy!r}; leave policy out (high_threshold is its bar)")
    if settings.knobs:
        raise SettingError(
            f"schedule='daedal' brings its own commit rule and takes no setting of policies, got {', '.join(settings.knobs)}; its own settings: {', '.join(NAMES)}"
        )
    if settings.cache is not None and str(settings.cache) != "none":
        raise SettingError(f"schedule='daedal' needs cache='none', got cache={str(settings.cache)!r}: an insertion moves the tokens whose K/V a cache would keep")
    plain = dict(
        position_bias=0.0, certainty_sigma=None, top_p=None, top_k=None, top_k_first=False, confidence_source="clean", repetition_penalty=1.0,
        soft_masks=None, logits_eos_inf=False, confidence_eos_eot_inf=False,
    )  # fmt: skip
    for name, off in plain.items():
        if getattr(settings, name) != off:
            why = ": it reads the answer's length from the probability of its end" if "eos" in name else ""
            raise SettingError(f"schedule='daedal' does not take {name}{why}; leave it out")
    if settings.score not in (None, "confidence"):
        raise SettingError(f"schedule='daedal' orders positions by confidence, got score={settings.score!r}; leave it out")
    if settings.eos_stop == "block":
        raise SettingError("schedule='daedal' decodes every row to its end: eos_stop must be True (cut at the first end token) or False, got 'block'")
    if settings.trace == "predictions":
        raise SettingError("schedule='daedal' moves tokens, so predictions of different steps do not line up: trace must be True or False")
