"""`unmask bench`: each op at a production shape beside the plain PyTorch that it replaces, on this machine, in about half a minute.

A short version of the scripts in the repository's bench/ folder, with the same timing helper; it works from an installed wheel.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
from collections.abc import Callable, Iterator

import torch
import torch.nn.functional as F
from tqdm import tqdm

from .. import ops
from .._machine import facts
from .._timing import bandwidth, gemm_seconds, measure, rotating
from ..ops.head_stats import Head, head_stats
from ..ops.linear import choose_format

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
VOCAB, ROWS, HEADS, DIM, PREFIX = 126464, 32, 32, 128, 4096
WIDTH = 512


@dataclasses.dataclass(frozen=True)
class Case:
    """One comparison. work: what ours must at least read (bytes) or compute (FLOP), for the share of the ceiling; None = latency."""

    op: str
    shape: str
    dtype: str
    ours: Callable
    rivals: dict[str, Callable]
    work: float | None = None
    unit: str = "GB/s"


def run(args: argparse.Namespace) -> int:
    if args.threads:
        torch.set_num_threads(args.threads)
    machine = facts()
    if not args.json:
        print(f"{machine['cpu']}, {machine['threads']} threads, {machine['isa']}, torch {machine['torch']}")
    with tqdm(total=0, unit="case", leave=False, disable=None) as bar, torch.inference_mode():
        bar.set_description("ceilings")
        ceilings = {"read GB/s": bandwidth()["read"]}
        for dtype in args.dtype:
            best = min(gemm_seconds(1024, 1024, 1024, DTYPES[dtype]).values())
            ceilings[f"{dtype} GEMM GFLOP/s"] = 2 * 1024**3 / best / 1e9
        rows = []
        for case in cases(args.dtype):
            bar.set_description(f"{case.op} {case.dtype}")
            rows.append(_measured(case, args.rounds, ceilings))
            bar.update()
    if args.json:
        print(json.dumps({"machine": machine, "ceilings": ceilings, "results": rows}, indent=1))
        return 0
    print("measured ceilings: " + ", ".join(f"{name} {value:.1f}" for name, value in ceilings.items()))
    print("\n".join(_lines(rows)))
    return 0


def _measured(case: Case, rounds: int, ceilings: dict[str, float]) -> dict[str, object]:
    times = measure({"ours": case.ours} | case.rivals, rounds=rounds, min_time=0.1, min_samples=3, warmup=1)
    row: dict[str, object] = {
        "op": case.op,
        "shape": case.shape,
        "dtype": case.dtype,
        "seconds": float(times["ours"]),
    }
    if case.work is not None:
        row["rate"] = case.work / times["ours"] / 1e9
        row["unit"] = case.unit
        row["of_ceiling"] = (
            row["rate"] / ceilings["read GB/s" if case.unit == "GB/s" else f"{case.dtype} GEMM GFLOP/s"]
        )
    row["rivals"] = {
        name: {"seconds": float(times[name]), "ratio": times[name] / times["ours"]} for name in case.rivals
    }
    return row


def _lines(rows: list[dict]) -> Iterator[str]:
    yield f"{'op':<16}{'shape':<34}{'dtype':<6}{'ours':>10}  {'rate':<15}{'of ceiling':<11} times faster than"
    for row in rows:
        rate = f"{row['rate']:.1f} {row['unit']}" if "rate" in row else ""
        share = f"{row['of_ceiling']:.0%}" if "rate" in row else ""
        rivals = ", ".join(f"{name}: {r['ratio']:.1f}x" for name, r in row["rivals"].items())
        yield f"{row['op']:<16}{row['shape']:<34}{row['dtype']:<6}{row['seconds'] * 1e3:>7.3f} ms  {rate:<15}{share:<11} {rivals}"


def cases(dtypes: list[str]) -> Iterator[Case]:
    """All comparisons, each built when its turn comes: inputs of one case are freed before the next."""
    for dtype in dtypes:
        yield _logit_stats(dtype)
        yield _block_attention(dtype)
        yield _rope_append(dtype)
        yield _head_stats(dtype)
    yield _commit()


def _select(logits: torch.Tensor) -> torch.Tensor:
    """What LLaDA-style loops do with logits: argmax, float64 softmax, gather."""
    token = logits.argmax(-1)
    return F.softmax(logits.to(torch.float64), dim=-1).gather(-1, token.unsqueeze(-1))


def _logit_stats(dtype: str) -> Case:
    kind = DTYPES[dtype]
    logits = rotating(lambda: (torch.randn(ROWS, VOCAB) * 3).to(kind))
    margin = lambda i: torch.sort(F.softmax(logits[i], -1), dim=-1, descending=True)  # noqa: E731
    return Case(
        "logit_stats", f"[{ROWS}, {VOCAB}]", dtype, lambda i: ops.logit_stats(logits[i]),
        {"argmax + fp64 softmax + gather": lambda i: _select(logits[i]), "softmax + sort (margin)": margin},
        ROWS * VOCAB * kind.itemsize,
    )  # fmt: skip


def _block_attention(dtype: str) -> Case:
    kind = DTYPES[dtype]
    n = PREFIX + ROWS
    q = torch.randn(ROWS, HEADS, DIM).to(kind)
    k, v = (torch.randn(1, HEADS, n, DIM).to(kind) for _ in range(2))
    past_k, past_v, new_k, new_v = k[:, :, :PREFIX], v[:, :, :PREFIX], k[:, :, PREFIX:], v[:, :, PREFIX:]
    cu, row, seg = torch.tensor([0, ROWS]), torch.tensor([0]), torch.tensor([[[0, n]]])
    wide = q.transpose(0, 1).unsqueeze(0).contiguous()

    def joined():
        return F.scaled_dot_product_attention(
            wide, torch.cat((past_k, new_k), 2), torch.cat((past_v, new_v), 2)
        )

    return Case(
        "block_attention", f"{HEADS} heads x {DIM}, {PREFIX} + {ROWS} keys", dtype,
        lambda: ops.block_attention(q, k, v, cu, row, seg, None, None, DIM**-0.5),
        {"cat + SDPA": joined, "SDPA": lambda: F.scaled_dot_product_attention(wide, k, v)},
        4.0 * HEADS * ROWS * n * DIM, "GFLOP/s",
    )  # fmt: skip


def _rope_append(dtype: str) -> Case:
    kind = DTYPES[dtype]
    n = PREFIX + ROWS
    q, k, v = (torch.randn(ROWS, HEADS, DIM).to(kind) for _ in range(3))
    k_cache, v_cache = (torch.zeros(1, HEADS, n, DIM, dtype=kind) for _ in range(2))
    row, pos = torch.zeros(ROWS, dtype=torch.int64), torch.arange(PREFIX, n)
    inv_freq = 1.0 / 500000.0 ** (torch.arange(0, DIM, 2) / DIM)
    angle = torch.outer(torch.arange(n).float(), inv_freq)
    sin, cos = (torch.cat((t, t), -1) for t in (angle.sin(), angle.cos()))
    wide = [t.transpose(0, 1).unsqueeze(0) for t in (q, k, v)]

    def rotated(x: torch.Tensor, at: slice) -> torch.Tensor:
        first, second = x.float().chunk(2, -1)
        return (x.float() * cos[at] + torch.cat((-second, first), -1) * sin[at]).type_as(x)

    def whole():
        keys = torch.cat((k_cache[:, :, :PREFIX], wide[1]), 2)
        return (
            rotated(wide[0], slice(PREFIX, n)),
            rotated(keys, slice(0, n)),
            torch.cat((v_cache[:, :, :PREFIX], wide[2]), 2),
        )

    return Case(
        "rope_append", f"{ROWS} tokens, {HEADS} x {DIM}, past {PREFIX}", dtype,
        lambda: ops.rope_append(q, k, v, k_cache, v_cache, row, pos, pos, None, None, None, inv_freq, 1e-5),
        {"cat + RoPE on all of K": whole},
    )  # fmt: skip


def _head_stats(dtype: str) -> Case:
    kind = DTYPES[dtype]
    weight = (torch.randn(VOCAB, WIDTH) / WIDTH**0.5).to(kind)
    hidden = torch.randn(ROWS, WIDTH).to(kind)
    head = Head(weight, choose_format(kind, weight.device, weight.numel()))
    return Case(
        "head_stats", f"[{ROWS}, {WIDTH}] x {VOCAB}", dtype, lambda: head_stats(hidden, head),
        {"linear + argmax + fp64 softmax": lambda: _select(F.linear(hidden, weight))},
        2.0 * ROWS * WIDTH * VOCAB, "GFLOP/s",
    )  # fmt: skip


def _commit() -> Case:
    score, token, pos = torch.rand(ROWS), torch.arange(ROWS), torch.arange(ROWS)
    canvas, masked = torch.zeros(1, ROWS, dtype=torch.int64), torch.ones(1, ROWS, dtype=torch.bool)
    cu, row, bar = torch.tensor([0, ROWS]), torch.tensor([0]), torch.tensor([0.9])

    def ours():
        masked.fill_(True)
        return ops.commit(canvas, masked, cu, row, pos, token, score, rule=1, threshold=bar)

    def loop():
        transfer = torch.zeros(1, ROWS, dtype=torch.bool)
        _, chosen = torch.topk(score, k=ROWS)
        transfer[0, chosen] = True
        for rank in range(1, ROWS):
            if score[chosen[rank]] < 0.9:
                transfer[0, chosen[rank]] = False
        canvas[transfer] = token.unsqueeze(0)[transfer]
        return (canvas == -1).sum() == 0

    return Case("commit", f"{ROWS} candidates, threshold", "fp32", ours, {"topk + Python loop": loop})
