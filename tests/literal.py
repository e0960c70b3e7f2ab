"""The decoding loop and every rule again, as literally as they are written down: one row, Python lists, no batching. The tests' oracle.

A `Script` is a module whose logits are given in advance, per row and forward, so that nothing but the rules decides. Statistics of single
positions (token, p, margin, entropy) come from the `logit_stats` op, which has tests of its own; every decision is made here again.
"""

from __future__ import annotations

import math
import types
from collections.abc import Callable
from typing import Any

import torch

from unmask.ops import logit_stats, uniform

VOCAB, MASK = 11, 10


class Script(torch.nn.Module):
    """tables: per row float32 [F, L, V], the logits of its F forwards (then the last one again). A row is known by its first token, its
    index, which its canvas must begin with."""

    def __init__(self, tables: list[torch.Tensor]):
        super().__init__()
        self.tables, self.seen = tables, [0] * len(tables)
        self.config = types.SimpleNamespace(mask_token_id=MASK, eos_token_id=None, vocab_size=VOCAB, shifted=False)

    def forward(self, ids):
        out = []
        for row in ids[:, 0].tolist():
            out.append(self.tables[row][min(self.seen[row], len(self.tables[row]) - 1), : ids.shape[1]])
            self.seen[row] += 1
        return torch.stack(out)


def tables(seed: int, rows: int, length: int, forwards: int = 40, sharp: float = 3.0, still: float = 0.5) -> list[torch.Tensor]:
    """Random logits; about a third of the positions of a forward repeat its last one, a few are on a coarse grid so that scores tie."""
    g = torch.Generator().manual_seed(seed)
    out = []
    for _ in range(rows):
        x = torch.randn((forwards, length, VOCAB), generator=g) * sharp
        x[:, ::3] = x[:, ::3].round()
        for f in range(1, forwards):
            same = torch.rand(length, generator=g) < still
            x[f, same] = x[f - 1, same]
        out.append(x)
    return out


