"""The one timing helper: `unmask bench` and every script in bench/ measure with it.

Rivals are timed in one process, interleaved, the order reversed in every odd round, so that drift of the machine hits all of them
alike; reported are medians with the 10th and 90th percentile.
"""

from __future__ import annotations

import gc
import inspect
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F

_FLUSH_BYTES = 64 << 20
_flush_buffer: torch.Tensor | None = None


class Timing(float):
    """Median seconds per call; also `p10`, `p90`, `n` (number of samples) and `samples`."""

    samples: tuple[float, ...]

    def __new__(cls, samples: Sequence[float]):
        ordered = sorted(samples)
        self = super().__new__(cls, _quantile(ordered, 0.5))
        self.samples = tuple(samples)
        self.p10 = _quantile(ordered, 0.1)
        self.p90 = _quantile(ordered, 0.9)
        self.n = len(ordered)
        return self

    def as_dict(self) -> dict[str, float | int]:
        return {"median_s": float(self), "p10_s": self.p10, "p90_s": self.p90, "n": self.n}


def _quantile(ordered: Sequence[float], q: float) -> float:
    at = q * (len(ordered) - 1)
    low = int(at)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (ordered[high] - ordered[low]) * (at - low)


def _takes_index(fn: Callable) -> bool:
    """Whether `fn` has a positional parameter without default: then it is called with the iteration index."""
    try:
        parameters = inspect.signature(fn).parameters.values()
    except (TypeError, ValueError):
        return False
    kinds = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    return any(p.kind in kinds and p.default is inspect.Parameter.empty for p in parameters)


