"""S2D2 beside the dynamic threshold that it drafts with, on the embedded block-causal model: forwards, and accuracy on held-out prompts.

Every configuration decodes the same held-out prompts of every task (unmask.tiny.tasks) as one batch per task, and an answer is judged by its
task's checker. Forwards are those of rows (Result.nfe, verifications included), rows are positions forwarded. "autoregressive" is the same
model with block size 1, the reading that verifies.

Wanted: fewer forwards than the dynamic threshold at equal or better accuracy.

    OMP_NUM_THREADS=1 python bench/bench_s2d2.py [--quick] [--count 60]
"""

from __future__ import annotations

import argparse
from typing import Any

import torch

import report
import unmask
from unmask.tiny.tasks import TASKS, held_out_examples, is_right

NEW_TOKENS = 32
THRESHOLDS = (0.8, 0.85, 0.9, 0.95)
PAPER = 0.85  # SDAR's threshold in the paper
GAIN = "route=score,cost=dynamic,score_threshold=1"  # a verification must promise one position more than the threshold would commit anyway
METHODS = {
    "always": "s2d2",
    "always, greedy": "s2d2:mode=greedy",
    "spans of 2 and more": "s2d2:min_span=2",
    "score, static cost 1": "s2d2:route=score,score_threshold=0,cost_coef=1",
    "hysteresis 1 / -5, dynamic cost": "s2d2:route=hysteresis,on=1,off=-5,cost=dynamic",
    "UCB": "s2d2:route=ucb",
    "gain of 1": f"s2d2:{GAIN}",
    "gain of 1, greedy": f"s2d2:mode=greedy,{GAIN}",
    "gain of 1, greedy, confident ones too": f"s2d2:mode=greedy,{GAIN},always_high_confidence=true",
}
WIDE = (8, 16)  # blocks longer than the trained ones: more masks that wait for each other


def configurations() -> dict[str, dict[str, Any]]:
    """Name -> settings of generate."""
    out: dict[str, dict[str, Any]] = {f"threshold {t}": dict(threshold=t) for t in THRESHOLDS}
    out |= {f"S2D2 {name}": dict(threshold=PAPER, speculate=method) for name, method in METHODS.items()}
    return out


def measure(model: unmask.Model, examples: dict[str, list], settings: dict[str, Any]) -> dict[str, Any]:
    """The row of one configuration."""
    right = prompts = tokens = nfe = drafted = accepted = 0
    forwarded = 0.0
    for task, chosen in examples.items():
        ids = [model.tokenizer.encode(e.prompt) for e in chosen]
        results = unmask.generate(model, ids, max_new_tokens=NEW_TOKENS, seed=len(task), **settings)
        right += sum(is_right(e, r.text) for e, r in zip(chosen, results, strict=True))
        prompts += len(chosen)
        tokens += sum(len(r.ids) for r in results)
        nfe += sum(r.nfe for r in results)
        forwarded += sum(r.rows_forwarded for r in results)
        drafted += sum(r.drafted for r in results)
        accepted += sum(r.accepted for r in results)
    return {
        "accuracy": right / prompts, "forwards": nfe, "tokens a forward": tokens / nfe, "rows": forwarded, "tokens a row": tokens / forwarded,
        "accepted": accepted / drafted if drafted else "",
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, default=60, help="held-out prompts a task (default: 60; fewer where there are fewer)")
    parser.add_argument("--quick", action="store_true", help="two prompts a task: shows that the script works, measures nothing")
    args = parser.parse_args()
    torch.set_num_threads(1)
    count = 2 if args.quick else args.count
    examples = {task: held_out_examples(task, count) for task in TASKS}
    model, alone = unmask.load("tiny-block"), unmask.load("tiny-block", overrides={"block_size": 1})
    wide = []
    for size in WIDE:
        model_of = unmask.load("tiny-block", overrides={"block_size": size})
        for name in ("", "always, greedy", "gain of 1, greedy"):
            settings = dict(policy="sdar_dynamic", threshold=PAPER) | (dict(speculate=METHODS[name]) if name else {})
            label = f"block {size}, " + (f"S2D2 {name}" if name else f"threshold {PAPER}")
            wide.append({"configuration": label} | measure(model_of, examples, settings))
    rows = [{"configuration": "autoregressive"} | measure(alone, examples, dict(policy="quota"))]
    for name, settings in configurations().items():
        rows.append({"configuration": name} | measure(model, examples, dict(policy="sdar_dynamic") | settings))
    base = next(r for r in rows if r["configuration"] == f"threshold {PAPER}")
    better = [r for r in rows if r["configuration"].startswith("S2D2") and r["forwards"] < base["forwards"] and r["accuracy"] >= base["accuracy"]]
    notes = [
        f"{sum(len(e) for e in examples.values())} held-out prompts, {NEW_TOKENS} new tokens, block size {model.config.block_size}, fp32; "
        f"S2D2 drafts with threshold {PAPER}",
        f"wanted: fewer forwards than threshold {PAPER} at no lower accuracy: " + (
            "reached by " + "; ".join(f"{r['configuration'].removeprefix('S2D2 ')} ({base['forwards'] / r['forwards']:.2f}x)" for r in better)
            if better else "missed"
        ),
    ]  # fmt: skip
    if args.quick:
        print(report.table(rows + wide))
        return
    sections = {"Held-out prompts": rows, "Blocks longer than the trained ones": wide}
    report.write("s2d2", "S2D2 on the embedded block-causal model", sections, notes)


if __name__ == "__main__":
    main()
