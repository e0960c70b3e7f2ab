"""Peak memory of decoding: RSS in a process of its own, above the RSS right after loading. Wanted: under 200 MB. With --load, of loading.

Each case runs in a fresh process: load the bench model (vocabulary 126464, see bench_generate.py), reset the kernel's peak, decode, read
the peak. On the fused path no [rows, vocabulary] tensor in fp32 or fp64 may exist, for which a guard looks as well: the largest tensor
that any torch op made while decoding.

--load makes a mixture of experts of LLaDA2's layout with random bf16 weights (1.1 GB in shards of 300 MB; also with every layer spread over
all shards) and loads it. Wanted: at most 1.1 x the weights in the format that they are kept in, plus 200 MB, above the process before.

    python bench/bench_memory.py [--quick] [--load]
"""

from __future__ import annotations

import argparse
import gc
import json
import math
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch.utils._python_dispatch import TorchDispatchMode
from tqdm import tqdm

import baseline_llada
import bench_generate
import report

WANTED_MB = 200
SHARD_BYTES = 300 << 20


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


def save_mixture(folder: Path, layers: int, scattered: bool) -> None:
    """A checkpoint of LLaDA2's layout: width 1024, `layers` layers of 64 experts, vocabulary 32768. scattered: no layer is in one shard."""
    from unmask.models import llada2

    config = {
        "model_type": "llada2_moe", "hidden_size": 1024, "num_hidden_layers": layers, "num_attention_heads": 8, "num_key_value_heads": 4,
        "head_dim": 128, "intermediate_size": 4096, "moe_intermediate_size": 256, "num_experts": 64, "num_experts_per_tok": 8,
        "num_shared_experts": 1, "first_k_dense_replace": 1, "use_bias": False, "vocab_size": 32768, "mask_token_id": 32767,
    }  # fmt: skip
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config))
    specs = list(llada2.weight_map(llada2.read_config(config, {}).validate()).values())
    shards = -(-sum(2 * math.prod(s.shape) for s in specs) // SHARD_BYTES)
    generator, index = torch.Generator().manual_seed(0), {}
    for i in range(shards):
        size = -(-len(specs) // shards)
        part = specs[i::shards] if scattered else specs[i * size : (i + 1) * size]
        file = f"model-{i + 1:05d}-of-{shards:05d}.safetensors"
        save_file({s.name: torch.randn(s.shape, generator=generator).mul_(0.02).bfloat16() for s in part}, folder / file)
        index |= {s.name: file for s in part}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": index}))


def load_child(folder: str, dtype: str) -> dict[str, object]:
    """Loads the checkpoint in this process."""
    from unmask.models import Tokenizer, inspect
    from unmask.models.model import build
    from unmask.ops.linear import choose_format

    kind = bench_generate.DTYPES[dtype]
    choose_format(kind, torch.device("cpu"), 1)  # what it probes is loaded before the start is measured
    gc.collect()
    reset_peak()
    before, began = rss(), time.perf_counter()
    info = inspect(folder)
    model = build(info, Tokenizer.load(info.folder, info.config), "mixture", kind, torch.device("cpu"))
    seconds = time.perf_counter() - began
    item = 2 if kind is torch.bfloat16 and model.format != "packed_fp32" else 4
    weights = item * info.n_parameters
    return {
        "format": model.format, "weights MB": weights / 2**20, "peak above MB": (peak_rss() - before) / 2**20,
        "after MB": (rss() - before) / 2**20, "wanted MB": (1.1 * weights) / 2**20 + WANTED_MB, "load": report.seconds(seconds),
    }  # fmt: skip


def measure_loading(quick: bool) -> None:
    rows = []
    with tempfile.TemporaryDirectory() as scratch:
        for name in ("in order", "scattered"):
            folder = Path(scratch) / name.replace(" ", "-")
            save_mixture(folder, 4 if quick else 11, name == "scattered")
            for dtype in tqdm(bench_generate.DTYPES, unit="process", desc=name):
                words = [sys.executable, __file__, "--load-child", json.dumps({"folder": str(folder), "dtype": dtype})]
                result = json.loads(subprocess.run(words, check=True, capture_output=True, text=True).stdout)
                rows.append({"layers in shards": name, "dtype": dtype} | result)
            shutil.rmtree(folder)
    notes = ["stored in bf16; peak and after: VmHWM and RSS minus RSS before loading; wanted: 1.1 x weights + 200 MB; each row is a process of its own"]
    report.write("memory-load-quick" if quick else "memory-load", "Peak memory of loading a mixture of experts", {"Loading": rows}, notes)
    over = [row for row in rows if row["peak above MB"] > row["wanted MB"]]
    if over:
        raise SystemExit(f"more than 1.1 x the weights + {WANTED_MB} MB: {over}")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="32 new tokens instead of 128, three cases")
    parser.add_argument(
        "--model-dir", type=Path, help="a checkpoint folder that bench_generate.py --model-dir has made"
    )
    parser.add_argument("--load", action="store_true", help="measure loading a mixture of experts instead of decoding")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    parser.add_argument("--load-child", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.load_child:
        print(json.dumps(load_child(**json.loads(args.load_child))))
        return
    if args.load:
        measure_loading(args.quick)
        return
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
