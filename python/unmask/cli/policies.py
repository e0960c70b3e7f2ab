"""`unmask policies`: the decoding rules, or one of them with its settings; a table of rich's on a terminal that has it, plain lines elsewhere."""

from __future__ import annotations

import argparse
import sys
import textwrap
from collections.abc import Sequence

from .options import fail, nearest

WIDTH = 100  # of plain text


def run(args: argparse.Namespace) -> int:
    from ..decode.table import RULES

    if args.name is not None and args.name not in RULES:
        return fail(args, f"unknown policy {args.name!r}{nearest(args.name, list(RULES))}")
    if args.name is None:
        _show(("policy", "rule", "source", "settings"), _overview())
        return 0
    spec = RULES[args.name]
    print(_paragraph(f"{spec.name}: {spec.title} ({spec.source}). {spec.doc}"))
    for line in _facts(args.name):
        print(_paragraph(line))
    if spec.knobs:
        print()
        _show(("setting", "default", "allowed", "meaning"), _knobs(args.name))
    return 0


def _overview() -> list[tuple[str, ...]]:
    from ..decode.table import RULES

    return [(s.name, s.title, s.source, ", ".join(k.name for k in s.knobs)) for s in RULES.values()]


def _facts(name: str) -> list[str]:
    from ..decode import tabulate
    from ..decode.table import RULES

    spec = RULES[name]
    return [f"scores: {tabulate.scores(spec)}".replace("`", ""), f"needs: {tabulate.needs(spec)}".replace("`", "")]


def _knobs(name: str) -> list[tuple[str, ...]]:
    from ..decode.table import RULES

    return [(k.name, "" if k.default is None else str(k.default), k.range, k.doc) for k in RULES[name].knobs]


def _paragraph(text: str) -> str:
    return textwrap.fill(text, WIDTH, subsequent_indent="  ", break_long_words=False)


def _show(head: Sequence[str], rows: list[tuple[str, ...]]) -> None:
    if sys.stdout.isatty():
        try:
            return _rich(head, rows)
        except ModuleNotFoundError as error:
            if error.name is None or error.name.partition(".")[0] != "rich":
                raise
    print("\n".join(plain(head, rows)))


def _rich(head: Sequence[str], rows: list[tuple[str, ...]]) -> None:
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table(*head)
    for row in rows:
        table.add_row(*(Text(cell) for cell in row))
    Console().print(table)


def plain(head: Sequence[str], rows: list[tuple[str, ...]]) -> list[str]:
    """Lines of text: columns as wide as their longest cell, the last one wrapped at WIDTH where that leaves it room."""
    widths = [max(len(row[i]) for row in (head, *rows)) for i in range(len(head) - 1)]
    indent = sum(widths) + 2 * len(widths)
    lines = []
    for row in (head, *rows):
        start = "  ".join([*(cell.ljust(width) for cell, width in zip(row, widths, strict=False)), ""])
        cell = textwrap.wrap(row[-1], max(WIDTH - indent, 40), break_long_words=False) or [""]
        lines += [(start + cell[0]).rstrip(), *(" " * indent + more for more in cell[1:])]
    return lines
