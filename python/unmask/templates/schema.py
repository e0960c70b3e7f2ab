"""JSON schema -> the tree of fields a scaffold lays out. What a canvas of fixed literals cannot hold is refused, by name."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator, Mapping
from typing import Any

from ..errors import SettingError, check_names
from ..models.config import shown
from ..values import integer
from .pieces import MAX_POSITIONS

DEFAULT_BUDGET = 16  # of the authors' code
SCALARS = ("string", "number", "integer", "boolean")
_MAX_DEPTH = 16
_BRACKETS = {"string": ('"', '"'), "array": ("[", "]")}  # literals straight around a field; numbers and booleans stand bare
_REFUSED = ("$ref", "anyOf", "oneOf", "allOf", "not", "if", "patternProperties")


@dataclasses.dataclass(frozen=True)
class Field:
    """One value to fill. name: its path, joined by dots. kind: string, number, integer, boolean or array. items: what an array holds.
    enum, description: for the prompt. required: by its object. budget: positions."""

    name: str
    kind: str
    items: str | None
    enum: tuple[Any, ...] | None
    description: str
    required: bool
    budget: int


Tree = dict[str, "Field | Tree"]


def read_schema(schema: Any, budget: int | Mapping[str, int]) -> Tree:
    """Fields by name, nested as in the schema, in its order. Errors as `Scaffold.from_schema`."""
    if not isinstance(budget, Mapping):
        budget = integer("budget", budget, 1, MAX_POSITIONS)
    tree = _object(schema, (), budget)
    names = [field.name for field in fields(tree)]
    if not names:
        raise SettingError("schema must have at least one field to fill, got none")
    twice = next((name for i, name in enumerate(names) if name in names[:i]), None) if len(set(names)) < len(names) else None
    if twice is not None:
        raise SettingError(f"schema: two fields are called {twice!r} (path joined by dots); rename one")
    if isinstance(budget, Mapping):
        check_names("field in budget", budget, names)
    total = sum(field.budget for field in fields(tree))
    if total > MAX_POSITIONS:
        raise SettingError(f"budget must be at most {MAX_POSITIONS} positions in all, got {total}")
    return tree


def fields(tree: Tree) -> Iterator[Field]:
    """Every field, in the order of the canvas."""
    for node in tree.values():
        if isinstance(node, Field):
            yield node
        else:
            yield from fields(node)


def pieces(tree: Tree, depth: int = 0) -> Iterator[str | Field]:
    """The JSON text as separate literals and fields, cut where the authors' code cuts it (scaffolding/schema.py of dLLM-CtrlGen)."""
    yield "{\n"
    for i, (key, node) in enumerate(tree.items()):
        head = "  " * (depth + 1) + json.dumps(key, ensure_ascii=False) + ": "
        if isinstance(node, Field):
            left, right = _BRACKETS.get(node.kind, ("", ""))
            yield head + left
            yield node
            if right:
                yield right
        elif node:
            yield head
            yield from pieces(node, depth + 1)
        else:
            yield head + "{}"
        yield ",\n" if i + 1 < len(tree) else "\n"
    yield "  " * depth + "}"


def _object(schema: Any, path: tuple[str, ...], budget: int | Mapping[str, int]) -> Tree:
    where = _where(path)
    if _type(schema, where) != "object":
        raise SettingError(f"{where} must have type 'object', got {schema.get('type')!r}")
    if len(path) > _MAX_DEPTH:
        raise SettingError(f"{where}: objects must be nested at most {_MAX_DEPTH} deep")
    properties, required = schema.get("properties", {}), schema.get("required", ())
    if not isinstance(properties, Mapping) or not all(isinstance(key, str) for key in properties):
        raise SettingError(f"{where}: properties must be a dict of names to schemas, got {shown(properties)}")
    if not isinstance(required, (list, tuple)) or not all(isinstance(key, str) for key in required):
        raise SettingError(f"{where}: required must be a list of names, got {shown(required)}")
    check_names(f"required field of {where}", required, properties)
    tree: Tree = {}
    for key, value in properties.items():
        below = (*path, key)
        kind = _type(value, _where(below))
        tree[key] = _object(value, below, budget) if kind == "object" else _field(value, kind, below, key in required, budget)
    return tree


def _field(schema: Mapping[str, Any], kind: str, path: tuple[str, ...], required: bool, budget: int | Mapping[str, int]) -> Field:
    where, name = _where(path), ".".join(path)
    items = None
    if kind == "array":
        items = _type(schema.get("items"), f"{where}: items")
        check_names(f"type of the items of {name!r}", [items], SCALARS)
    enum, description = schema.get("enum"), schema.get("description", "")
    if enum is not None and not (isinstance(enum, (list, tuple)) and enum and _is_json(enum)):
        raise SettingError(f"{where}: enum must be a list of JSON values, got {shown(enum)}")
    if not isinstance(description, str):
        raise SettingError(f"{where}: description must be a str, got {type(description).__name__}")
    if isinstance(budget, Mapping):
        budget = integer(f"budget of {name!r}", budget.get(name, DEFAULT_BUDGET), 1, MAX_POSITIONS)
    return Field(name, kind, items, None if enum is None else tuple(enum), " ".join(description.split()), required, budget)


def _type(schema: Any, where: str) -> str:
    """The one type of a schema; ["string", "null"] is a string that may be missing, as every field may."""
    if not isinstance(schema, Mapping):
        raise SettingError(f"{where} must be a JSON schema (a dict), got {type(schema).__name__}")
    refused = next((word for word in _REFUSED if word in schema), None)
    if refused is not None:
        raise SettingError(f"{where}: {refused} is not supported; write out the one type that the canvas should hold")
    kind = schema.get("type")
    if isinstance(kind, (list, tuple)):
        rest = [k for k in kind if k != "null"]
        kind = rest[0] if len(rest) == 1 else kind
    allowed = ("object", "array", *SCALARS)
    if not isinstance(kind, str):
        raise SettingError(f"{where}: type must be one of {', '.join(allowed)}, got {shown(kind)}")
    check_names(f"type of {where}", [kind], allowed)
    return kind


def _is_json(value: Any) -> bool:
    try:
        json.dumps(value, allow_nan=False)
    except (TypeError, ValueError, RecursionError):
        return False
    return True


def _where(path: tuple[str, ...]) -> str:
    return f"schema field {'.'.join(path)!r}" if path else "schema"
