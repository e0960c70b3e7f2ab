"""Caches as objects, for `generate(cache=...)`: `unmask.caches.Dual(refresh=4)` is what cache="dual:refresh=4" names. See docs/caches.md."""

from .decode.caches import (
    CACHES,
    D2,
    DKV,
    DLLM,
    Block,
    CacheRule,
    Dual,
    Elastic,
    Entropy,
    NoCache,
    Prefix,
    Sprint,
)

__all__ = ["CACHES", "Block", "CacheRule", "D2", "DKV", "DLLM", "Dual", "Elastic", "Entropy", "NoCache", "Prefix", "Sprint"]
