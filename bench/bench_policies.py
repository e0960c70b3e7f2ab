"""What choosing costs: one step of the decoding loop without its forward (statistics + score + rule + commit), every rule beside plain threshold.

The loop is the real one (decode/engine.py); its backend's forward costs nothing: it hands out prepared logits [32, 126464], rotated over at least
128 MB, and every step reduces all 32 rows. The state is put back before each step, inside the clock and in every case alike (`reset` in the table).
Every rule is timed in its fifth step of a block; those that read decided positions too have 16 of the 32 decided.

Wanted: at most 1.3 times plain threshold for stateless rules, 2 for stateful ones, 4 with top-p or top-k, 2.2 with classifier-free guidance. A plain
module's guidance reads two logits; a native model's combines hidden states before the head, so its cases hold the head (width 512) on both sides.
And no tensor that grows with the vocabulary beside the logits given.

    python bench/bench_policies.py [--quick] [--threads 2]
"""

from __future__ import annotations

import argparse
import ctypes
import dataclasses
import gc
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import torch
from tqdm import tqdm

import bench_memory
import report
import timing
from unmask.decode.backend import Guidance, NativeBackend, Plan
from unmask.decode.engine import Engine
from unmask.decode.logits import Kept, reduce_logits
from unmask.decode.module_backend import ModuleBackend
from unmask.decode.osdt import Table
from unmask.decode.schedule import AdaBlock, FixedBlocks
from unmask.decode.soft import SoftMasks
from unmask.decode.state import DecodeState
from unmask.decode.table import RULES
from unmask.ops import LogitStats
from unmask.ops.head_stats import Head
from unmask.ops.linear import choose_format
from unmask.settings import Settings

VOCAB, SMALL_VOCAB, BLOCK, WIDTH = 126_464, 32_768, 32, 512
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
WANTED = {"stateless": 1.3, "stateful": 2.0, "filtered": 4.0, "guidance": 2.2}
WARM_STEPS = 4


@dataclasses.dataclass(frozen=True)
class Case:
    """kind: a key of WANTED, or "" where nothing is wanted (reported only). decided: positions of the block that are decided already."""

    name: str
    kind: str
    settings: dict[str, Any]
    decided: int = 0
    adaptive: bool = False
    soft: bool = False


def cases() -> list[Case]:
    table = Table(((0.8, 0.9), (0.7,)))
    bias = lambda step: -step.pos.double()  # noqa: E731
    stateless = [
        ("threshold", {}), ("threshold, margin", dict(score="margin")), ("threshold, entropy", dict(score="entropy", threshold=-0.3)),
        ("threshold, dinfer", dict(variant="dinfer")), ("threshold, minimum 2", dict(minimum=2)),
        ("threshold, position_bias", dict(position_bias=0.01)), ("threshold, suppress", dict(suppress=(5, 6))),
        ("quota", dict(policy="quota")), ("quota, random", dict(policy="quota", score="random")),
        ("quota, leftmost", dict(policy="quota", score="leftmost")), ("quota, score function", dict(policy="quota", score=bias)),
        ("factor", dict(policy="factor")), ("factor, d2cache", dict(policy="factor", variant="d2cache")),
        ("eb", dict(policy="eb")), ("eb, d2cache", dict(policy="eb", variant="d2cache")), ("pc", dict(policy="pc", frequencies="even")),
        ("dus", dict(policy="dus")), ("dus, skip", dict(policy="dus", skip_below=0.5)), ("sdar_static", dict(policy="sdar_static")),
        ("sdar_dynamic", dict(policy="sdar_dynamic")), ("llada2", dict(policy="llada2")), ("sprint", dict(policy="sprint")),
        ("hierarchy", dict(policy="hierarchy")),
        ("dream, entropy", dict(policy="dream")), ("dream, origin", dict(policy="dream", alg="origin")),
        ("dream, alg_temp", dict(policy="dream", alg_temp=0.5)), ("plackett_luce", dict(policy="plackett_luce", order_logits=bias)),
    ]  # fmt: skip
    stateful = [
        Case("klass", "stateful", dict(policy="klass")), Case("slowfast", "stateful", dict(policy="slowfast")),
        Case("credit", "stateful", dict(policy="credit")), Case("osdt", "stateful", dict(policy="osdt", table=table)),
        Case("edit", "stateful", dict(policy="edit"), 16), Case("wino", "stateful", dict(policy="wino"), 16),
        *(Case(f"remdm, {s}", "stateful", dict(policy="remdm", strategy=s)) for s in ("cap", "rescale", "conf", "loop")),
        Case("remask", "stateful", dict(policy="remask", start_ratio=0.1), 16),
        Case("threshold, certainty_sigma", "stateful", dict(certainty_sigma=3.0)),
        Case("threshold, soft masks", "stateful", {}, soft=True), Case("threshold, adablock opens a block", "stateful", {}, adaptive=True),
    ]  # fmt: skip
    return [
        *(Case(name, "stateless", settings) for name, settings in stateless), *stateful,
        Case("threshold, top_p", "filtered", dict(top_p=0.9)), Case("threshold, top_k", "filtered", dict(top_k=50)),
        Case("threshold, both, tempered", "filtered", dict(top_p=0.9, top_k=50, temperature=0.7)),
        Case("threshold, guidance", "guidance", dict(cfg_scale=1.0)),
        Case("threshold, temperature", "", dict(temperature=0.7)), Case("threshold, repetition_penalty", "", dict(repetition_penalty=1.2)),
    ]  # fmt: skip


