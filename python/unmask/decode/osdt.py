"""OSDT's threshold table (arXiv 2511.02077): calibrated on one sequence, saved and loaded as JSON.

What the paper leaves open is fixed here: confidences of committed tokens only are recorded; a cell in which nothing was committed takes its
block's summary, a block without any the whole run's; steps and blocks beyond the table use its last.
"""

from __future__ import annotations

import dataclasses
import json
import math
import statistics
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from ..errors import SettingError, check_names

SUMMARIES = ("mean", "median", "q1", "q3", "min")


@dataclasses.dataclass(frozen=True)
class Table:
    """thresholds[block][step], each in [0, 1]; one step per block where it was calibrated per block. summary, per: how it was made."""

    thresholds: tuple[tuple[float, ...], ...]
    summary: str = "mean"
    per: str = "block"

    def __post_init__(self):
        cells = [x for row in self.thresholds for x in row]
        ok = all(isinstance(x, (int, float)) and not isinstance(x, bool) and math.isfinite(x) and 0.0 <= x <= 1.0 for x in cells)
        if not self.thresholds or not all(self.thresholds) or not ok:
            raise SettingError("an OSDT table must hold at least one block of at least one threshold, all in [0, 1]")

    @classmethod
    def calibrate(cls, source: Any, *, summary: str = "mean", per: str = "block") -> Table:
        """From a Result made with trace=True, or its records, of one sequence. summary: mean, median, q1, q3 or min of the confidences of the
        tokens committed; per: "block" or "step" (block and step)."""
        check_names("summary", [summary], SUMMARIES)
        check_names("per", [per], ("block", "step"))
        records = getattr(source, "trace", source)
        if records is None:
            raise SettingError("calibration needs a trace: generate(..., trace=True)")
        cells: dict[tuple[int, int], list[float]] = {}
        for r in _one_row(records):
            cells.setdefault((r["block"], r["step"] if per == "step" else 0), []).extend(c[2] for c in r["committed"])
        everything = [x for values in cells.values() for x in values]
        if not everything:
            raise SettingError("calibration needs a trace in which something was committed")
        table = []
        for block in range(max(b for b, _ in cells) + 1):
            steps = max((s for b, s in cells if b == block), default=0) + 1
            inside = [x for (b, _), values in cells.items() if b == block for x in values] or everything
            table.append(tuple(_clipped(_summary(cells.get((block, s)) or inside, summary)) for s in range(steps)))
        return cls(tuple(table), summary, per)

    def threshold(self, block: int, step: int) -> float:
        row = self.thresholds[min(max(block, 0), len(self.thresholds) - 1)]
        return row[min(step, len(row) - 1)]

    def save(self, path: str | Path) -> None:
        Path(path).write_text(json.dumps({"schema": 1, **dataclasses.asdict(self)}) + "\n")

    @classmethod
    def load(cls, path: str | Path) -> Table:
        try:
            value = json.loads(Path(path).read_text())
            return cls(tuple(tuple(row) for row in value["thresholds"]), str(value["summary"]), str(value["per"]))
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise SettingError(f"table: cannot read an OSDT table from {path}: {error}") from None


def _one_row(records: Iterable[dict[str, Any]]) -> list[dict[str, Any]]:
    found = list(records)
    if len({r["row"] for r in found}) > 1:
        raise SettingError("calibration takes the trace of one sequence, got several rows")
    return found


def _summary(values: list[float], how: str) -> float:
    if how == "mean":
        return statistics.fmean(values)
    if how == "median":
        return statistics.median(values)
    if how == "min":
        return min(values)
    if len(values) == 1:
        return values[0]
    return statistics.quantiles(values, n=4, method="inclusive")[0 if how == "q1" else 2]


def _clipped(x: float) -> float:
    return min(max(x, 0.0), 1.0)
