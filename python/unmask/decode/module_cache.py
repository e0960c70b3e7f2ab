"""A user's own module with a K/V cache: called as Fast-dLLM's samplers call their model classes, its logits reduced by the ops.

| class | K and V of a layer | a cached window is called with |
|---|---|---|
| Fast-dLLM's LLaDA | [B, H, L, d] | past_key_values=, use_cache=True, for the dual cache also replace_position= bool [B, L] |
| Fast-dLLM's Dream | [B, L, H d] | mask and position ids as 2nd and 3rd argument, the same, for the dual cache also dual_cache=True |

prefix: the window runs to the end of the canvas, and every layer's K and V are cut at its start; the module appends its own. dual: the
window is the block, and the module writes its K and V over the marked positions. (NVlabs/Fast-dLLM, llada/generate.py and
dream/model/generation_utils_block.py; arXiv 2505.22618.)
"""

from __future__ import annotations

import inspect
from collections.abc import Iterable
from typing import Any

import torch

from ..errors import SettingError
from ..ops import LogitStats
from .backend import Plan
from .logits import gathered, logits_of, reduce_logits
from .module_backend import ModuleBackend
from .state import DecodeState

Past = Any  # what the module returned as past_key_values: per layer a sequence of tensors


class LLaDACalls:
    """Ids first, everything else by name."""

    def needed(self, cache: str) -> tuple[str, ...]:
        """Parameters that the module's forward must name for this cache."""
        return {"none": (), "prefix": ("past_key_values", "use_cache"), "dual": ("past_key_values", "use_cache", "replace_position")}[cache]

    def whole(self, module: torch.nn.Module, x: torch.Tensor, rows: list[int], keep: bool) -> object:
        """A forward of whole canvases x int64 [n, L] of these rows; keep: the module is to return K and V."""
        return module(x, use_cache=True) if keep else module(x)

    def window(
        self, module: torch.nn.Module, x: torch.Tensor, rows: list[int], start: int, end: int, past: Past, replace: torch.Tensor | None
    ) -> object:
        """A forward of x[:, start:end] against K and V of the rest. replace: bool [n, L] for the dual cache, else None."""
        more = {} if replace is None else dict(replace_position=replace)
        return module(x[:, start:end], past_key_values=past, use_cache=True, **more)


class DreamCalls(LLaDACalls):
    """Ids, attention mask and position ids by place. attention: bool [B, L], False on padding, or None: then the mask is "full"."""

    def __init__(self, module: torch.nn.Module, attention: torch.Tensor | None):
        self.bare = not _takes_places(module, 3)
        self.attention = attention
        if attention is not None:
            if self.bare:
                raise SettingError(
                    f"attention_mask with padding needs a module called as forward(ids, attention_mask, position_ids), and "
                    f"{type(module).__name__}.forward does not take these; give prompts of one length without padding"
                )
            self.mask = attention[:, None, None, :] & attention[:, None, :, None]  # [B, 1, L, L]
            self.position = attention.long().cumsum(-1) - 1
            self.position.masked_fill_(~attention, 1)

    def needed(self, cache: str) -> tuple[str, ...]:
        return (*super().needed(cache), "dual_cache") if cache == "dual" else super().needed(cache)

    def whole(self, module, x, rows, keep):
        if self.bare:
            return module(x, use_cache=True) if keep else module(x)
        more = dict(use_cache=True) if keep else {}
        return module(x, *self._places(rows, 0, x.shape[1]), **more)

    def window(self, module, x, rows, start, end, past, replace):
        more = {} if replace is None else dict(dual_cache=True, replace_position=replace)
        places = () if self.bare else self._places(rows, start, end)
        return module(x[:, start:end], *places, past_key_values=past, use_cache=True, **more)

    def _places(self, rows: list[int], start: int, end: int) -> tuple[object, object]:
        if self.attention is None:
            return "full", None
        return self.mask[rows, :, start:end], self.position[rows, start:end]