class Logits(torch.nn.Module):
    """A module that returns the next of the prepared logits, [1 or 2, 32, V]."""

    def __init__(self, logits: timing.Rotation):
        super().__init__()
        self.turn, self.prepared = 0, logits

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.turn += 1
        return self.prepared[self.turn][: x.shape[0]]


class Prepared(ModuleBackend):
    """A shadow block's rows are those of the canvas; logits that a rule keeps are handed over as they are, as the native backend does with the
    head's output."""

    soft: Any = None

    def stats(self, plan: Plan, live: torch.Tensor, shadow: bool = False, **options) -> LogitStats:
        return super().stats(plan, live, **options)

    def reduce(self, plan: Plan, live: torch.Tensor, filters: dict[str, Any] | None = None, **options) -> LogitStats:
        if not self.keep_logits:
            return super().reduce(plan, live, filters, **options)
        self.kept = Kept(self.logits[0], torch.where(live, plan.cand_pos, -1))
        return reduce_logits(self.kept.logits, self.kept.rows, self.forbid, filters, options)


class HeadOnly:
    """A native model whose layers cost nothing: hidden states of width 512 are there, the head is real."""

    def __init__(self, head: Head):
        self.head, self.dtype, self.config = head, head.dtype, SimpleNamespace(visibility="bidirectional", shifted=False)
        self.hidden = torch.randn(4 * BLOCK, WIDTH, generator=torch.Generator().manual_seed(2)).to(head.dtype)

    def new_cache(self, rows: int, slots: int) -> None:
        return None

    def __call__(self, forward, cache: None) -> torch.Tensor:
        return self.hidden[: forward.ids.shape[0]]


