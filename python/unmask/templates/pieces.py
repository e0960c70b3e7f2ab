"""Literal text to ids, piece by piece: what a template fixes must stand in the canvas as written."""

from __future__ import annotations

import inspect
import unicodedata
from collections.abc import Sequence
from typing import Any, Protocol

from ..errors import SettingError
from ..models.config import shown

MAX_POSITIONS = 1 << 20  # of one canvas, as in `Settings`


class TokenizerLike(Protocol):
    """What templates need of a tokenizer; `unmask.models.Tokenizer` has it. `eos_ids`, `mask_id` are read where present."""

    def encode(self, text: str, add_special: bool = ...) -> list[int]: ...
    def decode(self, ids: Any) -> str: ...


def check_tokenizer(tokenizer: Any) -> None:
    missing = [name for name in ("encode", "decode") if not callable(getattr(tokenizer, name, None))]
    if missing:
        raise SettingError(
            f"tokenizer must have encode(text, add_special=False) and decode(ids), got {type(tokenizer).__name__} without {' and '.join(missing)}"
        )


def encode_piece(tokenizer: TokenizerLike, text: str, what: str) -> list[int]:
    """Ids of one literal piece, tokenised on its own.

    Raises SettingError where they do not read back as the text (a word-level tokenizer without the word, a lower-casing one): the canvas
    would fix something else than was written. Whitespace (which tokenizers strip at a piece's ends) and the Unicode normal form may differ.
    """
    ids = [int(i) for i in tokenizer.encode(text, add_special=False)]
    back = decode_all(tokenizer, ids)
    if _bare(back) != _bare(text):
        raise SettingError(f"{what}: the tokenizer cannot spell {shown(text)}, it reads back as {shown(back)}; write it as the tokenizer does")
    return ids


def decode_all(tokenizer: TokenizerLike, ids: Sequence[int]) -> str:
    """Text of ids with special tokens shown, where the tokenizer can."""
    try:
        shows = "skip_special" in inspect.signature(tokenizer.decode).parameters
    except (TypeError, ValueError):  # a callable without a signature
        shows = False
    return tokenizer.decode(list(ids), skip_special=False) if shows else tokenizer.decode(list(ids))  # type: ignore[call-arg]


def _bare(text: str) -> str:
    return "".join(unicodedata.normalize("NFC", text).split())
