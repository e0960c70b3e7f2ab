"""LLaDA-8B's shape on a CPU with 24 GB: random bf16 weights made in place in memory (16 GB), one block decoded, against its GEMMs alone.

There is no file and no second copy of a weight: `random_model` draws tensor by tensor and packs every product with its last tensor. The
peak of RSS, over building and decoding, is set against the bytes of the weights; wanted: at most 1.1 x the weights + 200 MB.

One block of 32 after a prompt of 64 tokens, dual cache, bf16, in few fixed steps (random weights have no confidence that a threshold could
mean anything for): the first forward brings the whole canvas, the others the block. The products alone are the model's own linears, run
for the same rows right after each step; reported are medians.

`--layers` and the other sizes scale it down; what a layer costs, and so the whole model, can be read off two depths.

    python bench/bench_8b_cpu.py [--layers N] [--steps N] [--quick]
"""

from __future__ import annotations

import argparse
import functools
import gc
import statistics
import time
from collections.abc import Callable

import torch
from tqdm import tqdm

import gemm_floor
import report
import unmask
from bench_memory import peak_rss, reset_peak, rss
from unmask.models.config import ModelConfig
from unmask.models.model import Model, random_model
from unmask.ops.linear import available_memory, choose_format

BLOCK, PROMPT = 32, 64
WANTED = 1.35
"""Most that a block step may take of the time of its GEMMs alone."""
WEIGHT_BYTES = {"packed": 2, "packed_fp32": 4, "plain": 2}


def llada_8b(layers: int = 32, width: int = 4096, ffn: int = 12288, vocab: int = 126464) -> ModelConfig:
    """LLaDA-8B's config (GSAI-ML/LLaDA-8B-Base, config.json), or a smaller one with its head size of 128."""
    heads = width // 128
    return ModelConfig(
        family="llada", d_model=width, n_layers=layers, n_heads=heads, n_kv_heads=heads, head_dim=128, ffn_dim=ffn, vocab_size=vocab,
        rope_theta=500000.0, rotary_dim=128, norm_eps=1e-5, qkv_bias=False, qk_norm=False, tied_head=False, mask_id=vocab - 128,
        eos_ids=(vocab - 383,), pad_id=vocab - 383, max_positions=4096, block_size=None, shifted=False, visibility="bidirectional",
    )  # fmt: skip


def decode(model: Model, prompt: list[int], products: list[Callable[[], None]]) -> tuple[list[tuple[float, float]], list[int]]:
    """Decodes the block in len(products) steps. Seconds of each step (forward and commit) and, right after it, of its products; the ids."""
    seconds, result = [], None
    for event in unmask.stream(
        model, prompt, max_new_tokens=BLOCK, block_size=BLOCK, policy="quota", steps=len(products), cache="dual", eos_stop=False
    ):
        if event.kind == "step":
            began = time.perf_counter()
            products[len(seconds)]()
            seconds.append((event.seconds, time.perf_counter() - began))
        elif event.kind == "done":
            result = event.result
    assert result is not None and len(result.ids) == BLOCK and result.nfe == len(products) == len(seconds), "the block was not decoded"
    return seconds, result.ids


def _times(name: str, steps: list[tuple[float, float]]) -> dict[str, object]:
    """Medians of a kind of step, of its products, and of the ratio of the two: each pair was measured one right after the other."""
    step, alone = (statistics.median(times) for times in zip(*steps, strict=True))
    return {name: report.seconds(step), f"GEMMs of a {name}": report.seconds(alone), f"{name} / GEMMs": statistics.median(s / a for s, a in steps)}


