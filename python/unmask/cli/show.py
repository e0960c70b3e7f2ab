"""How a canvas is written: token by token, undecided positions as blocks, control characters made visible."""

from __future__ import annotations

from collections.abc import Callable, Sequence

MASK = "\u2592"
"""Stands for one undecided position."""

_CONTROL = {c: 0x2400 + c for c in range(0x20)} | {0x7F: 0x2421} | {c: 0xFFFD for c in range(0x80, 0xA0)}
_CONTROL |= dict.fromkeys(
    (*range(0x202A, 0x202F), *range(0x2066, 0x206A), 0x200E, 0x200F), 0xFFFD
)  # they reorder what follows


def visible(text: str, keep: str = "\n\t") -> str:
    """The text with control characters (escape sequences, C1, text direction) replaced by visible ones, so none reaches a terminal."""
    return text.translate({c: v for c, v in _CONTROL.items() if chr(c) not in keep})


class Pieces:
    """Text of single tokens, with the space that belongs to each, from a decoder of whole id lists."""

    def __init__(self, decode: Callable[[Sequence[int]], str]):
        self._decode = decode
        self._known: dict[int, str] = {}

    def __getitem__(self, token: int) -> str:
        if token not in self._known:
            # what the token adds behind another one: decoders drop the space in front of a text's first token
            one = self._decode([token])
            self._known[token] = self._decode([token, token])[len(one) :]
        return self._known[token]


def id_pieces() -> Pieces:
    """Token ids as text, for a model without a tokenizer."""
    return Pieces(lambda ids: "".join(f" {i}" for i in ids))


def canvas_text(canvas: Sequence[int], start: int, mask_id: int, pieces: Pieces) -> str:
    """Positions from `start` on as one line of text, undecided ones as MASK."""
    return "".join(MASK if token == mask_id else pieces[token] for token in canvas[start:]).lstrip(" ")
