"""Whole denoise steps on a GPU: ours beside the loops that people run and beside the best that torch offers.

The model has LLaDA-8B's shape at full width with fewer layers and random weights, made in memory. A step forwards a block of 32 masked tokens
per row against a prefix whose K and V are cached, chooses tokens (highest probability, every one above 0.9, at least one) and writes them.
Every step begins with the same masked block: two small copies, part of everyone's time.

    ours                  one turn of the decoder's own loop (`Engine.run`): forward, head_stats, commit, its host reads
    ours, graph           its forward, head_stats and commit alone, replayed as a graph
    S1                    Fast-dLLM's step in eager torch (baseline_llada.py): K and V by torch.cat, RoPE on all keys, SDPA, float64 softmax,
                          topk and a Python loop of comparisons that each read one element
    S2 reduce-overhead    the same math on a preallocated cache, SDPA, cuBLAS, no host reads, by torch.compile(mode="reduce-overhead")
    S2 graph              the same run eagerly with a compiled choice of tokens, captured by hand
    S2 graph, compiled    the same compiled as a whole, captured by hand
    ours, block / S3      a whole block until nothing is masked, seconds per step: our loop, and "S2 graph, compiled" with `.item()` a step

`x NAME` is NAME's time over ours, `x NAME / graph` over ours as a graph (S2 against that is like for like: neither has a host in it). `of floor` is the
time that the step's weights and cached K and V take at this run's copy rate, or its FLOPs at this run's matmul rate where that is longer
(per part: linear layers, attention, head), over the time. "the same" counts rows that S1 and S2 leave as ours does; in bf16 near ties may differ.

    python bench/gpu_step.py [--layers 4] [--out bench/results]
    python bench/gpu_step.py --dry-run     # tiny shapes in fp32 on the CPU, uncompiled; ours, S1 and S2 must choose the same tokens
"""

from __future__ import annotations

import argparse
import dataclasses
import gc
import json
import math
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
import torch.nn.functional as F

import baseline_llada
import gpu_timing
import report
from unmask import ops
from unmask.decode.backend import NativeBackend, Plan, make_plan
from unmask.decode.engine import Engine
from unmask.decode.policy import Policy
from unmask.decode.schedule import FixedBlocks
from unmask.decode.state import DecodeState
from unmask.models.backbone import Backbone, Layer
from unmask.models.config import ModelConfig
from unmask.models.model import Model
from unmask.models.tokenizer import Tokenizer
from unmask.ops.head_stats import Head

FULL_LAYERS = 32  # of LLaDA-8B
PUBLIC = dict(q="q_proj", k="k_proj", v="v_proj", o="attn_out", gate="ff_proj", up="up_proj", down="ff_out", attn_norm="attn_norm", mlp_norm="ff_norm")


@dataclasses.dataclass(frozen=True)
class Shape:
    """A model of LLaDA's layout and what a step does with it. prefix, block: positions; threshold: of the rule."""

    width: int = 4096
    heads: int = 32
    ffn: int = 12_288
    vocab: int = 126_464
    mask_id: int = 126_336
    layers: int = 4
    block: int = 32
    threshold: float = 0.9

    def config(self) -> ModelConfig:
        dim = self.width // self.heads
        return ModelConfig(
            family="llada", d_model=self.width, n_layers=self.layers, n_heads=self.heads, n_kv_heads=self.heads, head_dim=dim,
            ffn_dim=self.ffn, vocab_size=self.vocab, rope_theta=500_000.0, rotary_dim=dim, norm_eps=1e-5, qkv_bias=False, qk_norm=False,
            tied_head=False, mask_id=self.mask_id, eos_ids=(), pad_id=None, max_positions=1 << 20, block_size=None, shifted=False,
            visibility="bidirectional",
        )  # fmt: skip


TINY = Shape(width=64, heads=4, ffn=96, vocab=300, mask_id=299, layers=2, block=8, threshold=0.5)


