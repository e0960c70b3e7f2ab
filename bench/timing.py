"""The timing helper for the scripts of this folder. It lives in the package, because `unmask bench` uses it from a wheel."""

from unmask._timing import (
    Rotation,
    Timing,
    bandwidth,
    ceilings,
    flush_cache,
    gemm_functions,
    gemm_seconds,
    measure,
    rotating,
)

__all__ = [
    "Rotation",
    "Timing",
    "bandwidth",
    "ceilings",
    "flush_cache",
    "gemm_functions",
    "gemm_seconds",
    "measure",
    "rotating",
]
