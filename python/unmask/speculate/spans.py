"""Runs of masks in a block."""

from __future__ import annotations

from collections.abc import Sequence


def first_run(masked: Sequence[bool]) -> tuple[int, int]:
    """[start, end) of the first run of True, (0, 0) if there is none.

    >>> first_run([False, True, True, False, True])
    (1, 3)
    """
    start = next((i for i, m in enumerate(masked) if m), None)
    if start is None:
        return 0, 0
    return start, next((i for i in range(start, len(masked)) if not masked[i]), len(masked))