class Weights:
    """Random weights by the names of `Layer`, scaled as in baseline_llada.random_weights so that positions and confidences differ."""

    def __init__(self, shape: Shape, dtype: torch.dtype, device: str):
        generator = torch.Generator(device).manual_seed(0)

        def normal(rows: int, columns: int, gain: float = 1.0) -> torch.Tensor:
            out = torch.empty(rows, columns, dtype=dtype, device=device)
            return out.normal_(0.0, gain / math.sqrt(columns), generator=generator)

        d, f = shape.width, shape.ffn
        ones = torch.ones(d, dtype=dtype, device=device)
        self.embed, self.head, self.final_norm = normal(shape.vocab, d, math.sqrt(d)), normal(shape.vocab, d, 3.0), ones
        self.head[shape.mask_id] = 0.0  # S1's loop does not forbid the mask token: it must never win
        self.layers = [
            dict(q=normal(d, d, 2.0), k=normal(d, d, 2.0), v=normal(d, d), o=normal(d, d), gate=normal(f, d), up=normal(f, d),
                 down=normal(d, f), attn_norm=ones, mlp_norm=ones)
            for _ in range(shape.layers)
        ]  # fmt: skip

    def public(self) -> dict[str, torch.Tensor]:
        """The same tensors by the names of the authors' checkpoints."""
        names = {"model.transformer.wte.weight": self.embed, "model.transformer.ln_f.weight": self.final_norm, "model.transformer.ff_out.weight": self.head}
        for i, layer in enumerate(self.layers):
            names |= {f"model.transformer.blocks.{i}.{PUBLIC[name]}.weight": tensor for name, tensor in layer.items()}
        return names

    def model(self, config: ModelConfig) -> Model:
        layers = [Layer(config, layer, "plain") for layer in self.layers]
        backbone = Backbone(config, self.embed, layers, self.final_norm)
        tokenizer = Tokenizer(Path("random"), config, None, None, {})
        return Model(config, backbone, Head(self.head, "plain"), tokenizer, "random", "plain").eval()


class Ours:
    """The decoder with K and V of the prefix in its cache, at the second step of the block (the first one forwards the whole canvas)."""

    def __init__(self, model: Model, shape: Shape, prompts: torch.Tensor):
        batch, prefix = prompts.shape
        canvases = [[*row, *[shape.mask_id] * shape.block] for row in prompts.tolist()]
        given = [[True] * prefix + [False] * shape.block] * batch
        self.state = DecodeState(canvases, given, shape.mask_id, FixedBlocks(shape.block), None, range(batch), prompts.device)
        self.masked_canvas, self.masked = self.state.canvas.clone(), self.state.masked.clone()
        self.backend, self.bare = (NativeBackend(model, self.state, shape.mask_id) for _ in range(2))  # of the loop, and without it
        self.bare.cache = self.backend.cache
        self.engine = Engine(self.state, self.backend, Policy(knobs=dict(threshold=shape.threshold)), cache="dual")
        self._steps = self.engine.run()
        self.begin()
        next(self._steps)
        entries = tuple((i, prefix, prefix + shape.block, prefix, prefix + shape.block) for i in range(batch))
        self.plan: Plan = make_plan(self.state, entries)
        self.bar = torch.full((batch,), shape.threshold, dtype=torch.float64, device=prompts.device)
        self.device_step()
        self.hidden = self.bare.hidden

    def begin(self) -> None:
        self.state.canvas.copy_(self.masked_canvas)
        self.state.masked.copy_(self.masked)

    def begin_block(self) -> None:
        """The masked block, with the first step done."""
        self.begin()
        for row in self.state.rows:
            row.step, row.nfe, row.finish_reason = 1, 1, None

    def step(self, _: int = 0) -> None:
        self.begin_block()
        next(self._steps)

    @torch.inference_mode()
    def device_step(self) -> None:
        """What of a step runs on the GPU, without the loop's host reads."""
        self.begin()
        self.choose(self.bare.stats(self.plan, self.live()))

    def choose(self, stats: ops.LogitStats) -> None:
        c = self.plan
        ops.commit(
            self.state.canvas, self.state.masked, c.cu, c.row, c.cand_pos, stats.token, stats.confidence, rule=ops.Rule.THRESHOLD, threshold=self.bar
        )

    def live(self) -> torch.Tensor:
        return self.state.masked.view(-1).index_select(0, self.plan.cand_flat)

    @torch.inference_mode()
    def head(self) -> None:
        """The step without its layers, on hidden states that stay where they are."""
        self.begin()
        self.bare.hidden = self.hidden
        self.choose(self.bare.reduce(self.plan, self.live()))

    def block(self, _: int = 0) -> int:
        """A whole block from its second step on; returns its steps. A fresh `run`: the last one ended with its rows."""
        self.begin_block()
        count = sum(1 for _ in self.engine.run())
        self._steps = self.engine.run()
        return count


