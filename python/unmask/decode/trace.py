"""Trace of a run: one record per forward and row, deltas only.

Record: {"row", "block", "step", "nfe", "committed": [[position, id, score], ...], "edited": [[position, old id, new id, score], ...], "remasked":
[[position, old id], ...], "masks_left", "ms"}; positions are canvas positions, committed in order of (score desc, position asc); edited tokens
were decided and changed, remasked ones were decided and are masks again; step counts from 0 in its block, nfe is the row's forwards so far with
this one. "filled" (trace="predictions"): the canvas with every prediction, before the commit. `write_jsonl` puts a versioned header line before
the records.

Records of schedule="daedal" have two more fields, with which a reader can follow an answer that grows. "inserted": [] or [[position, n]]: once
the commit is done, n masks stand from this position on, in place of the one that was there (what stood behind it moves n - 1 up), or in stage 1,
whose "block" is -1, behind the last position. "length": positions of the answer after the step; what an insertion pushes beyond max_new_tokens is
gone, and the last record of stage 1 is longer by the end-of-sequence tokens that it put behind the masks. "committed" holds positions from
before the insertion of the same record.
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
