"""End to end: unmask's decoder against the loops people run today, same weights, same cache mode, same run.

LLaDA layout d 512, 8 layers, 8 heads, ffn 1536, vocabulary 126464, random weights; prompt 128, generate 128, block 32, 128 fixed steps;
fp32 and bf16; no cache, prefix cache, dual cache. The baseline is baseline_llada.py (checked against the authors' recorded runs by
tests/test_bench_baseline.py). Also: 8 equal prompts as one batch against one at a time, and the time the GEMMs alone take.

    python bench/bench_generate.py                   # everything, about 40 minutes on 2 cores
    python bench/bench_generate.py --first-block     # the runs without a cache, 3/4 of that time, are cut to a quarter
    python bench/bench_generate.py --quick           # one block of 32 tokens instead of four
    python bench/bench_generate.py --dtype bf16 --cache dual --merge   # one case; the rest of today's results file is kept
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from tqdm import tqdm

import baseline_llada
import gemm_floor
import machine
import report
import timing
import unmask

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
WANTED = {  # at least this ratio to the baseline of the same cache mode
    ("fp32", "none"): 3.0, ("bf16", "none"): 5.0,
    ("fp32", "prefix"): 2.5, ("bf16", "prefix"): 4.5,
    ("fp32", "dual"): 2.8, ("bf16", "dual"): 2.8,
}  # fmt: skip
WANTED_FLOOR, WANTED_BATCH = 1.3, 1.25
BLOCK, PROMPT, BATCH = 32, 128, 8


def save_checkpoint(folder: Path, config: dict, weights: dict[str, torch.Tensor]) -> None:
    """A checkpoint folder without a tokenizer: prompts are token ids."""
    save_file(weights, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(config))


class Bench:
    """The model in both implementations, one prompt, and the work of one run.

    first_block: without a cache, run the first of the blocks only (each costs the same: a full forward per step).
    """

    def __init__(self, folder: Path, config: dict, dtype: str, new_tokens: int, first_block: bool):
        self.config, self.new_tokens, self.first_block = config, new_tokens, first_block
        self.model = unmask.load(folder, dtype=DTYPES[dtype])
        self.baseline = baseline_llada.Llada(config, load_file(folder / "model.safetensors"), DTYPES[dtype])
        generator = torch.Generator().manual_seed(1)
        self.prompt = torch.randint(0, config["eos_token_id"], (PROMPT,), generator=generator).tolist()
        self.results: dict[str, tuple[list[int], int]] = {}

    def share(self, cache: str) -> int:
        """How many times the timed part fits into a whole run."""
        return self.new_tokens // BLOCK if cache == "none" and self.first_block else 1

    def ours(self, cache: str, rows: int = 1):
        prompt = self.prompt if rows == 1 else [self.prompt] * rows
        settings = dict(
            max_new_tokens=self.new_tokens,
            steps=self.new_tokens,
            block_size=BLOCK,
            policy="quota",
            cache=cache,
            eos_stop=False,
        )
        if self.share(cache) > 1:
            for event in unmask.stream(self.model, prompt, **settings):
                if event.kind == "commit" and event.masks_left == 0:
                    break
            self.results[f"ours {cache} {rows}"] = (event.canvas, BLOCK)
            return
        made = unmask.generate(self.model, prompt, **settings)
        first = made if rows == 1 else made[0]
        self.results[f"ours {cache} {rows}"] = (first.canvas, first.nfe)
        if rows > 1 and any(r.canvas != first.canvas for r in made):
            raise AssertionError("rows of a batch of equal prompts differ")

    def theirs(self, name: str):
        loop = baseline_llada.llada_generate if name == "llada" else baseline_llada.LOOPS[name]
        only = dict(only_blocks=1) if name in ("llada", "none") and self.first_block else {}
        prompt, mask_id = torch.tensor([self.prompt]), self.config["mask_token_id"]
        canvas, nfe = loop(self.baseline, prompt, self.new_tokens, self.new_tokens, BLOCK, mask_id, **only)
        self.results[f"theirs {name}"] = (canvas[0].tolist(), nfe)

    def compare(self, cache: str) -> dict[str, object]:
        (ours, our_nfe), (theirs, their_nfe) = (
            self.results[f"ours {cache} 1"],
            self.results[f"theirs {cache}"],
        )
        differing = sum(a != b for a, b in zip(ours[PROMPT:], theirs[PROMPT:], strict=True))
        return {"NFE": our_nfe, "NFE baseline": their_nfe, "differing tokens": differing}


class Progress:
    """Moves the bar when `timing.measure` turns to a callable."""

    def __init__(self, bar: tqdm, stage: str):
        self.bar, self.stage = bar, stage

    def __call__(self, what: str) -> None:
        self.bar.set_description(f"{self.stage} {what}")
        self.bar.update()


def paired(a: timing.Timing, b: timing.Timing) -> float:
    """The median over the rounds of a / b: the speed of a shared machine drifts between rounds more than within one."""
    return statistics.median(x / y for x, y in zip(a.samples, b.samples, strict=True))


def run_case(
    bench: Bench, gemms: gemm_floor.Gemms, fmt: str, dtype: str, cache: str, rounds: int, progress
) -> dict[str, object]:
    part = bench.new_tokens // bench.share(cache)  # of equal blocks
    forwards = gemm_floor.forwards(cache, PROMPT, bench.new_tokens, BLOCK, bench.new_tokens)
    products = {kind: count * part // bench.new_tokens for kind, count in forwards.items()}
    fns = {
        "ours": lambda: bench.ours(cache),
        "gemms": lambda: gemms.run(products),
        "baseline": lambda: bench.theirs(cache),
    }
    if cache == "none":
        fns["llada"] = lambda: bench.theirs("llada")
    bench.ours(cache)  # allocator and packed formats warm; the baseline has none of either
    times = timing.measure(
        fns, rounds=rounds, min_time=0, min_samples=1, sample_time=0, warmup=0, progress=progress
    )
    ratio, over_floor = paired(times["baseline"], times["ours"]), paired(times["ours"], times["gemms"])
    times = {name: t * bench.share(cache) for name, t in times.items()}
    n = bench.new_tokens
    row = {
        "dtype": dtype, "cache": cache, "ours s": times["ours"], "baseline s": times["baseline"], "ratio": ratio,
        "wanted": WANTED[dtype, cache], "ours tok/s": n / times["ours"], "baseline tok/s": n / times["baseline"],
        "GEMM floor s": times["gemms"], "ours / floor": over_floor, "wanted floor": WANTED_FLOOR if cache == "dual" else "",
        "floor format": fmt, "our format": bench.model.format,
    }  # fmt: skip
    row |= bench.compare(cache) | {"rounds": rounds}
    if bench.share(cache) > 1:
        row["timed"] = f"first block, times {bench.share(cache)}"
    if "llada" in times:
        row["LLaDA's own loop s"] = times["llada"]
    return row


def run_batch(bench: Bench, dtype: str, cache: str, rounds: int, progress) -> dict[str, object]:
    bench.ours(cache, BATCH)
    fns = {"batch": lambda: bench.ours(cache, BATCH), "alone": lambda: bench.ours(cache)}
    times = timing.measure(
        fns, rounds=rounds, min_time=0, min_samples=1, sample_time=0, warmup=0, progress=progress
    )
    alone, batch = bench.new_tokens / times["alone"], BATCH * bench.new_tokens / times["batch"]
    same = bench.results[f"ours {cache} 1"][0] == bench.results[f"ours {cache} {BATCH}"][0]
    return {
        "dtype": dtype, "cache": cache, "alone tok/s": alone, f"batch of {BATCH} tok/s": batch, "ratio": batch / alone,
        "wanted": WANTED_BATCH if dtype == "bf16" else "", "same tokens as alone": same,
    }  # fmt: skip


def crossed(rows: list[dict]) -> list[dict]:
    """Our dual cache against their plain loop: another algorithm, so not a like-for-like ratio."""
    found = {(r["dtype"], r["cache"]): r for r in rows}
    out = []
    for dtype in DTYPES:
        if (dtype, "dual") in found and (dtype, "none") in found:
            ours, theirs = found[dtype, "dual"]["ours s"], found[dtype, "none"]["baseline s"]
            out.append(
                {
                    "dtype": dtype,
                    "our dual s": ours,
                    "their plain s": theirs,
                    "ratio": theirs / ours,
                    "note": "another algorithm",
                }
            )
    return out


def previous(name: str) -> dict[str, list[dict]]:
    """Sections of today's results file of this machine, for --merge."""
    import datetime

    path = report.RESULTS / f"{name}-{machine.cpu_slug()}-{datetime.date.today().isoformat()}.json"
    return json.loads(path.read_text())["sections"] if path.is_file() else {}


