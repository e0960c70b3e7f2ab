"""Trace of a run: one record per forward and row, deltas only.

Record: {"row", "block", "step", "nfe", "committed": [[position, id, score], ...], "edited": [], "masks_left", "ms"}; positions are canvas
positions, committed in order of (score desc, position asc); step counts from 0 in its block, nfe is the row's forwards so far with this
one. `write_jsonl` puts a versioned header line before the records.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from typing import Any, TextIO

SCHEMA_VERSION = 1


def write_jsonl(file: TextIO, header: dict[str, Any], records: Iterable[dict[str, Any]]) -> None:
    """One JSON object per line: the header (with "schema"), then every record."""
    file.write(json.dumps({"schema": SCHEMA_VERSION, **header}) + "\n")
    for record in records:
        file.write(json.dumps(record) + "\n")
