"""Watching a canvas denoise: redrawn in place on a terminal (rich), one plain line per forward elsewhere."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from typing import TYPE_CHECKING, Protocol

from .show import MASK, Pieces, canvas_text, visible

if TYPE_CHECKING:
    from ..result import Commit

CLEAR = ((0.7, "green"), (0.3, "yellow"), (float("-inf"), "red"))
"""Colour of a token that was just committed, by its score: at least this much."""


class View(Protocol):
    def __enter__(self) -> View: ...
    def __exit__(self, *exc: object) -> None: ...
    def update(self, commit: Commit, forwards: int) -> None: ...


def open_view(pieces: Pieces, start: int, mask_id: int) -> View:
    """The view that fits standard output. Raises ModuleNotFoundError (rich) on a terminal without rich installed."""
    if not sys.stdout.isatty() or os.environ.get("NO_COLOR") or os.environ.get("TERM") == "dumb":
        return Lines(pieces, start, mask_id, print)
    return Canvas(pieces, start, mask_id)


class Lines:
    """One line per forward: what was settled, how much is left, the text so far."""

    def __init__(self, pieces: Pieces, start: int, mask_id: int, write: Callable[[str], None]):
        self.pieces, self.start, self.mask_id, self.write = pieces, start, mask_id, write

    def __enter__(self) -> Lines:
        return self

    def __exit__(self, *exc: object) -> None:
        pass

    def update(self, commit: Commit, forwards: int) -> None:
        text = canvas_text(commit.canvas, self.start, self.mask_id, self.pieces)
        head = f"forward {forwards}, block {commit.block}: +{len(commit.positions)}, {commit.masks_left} left"
        self.write(f"{head} | {visible(text, keep='').replace(chr(0x240A), ' ')}")


class Canvas:
    """The text in place: undecided positions grey, fresh tokens coloured by their score, older ones plain."""

    def __init__(self, pieces: Pieces, start: int, mask_id: int):
        from rich.live import Live

        self.pieces, self.start, self.mask_id = pieces, start, mask_id
        self.live = Live(auto_refresh=False, transient=True, vertical_overflow="visible")

    def __enter__(self) -> Canvas:
        self.live.__enter__()
        return self

    def __exit__(self, *exc: object) -> None:
        self.live.__exit__(None, None, None)

    def update(self, commit: Commit, forwards: int) -> None:
        self.live.update(self.text(commit, forwards), refresh=True)

    def text(self, commit: Commit, forwards: int):
        """The canvas as rich text; every piece of generated text is made visible first, and none is read as markup."""
        from rich.text import Text

        fresh = dict(zip(commit.positions, commit.scores, strict=True))
        out = Text(no_wrap=False)
        for position, token in enumerate(commit.canvas[self.start :], self.start):
            if token == self.mask_id:
                out.append(MASK, style="bright_black")
                continue
            style = (
                next(colour for least, colour in CLEAR if fresh[position] >= least)
                if position in fresh
                else ""
            )
            out.append(visible(self.pieces[token]), style=style)
        out.append(
            f"\nforward {forwards}, block {commit.block}, {commit.masks_left} left in it",
            style="bright_black",
        )
        return out
