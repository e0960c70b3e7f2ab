"""S2D2's step between the engine's reduction and its commit: the policy's rule, wrapped.

The host decides here, per row: whether to verify, and what falls back on the rule. So a step reads the device once for its statistics and, where a
row verifies, for what the rule would commit and for the outcome (in stochastic mode also each such row's seed, and the ratios); with another
transform than the policy's, or routes by a score, for those too. The forwards are long beside it.
"""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Any

import torch

from .. import ops
from ..decode.caches import attention_block
from ..decode.policy import Policy
from ..decode.rules.base import Rule, Selection, StepView
from ..decode.state import DecodeState, Row
from ..errors import InvalidLogits, SettingError
from ..ops import LogitStats
from ..ops.head_stats import head_stats
from ..ops.info import Status
from . import acceptance, routing
from .acceptance import Draws, Keyed, Transform
from .s2d2_records import Counts, Parts, Verification
from .spans import first_run
from .verifier import Job, verify

if TYPE_CHECKING:
    from .s2d2 import S2D2Engine


@dataclasses.dataclass
class _Entry:
    """One row of a step, on the host: lists over the candidates of its block."""

    row: Row
    begin: int  # its first candidate among all
    pos: list[int]
    masked: list[bool]
    p: list[float]
    score: list[float]
    token: list[int]
    valid: bool
    span: tuple[int, int]

    @property
    def masks(self) -> list[int]:
        return [i for i, m in enumerate(self.masked) if m]