class FastDllm:
    """S1: the turn of Fast-dLLM's prefix-cache loop, on baseline_llada's forward and choice of tokens; batches as its code takes them."""

    def __init__(self, weights: Weights, shape: Shape, prompts: torch.Tensor):
        sizes = dict(d_model=shape.width, n_heads=shape.heads, n_layers=shape.layers, rope_theta=500_000.0, rms_norm_eps=1e-5)
        self.model = baseline_llada.Llada(sizes, weights.public(), weights.embed.dtype)
        self.shape, (batch, prefix) = shape, prompts.shape
        self.masked_block = torch.full((batch, shape.block), shape.mask_id, device=prompts.device)
        self.x = self.masked_block.clone()
        with torch.device(prompts.device):  # the tables and the bias are made once, where the weights are
            self.model._tables(prefix + shape.block)
            self.model._causal_bias(prefix + shape.block)
        rows = []  # one at a time: the head of this loop covers every position
        for row in prompts:
            _, past = self.model(torch.cat((row, self.masked_block[0]))[None], use_cache=True)
            rows.append([(k[:, :, :prefix], v[:, :, :prefix]) for k, v in past])
        self.past = [tuple(torch.cat(parts) for parts in zip(*layer, strict=True)) for layer in zip(*rows, strict=True)]

    def begin(self) -> None:
        self.x.copy_(self.masked_block)

    def turn(self) -> bool:
        mask_index = self.x == self.shape.mask_id
        logits, _ = self.model(self.x, past=self.past, use_cache=True)
        torch.argmax(logits, dim=-1)
        proposal, transfer = baseline_llada.select(logits, mask_index, self.x, None, self.shape.threshold, torch.float64)
        self.x[transfer] = proposal[transfer]
        return (self.x == self.shape.mask_id).sum().item() == 0

    def step(self, _: int = 0) -> None:
        self.begin()
        self.turn()

    def block(self, _: int = 0) -> int:
        self.begin()
        count = 1
        while not self.turn():
            count += 1
        return count


class Buffers(torch.nn.Module):
    """Tensors that a graph of torch.compile reads and writes where they are; those that are no buffers it would copy in every call."""

    def __init__(self, **tensors: torch.Tensor):
        super().__init__()
        for name, tensor in tensors.items():
            self.register_buffer(name, tensor)


