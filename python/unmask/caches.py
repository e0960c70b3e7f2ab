"""Caches as objects, for `generate(cache=...)`: `unmask.caches.Dual(refresh=4)` is what cache="dual:refresh=4" names. See docs/caches.md."""

from .decode.caches import CACHES, Block, CacheRule, Dual, NoCache, Prefix

__all__ = ["CACHES", "Block", "CacheRule", "Dual", "NoCache", "Prefix"]
