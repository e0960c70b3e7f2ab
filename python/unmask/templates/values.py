"""The text that a model left in a field, as a value of the field's type."""

from __future__ import annotations

import json
from typing import Any

from ..models.config import shown
from .schema import Field

_KINDS = {"string": "text", "number": "a number", "integer": "a whole number", "boolean": "true or false"}


def describe(field: Field) -> str:
    """The field's type in words."""
    return f"a list of values, each {_KINDS[field.items]}" if field.items else _KINDS[field.kind]


def value_of(field: Field, text: str) -> Any:
    """The value that a field's text spells; None for no text; the text itself where it is not of the field's type (see `problem`)."""
    if not text:
        return None
    if field.kind == "string":
        return _string(text)
    parsed = _parse(f"[{text}]" if field.kind == "array" else text)
    if field.kind == "array":
        if not isinstance(parsed, list):
            return text
        items = [_typed(field.items, item) for item in parsed]
        return text if any(item is None for item in items) else items
    value = _typed(field.kind, parsed)
    return text if value is None else value


def problem(field: Field, value: Any) -> str | None:
    """What is wrong with a value that `value_of` gave, if anything."""
    if value is None:
        return f"{field.name} is required, got nothing" if field.required else None
    wrong = field.kind != "string" and isinstance(value, str)
    if wrong:
        return f"{field.name} must be {describe(field)}, got {shown(value)}"
    if field.enum is not None and not any(type(value) is type(e) and value == e for e in field.enum):
        return f"{field.name} must be one of {json.dumps(list(field.enum), ensure_ascii=False)}, got {shown(value)}"
    return None


def _typed(kind: str | None, value: Any) -> Any:
    """The value if it is of a scalar type, else None. 12.0 is an integer, as JSON Schema has it."""
    number = isinstance(value, (int, float)) and not isinstance(value, bool)
    if kind == "integer":
        return int(value) if number and value == int(value) else None
    ok = {"string": isinstance(value, str), "number": number, "boolean": isinstance(value, bool)}[kind or ""]
    return value if ok else None


def _string(text: str) -> str:
    """The field stands between quotes, so escapes in it are JSON's; a text that is no JSON string (a raw newline, a quote) is meant as is."""
    value = _parse(f'"{text}"')
    return value if isinstance(value, str) else text


def _parse(text: str) -> Any:
    """JSON value of a text; None if it is none, or holds what no JSON text may: NaN, a number beyond double range, half a surrogate pair."""
    try:
        value = json.loads(text)
        json.dumps(value, allow_nan=False, ensure_ascii=False).encode()
    except (ValueError, RecursionError):  # UnicodeEncodeError is a ValueError
        return None
    return value