class Step:
    """One step of one case, to be called again and again: puts the state back, then steps."""

    def __init__(self, case: Case, logits: timing.Rotation | Head):
        vocab = logits.vocab_size if isinstance(logits, Head) else logits[0].shape[-1]
        even = dict(frequencies=torch.full((vocab,), 1.0 / vocab)) if "frequencies" in case.settings else {}
        settings = Settings.from_kwargs(dict(block_size=BLOCK, max_new_tokens=BLOCK) | case.settings | even)
        policy = settings._policy(tuple(settings.suppress), ())
        self.mask_id = vocab - 1
        schedule = AdaBlock(BLOCK, (7,), 0.99) if case.adaptive else FixedBlocks(BLOCK)
        state = self.state = DecodeState([[0] * BLOCK], [[False] * BLOCK], self.mask_id, schedule, None, [3], torch.device("cpu"))
        decided = slice(0, 2 * case.decided, 2)
        state.masked[0, decided] = False
        state.canvas[0, decided] = torch.arange(100, 100 + case.decided)
        soft = SoftMasks().start(state, self.mask_id) if case.soft else None
        weight = settings.guidance_weight
        guidance = Guidance(weight) if weight else None
        if isinstance(logits, Head):
            self.backend = NativeBackend(HeadOnly(logits), state, self.mask_id, guidance)
        else:
            self.backend = Prepared(Logits(logits), state, self.mask_id, guidance)
            self.backend.soft = soft
        self.engine = Engine(state, self.backend, policy, eos_ids=(1,))
        self.start = state.canvas.clone(), state.masked.clone()
        self.row = dict(vars(state.rows[0]))
        self.rule = dict(vars(self.engine.rule))
        if not case.adaptive:
            for step in range(WARM_STEPS):
                self()
                self.row |= dict(step=step + 1, nfe=step + 1)
                self.rule = {name: _kept(value) for name, value in vars(self.engine.rule).items()}

    def __call__(self) -> None:
        self.reset()
        self.engine._step(self.state.active)

    def reset(self) -> None:
        canvas, masked = self.start
        self.state.canvas.copy_(canvas)
        self.state.masked.copy_(masked)
        vars(self.state.rows[0]).update(self.row)
        vars(self.engine.rule).update({name: _kept(value) for name, value in self.rule.items()})


def _kept(value: Any) -> Any:
    """A rule's state as it was; logits that it keeps are never written, so the tensor itself will do."""
    if isinstance(value, dict):
        return dict(value)
    return value.clone() if isinstance(value, torch.Tensor) and value.numel() < VOCAB else value


def prepared(dtype: torch.dtype, vocab: int = VOCAB, total: int = 128 << 20) -> timing.Rotation:
    """Logits [2, 32, V], conditional and unconditional: noise, and in every row one token whose probability lies between 0.1 and 1."""
    generator = torch.Generator().manual_seed(0)
    peak = torch.linspace(0.1, 0.9999, BLOCK)
    token = torch.randint(100, vocab - 1, (BLOCK,), generator=generator)

    def make() -> torch.Tensor:
        x = torch.randn(2, BLOCK, vocab, generator=generator) * 3
        x[:, torch.arange(BLOCK), token] = x.logsumexp(-1) + torch.logit(peak)
        return x.to(dtype)

    return timing.rotating(make, 2 * total)


def largest(case: Case, dtype: torch.dtype, vocab: int) -> tuple[int, str]:
    """(bytes of the largest tensor that any torch op made in a step, what it was)."""
    step = Step(case, prepared(dtype, vocab, 0))
    step.reset()
    with bench_memory.LargestTensor() as seen:
        step.engine._step(step.state.active)
    return seen.bytes, seen.what


def growth(case: Case, dtype: torch.dtype) -> float:
    """MB that the process grew by, at its peak, while the case was set up and did its first steps: scratch memory of the ops included."""
    logits = prepared(dtype, VOCAB, 0)
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)  # what the C library holds back would hide growth
    bench_memory.reset_peak()
    before = bench_memory.rss()
    step = Step(case, logits)
    for _ in range(3):
        step()
    return (bench_memory.peak_rss() - before) / 2**20


