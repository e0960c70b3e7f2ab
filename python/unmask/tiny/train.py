"""Train the embedded models on data made here: seeded, resumable, on two CPU cores or one GPU.

    python -m unmask.tiny.train --out runs/tiny [--steps N] [--seed S] [--resume] [--dtype auto|fp32|bf16]
    python -m unmask.tiny.train --model tiny-block --out runs/tiny-block

`tiny` starts from nothing. Its block-causal sibling starts from the embedded model's weights, put into SDAR's layout.

Every step's data depend on (seed, step) alone, so an interrupted run that is resumed sees what an uninterrupted one
sees. State is kept as safetensors (weights, their running average, AdamW moments) and JSON.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

# before torch is imported: threads that spin while they wait made a step 8 times slower on a shared machine
os.environ.setdefault("OMP_WAIT_POLICY", "passive")
# ruff: noqa: E402
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer
from torch import Tensor
from tqdm import tqdm

from . import MODEL_DIR
from .block_causal import BlockBatch, make_block_batch
from .evaluate import block_accuracy, one_per_step_accuracy
from .network import Network, Shape, load_model, save_model
from .sdar_network import BlockNetwork, from_llada, save_block_model
from .tasks import training_examples
from .tokenizer import EOS, MASK, build_tokenizer, write_tokenizer


def _shares(**shares: float) -> dict[str, float]:
    return shares


Kind = tuple[int, int, dict[str, float]]
"""(row length: prompt + canvas, how often in 100 steps, shares of the tasks that fit)."""


def _start() -> tuple[Kind, ...]:
    shares = _shares(
        add=0.14, sort=0.18, reverse=0.16, close=0.14, json=0.12, function=0.08, pair=0.11, finish=0.13
    )
    no_json = {name: share for name, share in shares.items() if name != "json"}
    return (26, 50, no_json), (32, 28, shares), (40, 12, shares), (56, 6, shares), (72, 4, shares)


def _by_length(brief: dict[str, float], middle: dict[str, float], long: dict[str, float]) -> tuple[Kind, ...]:
    return (18, 45, brief), (26, 30, middle), (32, 12, long), (40, 6, long), (56, 4, long), (72, 3, long)


STAGES: tuple[tuple[int, tuple[Kind, ...]], ...] = (
    (0, _start()),
    (
        500,
        _by_length(
            _shares(add=0.22, sort=0.29, reverse=0.31, pair=0.18),
            _shares(add=0.05, sort=0.1, reverse=0.1, pair=0.05, close=0.27, finish=0.28, function=0.15),
            _shares(
                add=0.07,
                sort=0.09,
                reverse=0.09,
                pair=0.06,
                close=0.16,
                finish=0.16,
                function=0.13,
                json=0.24,
            ),
        ),
    ),
    (
        1500,
        _by_length(
            _shares(add=0.38, sort=0.13, reverse=0.27, pair=0.22),
            _shares(add=0.15, sort=0.05, reverse=0.14, pair=0.1, close=0.08, finish=0.32, function=0.16),
            _shares(
                add=0.1, sort=0.06, reverse=0.1, pair=0.08, close=0.08, finish=0.17, function=0.14, json=0.27
            ),
        ),
    ),
    (
        2000,
        _by_length(
            _shares(add=0.3, sort=0.25, reverse=0.23, pair=0.22),
            _shares(add=0.06, sort=0.07, reverse=0.07, pair=0.15, close=0.04, finish=0.44, function=0.17),
            _shares(
                add=0.08,
                sort=0.08,
                reverse=0.08,
                pair=0.12,
                close=0.05,
                finish=0.26,
                function=0.19,
                json=0.14,
            ),
        ),
    ),
    (
        2700,
        _by_length(
            _shares(add=0.12, sort=0.27, reverse=0.16, pair=0.45),
            _shares(add=0.04, sort=0.16, reverse=0.08, pair=0.32, close=0.03, finish=0.12, function=0.25),
            _shares(
                add=0.08, sort=0.16, reverse=0.1, pair=0.2, close=0.04, finish=0.1, function=0.22, json=0.1
            ),
        ),
    ),
    (
        3500,
        _by_length(
            _shares(add=0.08, sort=0.22, reverse=0.12, pair=0.58),
            _shares(add=0.03, sort=0.12, reverse=0.07, pair=0.5, close=0.03, finish=0.1, function=0.15),
            _shares(
                add=0.08, sort=0.12, reverse=0.08, pair=0.36, close=0.04, finish=0.08, function=0.14, json=0.1
            ),
        ),
    ),
)
"""(from step, kinds of rows). Rows are mostly as short as their tasks allow, for speed; some are long, so that long
canvases work too. The first steps use longer rows: what fills a canvas after an answer is learned there. Closing
brackets and JSON are learned first, adding and the many-answer tasks last: later stages move shares accordingly."""
TAIL_WEIGHT = 0.1
"""Loss weight of the EOS tokens after the first: trivial to learn, and most of the canvas."""


@dataclass
class Batch:
    """One step's rows: ids with masks [B, L], the clean ids [B, L], and loss weights [B, L] (0 where not masked)."""

    noisy: Tensor
    clean: Tensor
    weight: Tensor

    def to(self, device: torch.device) -> Batch:
        return Batch(self.noisy.to(device), self.clean.to(device), self.weight.to(device))

    def loss(self, network: Network) -> Tensor:
        """Weighted cross entropy over the masked positions; the head runs on those only."""
        chosen = self.weight > 0
        logits = network.head(network.hidden(self.noisy)[chosen]).float()
        weight = self.weight[chosen]
        return (F.cross_entropy(logits, self.clean[chosen], reduction="none") * weight).sum() / weight.sum()