def merged(old: list[dict], new: list[dict]) -> list[dict]:
    rows = {(r["dtype"], r.get("cache")): r for r in [*old, *new]}
    order = list(DTYPES), ["none", "prefix", "dual", None]
    return sorted(rows.values(), key=lambda r: (order[0].index(r["dtype"]), order[1].index(r.get("cache"))))


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="one block of 32 new tokens instead of four")
    parser.add_argument("--dtype", nargs="+", choices=DTYPES, default=list(DTYPES))
    parser.add_argument(
        "--cache", nargs="+", choices=("none", "prefix", "dual"), default=["none", "prefix", "dual"]
    )
    parser.add_argument("--rounds", type=int, default=3, help="interleaved runs per case (default 3)")
    parser.add_argument(
        "--batch-cache",
        nargs="*",
        choices=("none", "prefix", "dual"),
        default=["dual"],
        help="caches of the batch test",
    )
    parser.add_argument(
        "--first-block",
        action="store_true",
        help="without a cache, time the first of the four (equal) blocks and scale",
    )
    parser.add_argument(
        "--model-dir", type=Path, help="keep the random checkpoint (550 MB) here and use it again"
    )
    parser.add_argument("--no-compare", action="store_true", help="only the batch test")
    parser.add_argument("--merge", action="store_true", help="keep the other cases of today's results file")
    args = parser.parse_args()
    name = "generate-quick" if args.quick else "generate"
    new_tokens = BLOCK if args.quick else 4 * BLOCK

    config = baseline_llada.bench_config()
    rows, batches = [], []
    caches = [] if args.no_compare else args.cache
    total = (
        len(args.dtype)
        * args.rounds
        * (sum(4 if c == "none" else 3 for c in caches) + 2 * len(args.batch_cache))
    )
    with tempfile.TemporaryDirectory() as scratch, tqdm(total=total, unit="run") as bar:
        folder = args.model_dir or Path(scratch)
        if not (folder / "config.json").is_file():
            bar.set_description("making weights")
            folder.mkdir(parents=True, exist_ok=True)
            save_checkpoint(folder, config, baseline_llada.random_weights(config))
        for dtype in args.dtype:
            bar.set_description(f"{dtype} GEMM floor")
            gemms, fmt = gemm_floor.fastest(config, DTYPES[dtype], (BLOCK, BLOCK)) if caches else (None, "")
            bench = Bench(folder, config, dtype, new_tokens, args.first_block)
            for cache in caches:
                progress = Progress(bar, f"{dtype} {cache}")
                rows.append(
                    run_case(bench, gemms, fmt, dtype, cache, args.rounds, progress)
                )
                tqdm.write(report.table(rows[-1:]))
            for cache in args.batch_cache:
                batches.append(
                    run_batch(bench, dtype, cache, args.rounds, Progress(bar, f"{dtype} {cache} batch"))
                )
                tqdm.write(report.table(batches[-1:]))
            del bench, gemms

    sections = {"Same cache mode": rows, "Batch of 8 equal prompts (ours)": batches}
    if args.merge:
        old = previous(name)
        sections = {heading: merged(old.get(heading, []), new) for heading, new in sections.items()}
    sections["Our dual cache against their plain loop"] = crossed(sections["Same cache mode"])
    head = [(BLOCK, config["d_model"], config["vocab_size"])]
    rates = timing.ceilings(torch.float32, head, rounds=args.rounds)
    rates_bf16 = (
        timing.ceilings(torch.bfloat16, head, rounds=args.rounds)["gemm"] if "bf16" in args.dtype else {}
    )
    notes = [
        f"prompt {PROMPT}, {new_tokens} new tokens, block {BLOCK}, {new_tokens} fixed steps, median of `rounds` interleaved runs; ratios are medians of each round's",
        f"read {rates['read']:.1f} GB/s, copy {rates['copy']:.1f} GB/s; GEMM GFLOP/s fp32 {_rates(rates['gemm'])}; bf16 {_rates(rates_bf16)}",
        "GEMM floor: packed oneDNN weights, head on masked rows only, the faster format and head (whole or tiled) of this CPU, timed in the same rounds",
        "in fp32 every token must equal the baseline's; in bf16 random weights tie and differing tokens are counted",
        "seconds seen for the authors' code on a 2-core Zen 4 machine, fp32/bf16: plain 66.2/48.0, prefix 27.5/19.3, dual 14.9/8.4",
    ]
    report.write(
        name,
        "End to end: unmask against the loops people run",
        sections,
        notes,
        ceilings=rates,
        ceilings_bf16=rates_bf16,
    )
    wrong = [
        r for r in rows if r["NFE"] != r["NFE baseline"] or (r["dtype"] == "fp32" and r["differing tokens"])
    ]
    if wrong:
        raise SystemExit(f"not the same tokens or forwards as the baseline: {wrong}")


def _rates(gemm: dict) -> str:
    return "; ".join(
        f"{shape}: " + ", ".join(f"{way} {rate:.0f}" for way, rate in ways.items())
        for shape, ways in gemm.items()
    )


if __name__ == "__main__":
    main()
