"""Ops on a GPU beside what torch offers, interleaved in one process, with the copy bandwidth of the same run beside them.

Inputs rotate over more memory than the L2 cache holds; times are CUDA events around replays of a graph of 20 calls (eager calls where a graph
cannot capture a rival: the column says which), medians over interleaved rounds.
`of copy` is bytes read and written over the time, divided by the measured copy rate; `of matmul` is FLOPs over the time, divided by the
rate of an 8192 x 8192 x 8192 product in bf16. Lines of block_attention: "SDPA" is torch's attention on K and V that lie ready, with the
backend torch picks and with each one forced; "cat + SDPA" also appends the block's K and V to the past ones, as today's loops do.
"SDPA FA3" and "SDPA FA4" put those libraries behind the flash backend by torch's own switch; "Triton" is gpu_triton.py. What is not installed is
named in the output and left out.

    python bench/gpu_ops.py [--part attention|head|rest] [--out bench/results]
    python bench/gpu_ops.py --dry-run      # small shapes on the CPU, one call each: does every case run?
"""

from __future__ import annotations

import argparse
import functools
import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path

import torch

import gpu_timing
import gpu_triton
import report
from unmask import ops
from unmask.ops.head_stats import Head, head_stats

ROTATE_BYTES = 256 << 20
ATTENTION = ((1, 512), (1, 4096), (1, 32768), (8, 512), (8, 4096), (32, 4096))  # rows, prefix


class Case:
    """name; bytes moved by one call; calls: label -> function of a rotation index; flops of one call, where they matter."""

    def __init__(self, name: str, moved: int, calls: dict[str, Callable[[int], object]], flops: int = 0):
        self.name, self.moved, self.calls, self.flops = name, moved, calls, flops