def make_batch(tokenizer: Tokenizer, seed: int, step: int, rows: int) -> Batch:
    """Draw examples and mask them as LLaDA does: prompts stay clean, a ratio t ~ U(0, 1] per row, weight 1/t (bounded).

    The canvas is filled with EOS after the answer. In half of the rows the EOS tail has a ratio of its own (0 in half
    of those): decoding commits the tail early, so a known tail with an unknown answer is what the model meets most.
    """
    rng = random.Random(f"{seed} step {step}")
    kinds = next(kinds for begin, kinds in reversed(STAGES) if step >= begin)
    length, _, shares = rng.choices(kinds, [often for _, often, _ in kinds])[0]
    examples = training_examples(rows, rng, shares)
    mask_id, eos_id = tokenizer.token_to_id(MASK), tokenizer.token_to_id(EOS)
    prompts = tokenizer.encode_batch_fast([e.prompt for e in examples])
    wholes = tokenizer.encode_batch_fast([f"{e.prompt} {e.answer}" for e in examples])
    clean = torch.full((rows, length), eos_id)
    begin = torch.tensor([len(p.ids) for p in prompts])[:, None]
    end = torch.tensor([len(w.ids) for w in wholes])[:, None]
    for row, whole in enumerate(wholes):
        clean[row, : len(whole.ids)] = torch.tensor(whole.ids)

    generator = torch.Generator().manual_seed(rng.getrandbits(62))
    position = torch.arange(length)[None]
    answer = (position >= begin) & (position <= end)  # with its first EOS
    tail = position > end
    ratio = 1 - torch.rand(rows, 1, generator=generator)
    kind = torch.rand(rows, 1, generator=generator)
    own = torch.rand(rows, 1, generator=generator)
    tail_ratio = torch.where(kind < 0.5, ratio, torch.where(kind < 0.75, own, torch.zeros_like(own)))
    draw = torch.rand(rows, length, generator=generator)
    masked = (answer & (draw < ratio)) | (tail & (draw < tail_ratio))
    weight = torch.where(answer, 1.0, TAIL_WEIGHT) / ratio.clamp(min=0.4) * masked
    return Batch(torch.where(masked, mask_id, clean), clean, weight)


def learning_rate(step: int, steps: int, peak: float) -> float:
    """Warm up over 200 steps, hold, and go down to zero along a straight line over the last 40% of the run.

    The hold makes the beginning of a run independent of `steps`: a run resumed with fewer steps equals a short one.
    """
    down = max(1, int(0.4 * steps))
    return peak * min(1.0, (step + 1) / 200, (steps - step) / down)


