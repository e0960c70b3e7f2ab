"""AR-ness: how close the order of commits comes to left to right (DiffuCoder, arXiv 2506.20639)."""

from __future__ import annotations

import bisect
import itertools
import math
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

from ..errors import SettingError
from ..values import as_integer, integer
from .records import read_records


class ArNess(NamedTuple):
    """k, and both fractions for it, in [0, 1]; 1 = strictly left to right. See `local_arness` and `global_arness`."""

    k: int
    local: float
    global_: float


def arness(trace: Any, k: int | Iterable[int] = 1) -> ArNess | list[ArNess]:
    """Local and global AR-ness at k; for several k (`k=range(1, 5)`) one ArNess each. Arguments and errors as `commit_order`."""
    order = commit_order(trace)
    if isinstance(k, Iterable):
        return [ArNess(j, _local(order, j), _global(order, j)) for j in (integer("k", x, 1) for x in k)]
    k = integer("k", k, 1)
    return ArNess(k, _local(order, k), _global(order, k))


def local_arness(trace: Any, k: int = 1) -> float:
    """Fraction of windows of k + 1 successive commits i_(t-k), ..., i_t that are neighbours from left to right (each 1 more than the
    one before), over t = k..n-1; 0 where fewer than k + 1 positions were committed. Arguments and errors as `commit_order`."""
    return _local(commit_order(trace), integer("k", k, 1))


def global_arness(trace: Any, k: int = 1) -> float:
    """Fraction of commits whose position is among the k leftmost that are still undecided at that moment; 0 for no commits.

    Undecided means: committed now or later in this trace. Positions that the run left undecided (behind an early EOS) do not count.
    Arguments and errors as `commit_order`.
    """
    return _global(commit_order(trace), integer("k", k, 1))


def commit_order(trace: Any) -> list[int]:
    """Canvas positions in the order in which they were first committed: a permutation of the positions that the run decided.

    trace: a Result, a list of trace records of one row, or the positions themselves, a list of integers. Commits of one forward are put
    in order of (score desc, position asc), as S2D2's evaluation of this metric does (LLaDA2/utils_arness.py); without scores by position.
    Only the first commit of a position counts: edits do not, nor does deciding it again after it was remasked.
    Raises SettingError for anything else, naming the record.
    """
    if isinstance(trace, (list, tuple)) and trace and not isinstance(trace[0], Mapping):
        positions = [_position(p, f"position {i} of the order") for i, p in enumerate(trace)]
        return list(dict.fromkeys(positions))
    order: dict[int, None] = {}
    for i, record in enumerate(read_records(trace)):
        where = f"trace record {i}"
        entries = record.get("committed") or ()
        if not isinstance(entries, (list, tuple)):
            raise SettingError(f"{where}: committed must be a list of [position, id, score], got {type(entries).__name__}")
        ranked = sorted(_commit(entry, where) for entry in entries)
        order.update(dict.fromkeys(position for _, position in ranked if position not in order))
    return list(order)


def _commit(entry: Any, where: str) -> tuple[float, int]:
    """(-score, position): sorts by score descending, then position."""
    if not isinstance(entry, (list, tuple)) or not entry:
        raise SettingError(f"{where}: committed must hold [position, id, score], got {entry!r}")
    score = entry[2] if len(entry) > 2 else -math.inf
    if isinstance(score, bool) or not isinstance(score, (int, float)) or math.isnan(score):
        raise SettingError(f"{where}: the score of position {entry[0]!r} must be a number, got {score!r}")
    return -score, _position(entry[0], f"{where}: a committed position")


def _position(value: Any, what: str) -> int:
    position = as_integer(value)
    if position is None or position < 0:
        raise SettingError(f"{what} must be an integer >= 0, got {value!r}")
    return position


def _local(order: list[int], k: int) -> float:
    if len(order) < k + 1:
        return 0.0
    run = hits = 0  # run: neighbouring pairs that end at this commit
    for before, position in itertools.pairwise(order):
        run = run + 1 if position == before + 1 else 0
        hits += run >= k
    return hits / (len(order) - k)


def _global(order: list[int], k: int) -> float:
    undecided = sorted(order)
    hits = 0
    for position in order:
        at = bisect.bisect_left(undecided, position)
        hits += at < k
        del undecided[at]
    return hits / len(order) if order else 0.0
