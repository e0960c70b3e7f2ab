"""Caches beside none: forwards, positions forwarded, tokens that stay the same, answers that stay right, time.

Every cache of `unmask.caches.CACHES` for bidirectional models with its default settings, those that are added later too, and some with
others (VARIANTS); where a cache does not serve a policy, a note says why. Two models:
- the embedded one: held-out prompts of every task as one batch, 32 new tokens in blocks of 16;
- a random bf16 one of LLaDA's layout (width 512, 4 layers, vocabulary 32768), one prompt of 192, 64 new tokens in blocks of 32. What share of
  its tokens stays the same says little (random logits move far with every K and V), its times are what a larger model's would be like. Nor
  does it know anything: all its entropies are high, so EntropyCache keeps nothing there unless threshold=inf.
Each round runs all caches, in reverse order in odd rounds, and none once more; the time of a cache is divided by the mean of none's two in the
same round; reported is the median of these ratios.

    python bench/bench_caches.py [--quick] [--threads 2] [--only tiny|random]
"""

from __future__ import annotations

import argparse
import itertools
import statistics
import time
from typing import Any

import torch
from tqdm import tqdm

import report
import unmask
from unmask.caches import CACHES
from unmask.errors import SettingError
from unmask.models.config import ModelConfig
from unmask.models.model import random_model
from unmask.tiny.tasks import TASKS, held_out_examples, is_right

VARIANTS = (
    "dual:refresh=4", "dkv:refresh_every=4", "dkv:greedy=true,refresh_every=2", "dkv:greedy=true", "entropy:threshold=inf", "entropy:threshold=0.1",
    "sprint:keep_ratio=0.8", "sprint:keep_ratio=1",
)  # fmt: skip
WIDE = ModelConfig(
    family="llada", d_model=512, n_layers=4, n_heads=8, n_kv_heads=8, head_dim=64, ffn_dim=1536, vocab_size=32_768, rope_theta=500_000.0, rotary_dim=64,
    norm_eps=1e-5, qkv_bias=False, qk_norm=False, tied_head=False, mask_id=32_767, eos_ids=(32_766,), pad_id=32_766, max_positions=4096, block_size=None,
    shifted=False, visibility="bidirectional",
)  # fmt: skip


def cases() -> list[str]:
    """Caches to run, "none" first: every one of the table, then the variants, each by its name with settings."""
    names = [n for n, kind in CACHES.items() if "bidirectional" in kind.visibility and n != "none"]
    variants = [v for v in VARIANTS if v.partition(":")[0] in names]
    return ["none", *sorted([*names, *variants], key=lambda text: (names.index(text.partition(":")[0]), len(text)))]


class Work:
    """One model, its prompts, and how they are decoded. right: counts right answers, None where there are none to know."""

    def __init__(self, model, prompts: list, examples: list | None, **settings: Any):
        self.model, self.prompts, self.examples, self.settings = model, prompts, examples, settings

    def run(self, cache: str) -> tuple[list, float]:
        began = time.perf_counter()
        results = unmask.generate(self.model, self.prompts, cache=cache, **self.settings)
        return results, time.perf_counter() - began

    def refusal(self, cache: str) -> str | None:
        """Why this cache does not serve these settings."""
        try:
            unmask.generate(self.model, [[1]], cache=cache, **self.settings | dict(max_new_tokens=0))
        except SettingError as error:
            return str(error)
        return None

    def right(self, results: list) -> float | None:
        if self.examples is None:
            return None
        return sum(is_right(e, r.text) for e, r in zip(self.examples, results, strict=True)) / len(results)


def measure(work: Work, served: list[str], rounds: int, bar: tqdm) -> list[dict[str, object]]:
    bar.total += len(served) * (rounds + 1)
    results, ratios = {}, {name: [] for name in served}
    for name in served:  # what is decoded; also the first, slower run of each
        results[name], _ = work.run(name)
        bar.update()
    for turn in range(rounds):
        seconds = {}
        for name in reversed(served) if turn % 2 else served:
            seconds[name] = work.run(name)[1]
            bar.update()
        seconds["none"] = (seconds["none"] + work.run("none")[1]) / 2  # at both ends of the round, or twice at one
        for name in served:
            ratios[name].append(seconds[name] / seconds["none"])
    plain = results["none"]
    rows = []
    for name in served:
        own = results[name]
        new = [pair for r, p in zip(own, plain, strict=True) for pair in itertools.zip_longest(r.ids, p.ids)]
        row: dict[str, object] = {
            "cache": name, "exact": bool(own[0].exact), "forwards": sum(r.nfe for r in own),
            "positions forwarded": f"{sum(r.rows_forwarded for r in own) / sum(r.rows_forwarded for r in plain):.3f}",
            "tokens as none": f"{sum(a == b for a, b in new) / max(len(new), 1):.3f}",
        }  # fmt: skip
        if work.examples is not None:
            row["right"] = f"{work.right(own):.3f}"
        spread = sorted(ratios[name])
        rows.append(row | {"time": f"{statistics.median(spread):.2f}", "from": f"{spread[0]:.2f}", "to": f"{spread[-1]:.2f}"})
    return rows


def works(quick: bool, only: str | None) -> dict[str, Work]:
    found = {}
    if only in (None, "tiny"):
        tiny = unmask.load("tiny")
        examples = [e for task in TASKS for e in held_out_examples(task, 1 if quick else 8)]
        prompts = [e.prompt for e in examples]
        shared = dict(max_new_tokens=32, block_size=16)
        found["Embedded model, threshold 0.9"] = Work(tiny, prompts, examples, threshold=0.9, **shared)
        found["Embedded model, one token per step, left to right"] = Work(tiny, prompts, examples, policy="quota", score="leftmost", **shared)
    if only in (None, "random"):
        model = random_model(WIDE, dtype=torch.bfloat16, std=0.05)
        prompt = torch.randint(0, 32_000, (192,), generator=torch.Generator().manual_seed(1)).tolist()
        new = 32 if quick else 64
        shared = dict(max_new_tokens=new, block_size=32, eos_stop=False, policy="quota")
        found["Random bf16 model, one token per step"] = Work(model, [prompt], None, **shared)
        found["Random bf16 model, one token per step, random order"] = Work(model, [prompt], None, score="random", **shared)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="fewer prompts, one block, one round")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--only", choices=("tiny", "random"), help="one model; prints, writes nothing")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    rounds = 1 if args.quick else args.rounds
    with tqdm(total=0) as bar:
        sections, refused = {}, []
        for title, work in works(args.quick, args.only).items():
            reasons = {name: work.refusal(name) for name in cases()}
            sections[title] = measure(work, [name for name, why in reasons.items() if why is None], rounds, bar)
            refused += [f"{title}: not served: {why}" for why in reasons.values() if why is not None]
    notes = [
        *refused,
        "positions forwarded and time: of what the run without a cache takes; from, to: the lowest and highest of the rounds",
        f"time: median of {rounds} ratios, each of two runs of the same round; {args.threads} threads",
        "tokens as none: share of the new tokens that are equal at their place",
    ]
    if args.only:
        for name, rows in sections.items():
            print(f"## {name}\n\n{report.table(rows)}\n")
        return
    report.write("caches-quick" if args.quick else "caches", "Caches beside none", sections, notes)


if __name__ == "__main__":
    main()
