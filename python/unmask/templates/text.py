"""Text with holes in it: `Dear [[MASK*4]], thank you` -> the canvas that `unmask.infill` takes."""

from __future__ import annotations

import re

from ..errors import SettingError
from .pieces import MAX_POSITIONS, TokenizerLike, check_tokenizer, encode_piece

_HOLE = re.compile(r"\[\[MASK(?:\*([0-9]+))?\]\]")
_SHOWN = 24


def parse_template(text: str, tokenizer: TokenizerLike) -> list[int | None]:
    r"""Canvas of a template: token ids, with None at each position to fill.

    text: `[[MASK*n]]` is n positions to fill (n from 1), `[[MASK]]` is one; anything else is literal. Each literal piece between holes is
    tokenised on its own, without special tokens around it (S3, arXiv 2507.04504: no token may merge across a hole). `\[[` is a literal
    `[[`; backslashes straight before `[[` count in pairs, so `\\[[MASK]]` is a backslash and a hole. Of more than two brackets in a row
    the last two open the hole: `[[[MASK]]]` is a hole in brackets.
    tokenizer: `model.tokenizer`, or anything with encode(text, add_special=False) -> ids and decode(ids) -> text.
    Raises SettingError naming the offset (characters from 0) for a `[[` that opens no hole, n = 0, n or the canvas beyond 1,048,576
    positions, and a literal that the tokenizer cannot spell.
    """
    check_tokenizer(tokenizer)
    if not isinstance(text, str):
        raise SettingError(f"a template must be a str, got {type(text).__name__}")
    canvas: list[int | None] = []
    for offset, piece in _split(text):
        literal = isinstance(piece, str)
        ids = encode_piece(tokenizer, piece, f"template, offset {offset}") if literal else range(piece)
        if len(canvas) + len(ids) > MAX_POSITIONS:
            raise SettingError(f"template, offset {offset}: the canvas must be at most {MAX_POSITIONS} positions, got {len(canvas) + len(ids)}")
        canvas += ids if literal else [None] * piece
    return canvas


def escape(text: str, before_hole: bool = False) -> str:
    r"""The template of a literal text: `parse_template(escape(text), tokenizer)` holds the ids of the text alone.

    before_hole: a hole follows at once, so `escape(text, True) + "[[MASK]]"`; the two differ where the text ends in `\` or `\[`.
    """
    if not isinstance(text, str):
        raise SettingError(f"text must be a str, got {type(text).__name__}")
    out, done = [], 0
    while (at := text.find("[[", done)) >= 0:
        out += [text[done:at], "\\" * _slashes(text, done, at), r"\[["]
        done = at + 2
    if before_hole:
        end = len(text) - text.endswith("[", done)
        out += [text[done:end], "\\" * _slashes(text, done, end), text[end:]]
    else:
        out.append(text[done:])
    return "".join(out)


def _split(text: str) -> list[tuple[int, str | int]]:
    """(offset, literal text or number of positions), in order; literals are not empty and never adjacent."""
    out: list[tuple[int, str | int]] = []
    literal: list[str] = []
    began = done = 0  # where the literal at hand began; up to where the text is read
    while (at := text.find("[[", done)) >= 0:
        slashes = _slashes(text, done, at)
        literal += [text[done : at - slashes], "\\" * (slashes // 2)]
        if slashes % 2:
            literal.append("[[")
            done = at + 2
        elif text.startswith("[[[", at):
            literal.append("[")
            done = at + 1
        else:
            if any(literal):
                out.append((began, "".join(literal)))
            done, count = _hole(text, at)
            out.append((at, count))
            literal, began = [], done
    literal.append(text[done:])
    if any(literal):
        out.append((began, "".join(literal)))
    return out


def _slashes(text: str, low: int, at: int) -> int:
    """Backslashes straight before an offset, none of them before `low`."""
    first = at
    while first > low and text[first - 1] == "\\":
        first -= 1
    return at - first


def _hole(text: str, at: int) -> tuple[int, int]:
    """(offset behind it, positions) of the hole that opens at an offset."""
    hole = _HOLE.match(text, at)
    if hole is None:
        raise SettingError(
            f"template, offset {at}: [[ must open [[MASK]] or [[MASK*n]] with n in 1..{MAX_POSITIONS}, got {text[at : at + _SHOWN]!r}; "
            r"a literal [[ is written \[["
        )
    digits = (hole[1] or "1").lstrip("0")
    if not digits or len(digits) > 7 or int(digits) > MAX_POSITIONS:
        got = hole[1] if len(hole[1]) <= _SHOWN else f"a number of {len(hole[1])} digits"
        raise SettingError(f"template, offset {at}: a hole must be of 1..{MAX_POSITIONS} positions, got {got}")
    return hole.end(), int(digits)