@dataclass
class Run:
    """What a checkpoint holds: network, running average of its weights, optimizer, and where the run stands."""

    network: Network | BlockNetwork
    average: dict[str, Tensor]
    optimizer: torch.optim.AdamW
    step: int = 0
    cpu_seconds: float = 0.0
    seconds: float = 0.0

    def save(self, folder: Path) -> None:
        """Write state.safetensors and state.json under new names, then rename (the JSON last: it names the file)."""
        tensors: dict[str, Tensor] = {}
        for name, weight in self.network.named_parameters():
            state = self.optimizer.state[weight]
            tensors |= {f"weight/{name}": weight.detach(), f"average/{name}": self.average[name]}
            tensors |= {f"m/{name}": state["exp_avg"], f"v/{name}": state["exp_avg_sq"]}
        file = f"state-{self.step}.safetensors"
        save_file({n: t.cpu().contiguous() for n, t in tensors.items()}, folder / (file + ".part"))
        (folder / (file + ".part")).replace(folder / file)
        facts = {"file": file, "step": self.step, "cpu_seconds": self.cpu_seconds, "seconds": self.seconds}
        (folder / "state.json.part").write_text(json.dumps(facts), encoding="utf-8")
        (folder / "state.json.part").replace(folder / "state.json")
        for old in folder.glob("state-*.safetensors"):
            if old.name != file:
                old.unlink()

    def load(self, folder: Path) -> None:
        """Read what `save` wrote into this run's network, average and optimizer."""
        facts = json.loads((folder / "state.json").read_text(encoding="utf-8"))
        tensors = load_file(folder / facts["file"])
        names = {n.removeprefix("weight/") for n in tensors if n.startswith("weight/")}
        if names != {n for n, _ in self.network.named_parameters()}:
            raise SystemExit(f"{folder} holds a run of another model: give the --model that it was started with, or name another folder")
        self.step, self.cpu_seconds, self.seconds = facts["step"], facts["cpu_seconds"], facts["seconds"]
        with torch.no_grad():
            for name, weight in self.network.named_parameters():
                weight.copy_(tensors[f"weight/{name}"])
                self.average[name].copy_(tensors[f"average/{name}"])
                self.optimizer.state[weight] = {
                    "step": torch.tensor(float(self.step)),
                    "exp_avg": tensors[f"m/{name}"].to(weight.device),
                    "exp_avg_sq": tensors[f"v/{name}"].to(weight.device),
                }


def new_run(shape: Shape, seed: int, device: torch.device) -> Run:
    """A run from fresh weights, drawn from the seed."""
    network = Network(shape)
    network.initialise(torch.Generator().manual_seed(seed))
    return run_of(network, device)


def converted_run(seed: int, device: torch.device) -> Run:
    """A run of the block-causal sibling from the embedded model's weights; the seed draws the rows that fit its new norms."""
    source, _ = load_model(MODEL_DIR)
    return run_of(from_llada(source, make_batch(build_tokenizer(), seed, STAGES[-1][0], 128).noisy), device)


def run_of(network: Network | BlockNetwork, device: torch.device, weight_decay: float = 0.05) -> Run:
    """A run at its beginning; norms are not decayed."""
    network.to(device)
    matrices = [w for w in network.parameters() if w.dim() == 2]
    vectors = [w for w in network.parameters() if w.dim() < 2]
    groups = [{"params": matrices, "weight_decay": weight_decay}, {"params": vectors, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.98), fused=True)
    return Run(network, {n: w.detach().clone() for n, w in network.named_parameters()}, optimizer)


def one_step(run: Run, batch: Batch | BlockBatch, rate: float, dtype: torch.dtype) -> float:
    """Forward, backward, clip to norm 1, AdamW, running average; returns the loss."""
    device = next(run.network.parameters()).device
    batch = batch.to(device)
    for group in run.optimizer.param_groups:
        group["lr"] = rate
    with torch.autocast(device.type, dtype=dtype, enabled=dtype != torch.float32):
        loss = batch.loss(run.network)
    run.optimizer.zero_grad(set_to_none=True)
    loss.backward()
    torch.nn.utils.clip_grad_norm_(run.network.parameters(), 1.0)
    run.optimizer.step()
    decay = min(0.99, (run.step + 1) / (run.step + 10))
    with torch.no_grad():
        weights = [w.detach() for w in run.network.parameters()]
        torch._foreach_lerp_(list(run.average.values()), weights, 1 - decay)
    run.step += 1
    return float(loss.detach())


