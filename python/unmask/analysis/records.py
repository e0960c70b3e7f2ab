"""The records of one row, from whatever a caller has: a Result or a list."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from ..errors import SettingError
from ..result import Result
from ..values import as_integer


def read_records(source: Any) -> list[Mapping[str, Any]]:
    """The trace records of one row, in the order of the run.

    source: a Result, or an iterable of records. Raises SettingError for a Result without a trace, for items that are no records, for
    records of several rows, and for records out of order (by "nfe", where they have it).
    """
    if isinstance(source, Result):
        if source.trace is None:
            raise SettingError("this Result holds no trace; run with trace=True, or with trace='predictions' where predictions are needed")
        source = source.trace
    if isinstance(source, (str, bytes, Mapping)) or not isinstance(source, Iterable):
        raise SettingError(f"a trace must be a Result or a list of records, got {type(source).__name__}")
    records = list(source)
    for i, record in enumerate(records):
        if not isinstance(record, Mapping):
            raise SettingError(f"trace record {i} must be a dict, got {type(record).__name__}")
    rows = {repr(record["row"]) for record in records if "row" in record}
    if len(rows) > 1:
        raise SettingError(f"a trace must be of one row, got records of rows {', '.join(sorted(rows)[:8])}; pass one row's records at a time")
    last = 0
    for i, record in enumerate(records):
        if "nfe" in record:
            nfe = as_integer(record["nfe"])
            if nfe is None or nfe < last:
                raise SettingError(f"trace records must be in the order of the run: record {i} has nfe {record['nfe']!r} after {last}")
            last = nfe
    return records
