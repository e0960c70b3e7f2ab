"""Accuracy of an embedded model on held-out prompts, against tokens per forward, for a sweep of thresholds.

python -m unmask.tiny.evaluate [--model tiny|tiny-block|DIR] [--out bench/results] [--count 300] [--decoder unmask|plain]

A block-causal model is decoded in the blocks it was trained with, and once more with block size 1, as the autoregressive
model that it also is.
"""

from __future__ import annotations

import argparse
import csv
import json
import platform
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from tokenizers import Tokenizer
from torch import Tensor, nn
from tqdm import tqdm

from . import FOLDERS
from .network import load_model
from .sdar_network import load_block_model
from .tasks import TASKS, Example, held_out_examples, is_right

ONE_PER_STEP = 2.0
"""A threshold that no probability reaches: only the best position commits, one token per step."""
THRESHOLDS = (0.5, 0.6, 0.7, 0.8, 0.9, 0.95, 0.99, ONE_PER_STEP)


@dataclass(frozen=True)
class Decoded:
    """One decoded row: the generated ids before the first EOS, and the forwards in which the row took part."""

    ids: list[int]
    nfe: int


Decode = Callable[[list[list[int]], float, int], list[Decoded]]
"""(prompts as ids, threshold, new tokens) -> rows. The one call to replace to measure another decoder."""


@torch.inference_mode()
def decode_batch(
    network: Callable[[Tensor], Tensor],
    canvas: Tensor,
    prompt_length: int,
    threshold: float,
    mask_id: int,
    eos_id: int,
) -> list[Decoded]:
    """Denoise rows of equal prompt length as one block: canvas int64 [B, L], masks after `prompt_length`.

    Each step commits, in every row, the masked positions whose confidence reaches the threshold, and the best one
    always (ties: lowest position). The mask id cannot win but stays in the softmax's sum. A row ends when everything
    before its first EOS is decided.
    """
    canvas = canvas.clone()
    rows = torch.arange(canvas.shape[0])
    live = rows
    nfe = torch.zeros(len(rows), dtype=torch.int64)
    while len(live):
        x = canvas[live]
        logits = network(x).float()
        log_sum = logits.logsumexp(-1)
        logits[..., mask_id] = -torch.inf
        best, token = logits.max(-1)
        masked = x == mask_id
        confidence = torch.where(masked, (best - log_sum).exp(), -1.0)
        commit = masked & (confidence >= threshold)
        commit[torch.arange(len(live)), confidence.argmax(-1)] = True
        x = torch.where(commit, token, x)
        canvas[live] = x
        nfe[live] += 1
        answer = x[:, prompt_length:]
        ended = (answer == eos_id).int().cumsum(-1) > 0
        live = live[((answer == mask_id) & ~ended).any(-1)]
    done = []
    for row in rows.tolist():
        ids = canvas[row, prompt_length:].tolist()
        done.append(Decoded(ids[: ids.index(eos_id)] if eos_id in ids else ids, int(nfe[row])))
    return done