class TorchStep(Buffers):
    """S2: the step as one would write it in torch for speed.

    k, v: [layers, B, H, prefix + block, D], K after RoPE (ours, cloned after its first step). Products of q, k, v and of gate, up are one each.
    """

    def __init__(self, weights: Weights, shape: Shape, ours: Ours, compiled: Callable):
        batch, length = ours.masked.shape
        device, prefix = ours.masked.device, length - shape.block
        angle = torch.arange(prefix, length, device=device)[:, None] * ours.backend.model.backbone.inv_freq
        angle = torch.cat((angle, angle), -1)
        super().__init__(
            embed=weights.embed, final_norm=weights.final_norm, lm_head=weights.head, k=ours.backend.cache.k.clone(), v=ours.backend.cache.v.clone(),
            cos=angle.cos(), sin=angle.sin(), x=torch.full((batch, shape.block), shape.mask_id, device=device),
            masked=torch.ones(batch, shape.block, dtype=torch.bool, device=device),
        )  # fmt: skip
        self.shape, self.prefix = shape, prefix
        self.layers = torch.nn.ModuleList(
            Buffers(
                qkv=torch.cat([w["q"], w["k"], w["v"]]), gate_up=torch.cat([w["gate"], w["up"]]), o=w["o"], down=w["down"],
                attn_norm=w["attn_norm"], mlp_norm=w["mlp_norm"],
            )
            for w in weights.layers
        )  # fmt: skip
        self.choose = compiled(self.choose_tokens)

    def rotate(self, x: torch.Tensor) -> torch.Tensor:
        first, second = x.float().chunk(2, -1)
        return (x.float() * self.cos + torch.cat((-second, first), -1) * self.sin).to(x.dtype)

    def hidden(self) -> torch.Tensor:
        """[B, block, width] after the final norm; writes the block's K and V."""
        batch, block, width = *self.x.shape, self.shape.width
        x = F.embedding(self.x, self.embed)
        for i, w in enumerate(self.layers):
            h = F.rms_norm(x, (width,), w.attn_norm, 1e-5)
            q, k, v = F.linear(h, w.qkv).view(batch, block, 3, self.shape.heads, -1).permute(2, 0, 3, 1, 4)
            self.k[i, :, :, self.prefix :] = self.rotate(k)
            self.v[i, :, :, self.prefix :] = v
            y = F.scaled_dot_product_attention(self.rotate(q), self.k[i], self.v[i])
            x = x + F.linear(y.transpose(1, 2).reshape(batch, block, width), w.o)
            gate, up = F.linear(F.rms_norm(x, (width,), w.mlp_norm, 1e-5), w.gate_up).chunk(2, -1)
            x = x + F.linear(F.silu(gate) * up, w.down)
        return F.rms_norm(x, (width,), self.final_norm, 1e-5)

    def choose_tokens(self, logits: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Tokens [B, block] and which of them commit: every masked one above the threshold, the best at least."""
        logits = logits.float()
        best, token = logits.max(-1)
        score = torch.where(self.masked, torch.exp(best - torch.logsumexp(logits, -1)), -1.0)
        first = torch.arange(score.shape[1], device=score.device) == score.argmax(1, keepdim=True)
        return token, self.masked & ((score >= self.shape.threshold) | first)

    def head(self, hidden: torch.Tensor) -> None:
        token, take = self.choose(F.linear(hidden, self.lm_head))
        self.x.copy_(torch.where(take, token, self.x))
        self.masked.logical_and_(~take)

    def turn(self) -> None:
        self.head(self.hidden())

    def begin(self) -> None:
        self.x.fill_(self.shape.mask_id)
        self.masked.fill_(True)

    def forward(self) -> None:
        """One step from the masked block."""
        self.begin()
        self.turn()


class Tools:
    """compile and capture on a GPU; in a dry run both leave a function as it is."""

    def __init__(self, dry: bool):
        self.dry = dry

    def compiled(self, fn: Callable, mode: str | None = None) -> Callable:
        return fn if self.dry else torch.compile(fn, mode=mode, dynamic=False)

    def captured(self, fn: Callable[[], object]) -> gpu_timing.Call:
        """fn as a graph of one call, after warm-up calls (compilation, cuBLAS workspaces)."""
        if self.dry:
            return lambda _: fn()
        for _ in range(2):
            fn()
        replay = gpu_timing.graphed(lambda _: fn(), 1)
        if replay is None:
            raise RuntimeError("a graph cannot capture this step")
        return replay


def graphs_skipped(compiled: Callable[[], object]) -> int:
    """How often torch gave up its own graph of a reduce-overhead function; it records one at the second call."""
    from torch._dynamo.utils import counters

    before = counters["inductor"]["cudagraph_skips"]
    for _ in range(3):
        compiled()
    return counters["inductor"]["cudagraph_skips"] - before


class Rivals:
    """Every way of one case over the same weights and prompts.

    calls: label -> one step, from the masked block. heads: label -> its step without the layers. blocks: label -> a whole block; these
    return their steps.
    """

    def __init__(self, shape: Shape, weights: Weights, batch: int, prefix: int, dry: bool):
        generator = torch.Generator().manual_seed(1)
        prompts = torch.randint(0, shape.mask_id, (batch, prefix), generator=generator).to(weights.embed.device)
        tools = Tools(dry)
        ours = self.ours = Ours(weights.model(shape.config()), shape, prompts)
        s2 = self.s2 = TorchStep(weights, shape, ours, tools.compiled)
        self.s1 = FastDllm(weights, shape, prompts)
        hidden, choice, turn = s2.hidden(), tools.compiled(s2.head), tools.compiled(s2.turn)
        overhead = tools.compiled(s2, mode="reduce-overhead")
        self.heads = {"ours, graph": tools.captured(ours.head), "S2 graph, compiled": tools.captured(lambda: (s2.begin(), choice(hidden)))}
        self.calls = {"ours": ours.step, "ours, graph": tools.captured(ours.device_step), "S1": self.s1.step}
        self.calls |= {"S2 reduce-overhead": lambda _: overhead(), "S2 graph": tools.captured(s2)}
        self.calls["S2 graph, compiled"] = tools.captured(lambda: (s2.begin(), turn()))
        self.turn = tools.captured(turn)
        self.blocks = {"ours, block": ours.block, "S3": self.s3_block}
        self.graphs_skipped = 0 if dry else graphs_skipped(overhead)

    def s3_block(self, _: int = 0) -> int:
        """A block of S2 with one host read a step, as a loop must ask whether it is done."""
        self.s2.begin()
        count = 0
        while True:
            self.turn(0)
            count += 1
            if not self.s2.masked.any().item():
                return count

    def canvases(self) -> dict[str, torch.Tensor]:
        """Where each way that decides tokens left the block: label -> int64 [B, block]."""
        ours = self.ours.state.canvas[:, self.s2.prefix :]
        return {"ours": ours, "S1": self.s1.x, "S2": self.s2.x}


def floor_seconds(shape: Shape, batch: int, prefix: int, size: int, copy: float, products: float) -> dict[str, float]:
    """Seconds of a step's parts at the given rates: layers and head. size: bytes of a weight. Embedding rows, norms and activations are left out."""
    d, tokens, keys = shape.width, batch * shape.block, prefix + shape.block

    def time(moved: int, flops: int) -> float:
        return max(moved / copy, flops / products)

    linear = 4 * d * d + 3 * d * shape.ffn
    attention = time(2 * batch * keys * d * size, 4 * tokens * keys * d)
    return {
        "layers": shape.layers * (time(linear * size, 2 * tokens * linear) + attention),
        "head": time(shape.vocab * d * size, 2 * tokens * shape.vocab * d),
    }


def per_step(block: Callable[[int], int], steps: int) -> float:
    """Seconds of a step in a loop over whole blocks."""
    return gpu_timing.time_call(block, 2) / steps


def measure(shape: Shape, weights: Weights, batch: int, prefix: int, run: gpu_timing.Run) -> tuple[dict[str, object], list[dict[str, object]]]:
    """The case's line of the table of steps, and its lines of the table of parts."""
    rivals = Rivals(shape, weights, batch, prefix, dry=False)
    for name in ("ours", "S1", "S2 graph, compiled"):
        rivals.calls[name](0)
    left = {name: canvas.clone() for name, canvas in rivals.canvases().items()}
    heads = {f"{name}, head": fn for name, fn in rivals.heads.items()}
    times, _ = gpu_timing.measure(rivals.calls | heads, in_graph=0)
    steps = {name: block(0) for name, block in rivals.blocks.items()}
    rounds = [{name: per_step(block, steps[name]) for name, block in rivals.blocks.items()} for _ in range(3)]
    times |= {name: sorted(r[name] for r in rounds)[1] for name in rivals.blocks}
    floors = floor_seconds(shape, batch, prefix, weights.embed.element_size(), run.copy, run.products)
    floor = sum(floors.values())
    line: dict[str, object] = {"batch": batch, "prefix": prefix, "floor": report.seconds(floor)}
    for name in ("ours", "ours, graph", "ours, block"):
        line |= {name: report.seconds(times[name]), f"{name}, of floor": floor / times[name]}
    line |= {"x S1": times["S1"] / times["ours"]}
    for name in ("S2 reduce-overhead", "S2 graph", "S2 graph, compiled"):
        line |= {f"x {name}": times[name] / times["ours"], f"x {name} / graph": times[name] / times["ours, graph"]}
    line["x S3 / block"] = times["S3"] / times["ours, block"]
    line["the same"] = ", ".join(f"{n} {int((left[n] == left['ours']).all(1).sum())} of {batch}" for n in ("S1", "S2"))
    line["steps of a block"] = ", ".join(f"{name} {n}" for name, n in steps.items())
    if rivals.graphs_skipped:
        line["reduce-overhead"] = f"torch skipped its graph {rivals.graphs_skipped} times"
    return line, [*part_lines(shape, batch, prefix, times, floors)]


def part_lines(shape: Shape, batch: int, prefix: int, times: dict[str, float], floors: dict[str, float]) -> Iterator[dict[str, object]]:
    """What a layer (the step without its head, over their number) and the head cost, and what a model of full depth would."""
    for name in ("ours, graph", "S2 graph, compiled"):
        head = times[f"{name}, head"]
        layers = times[name] - head
        whole = layers / shape.layers * FULL_LAYERS + head
        yield {
            "batch": batch, "prefix": prefix, "what": name, "a layer": report.seconds(layers / shape.layers), "a layer, of floor": floors["layers"] / layers,
            "head and choice": report.seconds(head), "head, of floor": floors["head"] / head, f"{FULL_LAYERS} layers, calculated": report.seconds(whole),
        }  # fmt: skip


def check(shape: Shape, weights: Weights, batch: int, prefix: int) -> Iterator[str]:
    """The dry run of one case: each call once, and the tokens of ours, S1 and S2 after a step and after a block. Yields what ran."""
    rivals = Rivals(shape, weights, batch, prefix, dry=True)
    want = None
    for label, fn in rivals.calls.items():
        fn(0)
        got = rivals.canvases()["S1" if label == "S1" else "S2" if label.startswith("S2") else "ours"].clone()
        want = got if want is None else want
        assert torch.equal(got, want), f"{label} chose other tokens than ours: {got.tolist()}, {want.tolist()}"
        yield label
    settled = int((want != shape.mask_id).sum())
    assert batch <= settled < batch * shape.block, f"{settled} tokens settled: the threshold decides nothing"
    for label, fn in rivals.heads.items():
        fn(0)
        yield f"{label}, head"
    steps = {label: fn(0) for label, fn in (rivals.blocks | {"S1, block": rivals.s1.block}).items()}
    assert len(set(steps.values())) == 1, f"steps of a block differ: {steps}"
    ends = rivals.canvases()
    assert all(torch.equal(canvas, ends["ours"]) for canvas in ends.values()), "a block ended in other tokens"
    yield from steps


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dry-run", action="store_true")
    parser.add_argument("--layers", type=int, default=Shape.layers)
    parser.add_argument("--out", type=Path, default=report.RESULTS)
    args = parser.parse_args()
    with torch.no_grad():  # not inference_mode: torch.compile should see ordinary buffers; the decoder turns it on itself
        if args.dry_run:
            weights = Weights(TINY, torch.float32, "cpu")
            for batch, prefix in ((1, 24), (3, 40)):
                for label in check(TINY, weights, batch, prefix):
                    print(f"step {batch} x {TINY.block} on {prefix}: {label} runs")
            print("ours, S1 and S2 chose the same tokens")
            return
        run = gpu_timing.Run()
        shape = Shape(layers=args.layers)
        weights = Weights(shape, torch.bfloat16, "cuda")
        lines, parts = [], []
        for batch in (1, 8):
            for prefix in (512, 4096):
                gc.collect()  # graphs and compiled code hold each other, and memory
                torch._dynamo.reset()  # a case must not count as a recompilation of the one before
                torch.cuda.empty_cache()
                line, more = measure(shape, weights, batch, prefix, run)
                print(json.dumps(line), flush=True)
                lines.append(line)
                parts += more
        notes = [
            f"LLaDA-8B's shape (width {shape.width}, {shape.heads} heads, ffn {shape.ffn}, vocabulary {shape.vocab}) with {shape.layers} of its {FULL_LAYERS} layers, "
            f"random bf16 weights made in memory, block {shape.block}, threshold {shape.threshold}.",
            "Parts: a layer is (step - head and choice) / layers, both replayed as graphs; the step of full depth is calculated from these, not measured.",
            "What each name runs: `python bench/gpu_step.py --help`.",
        ]
        run.write(args.out, "gpu-step", "Denoise steps on a GPU", {"Steps": lines, "Parts": parts}, notes)


if __name__ == "__main__":
    main()