def flush_cache() -> None:
    """Walks 64 MB so that the next call finds its inputs in DRAM."""
    global _flush_buffer
    if _flush_buffer is None:
        _flush_buffer = torch.zeros(_FLUSH_BYTES // 4)
    _flush_buffer.add_(1.0)


class Rotation:
    """Copies of an input; `rotation[i]` wraps around, so a callable that takes the iteration index walks through all of them."""

    def __init__(self, items: Sequence[Any]):
        self.items = list(items)

    def __getitem__(self, index: int) -> Any:
        return self.items[index % len(self.items)]

    def __len__(self) -> int:
        return len(self.items)


def rotating(make: Callable[[], Any], total_bytes: int = 128 << 20) -> Rotation:
    """As many results of `make()` (a tensor, or a tuple or dict of tensors) as fill `total_bytes`, at least two.

    Use it as `inputs = rotating(lambda: torch.randn(32, 126464)); measure({"ours": lambda i: op(inputs[i])})`: with `total_bytes`
    beyond the last-level cache every call reads DRAM, as it does between the forwards of a real model.
    """
    first = make()
    size = max(1, _tensor_bytes(first))
    return Rotation([first] + [make() for _ in range(max(1, -(-total_bytes // size) - 1))])


def _tensor_bytes(value: Any) -> int:
    if isinstance(value, torch.Tensor):
        return value.numel() * value.element_size()
    if isinstance(value, Mapping):
        value = list(value.values())
    return sum(_tensor_bytes(v) for v in value) if isinstance(value, (list, tuple)) else 0


def measure(
    fns: Mapping[str, Callable],
    *,
    rounds: int = 3,
    min_time: float = 0.2,
    min_samples: int = 5,
    sample_time: float = 1e-3,
    warmup: int = 2,
    flush: bool = False,
    progress: Callable[[str], None] | None = None,
) -> dict[str, Timing]:
    """Times every callable, interleaved: {name: median seconds per call (Timing)}.

    `warmup` calls come before anything, one call opens each visit (none of either with warmup=0: for runs of many seconds). Each round visits all callables (odd rounds backwards) and samples each for `min_time` seconds and `min_samples` samples; a sample
    is as many calls as take `sample_time`, and one call when `flush` (cache walked before each, outside the clock). A callable with a
    positional parameter gets the iteration index (see `rotating`). `progress(name)` is called before each visit.
    """
    if not fns or rounds < 1 or min_samples < 1:
        raise ValueError(
            f"measure: expected callables, rounds >= 1, min_samples >= 1, got {len(fns)}, {rounds}, {min_samples}"
        )
    calls = {name: _indexed(fn) for name, fn in fns.items()}
    index = dict.fromkeys(calls, 0)
    sample_time = 0.0 if flush else sample_time
    number = {name: _calibrate(call, index, name, warmup, sample_time) for name, call in calls.items()}
    samples: dict[str, list[float]] = {name: [] for name in calls}
    names = list(calls)
    collected = gc.isenabled()
    gc.disable()
    try:
        for turn in range(rounds):
            for name in reversed(names) if turn % 2 else names:
                if progress is not None:
                    progress(name)
                call, count = calls[name], number[name]
                if warmup:
                    call(index[name])  # fills the caches with this callable's data, not the previous one's
                    index[name] += 1
                spent, taken = 0.0, 0
                while spent < min_time or taken < min_samples:
                    if flush:
                        flush_cache()
                    first = index[name]
                    start = time.perf_counter()
                    for i in range(first, first + count):
                        call(i)
                    seconds = time.perf_counter() - start
                    index[name] = first + count
                    samples[name].append(seconds / count)
                    spent += seconds
                    taken += 1
            gc.collect(0)
    finally:
        if collected:
            gc.enable()
    return {name: Timing(values) for name, values in samples.items()}


def _indexed(fn: Callable) -> Callable[[int], Any]:
    return fn if _takes_index(fn) else lambda _i: fn()


def _calibrate(
    call: Callable[[int], Any], index: dict[str, int], name: str, warmup: int, sample_time: float
) -> int:
    for _ in range(warmup):
        call(index[name])
        index[name] += 1
    count = 1
    while sample_time:
        start = time.perf_counter()
        for i in range(index[name], index[name] + count):
            call(i)
        seconds = time.perf_counter() - start
        index[name] += count
        if seconds >= sample_time / 2:
            return max(1, round(count * sample_time / seconds))
        count *= 4
    return 1


def bandwidth(total_bytes: int = 256 << 20, **options) -> dict[str, float]:
    """Measured DRAM rates in GB/s with torch's current threads: `read` (sum over fp32) and `copy` (bytes read plus bytes written)."""
    source = torch.ones(total_bytes // 4)
    target = torch.empty_like(source)
    options = {"min_time": 0.1, "min_samples": 3} | options
    times = measure({"read": source.sum, "copy": lambda: target.copy_(source)}, **options)
    return {"read": total_bytes / times["read"] / 1e9, "copy": 2 * total_bytes / times["copy"] / 1e9}


def gemm_functions(m: int, k: int, n: int, dtype: torch.dtype) -> dict[str, Callable[[], Any]]:
    """The GEMM [m, k] x [n, k]^T in every way this machine offers, by name.

    `linear`: F.linear. `packed`: oneDNN weights packed once (`unmask.ops.linear`). For bf16 also `packed_fp32`: the same product from
    fp32 copies, faster on a CPU without a bf16 dot product.
    """
    from .ops.linear import Linear, packing_available

    x, weight = torch.randn(m, k).to(dtype), (torch.randn(n, k) / k**0.5).to(dtype)
    fns: dict[str, Callable[[], Any]] = {"linear": lambda: F.linear(x, weight)}
    if packing_available(dtype):
        packed = Linear(weight, "packed")
        fns["packed"] = lambda: packed(x)
    if dtype is torch.bfloat16 and packing_available():
        wide, wide_x = Linear(weight.float(), "packed"), x.float()
        fns["packed_fp32"] = lambda: wide(wide_x)
    return fns


def gemm_seconds(m: int, k: int, n: int, dtype: torch.dtype, **options) -> dict[str, Timing]:
    """Seconds per call of each of `gemm_functions`."""
    return measure(gemm_functions(m, k, n, dtype), **{"min_time": 0.1, "min_samples": 3} | options)


def ceilings(
    dtype: torch.dtype = torch.float32,
    shapes: Sequence[tuple[int, int, int]] = ((2048, 2048, 2048),),
    **options,
) -> dict[str, Any]:
    """What this machine can do, measured now: {"read", "copy": GB/s, "gemm": {"MxKxN": {way: GFLOP/s, "best": GFLOP/s}}}."""
    found: dict[str, Any] = bandwidth(**options)
    found["gemm"] = {}
    for m, k, n in shapes:
        rates = {way: 2 * m * k * n / t / 1e9 for way, t in gemm_seconds(m, k, n, dtype, **options).items()}
        found["gemm"][f"{m}x{k}x{n}"] = rates | {"best": max(rates.values())}
    return found