def measure(config: ModelConfig, steps: int, rounds: int) -> dict[str, object]:
    """Builds the model and decodes `rounds` times."""
    choose_format(torch.bfloat16, torch.device("cpu"), 1)  # what it probes is loaded before the start is measured
    gc.collect()
    reset_peak()
    before, began = rss(), time.perf_counter()
    model = random_model(config, dtype=torch.bfloat16, name="random LLaDA")
    built = time.perf_counter() - began
    weights = WEIGHT_BYTES[model.format] * config.n_parameters
    building = peak_rss() - before
    prompt = torch.randint(0, config.vocab_size - 1000, (PROMPT,), generator=torch.Generator().manual_seed(1)).tolist()
    gemms = gemm_floor.Gemms.of_model(model)
    kinds = gemm_floor.forwards("dual", PROMPT, BLOCK, BLOCK, steps).elements()  # in the order of the steps
    products = [functools.partial(gemms.forward, *kind) for kind in kinds]
    decode(model, prompt, products)  # warm-up
    runs, texts = [], set()
    for _ in tqdm(range(rounds), unit="round", desc=f"{config.n_layers} layers"):
        seconds, ids = decode(model, prompt, products)
        runs.append(seconds)
        texts.add(tuple(ids))
    assert len(texts) == 1, "the same run gave different tokens"
    first, later = [run[0] for run in runs], [step for run in runs for step in run[1:]]
    return {
        "layers": config.n_layers, "parameters": config.n_parameters, "format": model.format, "weights MB": weights / 2**20,
        "peak building MB": building / 2**20, "peak MB": (peak_rss() - before) / 2**20, "wanted MB": 1.1 * weights / 2**20 + 200,
        "of the weights": (peak_rss() - before) / weights, "built in": report.seconds(built),
        **_times("first step", first), **_times("block step", later),
        "block decoded in": report.seconds(statistics.median(sum(step for step, _ in run) for run in runs)),
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, help="default 32; 2 with --quick")
    parser.add_argument("--width", type=int, default=4096, help="a multiple of 128")
    parser.add_argument("--ffn", type=int, default=12288)
    parser.add_argument("--vocab", type=int, default=126464)
    parser.add_argument("--steps", type=int, default=4, help="forwards of the block, at least 2 and a divisor of 32")
    parser.add_argument("--rounds", type=int, help="default 3; 2 with --quick")
    parser.add_argument("--quick", action="store_true", help="2 layers, 2 rounds")
    parser.add_argument("--no-report", action="store_true", help="print the row only")
    args = parser.parse_args()
    layers = args.layers or (2 if args.quick else 32)
    if args.width % 128 or args.width < 128 or args.vocab < 2048:
        parser.error(f"--width must be a multiple of 128 and --vocab at least 2048, got {args.width} and {args.vocab}")
    if args.steps < 2 or BLOCK % args.steps:
        parser.error(f"--steps must be 2, 4, 8, 16 or 32, got {args.steps}")
    config = llada_8b(layers, args.width, args.ffn, args.vocab)
    format = choose_format(torch.bfloat16, torch.device("cpu"), config.n_parameters)
    needed = WEIGHT_BYTES[format] * config.n_parameters * 1.05
    if needed > available_memory():
        short = f"{layers} layers need {needed / 2**30:.1f} GB of free memory, {available_memory() / 2**30:.1f} GB are; use fewer: --layers\n"
        parser.exit(0 if args.layers is None else 1, f"{parser.prog}: not run: {short}")  # run_all.sh goes on to the other scripts
    row = measure(config, args.steps, args.rounds or (2 if args.quick else 3))
    if args.no_report:
        print(report.table([{"figure": name, "value": value} for name, value in row.items()]))
    else:
        full = layers == 32 and config == llada_8b()
        sizes, facts = list(row)[:9], list(row)[9:]
        report.write(
            "8b-cpu" if full else f"8b-cpu-{layers}-layers",
            f"LLaDA-8B's shape{'' if full else f' with {layers} layers'} on the CPU",
            {"Memory": [{k: row[k] for k in sizes}], "Time": [{k: row[k] for k in facts}]},
            [
                f"random bf16 weights, made in place; prompt {PROMPT}, one block of {BLOCK} in {args.steps} fixed steps, dual cache",
                "peak: VmHWM minus RSS before building, over building and decoding; wanted: 1.1 x weights + 200 MB",
                "GEMMs: the model's own linears for the same rows, run right after each step; medians, of the ratios too; "
                f"wanted for a block step: at most {WANTED}",
            ],
            row=row,
        )
    if row["peak MB"] > row["wanted MB"]:
        raise SystemExit(f"peak of {row['peak MB']:.0f} MB, wanted at most {row['wanted MB']:.0f}")


if __name__ == "__main__":
    main()