def rotating(make: Callable[[], torch.Tensor], dry: bool) -> list[torch.Tensor]:
    first = make()
    copies = 1 if dry else max(2, -(-ROTATE_BYTES // max(1, first.numel() * first.element_size())))
    return [first, *(make() for _ in range(min(copies, 64) - 1))]


def logit_stats(rows: int, vocab: int, dry: bool, device: str) -> Case:
    x = rotating(lambda: (torch.randn(rows, vocab, device=device) * 3).bfloat16(), dry)

    def select64(i: int):
        logits = x[i % len(x)]
        token = logits.argmax(-1)
        return token, torch.softmax(logits.double(), -1).gather(-1, token[:, None])

    def select32(i: int):
        logits = x[i % len(x)].float()
        return torch.topk(logits, 2), torch.logsumexp(logits, -1)

    def margin(i: int):  # Dream's: softmax, then a full sort of the vocabulary
        p = torch.softmax(x[i % len(x)], -1).sort(-1, descending=True).values
        return p[:, 0] - p[:, 1]

    def entropy(i: int):
        p = torch.softmax(x[i % len(x)], -1)
        return -(p * torch.log(p + 1e-10)).sum(-1)

    def gumbel64(i: int):  # LLaDA's sampling at temperature 1
        logits = x[i % len(x)].double()
        return (logits.exp() / -torch.log(torch.rand_like(logits))).argmax(-1)

    key = torch.arange(rows, device=device)
    calls = {
        "ours": lambda i: ops.logit_stats(x[i % len(x)]),
        "ours, sampled": lambda i: ops.logit_stats(x[i % len(x)], temperature=1.0, seed=key, step=key, pos=key),
        "argmax + fp64 softmax": select64,
        "topk + logsumexp": select32,
        "softmax + sort (margin)": margin,
        "eager entropy": entropy,
        "fp64 Gumbel": gumbel64,
    }
    if device == "cuda":
        calls["compiled topk + logsumexp"] = lambda i: _compiled_select()(x[i % len(x)])
    return Case(f"logit_stats [{rows}, {vocab}] bf16", rows * vocab * 2, calls)


@functools.cache
def _compiled_select():
    def select(logits: torch.Tensor):
        logits = logits.float()
        return torch.topk(logits, 2), torch.logsumexp(logits, -1)

    return torch.compile(select, dynamic=False)


def head(rows: int, vocab: int, width: int, dry: bool, device: str) -> Case:
    """LM head and statistics of masked rows: ours (fused on Hopper up to 64 rows), and cuBLAS with what users run on its logits."""
    dtype = torch.float32 if device == "cpu" else torch.bfloat16
    hidden = rotating(lambda: torch.randn(rows, width, device=device).to(dtype), dry)[:8]
    weight = (torch.randn(vocab, width, device=device) * width**-0.5).to(dtype)  # far larger than L2
    ours = Head(weight, "plain")
    every = torch.arange(rows, device=device)

    def select(logits: torch.Tensor):
        top = torch.topk(logits.float(), 2)
        return top, torch.logsumexp(logits.float(), -1)

    def select64(i: int):
        logits = torch.nn.functional.linear(hidden[i % len(hidden)], weight)
        token = logits.argmax(-1)
        return token, torch.softmax(logits.double(), -1).gather(-1, token[:, None])

    compiled = select if dry else torch.compile(select, dynamic=False)
    calls = {
        "ours": lambda i: head_stats(hidden[i % len(hidden)], ours, every),
        "cuBLAS + argmax + fp64 softmax": select64,
        "cuBLAS + compiled topk, logsumexp": lambda i: compiled(torch.nn.functional.linear(hidden[i % len(hidden)], weight)),
        "cuBLAS alone": lambda i: torch.nn.functional.linear(hidden[i % len(hidden)], weight),
    }
    return Case(f"head_stats {rows} rows, [{vocab}, {width}] bf16", vocab * width * 2, calls, 2 * rows * vocab * width)


def commit(rows: int, block: int, dry: bool, device: str) -> Case:
    canvas = torch.zeros(rows, block, dtype=torch.int64, device=device)
    cu = torch.arange(rows + 1, device=device) * block
    row, pos = torch.arange(rows, device=device), torch.arange(block, device=device).repeat(rows)
    token, score = torch.ones_like(pos), torch.rand(rows * block, device=device)
    bar = torch.full((rows,), 0.9, device=device)
    masked = torch.ones(rows, block, dtype=torch.bool, device=device)

    def ours(_: int):
        return ops.commit(canvas, masked, cu, row, pos, token, score, rule=ops.Rule.THRESHOLD, threshold=bar)

    def torch_code(_: int):  # the authors' form: a loop over rows with topk and scatter
        s = torch.where(masked, score.view(rows, block), -torch.inf)
        keep = s >= bar[:, None]
        keep.scatter_(1, s.argmax(1, keepdim=True), True)
        return torch.where(keep, token.view(rows, block), canvas), masked & ~keep

    def host_loop(_: int):  # what the published loops do: topk per row, a comparison and a read per element
        s, out = torch.where(masked, score.view(rows, block), -torch.inf), canvas.clone()
        for r in range(rows):
            values, index = torch.topk(s[r], block)
            for k in range(block):
                if k > 0 and values[k].item() < 0.9:
                    break
                out[r, index[k]] = token[r * block + index[k]]
        return out

    return Case(f"commit {rows} x {block}", rows * block * 34, {"ours": ours, "torch.where": torch_code, "topk + Python loop": host_loop})


def rope_append(tokens: int, heads: int, kv_heads: int, dry: bool, device: str) -> Case:
    dim = 128
    q = rotating(lambda: torch.randn(tokens, heads, dim, device=device).bfloat16(), dry)
    k, v = (torch.randn(tokens, kv_heads, dim, device=device).bfloat16() for _ in range(2))
    k_cache, v_cache = (torch.zeros(1, kv_heads, tokens + 512, dim, device=device, dtype=torch.bfloat16) for _ in range(2))
    row, pos = torch.zeros(tokens, dtype=torch.int64, device=device), torch.arange(tokens, device=device)
    freq = 10000.0 ** (-torch.arange(0, dim, 2, device=device) / dim)

    def rotate(x: torch.Tensor) -> torch.Tensor:
        angle = torch.cat((pos[:, None] * freq, pos[:, None] * freq), -1)[:, None]
        half = torch.cat((-x[..., dim // 2 :], x[..., : dim // 2]), -1)
        return (x.float() * angle.cos() + half.float() * angle.sin()).to(x.dtype)

    def torch_code(i: int):
        k_cache[0, :, :tokens] = rotate(k).transpose(0, 1)
        v_cache[0, :, :tokens] = v.transpose(0, 1)
        return rotate(q[i % len(q)])

    calls = {
        "ours": lambda i: ops.rope_append(q[i % len(q)], k, v, k_cache, v_cache, row, pos, pos, None, None, None, freq.float(), 1e-5),
        "torch": torch_code,
    }
    return Case(f"rope_append {tokens} tokens, {heads}/{kv_heads} heads x {dim} bf16", 4 * tokens * (heads + 2 * kv_heads) * dim, calls)


def attention(batch: int, heads: int, kv_heads: int, block: int, prefix: int, dry: bool, device: str) -> Case:
    """A denoising step: `block` tokens a row against `prefix` cached keys and the block's own."""
    dim, keys = 128, prefix + block
    shape = (batch, kv_heads, keys, dim)
    caches = rotating(lambda: torch.randn(2, *shape, device=device).bfloat16(), dry)
    q = torch.randn(batch * block, heads, dim, device=device).bfloat16()
    cu, row = torch.arange(batch + 1, device=device) * block, torch.arange(batch, device=device)
    seg = torch.tensor([[[0, prefix], [prefix, block]]], device=device).expand(batch, 2, 2)
    q4 = q.view(batch, block, heads, dim).transpose(1, 2)
    gqa = heads != kv_heads

    def ours(i: int, invariant: bool = False):
        k, v = caches[i % len(caches)]
        return ops.block_attention(q, k, v, cu, row, seg, None, None, dim**-0.5, batch_invariant=invariant)

    def sdpa(i: int):
        k, v = caches[i % len(caches)]
        return torch.nn.functional.scaled_dot_product_attention(q4, k, v, enable_gqa=gqa)

    def cat(i: int):
        k, v = (torch.cat((x[:, :, :prefix], x[:, :, prefix:]), 2) for x in caches[i % len(caches)])
        return torch.nn.functional.scaled_dot_product_attention(q4, k, v, enable_gqa=gqa)

    def without_hopper(i: int):  # variant P where A would be taken
        os.environ["UNMASK_CUDA_ATTENTION"] = "mma"
        try:
            return ours(i)
        finally:
            del os.environ["UNMASK_CUDA_ATTENTION"]

    def repeated(i: int):  # Dream's: every kv head copied for each of its query heads
        k, v = (x.repeat_interleave(heads // kv_heads, 1) for x in caches[i % len(caches)])
        return torch.nn.functional.scaled_dot_product_attention(q4, k, v)

    calls = {"ours": ours, "ours, batch_invariant": lambda i: ours(i, True), "SDPA": sdpa, "cat + SDPA": cat}
    if gqa:
        calls["repeat_kv + SDPA"] = repeated
    if device == "cuda":
        if torch.cuda.get_device_capability()[0] == 9:
            calls["ours, mma.sync only"] = without_hopper
        from torch.nn.attention import SDPBackend, sdpa_kernel

        for backend in (SDPBackend.CUDNN_ATTENTION, SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION):

            def forced(i: int, backend=backend):
                with sdpa_kernel(backend):
                    return sdpa(i)

            try:
                forced(0)
            except RuntimeError:
                continue  # this backend does not take the shape
            calls[f"SDPA {backend.name.split('_')[0].lower()}"] = forced
        calls |= those_that_run(other_attention(q4, caches, gqa))
    calls |= those_that_run(triton_attention(q4, caches))
    moved = 2 * batch * kv_heads * keys * dim * 2 + 2 * q.numel() * 2
    return Case(f"block_attention {batch} x {block} on {prefix}, {heads}/{kv_heads} heads x {dim} bf16", moved, calls, 4 * q.numel() * keys)


def those_that_run(calls: dict[str, Callable[[int], object]]) -> dict[str, Callable[[int], object]]:
    """Those whose first call works. A baseline that does not run here is named, not dropped in silence."""
    running = {}
    for label, fn in calls.items():
        try:
            fn(0)
        except Exception as error:
            lines = str(error).splitlines() or [""]
            print(f"no baseline {label}: {type(error).__name__}: {lines[0][:120]}", flush=True)
            continue
        running[label] = fn
    return running


def triton_attention(q4: torch.Tensor, caches: list[torch.Tensor]) -> dict[str, Callable[[int], object]]:
    """The engines' kind of kernel (gpu_triton.py) with both of their tiles, if its first result is right. On the CPU it runs in Triton's
    interpreter, in fp16: that multiplies bf16 as integers."""
    if q4.device.type == "cpu":
        q4, caches = q4.half(), [kv.half() for kv in caches[:1]]

    def call(i: int, tile: int):
        return gpu_triton.attention(q4, *caches[i % len(caches)], tile=tile)

    def checked(i: int, tile: int):
        got, k, v = call(i, tile), *caches[i % len(caches)]
        want = torch.nn.functional.scaled_dot_product_attention(q4, k, v, enable_gqa=True)
        torch.testing.assert_close(got, want, atol=0.02, rtol=0.02)

    checks = {f"Triton, tile {tile}": functools.partial(checked, tile=tile) for tile in gpu_triton.TILES}
    return {label: functools.partial(call, tile=checks[label].keywords["tile"]) for label in those_that_run(checks)}


def other_attention(q4: torch.Tensor, caches: list[torch.Tensor], gqa: bool) -> dict[str, Callable[[int], object]]:
    """Attention of other libraries, where installed: label -> call on q [B, H, q, D] and caches [2, B, Hkv, keys, D]."""
    calls: dict[str, Callable[[int], object]] = {}
    batch, heads, block, dim = q4.shape
    keys = caches[0].shape[3]
    flex = _compiled_flex()
    calls["flex_attention"] = lambda i: flex(q4, *caches[i % len(caches)], enable_gqa=gqa)
    packed_q = q4.transpose(1, 2).reshape(batch * block, heads, dim)
    packed = [[x.transpose(1, 2).reshape(batch * keys, -1, dim) for x in kv] for kv in caches]
    cu_q, cu_k = (torch.arange(batch + 1, device=q4.device, dtype=torch.int32) * n for n in (block, keys))

    def varlen(i: int):
        from torch.nn.attention.varlen import varlen_attn

        return varlen_attn(packed_q, *packed[i % len(packed)], cu_q, cu_k, block, keys)

    calls["varlen_attn"] = varlen

    def flash(i: int):
        from flash_attn import flash_attn_func

        return flash_attn_func(q4.transpose(1, 2), *(x.transpose(1, 2) for x in caches[i % len(caches)]))

    def flashinfer(i: int):
        import flashinfer

        k, v = (x[0] for x in caches[i % len(caches)])
        return flashinfer.single_prefill_with_kv_cache(q4[0].transpose(0, 1), k, v, kv_layout="HND")

    def switched(i: int, impl: str):  # torch's own switch: another library's kernels behind SDPA's flash backend
        from torch.nn.attention import (
            SDPBackend,
            activate_flash_attention_impl,
            restore_flash_attention_impl,
            sdpa_kernel,
        )

        activate_flash_attention_impl(impl)
        try:
            with sdpa_kernel(SDPBackend.FLASH_ATTENTION):
                return torch.nn.functional.scaled_dot_product_attention(q4, *caches[i % len(caches)], enable_gqa=gqa)
        finally:
            restore_flash_attention_impl()

    calls["SDPA FA3"], calls["SDPA FA4"] = (functools.partial(switched, impl=impl) for impl in ("FA3", "FA4"))
    calls["flash_attn"] = flash
    if batch == 1:
        calls["flashinfer"] = flashinfer
    return calls


@functools.cache
def _compiled_flex():
    from torch.nn.attention.flex_attention import flex_attention

    return torch.compile(flex_attention, dynamic=False)


def rows(tokens: int, width: int, dry: bool, device: str) -> list[Case]:
    x = rotating(lambda: torch.randn(tokens, width, device=device).bfloat16(), dry)
    gate = rotating(lambda: torch.randn(tokens, 2 * width, device=device).bfloat16(), dry)
    weight, residual = torch.ones(width, device=device).bfloat16(), torch.randn(tokens, width, device=device).bfloat16()

    def add_norm(i: int):
        residual.add_(x[i % len(x)])
        return torch.nn.functional.rms_norm(residual, (width,), weight, 1e-5)

    def silu(i: int):
        g = gate[i % len(gate)]
        return torch.nn.functional.silu(g[:, :width]) * g[:, width:]

    size = tokens * width * 2
    return [
        Case(f"add_rms_norm [{tokens}, {width}] bf16", 4 * size, {
            "ours": lambda i: ops.add_rms_norm(residual, x[i % len(x)], weight, 1e-5), "torch": add_norm}),
        Case(f"silu_mul [{tokens}, 2 x {width}] bf16", 3 * size, {"ours": lambda i: ops.silu_mul(gate[i % len(gate)]), "torch": silu}),
    ]  # fmt: skip


def cases(dry: bool, device: str, part: str) -> Iterator[Case]:
    """One after the other, so that only one holds memory. part: attention, head, rest or all."""
    heads, batches, lm_heads = ((32, 32), (28, 4), (16, 4)), ATTENTION, ((126_464, 4096), (152_064, 3584), (157_184, 2048))
    if dry:
        heads, batches, lm_heads = ((4, 2),), ((2, 40),), ((5000, 64),)
    if part in ("attention", "all"):
        for h, kv in heads:
            for b, p in batches:
                yield attention(b, h, kv, 8 if dry else 32, p, dry, device)
    if part in ("head", "all"):
        for v, d in lm_heads:
            for n in (2,) if dry else (32, 64, 256) if v == 126_464 else (32,):
                yield head(n, v, d, dry, device)
    if part not in ("rest", "all"):
        return
    for n, v in ((2, 5000),) if dry else ((32, 126_464), (256, 126_464), (1024, 126_464), (32, 152_064)):
        yield logit_stats(n, v, dry, device)
    for n, block in ((2, 8),) if dry else ((64, 128), (8, 32)):
        yield commit(n, block, dry, device)
    for t, h, kv in ((3, 4, 2),) if dry else ((32, 32, 32), (256, 32, 32), (32, 28, 4), (4096, 32, 32)):
        yield rope_append(t, h, kv, dry, device)
    for n, width in ((2, 64),) if dry else ((32, 4096), (4096, 4096)):
        yield from rows(n, width, dry, device)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dry-run", action="store_true")
    parser.add_argument("--part", choices=("attention", "head", "rest", "all"), default="all")
    parser.add_argument("--out", type=Path, default=report.RESULTS)
    args = parser.parse_args()
    if args.dry_run:
        for case in cases(True, "cpu", args.part):
            for label, fn in case.calls.items():
                fn(0)
                print(f"{case.name}: {label} runs")
        return
    run, table = gpu_timing.Run(), []
    with torch.inference_mode():
        for case in cases(False, "cuda", args.part):
            times, eager = gpu_timing.measure(case.calls)
            line: dict[str, object] = {"case": case.name, "ours": report.seconds(times["ours"])}
            line["of copy"] = case.moved / times["ours"] / run.copy
            line["of matmul"] = case.flops / times["ours"] / run.products if case.flops else ""
            for label in list(times)[1:]:
                line[f"x {label}"] = times[label] / times["ours"]
            line["called eagerly"] = ", ".join(eager)
            table.append(line)
            print(json.dumps(line), flush=True)
    run.write(args.out, f"gpu-ops{'' if args.part == 'all' else '-' + args.part}", "Ops on a GPU", {"": table})


if __name__ == "__main__":
    main()