@dataclass(frozen=True)
class Recipe:
    """What differs between the embedded models: the start, the rows, the default sizes of a run, and the checkpoint."""

    start: Callable[[int, torch.device], Run]
    make_batch: Callable[[Tokenizer, int, int, int], Batch | BlockBatch]
    save: Callable[[Path, Run, int, int], None]
    judge: Callable[[Run, Tokenizer, int, int, int], dict[str, float]]
    steps: int
    rows: int
    peak: float


def _judge_network(run: Run) -> Network | BlockNetwork:
    """The averaged weights on the CPU in fp32."""
    judge = type(run.network)(run.network.shape).eval()
    judge.load_state_dict({n: w.cpu() for n, w in run.average.items()})
    return judge


def _judge_block(run: Run, tokenizer: Tokenizer, mask_id: int, eos_id: int, count: int) -> dict[str, float]:
    """Accuracy at the model's block size, one token per step; then the same of block size 1 (autoregressive), names marked."""
    judge = _judge_network(run)
    accuracy = block_accuracy(judge, tokenizer, mask_id, eos_id, count, judge.shape.block_size)
    alone = block_accuracy(judge, tokenizer, mask_id, eos_id, count, 1)
    return accuracy | {f"{name}@1": value for name, value in alone.items()}


RECIPES: dict[str, Recipe] = {
    "tiny": Recipe(
        start=lambda seed, device: new_run(Shape(vocab_size=build_tokenizer().get_vocab_size()), seed, device),
        make_batch=make_batch,
        save=lambda folder, run, mask_id, eos_id: save_model(folder, run.network.shape, run.average, mask_id, eos_id),
        judge=lambda run, *rest: one_per_step_accuracy(_judge_network(run), *rest),
        steps=3900,
        rows=128,
        peak=2e-3,
    ),
    "tiny-block": Recipe(
        start=converted_run,
        make_batch=make_block_batch,
        save=lambda folder, run, mask_id, eos_id: save_block_model(folder, run.network.shape, run.average, mask_id, eos_id),
        judge=_judge_block,
        steps=1700,
        rows=96,
        peak=1.5e-3,
    ),
}


def faster_dtype(recipe: Recipe, tokenizer: Tokenizer, device: torch.device, rows: int) -> torch.dtype:
    """fp32 or bf16 autocast, by timing three steps of a throw-away run with each (half the CPUs lack bf16 units)."""
    seconds = {}
    for dtype in (torch.float32, torch.bfloat16):
        trial = recipe.start(0, device)
        batch = recipe.make_batch(tokenizer, 0, 0, rows)
        one_step(trial, batch, 0.0, dtype)
        started = time.perf_counter()
        for _ in range(3):
            one_step(trial, batch, 0.0, dtype)
        seconds[dtype] = time.perf_counter() - started
    print("seconds for 3 steps:", {str(d): round(s, 2) for d, s in seconds.items()}, flush=True)
    return min(seconds, key=seconds.__getitem__)


def export(recipe: Recipe, run: Run, tokenizer: Tokenizer, folder: Path) -> None:
    """Write the averaged weights as a checkpoint with its tokenizer."""
    recipe.save(folder, run, tokenizer.token_to_id(MASK), tokenizer.token_to_id(EOS))
    write_tokenizer(folder)


def held_out_accuracy(recipe: Recipe, run: Run, tokenizer: Tokenizer, count: int) -> dict[str, float]:
    """Accuracy of the averaged weights, one token per step, on the CPU in fp32."""
    return recipe.judge(run, tokenizer, tokenizer.token_to_id(MASK), tokenizer.token_to_id(EOS), count)


