"""logit_stats at production shapes against the PyTorch code that decoding loops use today, in one run, inputs rotated over >= 128 MB.

`select`: argmax + float64 softmax + gather (LLaDA, Fast-dLLM: token and confidence). `margin`: softmax + full descending sort, top-2
difference (Dream; fp32 softmax). `sample`: float64 Gumbel noise as LLaDA draws it + argmax + softmax. One call of ours gives all of
token, p, p1, p2, entropy and logsumexp. GB/s counts the logits once; the ceiling is the DRAM read rate measured in the same run.
"""

from __future__ import annotations

import argparse

import torch
from tqdm import tqdm

import report
import timing
from unmask import ops

SHAPES = {"32 x 126464 (LLaDA)": (32, 126_464), "32 x 152064 (Dream)": (32, 152_064), "128 x 126464": (128, 126_464),
          "1024 x 126464": (1024, 126_464), "1 x 126464": (1, 126_464)}  # fmt: skip
DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32, "fp16": torch.float16}
SLOW_LIMIT = 4_100_000  # margin and sample take seconds beyond 32 x 126464
TARGETS = {"bf16": (20.0, 180.0, 0.40), "fp32": (12.0, 180.0, 0.60)}


def select(x: torch.Tensor):
    token = x.argmax(-1)
    p = torch.softmax(x.to(torch.float64), -1)
    return token, p.gather(-1, token[:, None])


def margin(x: torch.Tensor):
    ordered, _ = torch.sort(torch.softmax(x.float(), -1), -1, descending=True)
    return ordered[:, 0] - ordered[:, 1]


def sample(x: torch.Tensor, temperature: float = 1.0):
    wide = x.to(torch.float64)
    noise = (-torch.log(torch.rand_like(wide))) ** temperature
    token = (wide.exp() / noise).argmax(-1)
    return token, torch.softmax(wide, -1).gather(-1, token[:, None])


def case(name: str, dtype: str, read: float, quick: bool) -> list[dict[str, object]]:
    n, vocab = SHAPES[name]
    logits = timing.rotating(lambda: (torch.randn(n, vocab) * 3).to(DTYPES[dtype]))
    key = torch.arange(n)
    noise = {"temperature": 1.0, "seed": key, "step": key, "pos": key}
    fns = {
        "ours": lambda i: ops.logit_stats(logits[i]),
        "ours, top-8": lambda i: ops.logit_stats(logits[i], topk=8),
        "ours, sampled": lambda i: ops.logit_stats(logits[i], **noise),
        "select": lambda i: select(logits[i]),
    }
    if n * vocab <= SLOW_LIMIT:
        fns |= {"margin": lambda i: margin(logits[i]), "sample": lambda i: sample(logits[i])}
    options = {"rounds": 2, "min_time": 0.05, "min_samples": 3} if quick else {"rounds": 3, "min_time": 0.2, "min_samples": 3}
    if n * vocab > 10 * SLOW_LIMIT:
        options |= {"rounds": 2, "min_time": 0.0, "min_samples": 2}  # a second a call
    times = timing.measure(fns, **options)
    size = logits[0].numel() * logits[0].element_size()
    rival = {"ours": ("select", "margin"), "ours, top-8": ("margin",), "ours, sampled": ("sample",)}
    rows = []
    for ours, rivals in rival.items():
        line = {"shape": name, "dtype": dtype, "call": ours, "time": report.seconds(times[ours]), "GB/s": size / times[ours] / 1e9}
        line["of read rate"] = line["GB/s"] / read
        for other in rivals:
            if other in times:
                line[other] = report.seconds(times[other])
                line[f"x {other}"] = times[other] / times[ours]
        rows.append(line)
    return rows


@torch.inference_mode()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="a tenth of the time; the first shape only")
    args = parser.parse_args()
    read = timing.bandwidth()["read"]
    names = list(SHAPES)[:1] if args.quick else list(SHAPES)
    cases = [(name, dtype) for name in names for dtype in DTYPES if dtype != "fp16" or n_rows(name) == 32]
    rows = [row for name, dtype in tqdm(cases, desc="logit_stats") for row in case(name, dtype, read, args.quick)]
    notes = [f"DRAM read rate of this machine in this run: {read:.1f} GB/s ({torch.get_num_threads()} threads)."]
    for dtype, (x_select, x_margin, share) in TARGETS.items():
        line = next(r for r in rows if r["dtype"] == dtype and r["call"] == "ours")
        notes.append(
            f"{line['shape']} {dtype}: {line['x select']:.1f}x select (wanted {x_select:.0f}x), {line['x margin']:.0f}x margin "
            f"(wanted {x_margin:.0f}x), {line['of read rate']:.0%} of the read rate (wanted {share:.0%})."
        )
    report.write("op_logit_stats", "logit_stats", {"rows": rows}, notes)


def n_rows(name: str) -> int:
    return SHAPES[name][0]


if __name__ == "__main__":
    main()
