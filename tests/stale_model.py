"""A model by the definition in float64 whose K and V may be old, and the loops of the published caches over it: one row, Python lists.

`Stale` keeps one K and V per layer and position, of the last forward that the position was in, and what it was then. `decode` runs a row
with a method that says, as its authors' loop does, what is forwarded and what is seen. Nothing is shared with unmask but the keyed random numbers.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from hypothesis import assume

from unmask.models.config import ModelConfig
from unmask.ops import uniform

LIMIT = 5e-5


class Weights:
    """Canonical weights in float64; layers: those of each layer, by their names in it."""

    def __init__(self, weights: dict[str, torch.Tensor], config: ModelConfig):
        self.config = config
        self.all = {name: tensor.double() for name, tensor in weights.items()}
        starts = [f"layers.{i}." for i in range(config.n_layers)]
        self.layers = [{n.removeprefix(start): t for n, t in self.all.items() if n.startswith(start)} for start in starts]


class Stale:
    def __init__(self, weights: Weights):
        self.w, self.layers, self.c = weights.all, weights.layers, weights.config
        self.k = self.v = torch.empty(0)  # [layers, L, kv heads, head_dim]
        self.token: dict[int, int] = {}  # what each position held when its K and V were made

    def norm(self, x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        return x * (x.pow(2).mean(-1, keepdim=True) + self.c.norm_eps).rsqrt() * weight

    def angles(self, positions: list[int]) -> tuple[torch.Tensor, torch.Tensor]:
        half = self.c.rotary_dim // 2
        angle = torch.tensor(positions).double()[:, None] * self.c.rope_theta ** (-torch.arange(half).double() / half)
        return angle.cos()[:, None], angle.sin()[:, None]

    def rotate(self, x: torch.Tensor, turn: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
        """x: [n, heads, head_dim]."""
        half = self.c.rotary_dim // 2
        cos, sin = turn
        a, b, rest = x[..., :half], x[..., half : 2 * half], x[..., 2 * half :]
        return torch.cat([a * cos - b * sin, b * cos + a * sin, rest], -1)

    def forward(self, ids: list[int], positions: list[int], seen: Callable[[int], list[int]]) -> dict[int, torch.Tensor]:
        """Logits by position. seen: the positions that a position attends to; K and V of those that are not forwarded are as they were."""
        c = self.c
        self.token |= {p: ids[p] for p in positions}
        if not self.k.numel():
            self.k, self.v = torch.full((2, c.n_layers, len(ids), c.n_kv_heads, c.head_dim), torch.nan, dtype=torch.float64)
        visible = torch.zeros(len(positions), len(ids), dtype=torch.bool)
        for n, p in enumerate(positions):
            visible[n, seen(p)] = True
        turn = self.angles(positions)
        used = visible.any(0)  # what nobody sees may not exist yet
        x = self.w["embed"][[ids[p] for p in positions]]
        for i, own in enumerate(self.layers):
            y = self.norm(x, own["attn_norm"])
            q, k, v = ((y @ own[n].T + own.get(f"{n}_bias", 0.0)).view(len(positions), -1, c.head_dim) for n in "qkv")
            if c.qk_norm:
                q, k = self.norm(q, own["q_norm"]), self.norm(k, own["k_norm"])
            q, k = self.rotate(q, turn), self.rotate(k, turn)
            self.k[i, positions], self.v[i, positions] = k, v
            keys, values = (t[i, used].repeat_interleave(c.n_heads // c.n_kv_heads, 1) for t in (self.k, self.v))
            score = torch.einsum("qhd,shd->hqs", q, keys).div(c.head_dim**0.5).masked_fill(~visible[:, used], -math.inf)
            out = torch.einsum("hqs,shd->qhd", score.softmax(-1), values).flatten(1)
            x = x + out @ own["o"].T
            y = self.norm(x, own["mlp_norm"])
            x = x + (F.silu(y @ own["gate"].T) * (y @ own["up"].T)) @ own["down"].T
        logits = self.norm(x, self.w["final_norm"]) @ self.w.get("head", self.w["embed"]).T
        return dict(zip(positions, logits, strict=True))


@dataclasses.dataclass
class Look:
    """A row at a step: block [start, end), step of the block, forwards so far; tokens and which are undecided."""

    model: Stale
    ids: list[int]
    masked: list[bool]
    seed: int
    start: int = 0
    end: int = 0
    step: int = 0
    nfe: int = 0
    quotas: list[int] = dataclasses.field(default_factory=list)

    def apart(self, a: float, b: float) -> None:
        """These numbers decide something: an example where they are nearly equal is dropped, for float32 may order them otherwise."""
        assume(abs(a - b) > LIMIT)

    @property
    def everything(self) -> set[int]:
        return set(range(len(self.ids)))

    @property
    def open(self) -> list[int]:
        return [i for i in range(self.start, self.end) if self.masked[i]]

    @property
    def lag(self) -> int:
        return int(self.model.c.shifted)

    def u(self, i: int) -> float:
        return float(uniform(torch.tensor([self.seed]), torch.tensor([self.nfe]), torch.tensor([i])))

    def source(self, i: int) -> int:
        return max(i - self.lag, 0)

    def distribution(self, logits: dict[int, torch.Tensor], i: int, drawn: bool = True) -> tuple[int, float, float]:
        """(token, probability, entropy); the mask cannot win. drawn: which token it is matters."""
        z = logits[self.source(i)]
        p = z.softmax(-1)
        z = z.clone()
        z[self.model.c.mask_id] = -math.inf
        best, token = z.max(-1)
        if drawn:
            self.apart(float(best), float(z.topk(2).values[1]))
        return int(token), float(p[token]), float(-(p * p.clamp_min(1e-300).log()).sum())


class Method:
    """A cache as its authors' loop has it."""

    def begin(self, c: Look) -> None:
        """A block begins."""

    def forwarded(self, c: Look) -> set[int]:
        """Positions that this step forwards, but for what predicts undecided ones of shifted logits."""
        return c.everything

    def seen(self, c: Look, queried: list[int]) -> Callable[[int], list[int]]:
        everything = sorted(c.everything)
        return lambda p: everything

    def cached(self, c: Look, queried: set[int]) -> None:
        """May assert things of what is not forwarded."""

    def done(self, c: Look, logits: dict[int, torch.Tensor], decided: dict[int, float]) -> None:
        """The step has decided these positions; values: entropies."""