@torch.inference_mode()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="fewer samples")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--only", help="cases whose names hold this text, and plain threshold; prints, writes nothing")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    chosen = [c for c in cases() if c.name == "threshold" or not args.only or args.only in c.name]
    missing = set(RULES) - {c.settings.get("policy", "threshold") for c in cases()}
    if missing:
        raise SystemExit(f"bench/bench_policies.py has no case for {sorted(missing)}")
    sections: dict[str, list[dict[str, object]]] = {}
    over, times_of = [], {}
    options = dict(rounds=2, min_time=0.03, min_samples=5) if args.quick else dict(rounds=7, min_time=0.06, min_samples=7)
    for name, dtype in DTYPES.items():
        logits = prepared(dtype)
        steps = {case.name: Step(case, logits) for case in chosen}
        with tqdm(total=len(steps) * options["rounds"], desc=name) as bar:
            fns: dict[str, Callable] = dict(steps) | {"reset": steps["threshold"].reset}
            times = timing.measure(fns, **options, progress=lambda _, bar=bar: bar.update())
        rows = []
        native = [Case("threshold, native model", "", {}), Case("guidance, native model", "guidance", dict(cfg_scale=1.0))]
        if not args.only:
            weight = torch.randn(VOCAB, WIDTH, generator=torch.Generator().manual_seed(1)).to(dtype)
            head = Head(weight, choose_format(dtype, weight.device, weight.numel()))
            del weight
            times |= timing.measure({case.name: Step(case, head) for case in native}, **options)
        for case in chosen if args.only else [*chosen, *native]:
            base = times["threshold, native model" if case in native else "threshold"]
            ratio = times[case.name] / base
            wanted = WANTED.get(case.kind)
            rows.append({
                "case": case.name, "kind": case.kind, "time": report.seconds(times[case.name]), "p10": report.seconds(times[case.name].p10),
                "x threshold": f"{ratio:.2f}", "x at p10": f"{times[case.name].p10 / base.p10:.2f}", "wanted": "" if wanted is None else f"{wanted:g}",
                "reached": "" if wanted is None else bool(ratio <= wanted),
            })  # fmt: skip
            if wanted is not None and ratio > wanted:
                over.append(f"{case.name} {name} {ratio:.2f} (wanted {wanted:g})")
        rows.append({"case": "reset (part of each)", "time": report.seconds(times["reset"])})
        sections[f"One step, {name}"] = rows
        times_of[name] = {n: t.as_dict() for n, t in times.items()}
    if args.only:
        print("\n\n".join(report.table(rows) for rows in sections.values()))
        return
    sections["Memory of one step, fp32"] = memory = []
    for case in tqdm(chosen, desc="memory"):
        small, big = (largest(case, torch.float32, vocab) for vocab in (SMALL_VOCAB, VOCAB))
        memory.append({
            "case": case.name, f"largest new tensor, V {SMALL_VOCAB}": _bytes(small[0]), f"V {VOCAB}": _bytes(big[0]), "grows with V": big[0] > small[0],
            "what": big[1] if big[0] > small[0] else "", "peak growth MB": f"{growth(case, torch.float32):.1f}",
        })  # fmt: skip
    grows = [row["case"] for row in memory if row["grows with V"]]
    notes = [
        f"logits [{BLOCK}, {VOCAB}], {args.threads} threads; medians, interleaved (p10: the 10th percentile, which other work on the machine disturbs less); a [{BLOCK}, {VOCAB}] fp32 tensor is {BLOCK * VOCAB * 4 / 2**20:.1f} MB",
        "above what is wanted: " + ("; ".join(over) if over else "nothing"),
        "largest new tensor: of any torch op in one step, the logits given left out; it grows with the vocabulary for: " + (", ".join(grows) or "nothing"),
        "peak growth: of the process while the case is set up (pc: frequencies, float64 [V]) and steps, scratch memory of the ops included; klass keeps the logits of the step before, which here are the "
        "given ones (in a run: those of the block's masked rows)",
    ]
    report.write("policies-quick" if args.quick else "policies", "What choosing costs, per rule", sections, notes, times=times_of)


def _bytes(n: int) -> str:
    return f"{n / 1024:.1f} KB" if n < 1 << 20 else f"{n / 2**20:.1f} MB"


if __name__ == "__main__":
    main()
