"""Accuracy against tokens per forward (before EOS) of every decoding rule, on the embedded model's held-out prompts.

Every configuration of bench/quality_configs.py decodes the same prompts with the same seeds; an answer is judged by its task's checker. One JSON
line per configuration is added to --progress as it is done, and an interrupted run goes on behind the last one: lines of another commit, number of
prompts or seed do not count. Writes results/quality-<cpu>-<date>.{md,json,csv,png}; the plot needs matplotlib (pip install 'unmask[plot]').

    OMP_NUM_THREADS=1 python bench/quality.py [--quick] [--count 32] [--seed 0] [--progress build/quality.jsonl] [--fresh]
"""

from __future__ import annotations

import argparse
import json
import random
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

import machine
import quality_report
import unmask
from quality_configs import NEW_TOKENS, Config, all_configs
from unmask.decode.osdt import Table
from unmask.tiny.tasks import TASKS, Example, draw_example, held_out_examples, is_right, training_examples

PROGRESS = Path(__file__).resolve().parent.parent / "build" / "quality.jsonl"
TRAINING_ANSWERS = 4000


class Inputs:
    """Makes what a configuration names: PC-Sampler's frequencies, OSDT's table, order functions, delimiters."""

    def __init__(self, model: unmask.Model):
        self.model = model
        self._frequencies: torch.Tensor | None = None
        self._calibration: dict[str, Any] = {}

    def settings(self, config: Config, task: str) -> dict[str, Any]:
        given = dict(config.settings)
        make: dict[str, Callable[[Any], Any]] = {
            "frequencies": lambda _: self.frequencies(),
            "table": lambda name: self.table(task, name.removeprefix("one sequence: ")),
            "order_logits": ORDERS.__getitem__,
            "delimiters": lambda tokens: [self.model.tokenizer.token_to_id(t) for t in tokens],
        }
        return {name: make[name](value) if name in make else value for name, value in given.items()}

    def frequencies(self) -> torch.Tensor:
        """float64 [V]: share of each token in answers drawn as for training, all tasks alike."""
        if self._frequencies is None:
            drawn = training_examples(TRAINING_ANSWERS, random.Random("frequencies"), dict.fromkeys(TASKS, 1.0))
            ids = [t for e in drawn for t in self.model.tokenizer.encode(e.answer, add_special=False)] + [*self.model.config.eos_ids] * len(drawn)
            counts = torch.bincount(torch.tensor(ids), minlength=self.model.config.vocab_size).double()
            self._frequencies = counts / counts.sum()
        return self._frequencies

    def table(self, task: str, summary: str) -> Table:
        """From the confidences of one sequence of the task, which is not held out, decoded with threshold 0.9."""
        if task not in self._calibration:
            example = draw_example(TASKS[task], random.Random(f"calibration {task}"), held_out=False)
            self._calibration[task] = unmask.generate(
                self.model, example.prompt, max_new_tokens=NEW_TOKENS, block_size=NEW_TOKENS, threshold=0.9, trace=True
            )
        return Table.calibrate(self._calibration[task], summary=summary)


ORDERS: dict[str, Callable] = {
    "confidence": lambda step: 8.0 * step.stats.confidence.clamp_min(1e-30).log(),
    "leftmost": lambda step: -step.pos.double(),
}


def judge(model: unmask.Model, inputs: Inputs, config: Config, prompts: dict[str, list[Example]], seed: int) -> dict[str, Any]:
    """Decodes every task's prompts with one configuration: per task [right, prompts, tokens before EOS, forwards]."""
    began, tasks = time.perf_counter(), {}
    for task, examples in prompts.items():
        results = unmask.generate(
            model, [e.prompt for e in examples], max_new_tokens=NEW_TOKENS, seed=seed, **inputs.settings(config, task)
        )
        right = sum(is_right(e, r.text) for e, r in zip(examples, results, strict=True))
        tasks[task] = [right, len(examples), sum(len(r.ids) for r in results), sum(r.nfe for r in results)]
    return {"tasks": tasks, "seconds": round(time.perf_counter() - began, 3)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="one configuration per rule, two prompts per task")
    parser.add_argument("--count", type=int, help="held-out prompts per task (default 32; with --quick 2)")
    parser.add_argument("--seed", type=int, default=0, help="which prompts, and which random numbers")
    parser.add_argument("--progress", type=Path, default=PROGRESS, help="file that an interrupted run goes on from")
    parser.add_argument("--fresh", action="store_true", help="forget what --progress holds")
    args = parser.parse_args()
    count = args.count or (2 if args.quick else 32)
    torch.set_num_threads(1)  # rows are many and layers small: a second thread mostly waits

    run = {"count": count, "seed": args.seed, "new_tokens": NEW_TOKENS, "commit": machine.commit(), "version": unmask.__version__}
    if args.fresh:
        args.progress.unlink(missing_ok=True)
    done = read_progress(args.progress, run)
    configs = all_configs(args.quick)
    model = unmask.load("tiny")
    inputs = Inputs(model)
    prompts = {task: held_out_examples(task, count, args.seed) for task in TASKS}
    args.progress.parent.mkdir(parents=True, exist_ok=True)
    with args.progress.open("a") as file:
        for config in tqdm(configs, unit="configuration"):
            if config.key not in done:
                done[config.key] = judge(model, inputs, config, prompts, args.seed)
                file.write(json.dumps({"run": run, "key": config.key, **done[config.key]}) + "\n")
                file.flush()
    quality_report.write(configs, [done[c.key] for c in configs], run, quick=args.quick)


def read_progress(path: Path, run: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """key -> result of the lines that this run made; a line cut short by an interruption is left out."""
    found: dict[str, dict[str, Any]] = {}
    if not path.exists():
        return found
    text = path.read_text()
    if text and not text.endswith("\n"):  # the next line must not join the one that was cut
        path.write_text(text + "\n")
    for line in text.splitlines():
        try:
            row = json.loads(line)
        except ValueError:
            continue
        if row["run"] == run:
            found[row["key"]] = {"tasks": row["tasks"], "seconds": row["seconds"]}
    return found


if __name__ == "__main__":
    main()
