"""`unmask inspect`: what a checkpoint is, what it needs and what would run where. Headers are read, weights are not."""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from typing import Any

from .options import fail

SHORT = {"float32": "fp32", "bfloat16": "bf16", "float16": "fp16", "int8": "int8"}


def run(args: argparse.Namespace) -> int:
    from ..errors import CheckpointError, UnmaskError
    from ..models import describe, hub, inspect

    try:
        info = inspect(hub.resolve(args.model), overrides=dict(args.override))
        report = describe(info) | here(info, args.dtype)
    except CheckpointError as e:
        if args.json:
            print(json.dumps({"error": e.headline, "problems": e.problems}, indent=1))
            return 2
        return fail(args, "\n".join([f"{e.headline}:", *(f"  - {problem}" for problem in e.problems)]))
    except UnmaskError as e:
        return fail(args, e)
    print(json.dumps(report, indent=1) if args.json else "\n".join(written(report)))
    return 0


def here(info, dtype: str | None) -> dict[str, Any]:
    """What this machine and this build make of the checkpoint: dtype it would load in, caches, kernels, and whether its memory suffices."""
    import torch

    from .. import ops
    from ..decode.caches import CACHES, default_cache
    from ..models import checkpoint
    from ..models.facts import ITEM_BYTES, loaded_bytes, longest
    from ..ops.linear import available_memory, choose_format

    c, cpu = info.config, torch.device("cpu")
    unserved = dtype is None and info.stored_dtype == "float16"  # loading it as it is stored raises on the CPU
    kind = checkpoint.resolve_dtype(info, "bfloat16" if unserved else dtype, cpu)
    name = str(kind).removeprefix("torch.")
    format = choose_format(kind, cpu, info.n_parameters)
    weights, free = loaded_bytes(info, name, format), available_memory()
    per_token = 2 * c.n_layers * c.n_kv_heads * c.head_dim * ITEM_BYTES[name]
    tokens = longest(free, weights, per_token, c.max_positions)
    return {
        "caches": {n: {"exact": CACHES[n]().exact(c), "default": n == default_cache(c.visibility)} for n in _served_caches(c)},
        "cpu": {
            "isa": ops.isa(), "dtype": name, "linear_weights": format, "experts": None if c.experts is None else "loop over the experts that have rows",
            "weight_bytes": weights, "available_bytes": free, "tokens": tokens,
        },
        "cuda": {
            "archs": ops.cuda_archs(), "device": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
            "linear_weights": "plain", "experts": _experts_on_cuda(c, kind),
        },
        "verdict": verdict(name, weights, free, tokens, per_token, c.max_positions) + ("; load it with dtype='bfloat16' on the CPU" if unserved else ""),
    }  # fmt: skip


def _served_caches(config) -> list[str]:
    """Caches that take this model with their default settings."""
    from ..decode.caches import CACHES, allowed_caches
    from ..decode.policy import Policy
    from ..errors import SettingError

    served = []
    for name in allowed_caches(config.visibility):
        try:
            CACHES[name]().check(Policy(), config)
        except SettingError:
            continue
        served.append(name)
    return served


def _experts_on_cuda(config, dtype) -> str | None:
    import torch

    from ..ops.grouped_linear import grouped_available

    if config.experts is None:
        return None
    if not torch.cuda.is_available():
        return "grouped product (bf16, from sm_80 on), else a loop over the experts that have rows"
    found = grouped_available(dtype, torch.device("cuda"), config.d_model, config.experts.expert_dim)
    return "grouped product" if found else "loop over the experts that have rows"


def verdict(dtype: str, weights: int, free: int, tokens: int, per_token: int, max_positions: int) -> str:
    """One line: whether the memory of this machine suffices on the CPU. free: 0 where the system does not tell."""
    if not free:
        return f"{size(weights)} of weights in {dtype}; this system does not say how much memory is available"
    if not tokens:
        return f"does not fit here: {dtype} needs {size(int(1.1 * weights) + (200 << 20))} to load, {size(free)} are available"
    if tokens < max_positions:
        return f"fits here in {dtype} ({size(weights)}, {size(free)} are available) with sequences of up to {tokens:,} of {max_positions:,} tokens"
    return f"fits here in {dtype}: {size(weights)} and {size(per_token * max_positions)} for {max_positions:,} tokens, {size(free)} are available"


