"""filtered_stats and kl_stats at production shapes against the PyTorch code that decoding loops use today, in one run, inputs rotated.

`Dream`: divide by the temperature, sort + softmax + cumulative sum + scatter for top-p, topk for top-k, softmax, entropy, argmax, as its
`sample_tokens` does, in fp32. `KLASS`: two float64 softmaxes and the sum over their logarithms. `logit_stats`: the same rows without filters, one
read of the logits. Logits are 3 randn: a flat softmax, top_p = 0.95 keeps 11,000 of 126,464 ids; "peaked" are 10 randn, some hundred.
"""

from __future__ import annotations

import argparse

import torch
from tqdm import tqdm

import report
import timing
from unmask import ops

SHAPES = {"32 x 126464 (LLaDA)": (32, 126_464), "32 x 152064 (Dream)": (32, 152_064), "1 x 126464": (1, 126_464)}
DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}
SCALES = {"flat": 3.0, "peaked": 10.0}
CALLS = {"top_p 0.95": {"top_p": 0.95}, "top_k 50": {"top_k": 50}, "both": {"top_p": 0.95, "top_k": 50},
         "both, T = 0.2": {"top_p": 0.95, "top_k": 50, "temperature": 0.2}}  # fmt: skip
TARGET = 4.0  # times logit_stats


def dream(x: torch.Tensor, top_p: float = 1.0, top_k: int = 0, temperature: float = 0.0):
    y = x.float()
    if temperature > 0:
        y = y / temperature
    if top_p < 1:
        ordered, index = torch.sort(y, descending=True)
        over = torch.softmax(ordered, -1).cumsum(-1) > top_p
        over = torch.cat((torch.zeros_like(over[:, :1]), over[:, :-1]), -1)
        y = y.masked_fill(torch.zeros_like(over).scatter_(-1, index, over), float("-inf"))
    if top_k:
        y = y.masked_fill(y < torch.topk(y, top_k)[0][:, -1:], float("-inf"))
    p = torch.softmax(y, -1)
    token = torch.multinomial(p, 1) if temperature > 0 else p.argmax(-1, keepdim=True)
    return token, p.gather(-1, token), (p * torch.log(p + 1e-10)).sum(-1)


def klass(x: torch.Tensor, y: torch.Tensor):
    p, q = torch.softmax(x.double(), -1), torch.softmax(y.double(), -1)
    return (p * ((p + 1e-12) / (q + 1e-12)).log()).sum(-1)


def case(name: str, dtype: str, kind: str, quick: bool) -> list[dict[str, object]]:
    n, vocab = SHAPES[name]
    logits = timing.rotating(lambda: (torch.randn(n, vocab) * SCALES[kind]).to(DTYPES[dtype]))
    lse = [ops.logit_stats(logits[i]).logsumexp.clone() for i in range(2)]
    key = torch.arange(n)
    noise = {"seed": key, "step": key, "pos": key}
    fns = {"logit_stats": lambda i: ops.logit_stats(logits[i])}
    for call, options in CALLS.items():
        fns[call] = lambda i, o=options: ops.filtered_stats(logits[i], **o, **(noise if "temperature" in o else {}))
        fns[f"Dream: {call}"] = lambda i, o=options: dream(logits[i], **o)
    fns["kl_stats"] = lambda i: ops.kl_stats(logits[i], logits[i + 1], lse=lse[0], previous_lse=lse[1])
    fns["KLASS: kl_stats"] = lambda i: klass(logits[i], logits[i + 1])
    times = timing.measure(fns, **({"rounds": 1, "min_time": 0.05, "min_samples": 2} if quick else {"rounds": 3, "min_time": 0.2, "min_samples": 3}))
    rows = []
    for call in (*CALLS, "kl_stats"):
        theirs = next(other for other in fns if other.endswith(f": {call}"))
        line = {"shape": name, "dtype": dtype, "logits": kind, "call": call, "time": report.seconds(times[call])}
        line |= {"of logit_stats": times[call] / times["logit_stats"], "theirs": report.seconds(times[theirs]), "x theirs": times[theirs] / times[call]}
        rows.append(line)
    return rows


@torch.inference_mode()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="a tenth of the time; the first shape only")
    args = parser.parse_args()
    names = list(SHAPES)[:1] if args.quick else list(SHAPES)
    cases = [(name, dtype, kind) for name in names for dtype in DTYPES for kind in SCALES]
    rows = [row for c in tqdm(cases, desc="filtered_stats") for row in case(*c, args.quick)]
    notes = []
    for dtype in DTYPES:
        for call in list(CALLS)[:3]:
            line = next(r for r in rows if r["dtype"] == dtype and r["call"] == call and r["logits"] == "flat")
            notes.append(f"{line['shape']} {dtype}, {call}: {line['of logit_stats']:.1f} times logit_stats (wanted at most {TARGET:.0f}).")
    report.write("op_filtered_stats", "filtered_stats and kl_stats", {"rows": rows}, notes)


if __name__ == "__main__":
    main()