class CachedModule(ModuleBackend):
    """A module with a K/V cache. Canvases of equal length.

    cache: none | prefix | dual. calls: how the module is called. Rows in the same window share a forward; rows whose blocks have come apart
    (a threshold's, or adaptive ones) are forwarded window by window. forwards: calls of the module so far. Raises SettingError if the
    module's forward cannot be called that way, before it is called.
    """

    def __init__(
        self, module: torch.nn.Module, state: DecodeState, mask_id: int, cache: str = "none", calls: LLaDACalls | None = None, shifted: bool = False
    ):  # fmt: skip
        super().__init__(module, state, mask_id, shifted=shifted)
        self.cache_mode, self.calls = cache, calls or LLaDACalls()
        check_cacheable(module, cache, self.calls.needed(cache))
        self.forwards = 0
        self._past: dict[int, tuple[Past, int]] = {}  # of a row: K and V of the batch that it was opened with, its place there

    def stats(self, plan: Plan, live: torch.Tensor, shadow: bool = False, **options) -> LogitStats:
        """Runs the module on the windows of the active rows and reduces the logits of the live candidates."""
        assert not shadow, "checked before the run: a shadow block needs a model from unmask.load"
        windows: dict[tuple[int, int], list[int]] = {}
        for entry, (_, start, end, *_) in enumerate(plan.entries):
            windows.setdefault((start, end), []).append(entry)
        pieces: dict[int, torch.Tensor] = {}
        for (start, end), entries in windows.items():
            logits = self._forward([plan.entries[e][0] for e in entries], start, end)
            if len(windows) == 1:
                self.logits = logits.reshape(-1, logits.shape[2])
            pieces.update(zip(entries, logits, strict=True))
        if len(windows) > 1:
            self.logits = torch.cat([pieces[e] for e in range(len(plan.entries))])
        if self.vocab != self.logits.shape[1]:
            self.vocab = self.logits.shape[1]
            self._check_ids(options.get("suppress"))
        return self.reduce(plan, live, **options)

    def reduce(self, plan: Plan, live: torch.Tensor, filters: dict[str, Any] | None = None, **options) -> LogitStats:
        """The reduction alone, over the logits [T0, V] of the last forward: row after row, each its window."""
        rows = torch.where(live, plan.cand_query, -1)
        if self.keep_logits:
            self.kept = gathered(self.logits, rows)
            return reduce_logits(self.kept.logits, self.kept.rows, self.forbid, filters, options)
        return reduce_logits(self.logits, rows, self.forbid, filters, options)

    def _forward(self, rows: list[int], start: int, end: int) -> torch.Tensor:
        """Logits [n, end - start, V]. A whole canvas opens a block: its K and V are kept."""
        length = self.state.canvas.shape[1]
        x = self.state.canvas[rows]
        self.forwards += 1
        name = type(self.module).__name__
        if (start, end) == (0, length):
            out = self.calls.whole(self.module, x, rows, self.cache_mode != "none")
            if self.cache_mode != "none":
                past = _past_of(out, name, len(rows), length)
                self._past.update((row, (past, i)) for i, row in enumerate(rows))
        else:
            past, replace = self._gather(rows), None
            if self.cache_mode == "prefix":
                past = [tuple(t.narrow(_time(t), 0, start) for t in layer) for layer in past]
            else:
                replace = torch.zeros_like(x, dtype=torch.bool)
                replace[:, start:end] = True
            out = self.calls.window(self.module, x, rows, start, end, past, replace)
        logits = logits_of(out, name)
        if logits.dim() != 3 or logits.shape[:2] != (len(rows), end - start):
            raise SettingError(
                f"the module must return logits [B, L, V] = [{len(rows)}, {end - start}, any] for ids [{len(rows)}, {end - start}], "
                f"got {list(logits.shape)}"
            )
        return logits

    def _gather(self, rows: list[int]) -> Past:
        """K and V of these rows: as the module returned them if they were opened together, else joined from where they lie."""
        found = [self._past[row] for row in rows]
        first = found[0][0]
        if all(past is first for past, _ in found) and [i for _, i in found] == list(range(first[0][0].shape[0])):
            return first
        joined = [
            tuple(torch.cat([past[layer][j][i : i + 1] for past, i in found]) for j in range(len(first[layer])))
            for layer in range(len(first))
        ]
        self._past.update((row, (joined, i)) for i, row in enumerate(rows))
        return joined


def check_cacheable(module: torch.nn.Module, cache: str, needed: Iterable[str]) -> None:
    """Raises SettingError unless the module's forward names every parameter that this cache is called with.

    `**kwargs` do not count: a class that swallows replace_position would decode wrong tokens without a word.
    """
    if cache == "none":
        return
    names = _parameters(module)
    missing = [n for n in needed if n not in names]
    if missing:
        raise SettingError(
            f"the {cache} cache needs a model loaded with unmask.load, or a module whose forward names {', '.join(needed)} (Fast-dLLM's classes "
            f"do); {type(module).__name__}.forward lacks {', '.join(missing)}"
        )


def _parameters(module: torch.nn.Module) -> dict[str, inspect.Parameter]:
    """Parameters of the forward, through wrappers that only pass arguments on."""
    seen = module
    while True:
        parameters = inspect.signature(seen.forward).parameters
        inner = next((m for m in (getattr(seen, "_orig_mod", None), getattr(seen, "module", None)) if isinstance(m, torch.nn.Module)), None)
        if inner is None or any(p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD) for p in parameters.values()):
            return dict(parameters)
        seen = inner


def _takes_places(module: torch.nn.Module, n: int) -> bool:
    """Whether the forward takes n arguments by place."""
    kinds = [p.kind for p in _parameters(module).values()]
    P = inspect.Parameter
    return P.VAR_POSITIONAL in kinds or sum(k in (P.POSITIONAL_ONLY, P.POSITIONAL_OR_KEYWORD) for k in kinds) >= n


def _time(t: torch.Tensor) -> int:
    """The axis of positions: [B, H, L, d] or [B, L, D]."""
    return t.dim() - 2


def _past_of(out: object, name: str, rows: int, length: int) -> Past:
    """The K and V in what a module returned, checked."""
    past = getattr(out, "past_key_values", None)
    ok = isinstance(past, (list, tuple)) and len(past) > 0
    for layer in past if ok else ():
        ok = ok and isinstance(layer, (list, tuple)) and len(layer) > 0
        ok = ok and all(
            isinstance(t, torch.Tensor) and t.dim() in (3, 4) and t.shape[0] == rows and t.shape[_time(t)] == length for t in layer
        )
    if not ok:
        raise SettingError(
            f"{name}, called with use_cache=True, must return past_key_values: per layer (K, V) of [B, H, L, d] or [B, L, D] with B = {rows} and "
            f"L = {length}, got {type(past).__name__}"
        )
    return past
