"""S3: the JSON text of a schema stands in the canvas from the start, and the model fills in the values (arXiv 2507.04504)."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch

from ..errors import SettingError
from ..models.config import shown
from ..result import Result
from ..values import as_integer, integer
from .pieces import TokenizerLike, check_tokenizer, decode_all, encode_piece
from .schema import DEFAULT_BUDGET, Field, Tree, fields, pieces, read_schema
from .values import describe, problem, value_of

_FENCE = ("```json\n", "\n```")


@dataclasses.dataclass(frozen=True)
class Scaffold:
    """A JSON object as a canvas: literals given, values to fill. Made by `from_schema`.

    canvas: token ids, None where to fill; `unmask.infill(model, prompt_ids + scaffold.canvas)`.
    spans: field name (path joined by dots) to its [start, end) in `canvas`.
    null_ids: the tokens of the null, which a model writes where a value is missing or over. eos_ids: end and padding ids, which end a
    field too. end_ids: both, as `end_fields` takes them; a null of several tokens is one run. fill_id: what is put behind an end.
    """

    canvas: list[int | None]
    spans: dict[str, tuple[int, int]]
    null: str
    null_ids: tuple[int, ...]
    eos_ids: tuple[int, ...]
    tokenizer: TokenizerLike
    tree: Tree = dataclasses.field(repr=False)

    @classmethod
    def from_schema(
        cls,
        schema: Mapping[str, Any],
        tokenizer: TokenizerLike,
        *,
        null: str | int = "<none>",
        budget: int | Mapping[str, int] = DEFAULT_BUDGET,
        fenced: bool = True,
        eos_ids: Iterable[int] | None = None,
    ) -> Scaffold:
        """Lays a schema out as the authors do: two spaces of indent a level, each literal piece tokenised on its own.

        schema: JSON schema of an object whose properties are of type string, number, integer, boolean, array of these, or object again.
        Strings are filled between quotes, an array's elements between brackets in one go, the rest bare. enum and description only
        appear in `instructions`; other keywords (pattern, minimum, ...) are not enforced. tokenizer: as for `parse_template`.
        null: text of the null, as the model is told and tokenised on its own, or one token id. budget: positions per field, for all or by
        name (16 for the rest). fenced: inside a ```json fence. eos_ids: default the tokenizer's, with its padding token.
        Raises SettingError for other schemas (anyOf, $ref, ...), unknown names (with the nearest valid one), numbers out of range and
        literals that the tokenizer cannot spell.
        """
        check_tokenizer(tokenizer)
        if not isinstance(fenced, bool):
            raise SettingError(f"fenced must be True or False, got {fenced!r}")
        tree = read_schema(schema, budget)
        text, null_ids = _null(null, tokenizer)
        ends = _eos_ids(tokenizer) if eos_ids is None else tuple(integer("an id in eos_ids", i, 0) for i in eos_ids)
        canvas: list[int | None] = []
        spans: dict[str, tuple[int, int]] = {}
        for piece in [_FENCE[0], *pieces(tree), _FENCE[1]] if fenced else pieces(tree):
            if isinstance(piece, Field):
                spans[piece.name] = (len(canvas), len(canvas) + piece.budget)
                canvas += [None] * piece.budget
            else:
                canvas += encode_piece(tokenizer, piece, f"schema, literal {shown(piece)}")
        return cls(canvas, spans, text, null_ids, ends, tokenizer, tree)

    @property
    def end_ids(self) -> tuple[int | tuple[int, ...], ...]:
        return (self.null_ids[0] if len(self.null_ids) == 1 else self.null_ids, *self.eos_ids)

    @property
    def fill_id(self) -> int:
        """The null if it is one token, else the first end id, else the null's last token: `read` stops before any of them."""
        return self.null_ids[0] if len(self.null_ids) == 1 else (*self.eos_ids, self.null_ids[-1])[0]

    def field_map(self, length: int | None = None, offset: int = 0) -> torch.Tensor:
        """int64 [length], the field (0, 1, ... in the order of `spans`) of each position of a row whose scaffold begins at `offset`, -1
        elsewhere: one row of `end_fields`' `field`. length: of the row, default up to the scaffold's end."""
        offset = integer("offset", offset, 0)
        end = offset + len(self.canvas)
        length = end if length is None else integer("length (offset + the scaffold at least)", length, end)
        out = torch.full((length,), -1, dtype=torch.int64)
        for i, (a, b) in enumerate(self.spans.values()):
            out[offset + a : offset + b] = i
        return out

    def instructions(self) -> str:
        """What to tell the model, for the prompt: the fields, their types, choices and descriptions, and the null."""
        lines = ["Answer only with a JSON object that has these fields:"]
        for field in fields(self.tree):
            parts = [describe(field)]
            if field.enum is not None:
                parts.append("one of " + ", ".join(json.dumps(e, ensure_ascii=False) for e in field.enum))
            lines.append(f"- {field.name} ({'; '.join(parts)})" + (f": {field.description}" if field.description else ""))
        lines.append(
            f"If a value is not known, write {self.null} in its place. After a value that is shorter than its space write {self.null} "
            "too; it may be repeated."
        )
        return "\n".join(lines)

    def read(self, ids: Any) -> dict[str, Any]:
        """The values, nested as in the schema.

        ids: the filled canvas (a list, a tensor [L] or a Result), whose last len(canvas) positions are the scaffold. A field's text is
        what stands before its first null, end or padding token, spaces around it removed; JSON escapes in a string are resolved. No text
        reads as None; text that is not of the field's type reads as that text, and `problems` names it.
        Raises SettingError where a literal of the scaffold is not in its place, or a position is undecided.
        """
        return self._nest(self.tree, self._values(ids))

    def json(self, ids: Any) -> str:
        """`read` as JSON text; valid whatever the model wrote. Arguments and errors as `read`."""
        return json.dumps(self.read(ids), ensure_ascii=False, allow_nan=False)

    def problems(self, ids: Any) -> list[str]:
        """One sentence per field whose value is missing though required, not of its type, or not in its enum. Arguments as `read`."""
        values = self._values(ids)
        return [p for field in fields(self.tree) if (p := problem(field, values[field.name])) is not None]

    def _values(self, ids: Any) -> dict[str, Any]:
        row = self._row(ids)
        return {field.name: value_of(field, self._text(row[slice(*self.spans[field.name])])) for field in fields(self.tree)}

    def _nest(self, tree: Tree, values: Mapping[str, Any]) -> dict[str, Any]:
        return {key: values[node.name] if isinstance(node, Field) else self._nest(node, values) for key, node in tree.items()}

    def _row(self, ids: Any) -> list[int]:
        """The scaffold's part of a canvas, checked."""
        if isinstance(ids, Result):
            ids = ids.canvas
        if hasattr(ids, "tolist"):
            ids = ids.tolist()
        if not isinstance(ids, (list, tuple)) or len(ids) < len(self.canvas):
            got = len(ids) if isinstance(ids, (list, tuple)) else type(ids).__name__
            raise SettingError(f"ids must be one filled canvas of at least {len(self.canvas)} token ids, got {got}")
        row = [as_integer(i) for i in ids[len(ids) - len(self.canvas) :]]
        mask = getattr(self.tokenizer, "mask_id", None)
        for position, (given, have) in enumerate(zip(self.canvas, row, strict=True)):
            if given is not None and have != given:
                raise SettingError(
                    f"ids must end with the scaffold: position {position} of it is the literal token {given}, got {have!r}; pass the "
                    "canvas of infill (Result.canvas), not only the ids that were filled in"
                )
            if have is None or (given is None and have == mask):
                raise SettingError(f"ids: position {position} of the scaffold is undecided; read it when the run has ended")
        return row  # type: ignore[return-value]

    def _text(self, ids: Sequence[int]) -> str:
        n = len(self.null_ids)
        null = list(self.null_ids)
        end = next((i for i, t in enumerate(ids) if t in self.eos_ids or list(ids[i : i + n]) == null), len(ids))
        text = self.tokenizer.decode(list(ids[:end]))
        return text.split(self.null, 1)[0].strip()  # the model may spell the null with other tokens


def _null(null: str | int, tokenizer: TokenizerLike) -> tuple[str, tuple[int, ...]]:
    """(text, ids) of the null."""
    if isinstance(null, str):
        if not null.strip():
            raise SettingError(f"null must be a text that can be seen, or a token id, got {null!r}")
        text, ids = null, tuple(encode_piece(tokenizer, null, "null"))
    else:
        ids = (integer("null (a text or a token id)", null, 0),)
        text = decode_all(tokenizer, ids)
        if not text.strip():
            raise SettingError(f"null must be a token with a text that can be seen, the tokenizer decodes {ids[0]} to {text!r}")
    if getattr(tokenizer, "mask_id", None) in ids:
        raise SettingError(f"null must not hold the mask token, got {null!r}: a model never writes it")
    return text, ids


def _eos_ids(tokenizer: TokenizerLike) -> tuple[int, ...]:
    """End and padding ids of an unmask tokenizer; none where a tokenizer does not say."""

    def ids() -> Iterator[int]:
        yield from getattr(tokenizer, "eos_ids", None) or ()
        pad = (getattr(tokenizer, "special", None) or {}).get("pad_token")
        if pad is not None and (pad_id := tokenizer.token_to_id(pad)) is not None:  # type: ignore[attr-defined]
            yield pad_id

    return tuple(dict.fromkeys(ids()))
