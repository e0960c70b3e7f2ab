"""Settings that are a name with settings of their own: "name" or "name:setting=value,setting=value"."""

from __future__ import annotations

from collections.abc import Callable, Iterable

from .errors import SettingError, check_names


def read_named(what: str, text: str, names: Iterable[str], fields: Callable[[str], Iterable[str]]) -> tuple[str, dict[str, str]]:
    """The name and its settings, values as they were written.

    what: the setting that the text was given for. names: those allowed. fields: of a name, the settings it has. Raises SettingError for an
    unknown name or setting, one that is given twice, and a part that is empty: a list that somebody cut short would otherwise run with defaults.
    """
    name, colon, rest = text.partition(":")
    check_names(what, [name], names)
    if not colon:
        return name, {}
    allowed = list(fields(name))
    listed = ", ".join(allowed) or "none: it has no settings"
    if not rest:
        raise SettingError(f"{what}={text!r}: nothing stands behind the colon; give {what}={name!r}, or {name}:setting=value,... with settings {listed}")
    values: dict[str, str] = {}
    for part in rest.split(","):
        key, equals, value = part.partition("=")
        if not equals or key not in allowed:
            raise SettingError(f"{what}={text!r}: expected {name}:setting=value,... with settings {listed}; got {part!r}")
        if key in values:
            raise SettingError(f"{what}={text!r}: {key} is given twice; give it once")
        values[key] = value
    return name, values
