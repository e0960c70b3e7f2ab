"""Results as JSON (for machines) and as a markdown table (for readers), written beside each other and printed."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path

import machine

RESULTS = Path(__file__).resolve().parent / "results"


def seconds(value: float) -> str:
    """A time with three significant digits and a fitting unit."""
    for scale, unit in ((1.0, "s"), (1e-3, "ms"), (1e-6, "us")):
        if value >= scale:
            return f"{value / scale:.3g} {unit}" if value / scale < 999.5 else f"{value / scale:.0f} {unit}"
    return f"{value * 1e9:.3g} ns"


def table(rows: Iterable[Mapping[str, object]]) -> str:
    """Markdown table of the rows; columns are the keys in order of first appearance, missing cells stay empty."""
    rows = list(rows)
    columns = list(dict.fromkeys(key for row in rows for key in row))
    cells = [columns] + [[_cell(row.get(column, "")) for column in columns] for row in rows]
    widths = [max(len(line[i]) for line in cells) for i in range(len(columns))]
    lines = [
        "| " + " | ".join(text.ljust(width) for text, width in zip(line, widths, strict=True)) + " |"
        for line in cells
    ]
    lines.insert(1, "|" + "|".join("-" * (width + 2) for width in widths) + "|")
    return "\n".join(lines)


def _cell(value: object) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float):
        return f"{value:.3g}" if abs(value) < 1000 else f"{value:.0f}"
    return str(value)


def write(
    name: str,
    title: str,
    sections: Mapping[str, Iterable[Mapping[str, object]]],
    notes: Iterable[str] = (),
    **data,
) -> Path:
    """Prints and writes results/<name>-<cpu>-<date>.{json,md}; returns the markdown file.

    sections: heading -> table rows (a section without rows is left out). notes: lines under the tables. data: anything else that the JSON should hold.
    """
    origin = machine.origin()
    sections = {heading: [dict(row) for row in rows] for heading, rows in sections.items()}
    sections = {heading: rows for heading, rows in sections.items() if rows}
    text = [f"# {title}", "", _origin_line(origin), ""]
    for heading, rows in sections.items():
        text += [f"## {heading}", "", table(rows), ""]
    text += [f"- {note}" for note in notes]
    markdown = "\n".join(text).rstrip() + "\n"
    stem = RESULTS / f"{name}-{machine.cpu_slug()}-{origin['date']}"
    RESULTS.mkdir(exist_ok=True)
    payload = {
        "name": name,
        "title": title,
        "origin": origin,
        "sections": sections,
        "notes": list(notes),
    } | data
    stem.with_suffix(".json").write_text(json.dumps(payload, indent=1, default=_plain) + "\n")
    stem.with_suffix(".md").write_text(markdown)
    print(markdown)
    return stem.with_suffix(".md")


def _origin_line(origin: Mapping[str, object]) -> str:
    keys = ("cpu", "cores", "threads", "isa", "torch", "load", "commit", "date")
    return ", ".join(f"{key} {origin[key]}" for key in keys) + f"; `{origin['command']}`"


def _plain(value: object) -> object:
    return value.as_dict() if hasattr(value, "as_dict") else str(value)