def size(n_bytes: int) -> str:
    """Bytes with three significant digits; a GB is 2**30 bytes."""
    value, unit = float(n_bytes), "bytes"
    for bigger in ("KB", "MB", "GB", "TB"):
        if value < 999.5:
            break
        value, unit = value / 1024, bigger
    return f"{n_bytes} bytes" if unit == "bytes" else f"{value:.3g} {unit}"


def written(report: dict[str, Any]) -> Iterator[str]:
    """The report as lines of text."""
    c, cpu, cuda = report["config"], report["cpu"], report["cuda"]

    def line(name: str, text: str) -> str:
        return f"{name:<12}{text}"

    def by_dtype(sizes: dict[str, int]) -> str:
        return ", ".join(f"{SHORT[dtype]} {size(n)}" for dtype, n in sizes.items())

    files = "1 file" if report["n_files"] == 1 else f"{report['n_files']} files"
    yield line("model", report["folder"])
    yield line("family", f"{report['family']}, stored in {report['stored_dtype']}, {size(report['stored_bytes'])} in {files}")
    yield line("layers", f"{c['layers']} of width {c['width']}, {c['heads']} heads x {c['head_dim']} ({c['kv_heads']} for K/V), {', '.join(_mlp(c))}")
    extras = [word for word, there in (("biases on q, k and v", c["qkv_bias"]), ("norms on q and k", c["qk_norm"])) if there]
    rope = f"RoPE of base {c['rope_theta']:,.0f} on {c['rotary_dim']} of {c['head_dim']} dims"
    yield line("attention", ", ".join([_sees(c), rope, *extras]))
    yield line("vocabulary", f"{c['vocab']:,}, head {'tied to the embedding' if c['tied_head'] else 'of its own'}, logits {_shift(c)}")
    eos = " ".join(map(str, c["eos_ids"])) or "none"
    yield line("ids", f"mask {c['mask_id']}, end of sequence {eos}, pad {'none' if c['pad_id'] is None else c['pad_id']}")
    total, active = report["parameters"]["total"], report["parameters"]["active"]
    yield line("parameters", f"{total:,}" + ("" if active == total else f", {active:,} of them active for a token"))
    yield line("weights", by_dtype(report["weight_bytes"]))
    yield line("K/V", f"{by_dtype(report['kv_bytes_per_token'])} per token; longest sequence {report['max_positions']:,} tokens")
    yield line("caches", ", ".join(_cache(name, facts) for name, facts in report["caches"].items()))
    yield line("CPU", ", ".join([f"{cpu['isa']} kernels", f"{cpu['dtype']} with {cpu['linear_weights']} linear weights", *_experts(cpu)]))
    archs = f"kernels for sm_{', sm_'.join(map(str, cuda['archs']))}" if cuda["archs"] else "no kernels in this build"
    device = cuda["device"] or "no device visible to torch"
    yield line("CUDA", ", ".join([archs, device, *([f"{cuda['linear_weights']} linear weights"] if cuda["archs"] else []), *_experts(cuda)]))
    yield line("verdict", report["verdict"])


def _mlp(c: dict[str, Any]) -> Iterator[str]:
    e = c["experts"]
    if e is None or len(e["layers"]) < c["layers"]:
        yield f"MLP {c['ffn']}" + ("" if e is None else f" in {c['layers'] - len(e['layers'])}")
    if e is not None:
        shared = f" and a shared one of {e['shared_dim']}" if e["shared_dim"] else ""
        yield f"{e['top_k']} of {e['n_experts']} experts of {e['expert_dim']}{shared} in {len(e['layers'])}"


def _sees(c: dict[str, Any]) -> str:
    if c["visibility"] == "bidirectional":
        block = "" if c["block_size"] is None else f", trained with blocks of {c['block_size']}"
        return f"bidirectional{block}"
    return f"block-causal in blocks of {c['block_size']}"


def _shift(c: dict[str, Any]) -> str:
    return "shifted (position i predicts i + 1)" if c["shifted"] else "not shifted"


def _cache(name: str, facts: dict[str, bool]) -> str:
    return f"{name} ({'exact' if facts['exact'] else 'approximate'}{', default' if facts['default'] else ''})"


def _experts(place: dict[str, Any]) -> list[str]:
    return [] if place["experts"] is None else [f"experts: {place['experts']}"]