class DKV(Method):
    """horseee/dKV-Cache: `previous` and `current` are what was decided after the last step but one, and after the last; the cache holds what
    `current` was when the last forward ran, and is dropped where a block begins."""

    def __init__(self, refresh_every: int):
        self.every = refresh_every

    def begin(self, c):
        self.previous, self.current, self.cache = None, None, set()

    def forwarded(self, c):
        if c.step % self.every == 0 or c.step <= 1:
            return c.everything
        return c.everything - self.previous

    def cached(self, c, queried):
        assert c.everything - queried <= self.cache
        self.cache = self.current or set()

    def done(self, c, logits, decided):
        self.previous, self.current = self.current, {i for i in c.everything if not c.masked[i]}


class Greedy(DKV):
    """Its greedy variant: the order is known, and so is what the next step decides."""

    def __init__(self, refresh_every: int, window: int):
        super().__init__(refresh_every)
        self.window = window

    def begin(self, c):
        self.last: set[int] = set()

    def forwarded(self, c):
        if c.step % self.every == 0:
            return c.everything
        order = sorted(c.open, key=lambda i: (-c.u(i), i))
        upcoming = order[: c.quotas[c.step]]
        chosen = {*self.last, *upcoming}
        for i in upcoming:
            found, distance = 0, 1
            while found < self.window and distance < len(c.ids):
                for j in (i - distance, i + distance):
                    if found < self.window and 0 <= j < len(c.ids) and c.masked[j] and j not in chosen:
                        chosen.add(j)
                        found += 1
                distance += 1
        return chosen

    def cached(self, c, queried):
        pass

    def done(self, c, logits, decided):
        self.last = set(decided)


class EntropyCache(Method):
    def __init__(self, threshold: float, recent: int):
        self.threshold, self.recent, self.order = threshold, recent, []

    def begin(self, c):
        self.refresh = True

    def forwarded(self, c):
        if self.refresh:
            return c.everything
        latest = [i for group in reversed(self.order) for i in sorted(group)][: self.recent]
        return {*c.open, *self.order[-1], *latest}

    def done(self, c, logits, decided):
        highest = max(decided.values())
        c.apart(highest, self.threshold)
        self.refresh = highest > self.threshold
        self.order.append(decided)