def _percent(accuracy: dict[str, float]) -> str:
    mean = sum(accuracy.values()) / len(accuracy)
    return "  ".join(f"{name} {100 * value:.1f}" for name, value in {**accuracy, "average": mean}.items())


def _defaults(field: str) -> str:
    return ", ".join(f"{getattr(recipe, field)} ({name})" for name, recipe in RECIPES.items())


def parse(argv: list[str] | None) -> argparse.Namespace:
    """Command line options; the defaults are those the embedded models were trained with."""
    parser = argparse.ArgumentParser(
        prog="python -m unmask.tiny.train", description="Train an embedded model."
    )
    parser.add_argument("--model", choices=tuple(RECIPES), default="tiny", help="which one (default tiny)")
    parser.add_argument(
        "--out", type=Path, required=True, help="folder for the state and, under model/, the checkpoint"
    )
    parser.add_argument("--steps", type=int, help=f"default: {_defaults('steps')}")
    parser.add_argument("--rows", type=int, help=f"examples per step; default: {_defaults('rows')}")
    parser.add_argument("--peak", type=float, help=f"highest learning rate; default: {_defaults('peak')}")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--resume", action="store_true", help="go on from the state in --out")
    parser.add_argument("--dtype", choices=("auto", "fp32", "bf16"), default="auto")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--save-every", type=int, default=100)
    parser.add_argument(
        "--judge-every", type=int, default=750, help="steps between held-out checks (40 prompts a task)"
    )
    parser.add_argument("--final-count", type=int, default=300, help="held-out prompts a task at the end")
    args = parser.parse_args(argv)
    for field in ("steps", "rows", "peak"):
        if getattr(args, field) is None:
            setattr(args, field, getattr(RECIPES[args.model], field))
    return args


def main(argv: list[str] | None = None) -> None:
    """Train, saving as it goes; print held-out accuracy per task; export to OUT/model."""
    args = parse(argv)
    torch.set_num_threads(args.threads)
    device = torch.device(args.device)
    tokenizer = build_tokenizer()
    recipe = RECIPES[args.model]
    args.out.mkdir(parents=True, exist_ok=True)
    dtypes = {"fp32": torch.float32, "bf16": torch.bfloat16}
    dtype = dtypes.get(args.dtype) or faster_dtype(recipe, tokenizer, device, args.rows)
    run = recipe.start(args.seed, device)
    if args.resume:
        run.load(args.out)
    elif (args.out / "state.json").exists():
        raise SystemExit(f"{args.out} holds a run already: add --resume to go on, or name another folder")

    size = sum(w.numel() for w in run.network.parameters())
    print(
        f"{size / 1e6:.2f}M parameters, {dtype}, {device}, from step {run.step} of {args.steps}", flush=True
    )
    clock = (time.process_time() - run.cpu_seconds, time.perf_counter() - run.seconds)
    smooth = 0.0
    with tqdm(total=args.steps, initial=run.step, unit="step", mininterval=5.0) as bar:
        while run.step < args.steps:
            batch = recipe.make_batch(tokenizer, args.seed, run.step, args.rows)
            loss = one_step(run, batch, learning_rate(run.step, args.steps, args.peak), dtype)
            smooth = loss if smooth == 0.0 else smooth + 0.02 * (loss - smooth)
            bar.update()
            bar.set_postfix(loss=f"{smooth:.3f}", refresh=False)
            run.cpu_seconds, run.seconds = time.process_time() - clock[0], time.perf_counter() - clock[1]
            if run.step % args.save_every == 0 or run.step == args.steps:
                run.save(args.out)
            if run.step % args.judge_every == 0 and run.step < args.steps:
                bar.write(
                    f"step {run.step} cpu {run.cpu_seconds:.0f}s  {_percent(held_out_accuracy(recipe, run, tokenizer, 40))}"
                )
                export(recipe, run, tokenizer, args.out / "model")
    export(recipe, run, tokenizer, args.out / "model")
    print(f"trained in {run.cpu_seconds:.0f} CPU seconds, {run.seconds:.0f} s wall", flush=True)
    print(_percent(held_out_accuracy(recipe, run, tokenizer, args.final_count)), flush=True)


if __name__ == "__main__":
    main()
