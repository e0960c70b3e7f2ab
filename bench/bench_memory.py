"""Peak memory of decoding: RSS in a process of its own, above the RSS right after loading. Wanted: under 200 MB.

Each case runs in a fresh process: load the bench model (vocabulary 126464, see bench_generate.py), reset the kernel's peak, decode, read
the peak. On the fused path no [rows, vocabulary] tensor in fp32 or fp64 may exist, for which a guard looks as well: the largest tensor
that any torch op made while decoding.

    python bench/bench_memory.py [--quick]
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from tqdm import tqdm

import baseline_llada
import bench_generate
import report

WANTED_MB = 200


def peak_rss() -> int:
    """Highest RSS in bytes since the last reset (VmHWM)."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) * 1024
    raise RuntimeError("this system does not report VmHWM")


def rss() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def reset_peak() -> None:
    Path("/proc/self/clear_refs").write_text("5")


class LargestTensor(TorchDispatchMode):
    """Remembers the largest tensor that any op returned."""

    def __init__(self):
        super().__init__()
        self.bytes, self.what = 0, ""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for t in out if isinstance(out, (tuple, list)) else (out,):
            if (
                isinstance(t, torch.Tensor)
                and t.layout is torch.strided
                and t.untyped_storage().nbytes() > self.bytes
            ):
                if not any(
                    isinstance(a, torch.Tensor) and _same_storage(a, t) for a in args
                ):  # a view or an in-place result is not new
                    self.bytes, self.what = t.untyped_storage().nbytes(), f"{func} {list(t.shape)} {t.dtype}"
        return out


def _same_storage(a: torch.Tensor, b: torch.Tensor) -> bool:
    return a.layout is torch.strided and a.untyped_storage().data_ptr() == b.untyped_storage().data_ptr()


def child(folder: str, dtype: str, cache: str, rows: int, new_tokens: int, guard: bool) -> dict[str, object]:
    """One case, in this process."""
    import unmask

    model = unmask.load(folder, dtype=bench_generate.DTYPES[dtype])
    prompt = torch.randint(
        0, 126000, (bench_generate.PROMPT,), generator=torch.Generator().manual_seed(1)
    ).tolist()
    options = dict(
        steps=new_tokens, block_size=bench_generate.BLOCK, policy="quota", cache=cache, eos_stop=False
    )

    def decode():
        unmask.generate(model, [prompt] * rows, max_new_tokens=new_tokens, **options)

    gc.collect()
    if guard:
        with LargestTensor() as largest:
            decode()
        return {"largest MB": largest.bytes / 2**20, "largest tensor": largest.what}
    reset_peak()
    before = rss()
    decode()
    return {"loaded MB": before / 2**20, "above MB": (peak_rss() - before) / 2**20}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="32 new tokens instead of 128, three cases")
    parser.add_argument(
        "--model-dir", type=Path, help="a checkpoint folder that bench_generate.py --model-dir has made"
    )
    parser.add_argument("--child", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child:
        print(json.dumps(child(**json.loads(args.child))))
        return
    new_tokens = bench_generate.BLOCK if args.quick else 4 * bench_generate.BLOCK
    cases = [(dtype, cache, 1) for dtype in bench_generate.DTYPES for cache in ("none", "prefix", "dual")]
    cases += [(dtype, "dual", bench_generate.BATCH) for dtype in bench_generate.DTYPES]
    if args.quick:
        cases = [("fp32", "none", 1), ("fp32", "dual", 1), ("bf16", "dual", 1)]
    rows = []
    config = baseline_llada.bench_config()
    with tempfile.TemporaryDirectory() as scratch:
        folder = args.model_dir or Path(scratch)
        if not (folder / "config.json").is_file():
            bench_generate.save_checkpoint(folder, config, baseline_llada.random_weights(config))
        for dtype, cache, batch in tqdm(cases, unit="process"):
            row: dict[str, object] = {"dtype": dtype, "cache": cache, "rows": batch}
            for guard in (False, True):
                case = dict(
                    folder=str(folder),
                    dtype=dtype,
                    cache=cache,
                    rows=batch,
                    new_tokens=new_tokens,
                    guard=guard,
                )
                words = [sys.executable, __file__, "--child", json.dumps(case)]
                row |= json.loads(subprocess.run(words, check=True, capture_output=True, text=True).stdout)
            rows.append(row | {"wanted MB": WANTED_MB if batch == 1 else ""})
    notes = [
        f"prompt {bench_generate.PROMPT}, {new_tokens} new tokens; each row is a process of its own",
        "above: VmHWM after decoding minus RSS right after loading; largest: the largest tensor that any torch op newly made",
        f"a [32, {config['vocab_size']}] fp32 tensor would be {32 * config['vocab_size'] * 4 / 2**20:.1f} MB, fp64 twice that",
    ]
    report.write(
        "memory-quick" if args.quick else "memory", "Peak memory of decoding", {"Peak RSS": rows}, notes
    )
    over = [row for row in rows if row["wanted MB"] and row["above MB"] > row["wanted MB"]]
    if over:
        raise SystemExit(f"more than {WANTED_MB} MB above the loaded model: {over}")


if __name__ == "__main__":
    main()