class Sprint(Method):
    def __init__(self, keep_ratio: float, alpha: float, warmup_steps: int, layer: int = -1):
        self.ratio, self.alpha, self.warm, self.layer = keep_ratio, alpha, warmup_steps, layer
        self.stored, self.confidence = 0, {}

    def begin(self, c):
        self.kept = None
        size = c.model.c.block_size if c.model.c.visibility == "block_causal" else None
        self.first, self.last = (c.start // size * size, min(-(-c.end // size) * size, len(c.ids))) if size else (c.start, len(c.ids))
        self.size = size

    def forwarded(self, c):
        if self.size:
            return set(range(min(self.stored, self.first), self.last))
        return set(range(0 if c.step < self.warm else self.first, self.last))

    def seen(self, c, queried):
        if c.step >= self.warm and self.kept is not None:
            keys = [*self.kept, *range(self.first - c.lag, self.last)]
            return lambda p: keys
        if self.size:
            return lambda p: list(range(min((p // self.size + 1) * self.size, len(c.ids))))
        return lambda p: list(range(len(c.ids)))

    def done(self, c, logits, decided):
        prefix = range(self.first if self.size else self.first - c.lag)
        for i in prefix:
            if i in logits and c.source(i) in logits:
                self.confidence[i] = c.distribution(logits, i, drawn=False)[1]
        self.stored = self.first
        if c.step + 1 != self.warm or len(prefix) == 0:
            return
        count = math.ceil(round(self.ratio * len(prefix), 9))
        if count == len(prefix):
            return
        layers = range(c.model.c.n_layers) if self.layer < 0 else [self.layer]
        norms = [[float(c.model.k[n, i].norm(dim=-1).mean()) for i in prefix] for n in layers]
        score = {
            i: self.alpha * sum(row[i] / (sum(row) / len(row)) for row in norms) / len(norms) + (1 - self.alpha) * self.confidence[i] for i in prefix
        }  # fmt: skip
        order = sorted(prefix, key=lambda i: (-score[i], i))
        if count:
            c.apart(score[order[count - 1]], score[order[count]])
        self.kept = sorted(order[:count])


def decode(model: Stale, canvas: list[int | None], size: int, method: Method, policy: dict[str, Any], seed: int = 0):
    """(tokens, positions forwarded per step, positions decided per step). policy: threshold=, or steps= with score="confidence" | "random"."""
    config = model.c
    c = Look(model, [config.mask_id if t is None else t for t in canvas], [t is None for t in canvas], seed)
    sets, commits = [], []
    region = c.masked.index(True)
    aligned = config.visibility == "block_causal"
    blocks, start = [], region
    while start < len(canvas):
        end = min((start // size + 1) * size if aligned else start + size, len(canvas))
        blocks.append((start, end))
        start = end
    for number, (c.start, c.end) in enumerate(blocks):
        c.step, masks = 0, len(c.open)
        if "steps" in policy and masks:
            share = [policy["steps"] // len(blocks) + (n < policy["steps"] % len(blocks)) for n in range(len(blocks))][number]
            c.quotas = [masks // share + (n < masks % share) for n in range(share)]
        if masks:
            method.begin(c)
        while c.open:
            queried = set(method.forwarded(c))
            queried |= {c.source(i) for i in queried if c.masked[i]} if not isinstance(method, Sprint) else set()
            if isinstance(method, Sprint) and c.lag and min(queried) > 0:
                queried.add(min(queried) - 1)
            method.cached(c, queried)
            positions = sorted(queried)
            logits = model.forward(c.ids, positions, method.seen(c, positions))
            stale = [p for p in method.seen(c, positions)(c.end - 1) if model.token[p] != c.ids[p]]
            assert not stale, f"K and V of {stale} are those of masks that have been decided since"
            reached = [i for i in c.open if c.source(i) in queried]
            drawn = {i: c.distribution(logits, i) for i in reached}
            if "threshold" in policy:
                order = sorted(reached, key=lambda i: (-drawn[i][1], i))
                for i in reached:
                    c.apart(drawn[i][1], policy["threshold"])
                chosen = [i for i in order if drawn[i][1] >= policy["threshold"]]
                if not chosen and len(order) > 1:
                    c.apart(drawn[order[0]][1], drawn[order[1]][1])
                chosen = chosen or order[:1]
            else:
                score = {i: c.u(i) if policy["score"] == "random" else drawn[i][1] for i in reached}
                order = sorted(reached, key=lambda i: (-score[i], i))
                n = c.quotas[c.step]
                if 0 < n < len(order):
                    c.apart(score[order[n - 1]], score[order[n]])
                chosen = order[:n]
            for i in chosen:
                c.ids[i], c.masked[i] = drawn[i][0], False
            sets.append(positions)
            commits.append(sorted(chosen))
            method.done(c, logits, {i: drawn[i][2] for i in chosen})
            c.step, c.nfe = c.step + 1, c.nfe + 1
    return c.ids, sets, commits