@torch.inference_mode()
def decode_blocks(
    network: nn.Module, canvas: Tensor, prompt_length: int, threshold: float, mask_id: int, eos_id: int, block_size: int
) -> list[Decoded]:
    """`decode_batch` for a block-causal network: blocks end at multiples of `block_size` and are filled one after the other.

    What is behind a block is not computed. A row ends with the block of its first EOS, or as soon as all before it is decided.
    """
    done: list[Decoded | None] = [None] * canvas.shape[0]
    live, nfe, rows = torch.arange(canvas.shape[0]), [0] * canvas.shape[0], canvas.clone()

    def forward(ids: Tensor) -> Tensor:
        return network(ids, block_size)

    for end in range((prompt_length // block_size + 1) * block_size, canvas.shape[1] + block_size, block_size):
        if not len(live):
            break
        end = min(end, canvas.shape[1])
        part = decode_batch(forward, rows[live, :end], prompt_length, threshold, mask_id, eos_id)
        go_on = []
        for i, row in zip(live.tolist(), part, strict=True):
            nfe[i] += row.nfe
            rows[i, prompt_length : prompt_length + len(row.ids)] = torch.tensor(row.ids, dtype=torch.int64)
            done[i] = Decoded(row.ids, nfe[i])
            if prompt_length + len(row.ids) == end:
                go_on.append(i)
        live = torch.tensor(go_on, dtype=torch.int64)
    return [row for row in done if row is not None]


def plain_decoder(network: nn.Module, mask_id: int, eos_id: int, block_size: int | None = None) -> Decode:
    """The pure-PyTorch decoder: prompts of one length at a time, so that no padding is needed. block_size: of a block-causal network."""

    def decode(prompts: list[list[int]], threshold: float, new_tokens: int) -> list[Decoded]:
        out: list[Decoded | None] = [None] * len(prompts)
        for length in sorted({len(p) for p in prompts}):
            chosen = [i for i, p in enumerate(prompts) if len(p) == length]
            canvas = torch.full((len(chosen), length + new_tokens), mask_id)
            canvas[:, :length] = torch.tensor([prompts[i] for i in chosen])
            if block_size is None:
                rows = decode_batch(network, canvas, length, threshold, mask_id, eos_id)
            else:
                rows = decode_blocks(network, canvas, length, threshold, mask_id, eos_id, block_size)
            for i, row in zip(chosen, rows, strict=True):
                out[i] = row
        return [row for row in out if row is not None]

    return decode


def trained_blocks(folder: Path) -> int | None:
    """Block size of a block-causal checkpoint; None for one that sees the whole canvas."""
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    return int(config["block_size"]) if config["model_type"] == "sdar" else None


def plain_decoder_of(folder: Path, block_size: int | None = None) -> Decode:
    """The pure-PyTorch decoder on the checkpoint in `folder`. block_size: another than a block-causal one was trained with."""
    trained = trained_blocks(folder)
    network, config = load_model(folder) if trained is None else load_block_model(folder)
    return plain_decoder(network, int(config["mask_token_id"]), int(config["eos_token_id"]), trained and (block_size or trained))


def library_decoder(folder: Path, block_size: int | None = None) -> Decode:
    """`unmask.generate` on the same checkpoint, all prompts as one ragged batch.

    The canvas is one block, or (block-causal) is decoded in the blocks that were trained; block_size: in others, which attention then has too.
    """
    import unmask

    model = unmask.load(folder, overrides=None if block_size is None else {"block_size": block_size})
    trained = trained_blocks(folder)

    def decode(prompts: list[list[int]], threshold: float, new_tokens: int) -> list[Decoded]:
        rule = {"policy": "quota"} if threshold == ONE_PER_STEP else {"threshold": threshold}
        size = new_tokens if trained is None else block_size or trained
        results = unmask.generate(model, prompts, max_new_tokens=new_tokens, block_size=size, **rule)
        return [Decoded(list(result.ids), result.nfe) for result in results]

    return decode


@dataclass(frozen=True)
class Score:
    """Result of one task at one threshold. Tokens per forward counts the answer's tokens before the first EOS."""

    task: str
    threshold: float
    prompts: int
    right: int
    accuracy: float
    tokens: int
    nfe: int
    tokens_per_forward: float


def score(
    examples: list[Example], tokenizer: Tokenizer, decode: Decode, threshold: float, new_tokens: int
) -> Score:
    """Decode the prompts of one task and judge the text by the task's checker."""
    rows = decode([tokenizer.encode(e.prompt).ids for e in examples], threshold, new_tokens)
    right = sum(is_right(e, tokenizer.decode(row.ids)) for e, row in zip(examples, rows, strict=True))
    tokens, nfe = sum(len(row.ids) for row in rows), sum(row.nfe for row in rows)
    return Score(
        examples[0].task,
        threshold,
        len(examples),
        right,
        right / len(examples),
        tokens,
        nfe,
        tokens / max(nfe, 1),
    )


def one_per_step_accuracy(
    network: nn.Module, tokenizer: Tokenizer, mask_id: int, eos_id: int, count: int, new_tokens: int = 24
) -> dict[str, float]:
    """Held-out accuracy of every task, one token per step: the number printed during and after training."""
    decode = plain_decoder(network, mask_id, eos_id)
    return {
        name: score(held_out_examples(name, count), tokenizer, decode, ONE_PER_STEP, new_tokens).accuracy
        for name in TASKS
    }


def block_accuracy(
    network: nn.Module, tokenizer: Tokenizer, mask_id: int, eos_id: int, count: int, block_size: int, new_tokens: int = 24
) -> dict[str, float]:
    """`one_per_step_accuracy` of a block-causal network at a block size; 1 decodes as an autoregressive model does."""
    decode = plain_decoder(network, mask_id, eos_id, block_size)
    return {
        name: score(held_out_examples(name, count), tokenizer, decode, ONE_PER_STEP, new_tokens).accuracy
        for name in TASKS
    }


def _label(threshold: float) -> str:
    return "one per step" if threshold == ONE_PER_STEP else f"{threshold:g}"


def table(scores: list[Score], alone: list[Score] | None = None) -> str:
    """Markdown table: a row per threshold, accuracy per task, then averages and tokens per forward. alone: with block size 1."""
    lines = [
        "| threshold | " + " | ".join(TASKS) + " | average | single-answer | many-answer | tokens/forward |"
    ]
    lines.append("|---" * (len(TASKS) + 5) + "|")
    many = [name for name, task in TASKS.items() if task.many_answers]
    sweep = [
        (_label(threshold), [s for s in scores if s.threshold == threshold])
        for threshold in sorted({s.threshold for s in scores})
    ]
    for label, row in [*sweep, *([("block size 1", alone)] if alone else [])]:
        by_task = {s.task: s for s in row}
        accuracy = {name: by_task[name].accuracy for name in TASKS}
        groups = (list(TASKS), [n for n in TASKS if n not in many], many)
        means = [sum(accuracy[n] for n in group) / len(group) for group in groups]
        speed = sum(s.tokens for s in by_task.values()) / sum(s.nfe for s in by_task.values())
        cells = [f"{100 * v:.1f}" for v in (*accuracy.values(), *means)]
        lines.append(f"| {label} | " + " | ".join(cells) + f" | {speed:.2f} |")
    return "\n".join(lines) + "\n"


def plot(scores: list[Score], path: Path) -> None:
    """Accuracy against tokens per forward, one line per task, one point per threshold."""
    try:
        import matplotlib
    except ImportError:
        raise SystemExit(
            "the plot needs matplotlib: pip install 'unmask[plot]' (the numbers are written)"
        ) from None

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, panels = plt.subplots(1, 2, figsize=(12, 4.8), sharey=True)
    for name, task in TASKS.items():
        mine = sorted((s for s in scores if s.task == name), key=lambda s: s.threshold)
        panel = panels[int(task.many_answers)]
        panel.plot(
            [s.tokens_per_forward for s in mine], [100 * s.accuracy for s in mine], marker="o", label=name
        )
        if task.many_answers:
            for s in mine:
                panel.annotate(_label(s.threshold), (s.tokens_per_forward, 100 * s.accuracy), fontsize=7)
    for panel, title in zip(panels, ("one right answer", "many right answers"), strict=True):
        panel.set(title=title, xlabel="tokens per forward", ylim=(-3, 103))
        panel.grid(alpha=0.3)
        panel.legend()
    panels[0].set_ylabel("held-out accuracy, %")
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    plt.close(figure)


def main(argv: list[str] | None = None) -> None:
    """Command line: sweep the thresholds, write tiny-sweep.* or tiny-block-sweep.{csv,json,md,png}, print the table."""
    parser = argparse.ArgumentParser(prog="python -m unmask.tiny.evaluate", description=__doc__)
    parser.add_argument(
        "--model", default="tiny", help="tiny (default), tiny-block, or a checkpoint folder of either layout"
    )
    parser.add_argument("--out", type=Path, default=Path("bench/results"), help="where results are written")
    parser.add_argument(
        "--count", type=int, default=300, help="held-out prompts per task (fewer where there are fewer)"
    )
    parser.add_argument(
        "--decoder", choices=("unmask", "plain"), default="unmask", help="plain: no compiled parts"
    )
    parser.add_argument("--new-tokens", type=int, default=32)
    parser.add_argument("--threads", type=int, default=2)
    args = parser.parse_args(argv)
    torch.set_num_threads(args.threads)

    folder = FOLDERS.get(args.model) or Path(args.model)
    if not (folder / "config.json").is_file():
        parser.error(f"--model must be {', '.join(FOLDERS)} or a checkpoint folder, and {folder} holds no config.json")
    block_size = trained_blocks(folder)
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    make = library_decoder if args.decoder == "unmask" else plain_decoder_of
    decode, decode_alone = make(folder), None if block_size is None else make(folder, 1)
    started, cpu = time.perf_counter(), time.process_time()
    scores, alone = [], []
    for name in tqdm(TASKS, desc="tasks"):
        examples = held_out_examples(name, args.count)
        scores += [score(examples, tokenizer, decode, t, args.new_tokens) for t in THRESHOLDS]
        if decode_alone is not None:
            alone.append(score(examples, tokenizer, decode_alone, ONE_PER_STEP, args.new_tokens))
    args.out.mkdir(parents=True, exist_ok=True)
    report = {
        "command": "python -m unmask.tiny.evaluate" + ("" if args.model == "tiny" else f" --model {args.model}"),
        "decoder": args.decoder,
        "machine": platform.processor() or platform.machine(),
        "torch": torch.__version__,
        "threads": args.threads,
        "new_tokens": args.new_tokens,
        "seconds": round(time.perf_counter() - started, 1),
        "cpu_seconds": round(time.process_time() - cpu, 1),
        "one_per_step_threshold": ONE_PER_STEP,
        "scores": [asdict(s) for s in scores],
    }
    if block_size is not None:
        report |= {"block_size": block_size, "block_size_1": [asdict(s) for s in alone]}
    stem = "tiny-sweep" if block_size is None else "tiny-block-sweep"
    (args.out / f"{stem}.json").write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    with (args.out / f"{stem}.csv").open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, fieldnames=list(asdict(scores[0])), lineterminator="\n")
        writer.writeheader()
        writer.writerows(asdict(s) for s in scores)
    (args.out / f"{stem}.md").write_text(table(scores, alone), encoding="utf-8")
    print(table(scores, alone))
    plot(scores, args.out / f"{stem}.png")


if __name__ == "__main__":
    main()