def schedule(masks: int, steps: int) -> list[int]:
    return [masks // steps + (1 if k < masks % steps else 0) for k in range(steps)]


class Look:
    """What a rule may know at a step: c.open undecided positions of the block in order, c.score, c.stats, c.logits by position."""

    def __init__(self, **fields: Any):
        self.__dict__.update(fields)

    def order(self, among=None, score=None) -> list[int]:
        s = self.score if score is None else score
        return sorted(self.open if among is None else among, key=lambda i: (-s[i], i))


class Rule:
    """step returns (positions that commit, decided ones that change their token, decided ones that return to masks)."""

    decided = False  # statistics of decided positions are wanted too

    def __init__(self, knobs: dict[str, Any]):
        self.k = knobs

    def begin(self, c: Look) -> None:
        """A block begins."""

    def prepare(self, c: Look) -> None:
        """May change the statistics."""

    def step(self, c: Look) -> tuple[list[int], list[int], list[int]]:
        return self.commit(c), [], []

    def done(self, c: Look, left: int) -> bool:
        return left == 0


class Quota(Rule):
    def commit(self, c):
        n = c.quotas[c.step] if c.step < len(c.quotas) else len(c.open)
        return c.order()[:n]


class Threshold(Rule):
    def commit(self, c):
        order = c.order()
        bar = self.k["threshold"]
        if self.k.get("variant") == "dinfer":
            bar = min(bar, c.score[order[0]] - 1e-5)
        passing = [i for i in order if c.score[i] >= bar]
        return order[: max(len(passing), self.k.get("minimum", 1))]


class Factor(Rule):
    def commit(self, c):
        order, f = c.order(), self.k["factor"]
        s = [c.score[i] for i in order]
        fails = [n for n in range(1, len(s) + 1) if (n + 1) * (1.0 - s[n - 1]) >= f]
        if self.k.get("variant") == "d2cache":  # stops at the first n that fails, takes n - 1; all but one where none fails
            return order[: max(1, fails[0] - 1 if fails else len(s) - 1)]
        if self.k.get("factor_off_by_one"):
            for rank in range(1, len(s)):  # the first rank has no bar
                if s[rank] < 1.0 - f / (rank + 2):
                    return order if rank == len(s) - 1 else order[:rank]
            return order
        return order[: max([n for n in range(1, len(s) + 1) if n not in fails], default=1)]


class EntropyBound(Rule):
    def commit(self, c):
        order = c.order()
        h = [c.entropy[i] for i in order]
        if self.k.get("variant") == "d2cache":
            return order[: max(1, sum(math.fsum(h[:j]) <= self.k["gamma"] for j in range(len(h))))]
        fits = [j for j in range(1, len(h) + 1) if math.fsum(h[:j]) - max(h[:j]) <= self.k["gamma"]]
        return order[: max(1, len(fits))]


class Dilated(Rule):
    def begin(self, c):
        size, base, self.groups = c.end - c.start, self.k.get("base", 2), []
        left, t = list(range(size)), 0
        while left:
            t += 1
            stride = max(1, size // base**t)
            group = [k for k in left if k % stride == 0]
            left = [k for k in left if k not in group]
            if group:
                self.groups.append([c.start + k for k in group])
        if self.k.get("merge_last") and len(self.groups) > 1 and len(self.groups[-1]) < len(self.groups[-2]):
            self.groups[-2:] = [self.groups[-2] + self.groups[-1]]

    def commit(self, c):
        skip = self.k.get("skip_below")
        if skip is None:
            return next(open_ for open_ in ([i for i in g if i in c.open] for g in self.groups) if open_)
        if c.step >= len(self.groups) - 1:
            return c.open
        now = [i for g in self.groups[: c.step + 1] for i in g]
        return [i for i in c.open if i in now and c.score[i] >= skip]


class Klass(Rule):
    """KL in float64 with the authors' 1e-12."""

    def begin(self, c):
        self.last, self.history = {}, {}

    def commit(self, c):
        for i in c.open:
            p = torch.softmax(c.logits[i].double(), 0)
            kl = math.inf
            if i in self.last:
                q = self.last[i]
                kl = float((p * (torch.log(p + 1e-12) - torch.log(q + 1e-12))).sum())
            self.last[i] = p
            self.history.setdefault(i, []).append(kl)
        n = self.k.get("history", 2)
        still = [i for i in c.open if len(self.history[i]) >= n and all(h < self.k["kl_threshold"] for h in self.history[i][-n:])]
        c.close += [(h, self.k["kl_threshold"]) for i in c.open for h in self.history[i]]
        sure = [i for i in still if c.score[i] > self.k["threshold"]]
        return sure or c.order()[: self.k.get("minimum", 1)]


class SlowFast(Rule):
    def begin(self, c):
        self.last = c.start
        self.cycle()

    def cycle(self):
        self.seen, self.estimates, self.end = 0, [], None

    def commit(self, c):
        k = self.k
        if self.seen < k["explore_steps"]:
            far = [i for i in c.open if i >= self.last and c.score[i] >= k["explore_threshold"]]
            self.estimates.append((max(far) if far else self.last) + 1)
            window = self.estimates[-k["window"] :]
            mean = sum(window) / len(window)
            spread = math.sqrt(sum((w - mean) ** 2 for w in window) / len(window))
            self.end = self.estimates[-1] if spread < k["deviation"] else math.floor(mean)
            self.end = min(max(self.end, self.last + 1), c.end)
            scope = [i for i in c.open if i >= self.last]
        else:
            scope = [i for i in c.open if self.last <= i < self.end]
        self.seen += 1
        sure = [i for i in scope if c.score[i] >= k["threshold"]]
        chosen = sure if len(sure) >= 2 else c.order(scope)[:1]
        filled = not [i for i in c.open if self.last <= i < self.end and i not in chosen]
        if self.seen >= k["explore_steps"] and filled:
            self.last = self.end
            self.cycle()
        return chosen


class Dynamic(Rule):
    def commit(self, c):
        least = max(c.quotas[c.step] if c.step < len(c.quotas) else len(c.open), 1) if self.k.get("quota") else self.k.get("minimum", 1)
        above = [i for i in c.order() if c.score[i] > self.k["threshold"]]
        return above if len(above) >= least else c.order()[:least]


class Sprint(Rule):
    def commit(self, c):
        pace = math.ceil(len(c.open) / max(len(c.quotas) - c.step, 1))
        return sorted({*c.order()[:pace], *(i for i in c.open if c.confidence[i] > self.k["threshold"])})


class Edit(Rule):
    decided = True

    def begin(self, c):
        self.post = 0

    def step(self, c):
        above = [i for i in c.order() if c.score[i] > self.k["threshold"]]
        chosen = above if len(above) >= self.k.get("minimum", 1) else c.order()[: self.k.get("minimum", 1)]
        edits = [i for i in c.mine if c.token[i] != c.canvas[i] and c.confidence[i] > self.k["edit_threshold"]]
        self.before, self.edits = len(c.open), len(edits)
        return chosen, edits, []

    def done(self, c, left):
        if left:
            return False
        if self.before:
            return self.k.get("max_post_steps", 16) == 0 or self.k["edit_threshold"] >= 1
        self.post += 1
        return not self.edits or self.post >= self.k.get("max_post_steps", 16)


class Hierarchy(Rule):
    def commit(self, c):
        runs: list[list[int]] = []
        for i in c.open:
            if runs and runs[-1][-1] == i - 1:
                runs[-1].append(i)
            else:
                runs.append([i])
        best = [c.order(run)[0] for run in runs]
        chosen = {i for i in best if c.score[i] > self.k["low_threshold"]}
        return sorted(chosen | {i for i in c.open if c.score[i] > self.k["threshold"]} | {c.order()[0]})


class Credit(Rule):
    """Dense credits, float64 [V] per position."""

    def begin(self, c):
        self.credit = {}

    def prepare(self, c):
        for i in c.open:
            z = c.logits[i].double()
            credit = self.credit.setdefault(i, torch.zeros(VOCAB, dtype=torch.float64))
            credit *= self.k["decay_beta"]
            raw = torch.softmax(z, 0)
            allowed = z.clone()
            allowed[MASK] = -math.inf
            best = int(allowed.argmax())
            credit[best] += raw[best] ** self.k["boost_gamma"]
            fused = z + self.k["credit_alpha"] * torch.log(1.0 + credit)
            p = torch.softmax(fused, 0)
            fused[MASK] = -math.inf
            c.token[i] = int(fused.argmax())
            c.score[i] = float(p[c.token[i]])
            top = fused.sort(descending=True).values
            c.close.append((float(top[0]), float(top[1])))

    def commit(self, c):
        bar = min(self.k["threshold"], max(c.score[i] for i in c.open) - 1e-5)
        c.close += [(c.score[i], bar) for i in c.open]
        return [i for i in c.open if c.score[i] >= bar]


class Osdt(Rule):
    def commit(self, c):
        table = self.k["table"].thresholds
        row = table[min(c.block, len(table) - 1)]
        bar = min(row[min(c.step, len(row) - 1)], self.k.get("cap", 0.9)) * (1.0 - self.k.get("slack", 0.0))
        return [i for i in c.open if c.score[i] >= bar] or c.order()[:1]


class Dream(Rule):
    def begin(self, c):
        self.steps = self.k.get("steps") or len(c.open)
        self.t = torch.linspace(1, self.k.get("eps", 1e-3), self.steps + 1)

    def commit(self, c):
        t, s, last = self.t[c.step], self.t[c.step + 1], c.step == self.steps - 1
        alg = self.k["alg"]
        if alg == "origin":
            return [i for i in c.open if last or c.u(i) < float(1 - s / t)]
        n = len(c.open) if last else int(torch.tensor(float(len(c.open))) * (1 - s / t))
        score = {"maskgit_plus": c.confidence, "topk_margin": c.margin, "entropy": {i: -h for i, h in c.entropy.items()}}[alg]
        if self.k.get("alg_temp"):
            score = {i: score[i] / self.k["alg_temp"] - math.log(-math.log(c.u(i))) for i in c.open}
        return c.order(score=score)[:n]


class PlackettLuce(Rule):
    """order_logits is a function of positions alone here, so that the loop can ask it too."""

    log_prob = 0.0

    def commit(self, c):
        h = dict(zip(c.open, self.k["h"](torch.tensor(c.open)).tolist(), strict=True))
        key = {i: h[i] - math.log(-math.log(c.u(i))) for i in c.open} if self.k.get("sample", True) else h
        chosen = c.order(score=key)[: c.quotas[c.step]]
        if len(chosen) < len(c.open):
            for j, i in enumerate(chosen):
                rest = [h[o] for o in c.open if o not in chosen[:j]]
                self.log_prob += h[i] - math.log(math.fsum(math.exp(r - h[i]) for r in rest)) - h[i]
        self.log_prob += sum(math.log(c.p[i]) for i in chosen)
        return chosen


class ReMDM(Rule):
    ETA = dict(cap=0.008, rescale=0.015, conf=0.015, loop=0.02)

    def begin(self, c):
        self.steps = self.k.get("steps") or 2 * len(c.open)
        if not hasattr(self, "when"):
            self.when = {}

    def step(self, c):
        strategy = self.k["strategy"]
        eta = self.k.get("eta") or self.ETA[strategy]
        t_on, t_off, on = self.k.get("t_on", 0.55), self.k.get("t_off", 0.05), self.k.get("alpha_on", 0.9)
        dt = (1 - 1e-5) / self.steps
        t = 1 - c.step * dt
        s = t - dt

        def alpha(x):
            if strategy != "loop":
                return 1 - x
            return (1 - x) * on / (1 - t_on) if x > t_on else on if x > t_off else 1 - x * (1 - on) / t_off

        a_t, a_s = alpha(t), alpha(s)
        most = min(1.0, (1 - a_s) / a_t) if a_t > 0 else 1.0
        weight = {i: math.exp(-self.when[i]) for i in c.mine}
        share = {i: w / math.fsum(weight.values()) for i, w in weight.items()}
        sigma = dict(cap=min(eta, most), rescale=eta * most, conf=0.0, loop=min(eta, most) if t_off < t <= t_on else 0.0)[strategy]
        if c.step == self.steps - 1:
            chosen, back = c.open, []
        else:
            stays = (1 - a_s - sigma * a_t) / (1 - a_t) if a_t < 1 else 0.0
            chosen = [i for i in c.open if c.u(i) < 1 - stays]
            back = [i for i in c.mine if c.u(i) < (share[i] * most if strategy == "conf" else sigma)]
            c.close += [(c.u(i), 1 - stays) for i in c.open]
        for i in chosen:
            self.when[i] = c.p[i]
        return chosen, [], back

    def done(self, c, left):
        return c.step + 1 == self.steps


class Remask(Rule):
    decided = True

    def begin(self, c):
        masks = len(c.open)
        first = min(math.ceil(self.k["start_ratio"] * masks), masks)
        self.plan = [(1, 0)] * first
        if first:
            self.plan += [(0, self.k["k"]), (self.k["k"], 0)] * self.k["loop_steps"]

    def step(self, c):
        take, back = self.plan[c.step] if c.step < len(self.plan) else (1, 0)
        lowest = sorted(c.mine, key=lambda i: (c.now[i], i))
        return c.order()[:take], [], lowest[:back]

    def done(self, c, left):
        return left == 0 and c.step + 1 >= len(self.plan)


RULES: dict[str, type[Rule]] = dict(
    quota=Quota, threshold=Threshold, factor=Factor, eb=EntropyBound, pc=Quota, dus=Dilated, klass=Klass, slowfast=SlowFast, sdar_static=Quota,
    sdar_dynamic=Dynamic, llada2=Dynamic, sprint=Sprint, edit=Edit, hierarchy=Hierarchy, credit=Credit, osdt=Osdt, dream=Dream, plackett_luce=PlackettLuce,
    remdm=ReMDM, remask=Remask,
)  # fmt: skip
"""wino is not among them: it needs a shadow block, which a module does not have (tests/test_rule_wino.py)."""

Scorer = Callable[[Look], dict[int, float]]


def scorer(name: str, **knobs: Any) -> Scorer:
    def pc(c: Look) -> dict[int, float]:
        f = knobs["frequencies"].double()
        decay = 0.25 if knobs.get("decay") is None else knobs["decay"]
        rare = {i: min(knobs.get("clip", 10.0), -c.p[i] * math.log(float(f[c.token[i]]) + 1e-9)) for i in c.open}
        return {i: r * math.exp(-decay * (i - c.start)) for i, r in rare.items()}

    return dict(
        confidence=lambda c: c.confidence, margin=lambda c: c.margin, entropy=lambda c: {i: -h for i, h in c.entropy.items()},
        random=lambda c: {i: c.u(i) for i in c.open}, leftmost=lambda c: {i: -float(i) for i in c.open}, pc=pc,
    )[name]  # fmt: skip


def decode(
    table: torch.Tensor, canvas: list[int | None], block_size: int, rule: Rule, score: Scorer, *, seed: int = 0, steps: int | None = None
) -> Look:
    """One row to its end. canvas: None = undecided. Returns canvas, nfe, trace (per forward: committed, edited, remasked as sets) and close
    (pairs of numbers that this float64 code compared and the package may have rounded otherwise)."""
    now = [MASK if t is None else t for t in canvas]
    masked, given = [t is None for t in canvas], [t is not None for t in canvas]
    length, nfe, trace, close = len(now), 0, [], []
    if not any(masked):
        return Look(canvas=now, nfe=0, trace=[], close=[])
    region = masked.index(True)
    blocks = range(region, length, block_size)
    for number, start in enumerate(blocks):
        end = min(start + block_size, length)
        inside = range(start, end)
        if not any(masked[i] for i in inside):
            continue
        step, masks = 0, sum(masked[i] for i in inside)
        quotas = [1] * masks if steps is None else schedule(masks, schedule(steps, len(blocks))[number])
        while True:
            logits = table[min(nfe, len(table) - 1)]
            ids = torch.tensor(now)[:, None]
            s = logit_stats(logits[:length], forbid=torch.tensor([MASK]), ids=ids)
            parts = dict(
                token=s.token, p=s.p, confidence=s.confidence, margin=s.margin, entropy=s.entropy, now=s.at_ids[:, 0, 0],
            )  # fmt: skip
            forward = nfe
            c = Look(
                open=[i for i in inside if masked[i]], mine=[i for i in inside if not masked[i] and not given[i]], canvas=now, logits=logits,
                start=start, end=end, step=step, block=number, quotas=quotas, close=close,
                u=lambda i, forward=forward: float(uniform(torch.tensor([seed]), torch.tensor([forward]), torch.tensor([i]))),
                **{name: dict(enumerate(value.tolist())) for name, value in parts.items()},
            )  # fmt: skip
            if step == 0:
                rule.begin(c)
            c.score = dict(score(c))
            rule.prepare(c)
            chosen, edits, back = rule.step(c)
            assert set(chosen) <= set(c.open) and set(edits) | set(back) <= set(c.mine)
            trace.append(({(i, c.token[i]) for i in chosen}, {(i, now[i], c.token[i]) for i in edits}, {(i, now[i]) for i in back}))
            for i in (*chosen, *edits):
                now[i], masked[i] = c.token[i], False
            for i in back:
                now[i], masked[i] = MASK, True
            nfe += 1
            if rule.done(c, sum(masked[i] for i in inside)):
                break
            step += 1
    return Look(canvas=now, nfe=nfe, trace=trace, close=close)