class Speculation:
    """The policy's rule, wrapped: what it does not define is the rule's own."""

    def __init__(self, engine: S2D2Engine, base: Rule):
        self.engine, self.base, self.asked = engine, base, engine.options
        # p is needed at every draft token: its logits are made once, for the statistics too
        self.wants_logits = base.wants_logits or self.asked.mode == "stochastic"
        self.state: DecodeState = engine.state
        self.backend: Any = engine.backend
        policy = engine.policy
        self.transform = Transform.of(policy) if engine.transform is None else engine.transform
        self._clean = engine.transform is None  # p and q are of the ids that can be chosen, the mask token not among them
        self._own_p = self._clean or (policy.temperature > 0 and not policy.tempered)  # the score's p is not what tokens are drawn from
        self.router = routing.Router(self.asked, engine.empty_turns_off)
        self.draws: Draws = engine.draws or Keyed(self.state.seeds)
        self.high = self._high_confidence(policy)
        self.bar = policy.knobs.get("threshold")  # what commits by the policy's rule is above it
        self.equal = policy.rule == "threshold"  # or equal to it
        self.counts = [Counts() for _ in self.state.rows]
        self.verifications: list[Verification] = []
        self.parts: dict[int, Parts] = {}
        self.forwards = 0

    def __getattr__(self, name: str) -> Any:
        return getattr(self.base, name)

    def _high_confidence(self, policy: Policy) -> float | None:
        given = self.asked.high_confidence
        if given is None:
            given = policy.knobs.get("threshold")
        if given is None and self.asked.looks_at_confidence:
            raise SettingError(f"high_confidence must be given: policy={policy.rule!r} has no threshold that could stand in for it")
        return None if given is None else float(given)

    def joined(self, row: Row) -> None:
        """A new row took this place."""
        self.base.joined(row)
        self.counts[row.index] = Counts()
        self.router.forget(row.index)

    # -- one step ----------------------------------------------------------------------------------------------------------------------------

    def select(self, step: StepView, stats: LogitStats, score: torch.Tensor) -> Selection:
        selection = self.base.select(step, stats, score)
        entries = self._entries(step, stats, selection.score)
        looks = self._looks(step, stats, entries)
        chosen = [e.valid and self.router.decide(e.row.index, look) for e, look in zip(entries, looks, strict=True)]
        self.parts = {e.row.index: Parts(verified=v) for e, v in zip(entries, chosen, strict=True)}
        if not any(chosen) and not self.asked.always_high_confidence:
            return selection
        filled, base = self._dry(step, stats, selection)
        if any(chosen):
            self._verify(step, stats, [e for e, v in zip(entries, chosen, strict=True) if v], filled)
        committed = torch.zeros_like(step.masked)
        keep = base.tolist()
        for entry, verified in zip(entries, chosen, strict=True):
            parts = self.parts[entry.row.index]
            own = keep[entry.begin : entry.begin + len(entry.pos)]
            self._confident(entry, parts)
            if not verified and not parts.confident:
                parts.rule = [entry.pos[i] for i in sorted(entry.masks, key=lambda i: -entry.score[i]) if own[i]]
            else:
                self._fall_back(step, entry, parts)
            where = {p: entry.begin + i for i, p in enumerate(entry.pos)}
            committed[[where[p] for p in parts.all]] = True
        return Selection(
            selection.score, quota=torch.full((step.entries,), committed.shape[0], dtype=torch.int64, device=step.device), eligible=committed,
            editable=selection.editable, params=selection.params if selection.editable is not None else [],
        )  # fmt: skip

    def after(self, step: StepView, stats: LogitStats, selection: Selection, committed: torch.Tensor) -> torch.Tensor | None:
        if self.asked.route == "ucb":
            for row, count in zip(step.rows, step.count(committed & step.masked).tolist(), strict=True):
                self.router.note(row.index, count)
        if self.engine.record:
            self._note_rule(step, selection, committed)
        return self.base.after(step, stats, selection, committed)

    def _note_rule(self, step: StepView, selection: Selection, committed: torch.Tensor) -> None:
        """The positions that the policy's rule committed in rows for which nothing else was decided."""
        bounds = step.plan.bounds
        for row, a, b in zip(step.rows, bounds[:-1], bounds[1:], strict=True):
            parts = self.parts[row.index]
            if not parts.all:
                chosen = torch.nonzero(committed[a:b] & step.masked[a:b]).flatten()
                order = torch.argsort(selection.score[a:b][chosen], descending=True, stable=True)
                parts.rule = step.pos[a:b][chosen][order].tolist()

    def _entries(self, step: StepView, stats: LogitStats, score: torch.Tensor) -> list[_Entry]:
        """One read of the device for all rows."""
        columns = [step.masked, stats.p, score, stats.token, stats.status != 0]
        masked, p, scores, token, bad = torch.stack([c.double() for c in columns]).tolist()
        out, bounds = [], step.plan.bounds
        pos = [p for *_, first, last in step.plan.entries for p in range(first, last)]
        for row, a, b in zip(step.rows, bounds[:-1], bounds[1:], strict=True):
            holes = [m > 0 for m in masked[a:b]]
            start, end = first_run(holes)
            if self.backend.shifted and start < end and pos[a + start] == 0:
                start += 1  # nothing stands before position 0 that could predict it
            tokens = [int(t) for t in token[a:b]]
            valid = not any(bad[a:b]) and all(t >= 0 for t, hole in zip(tokens, holes, strict=True) if hole)
            out.append(_Entry(row, a, pos[a:b], holes, p[a:b], scores[a:b], tokens, valid, (start, end)))
        return out

    def _looks(self, step: StepView, stats: LogitStats, entries: list[_Entry]) -> list[routing.Look]:
        o = self.asked
        alphas, entropies = None, None
        if o.route in ("score", "hysteresis"):
            margin, uncertainty, square = self._distribution(step, stats, square=o.estimator == "soft_renyi_2_entropy")
            alphas = routing.estimate(o, stats.p, margin, uncertainty, square).tolist()
        elif o.route == "ucb":
            entropies = self._distribution(step, stats)[1].tolist()
        length = self.state.schedule.block_size
        out = []
        for e in entries:
            a, (s, t) = e.begin, e.span
            masks = e.masks
            seen = range(s, t) if o.ucb_entropy_source == "span" else masks
            out.append(
                routing.Look(
                    t - s, len(masks), sum(e.p[i] > self.high for i in masks) if self.high is not None else 0,
                    [] if alphas is None else alphas[a + s : a + t], length, e.row.masks - len(masks), length - len(masks),
                    sum(entropies[a + i] for i in seen) / len(seen) if entropies is not None and len(seen) else 0.0,
                )  # fmt: skip
            )
        return out

    def _distribution(self, step: StepView, stats: LogitStats, square: bool = False) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
        """(p1 - p2, entropy / ln V, sum p^2) of every candidate under the verifier's transform; of the statistics where that is theirs."""
        policy = self.engine.policy
        same = self.transform == Transform.of(self.engine.policy) and (policy.tempered or policy.temperature == 0)
        if same and not square:
            return stats.margin, stats.entropy / torch.log(torch.tensor(float(max(2, self.backend.model.config.vocab_size)))), None
        live = torch.nonzero(step.masked).flatten()
        found = routing.statistics(self.transform.probabilities(self._draft_logits(step, live)))
        full = [torch.zeros(step.masked.shape, dtype=torch.float64, device=step.device).index_copy_(0, live, x) for x in found]
        return full[0], full[1], full[2]

    def _dry(self, step: StepView, stats: LogitStats, selection: Selection) -> tuple[torch.Tensor, torch.Tensor]:
        """(canvases with the drafts in place of masks and with the step's edits, what the policy's rule would commit bool [N])."""
        canvas, masked, plan = self.state.canvas.clone(), self.state.masked.clone(), step.plan
        result = ops.commit(
            canvas, masked, plan.cu, plan.row, plan.cand_pos, stats.token, selection.score, rule=selection.rule, params=selection.params,
            cost=selection.cost, eligible=selection.eligible, editable=selection.editable, quota=selection.quota, threshold=selection.threshold,
        )  # fmt: skip
        flat = canvas.view(-1)
        draft = step.masked & (stats.token >= 0)
        flat.index_copy_(0, step.flat, torch.where(draft, stats.token, flat.index_select(0, step.flat)))
        return canvas, result.committed

    # -- verification ------------------------------------------------------------------------------------------------------------------------

    def _verify(self, step: StepView, stats: LogitStats, entries: list[_Entry], filled: torch.Tensor) -> None:
        """The verification forward of these rows; fills their parts and writes replaced tokens into `stats`."""
        o, backend = self.asked, self.backend
        asked = [_Asked(e, tuple(range(*e.span)), self._behind(e)) for e in entries]
        jobs = [Job(a.entry.row.index, attention_block(a.entry.row, backend.attention_block)[0], a.positions) for a in asked]
        hidden = verify(backend.model, backend.cache, jobs, filled, backend.mask_id)
        self.forwards += 1
        # the spans first, then what lies behind them: a span's positions stand together
        order, behind, start = [], [], 0
        for a in asked:
            order += range(start, start + len(a.span))
            behind += range(start + len(a.span), start + len(a.positions))
            start += len(a.positions)
        hidden = hidden.index_select(0, torch.tensor(order + behind, device=step.device))
        at = torch.tensor([i for a in asked for i in a.at(a.span)] + [i for a in asked for i in a.at(a.behind)], device=step.device)
        sizes = [len(a.span) for a in asked]
        cu = torch.tensor([0, *sizes]).cumsum(0).tolist()
        uniforms: list[float] = []
        if o.mode == "stochastic":
            for a in asked:
                row = a.entry.row
                uniforms += self.draws.uniforms(row.index, row.nfe + 1, a.positions[: len(a.span)])
        if o.mode == "greedy":
            out = self._greedy(step, stats, asked, hidden, at, cu)
        elif self._clean and not self.transform.filters and self.asked.tempering > 0:  # the op's exponent is above 0
            out = self._by_op(step, stats, asked, hidden, at, cu, uniforms)
        else:
            out = self._by_definition(step, stats, asked, hidden, at, cu, uniforms)
        replaced = []
        for i, (a, job) in enumerate(zip(asked, jobs, strict=True)):
            e, span, kept = a.entry, a.positions[: len(a.span)], out.kept[i]
            e.row.nfe += 1
            e.row.forwarded += job.size(backend.shifted)
            if not e.valid:
                continue
            parts, counts, token = self.parts[e.row.index], self.counts[e.row.index], None
            parts.accepted = list(span[:kept])
            if kept < len(span) and o.rejected == "draft":
                parts.accepted.append(span[kept])
            elif kept < len(span) and o.rejected == "resample":
                given = self.draws.resample(e.row.index, e.row.nfe, span[kept]) if o.mode == "stochastic" else None
                token = out.token[i] if given is None else given
                parts.replaced = [span[kept]]
                replaced.append((e.begin + a.span[kept], token))
                counts.replaced += 1
            counts.verifies += 1
            counts.drafted += len(span)
            counts.accepted += kept
            counts.rows_forwarded += job.size(backend.shifted)
            own = slice(cu[i], cu[i + 1])
            if self.engine.record:
                drafted = [e.token[k] for k in a.span]
                self.verifications.append(
                    Verification(e.row.index, list(span), drafted, out.p[own], out.q[own], out.ratio[own], uniforms[own], kept, token)
                )
        if o.ratio_threshold is not None:
            self._by_ratio(asked, cu, out.ratio)
        if replaced:
            where, tokens = zip(*replaced, strict=True)
            stats.token.index_copy_(0, torch.tensor(where, device=step.device), torch.tensor(tokens, device=step.device))
        if self.engine.on_verify is not None:
            self.engine.on_verify()

    def _behind(self, entry: _Entry) -> tuple[int, ...]:
        """ratio_all_spans: the masks behind the span are looked at too."""
        return tuple(i for i in entry.masks if i >= entry.span[1]) if self.asked.ratio_all_spans else ()

    def _by_ratio(self, asked: list[_Asked], cu: list[int], ratio: list[float]) -> None:
        """ratio_threshold: what else commits."""
        bar, after = self.asked.ratio_threshold, cu[-1]
        assert bar is not None
        for i, a in enumerate(asked):
            if not a.entry.valid:
                after += len(a.behind)
                continue
            parts = self.parts[a.entry.row.index]
            own = ratio[cu[i] : cu[i + 1]] + ratio[after : after + len(a.behind)]
            after += len(a.behind)
            done = {*parts.accepted, *parts.replaced}
            parts.by_ratio = [p for p, r in zip(a.positions, own, strict=True) if r >= bar and p not in done]

    def _by_op(
        self, step: StepView, stats: LogitStats, asked: list[_Asked], hidden: torch.Tensor, at: torch.Tensor, cu: list[int], uniforms: list[float]
    ) -> _Outcome:
        """`ops.verify_ratio`: p and q are the softmax at the policy's temperature, without the mask token."""
        head, device, n = self.backend.model.head, step.device, at.shape[0]
        (p_logits, p_rows), q_logits = self._kept(step, at), head.logits(hidden)
        suppress = self.engine._suppress
        forbid = self.backend.forbid if suppress is None else torch.cat([self.backend.forbid, suppress])
        rows, token = torch.arange(n, device=device), stats.token.index_select(0, at)
        row = step.plan.cand_row.index_select(0, at)
        forward = step.per_entry([r.nfe + 1 for r in step.rows]).index_select(0, step.entry.index_select(0, at))
        u = torch.tensor(uniforms + [0.0] * (n - len(uniforms)), dtype=torch.float64, device=device)
        result = ops.verify_ratio(
            p_logits, q_logits, p_rows, rows, token, torch.tensor(cu, device=device), self.state.seeds.index_select(0, row), forward,
            step.pos.index_select(0, at), temper=self.asked.tempering, temperature=self.transform.temperature or 1.0, uniforms=u, forbid=forbid,
            resample=self.asked.rejected == "resample",
        )  # fmt: skip
        accepted, following, status = torch.stack([result.accepted, result.next, result.status.long()]).tolist()
        self._report(step, asked, status)
        ratio = result.log_ratio.double().clamp_max(0.0).exp().tolist()
        p: list[float] = []
        q: list[float] = []
        if self.engine.record:
            p, q = (
                self._at(self.transform.probabilities(self._allowed(x)), token).tolist() for x in (p_logits.index_select(0, p_rows), q_logits)
            )
        return _Outcome(accepted, following, ratio, p, q)

    def _by_definition(
        self, step: StepView, stats: LogitStats, asked: list[_Asked], hidden: torch.Tensor, at: torch.Tensor, cu: list[int], uniforms: list[float]
    ) -> _Outcome:
        """The same in plain tensor code: with top-k and top-p, and for recorded runs, whose p and q count the mask token's mass."""
        logits = self._allowed(self.backend.model.head.logits(hidden))
        bits = torch.where(logits.isnan().any(1), int(Status.NAN), torch.where((logits == -torch.inf).all(1), int(Status.ALL_INF), 0)).tolist()
        self._report(step, asked, [max(bits[a:b]) for a, b in zip(cu, cu[1:], strict=False)])
        token = stats.token.index_select(0, at)
        q_all = self.transform.probabilities(logits)
        q = self._at(q_all, token)
        p = self._at(self.transform.probabilities(self._draft_logits(step, at)), token) if self._own_p else stats.p.index_select(0, at).double()
        p_list, q_list, ratio = torch.stack([p, q, acceptance.ratios(q, p, self.asked.tempering)]).tolist()
        kept = [acceptance.accepted([u < r for u, r in zip(uniforms[a:b], ratio[a:b], strict=True)]) for a, b in zip(cu, cu[1:], strict=False)]
        rejected = [i for i, k in enumerate(kept) if k < cu[i + 1] - cu[i]]
        next_token = [-1] * len(kept)
        if rejected and self.asked.rejected == "resample":
            drawn = torch.tensor([cu[i] + kept[i] for i in rejected], device=step.device)
            where = at.index_select(0, drawn)
            p_all = self.transform.probabilities(self._draft_logits(step, where))
            weights = acceptance.residual(q_all.index_select(0, drawn), p_all, self.backend.mask_id)
            forward = step.per_entry([r.nfe + 1 for r in step.rows]).index_select(0, step.entry.index_select(0, where))
            seed = self.state.seeds.index_select(0, step.plan.cand_row.index_select(0, where))
            tokens = acceptance.draw(weights, seed, forward, step.pos.index_select(0, where)).tolist()
            for i, t in zip(rejected, tokens, strict=True):
                next_token[i] = t
        return _Outcome(kept, next_token, ratio, p_list, q_list)

    def _greedy(self, step: StepView, stats: LogitStats, asked: list[_Asked], hidden: torch.Tensor, at: torch.Tensor, cu: list[int]) -> _Outcome:
        backend = self.backend
        best = head_stats(hidden, backend.model.head, None, forbid=backend.forbid, suppress=self.engine._suppress)
        same, token, bits = torch.stack([(best.token == stats.token.index_select(0, at)).long(), best.token, best.status.long()]).tolist()
        self._report(step, asked, [max(bits[a:b]) for a, b in zip(cu, cu[1:], strict=False)])
        kept = [acceptance.accepted(same[a:b]) for a, b in zip(cu, cu[1:], strict=False)]
        following = [token[a + k] if a + k < b else -1 for k, a, b in zip(kept, cu, cu[1:], strict=False)]
        return _Outcome(kept, following, [], [], [])

    def _kept(self, step: StepView, at: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """(logits [M, V], rows int64 [n]): the draft's logits of these candidates, those that its reduction read where it kept them."""
        kept = self.backend.kept
        if kept is not None and kept.rows.shape[0] == step.pos.shape[0]:
            return kept.logits, kept.rows.index_select(0, at)
        query = step.plan.cand_query.index_select(0, at)  # an adaptive schedule has moved the block's end since
        return self.backend.model.head.logits(self.backend.hidden.index_select(0, query)), torch.arange(at.shape[0], device=at.device)

    def _draft_logits(self, step: StepView, at: torch.Tensor) -> torch.Tensor:
        logits, rows = self._kept(step, at)
        return self._allowed(logits.index_select(0, rows))

    def _allowed(self, logits: torch.Tensor) -> torch.Tensor:
        """Logits of the ids that may be chosen; in the authors' distributions the mask token stays."""
        suppress = self.engine._suppress
        logits = logits if suppress is None else logits.index_fill(1, suppress, -torch.inf)
        return logits.index_fill(1, self.backend.forbid, -torch.inf) if self._clean else logits

    @staticmethod
    def _at(probabilities: torch.Tensor, token: torch.Tensor) -> torch.Tensor:
        return probabilities.gather(1, token[:, None])[:, 0]

    def _report(self, step: StepView, asked: list[_Asked], status: list[int]) -> None:
        """Invalid logits of the verifier: raise, or end their rows."""
        for a, bits in zip(asked, status, strict=True):
            row = a.entry.row
            if bits and self.engine.on_invalid == "raise":
                raise InvalidLogits(
                    f"row {row.index}, verification of step {row.nfe}, positions {a.positions[0]} to {a.positions[-1]}: {Status(bits).describe()}; "
                    "on_invalid='skip' ends such rows and goes on with the others"
                )
            if bits:
                row.finish_reason = "invalid"
                a.entry.valid = False

    # -- the rest of the step ----------------------------------------------------------------------------------------------------------------

    def _confident(self, entry: _Entry, parts: Parts) -> None:
        """always_high_confidence: what is left and confident."""
        if not self.asked.always_high_confidence or not entry.valid:
            return
        assert self.high is not None
        done = set(parts.all)
        left = [i for i in entry.masks if entry.pos[i] not in done and entry.p[i] > self.high]
        parts.confident = [entry.pos[i] for i in sorted(left, key=lambda i: -entry.p[i])]

    def _fall_back(self, step: StepView, entry: _Entry, parts: Parts) -> None:
        """Where fewer than the quota were committed: all that the policy's threshold lets through if they are enough, else the best."""
        done = set(parts.all)
        missing = min(self._least(entry.row), len(entry.masks)) - len(done)
        if missing <= 0 or not entry.valid:
            return
        left = sorted((i for i in entry.masks if entry.pos[i] not in done), key=lambda i: -entry.score[i])
        above = [] if self.bar is None else [i for i in left if entry.score[i] > self.bar or (self.equal and entry.score[i] == self.bar)]
        parts.rule = [entry.pos[i] for i in (above if len(above) >= missing else left[:missing])]

    def _least(self, row: Row) -> int:
        if self.asked.min_commit is not None:
            return self.asked.min_commit
        policy = self.engine.policy
        if policy.spec.uses_steps:
            return max(1, row.quotas[row.step] if row.step < len(row.quotas) else row.masks)
        return int(policy.knobs.get("minimum", 1))


@dataclasses.dataclass(frozen=True)
class _Asked:
    """What a row asks its verification: candidates of its span and behind it, counted from its first one."""

    entry: _Entry
    span: tuple[int, ...]
    behind: tuple[int, ...]

    @property
    def positions(self) -> tuple[int, ...]:
        return tuple(self.entry.pos[i] for i in self.span + self.behind)

    def at(self, which: tuple[int, ...]) -> list[int]:
        """Among all candidates of the step."""
        return [self.entry.begin + i for i in which]


@dataclasses.dataclass(frozen=True)
class _Outcome:
    """kept, token: per row the accepted prefix and what the rejected position gets (-1: nothing). ratio: per position in question (empty in greedy
    mode). p, q: the same, where they were computed."""

    kept: list[int]
    token: list[int]
    ratio: list[float]
    p: list[float]
    q: list[float]
