"""Caches: which K and V are kept, and when they are recomputed. One module per method; `CACHES` is the table of all."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ...errors import SettingError
from .base import Cache, CacheRule, CacheRun, Runs, from_text, runs_of
from .d2 import D2
from .dkv import DKV
from .dllm import DLLM
from .elastic import Elastic
from .entropy import Entropy
from .sprint import Sprint
from .windows import Block, Dual, NoCache, Prefix, attention_block, part_start

if TYPE_CHECKING:
    from ...models.config import ModelConfig

CACHES: dict[str, type[CacheRule]] = {c.name: c for c in (NoCache, Prefix, Block, Dual, D2, DKV, Entropy, Sprint, DLLM, Elastic)}


def allowed_caches(visibility: str) -> tuple[str, ...]:
    """Names of the caches for models of this attention."""
    return tuple(n for n, c in CACHES.items() if visibility in c.visibility)


def default_cache(visibility: str) -> str:
    """The exact one: nothing is cached on a bidirectional model, finished blocks on a block-causal one."""
    return "block" if visibility == "block_causal" else "none"


def read_cache(given: object) -> CacheRule:
    """A cache as a setting gives it: a CacheRule, a name, or "name:setting=value,...". Raises SettingError."""
    if isinstance(given, CacheRule) and hasattr(given, "name"):  # not the class that all rules derive from
        return given
    if isinstance(given, str):
        return from_text(given, CACHES)
    raise SettingError(f"cache must be a name ({', '.join(CACHES)}), 'name:setting=value' or one of unmask.caches, got {type(given).__name__}")


def cache_for(given: object, config: ModelConfig) -> CacheRule:
    """The cache of a run (None: the model's default); raises SettingError for one that the model's attention does not allow."""
    rule = read_cache(default_cache(config.visibility) if given is None else given)
    if config.visibility not in rule.visibility:
        allowed = ", ".join(allowed_caches(config.visibility))
        raise SettingError(f"cache must be one of {allowed} for a {config.visibility.replace('_', '-')} model, got {rule.name!r}")
    return rule


__all__ = [
    "CACHES", "DKV", "Block", "Cache", "CacheRule", "CacheRun", "D2", "DLLM", "Elastic", "Dual", "Entropy", "NoCache", "Prefix", "Runs",
    "Sprint", "allowed_caches", "attention_block", "cache_for", "default_cache", "part_start", "read_cache", "runs_of",
]  # fmt: skip
