"""Golden numbers of algorithms.md for rules, scores, schedules and carry-over, and invariants that hold exactly."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import unmask
from literal import MASK, VOCAB, Script
from random_models import make
from unmask.decode.backend import make_plan
from unmask.decode.osdt import Table
from unmask.decode.policy import Policy, quota_schedule
from unmask.decode.rules.base import Run, StepView
from unmask.decode.rules.dream import timesteps, transfer_count
from unmask.decode.rules.dus import dilated_groups
from unmask.decode.rules.plackett_luce import plackett_luce_log_prob
from unmask.decode.rules.remdm import transition
from unmask.decode.schedule import FixedBlocks
from unmask.decode.scores import Score
from unmask.decode.state import DecodeState
from unmask.errors import SettingError
from unmask.ops import LogitStats


def with_probabilities(p: list[float]) -> torch.Tensor:
    """Logits [L, V] of a canvas whose position i gives token 1 the probability p[i] and shares the rest among seven others."""
    x = torch.full((len(p), VOCAB), -100.0)
    for i, q in enumerate(p):
        x[i, 2:9] = math.log((1.0 - q) / 7.0)
        x[i, 1] = math.log(q)
    return x


def first_commits(p: list[float], **settings) -> int:
    """How many positions the first forward commits."""
    table = torch.cat([torch.zeros(1, VOCAB), with_probabilities(p)]).unsqueeze(0)
    result = unmask.infill(Script([table]), [0, *[None] * len(p)], block_size=64, trace=True, **settings)
    return len(result.trace[0]["committed"])


def test_quota():
    assert quota_schedule(10, 4) == [3, 3, 2, 2] and quota_schedule(3, 5) == [1, 1, 1, 0, 0]


def dream_counts(masks: int, steps: int) -> list[int]:
    left, out, times = masks, [], timesteps(steps, 1e-3)
    for i in range(steps):
        out.append(transfer_count(left, i, times))
        left -= out[-1]
    return out


def test_dream_schedule():
    assert dream_counts(8, 8) == [0, 1, 1, 1, 1, 1, 1, 2] and dream_counts(8, 4) == [1, 2, 2, 3]
    for n, s in itertools.product(range(1, 20), range(1, 20)):
        assert sum(dream_counts(n, s)) == n
    r = unmask.infill(make(), [None] * 8, policy="dream", block_size=8, trace=True)
    assert [len(x["committed"]) for x in r.trace] == [0, 1, 1, 1, 1, 1, 1, 2]


@pytest.mark.parametrize(
    "p, paper, code",
    [
        ([0.99, 0.98, 0.5, 0.4], 2, 2), ([0.9, 0.9, 0.9, 0.9], 4, 4), ([0.3], 1, 1), ([0.99, 0.2], 1, 2), ([0.99, 0.98, 0.97, 0.5], 3, 4),
    ],
)  # fmt: skip
def test_factor(p, paper, code):
    assert first_commits(p, policy="factor") == paper
    assert first_commits(p, policy="factor", factor_off_by_one=True) == code


def eb_count(entropies: list[float], gamma: float) -> int:
    """The rule on entropies themselves: StepView and LogitStats made by hand."""
    n = len(entropies)
    state = DecodeState([[MASK] * n], [[False] * n], MASK, FixedBlocks(n), None, [0], torch.device("cpu"))
    plan = make_plan(state, ((0, 0, n, 0, n),))
    step = StepView(state, state.rows, plan, False)
    stats = torch.zeros(n, 6)
    stats[:, 3] = torch.tensor(entropies)
    policy = Policy("eb", knobs=dict(gamma=gamma))
    run = Run(policy, state, MASK)
    none = torch.empty(n, 0)
    pack = LogitStats.pack(torch.ones(n, dtype=torch.int64), stats, torch.zeros(n, dtype=torch.int32), torch.empty(n, 0, 2), none.long(), none)
    selection = policy.lower(run).select(step, pack, Score(run)(step, pack, torch.float32))
    from unmask import ops

    result = ops.commit(
        state.canvas, state.masked, plan.cu, plan.row, plan.cand_pos, pack.token, selection.score, rule=selection.rule, params=selection.params,
        cost=selection.cost,
    )  # fmt: skip
    return int(result.count)


def test_entropy_bound():
    assert eb_count([0.001, 0.002, 0.004, 0.02, 0.5], 0.01) == 4
    assert eb_count([0.004] * 4, 0.01) == 3 and eb_count([0.5, 0.6], 0.01) == 1
    assert eb_count([0.0, 0.0, 0.0, 3.0], 0.0) == 4  # the newest token is not charged


def test_dilated_groups():
    assert dilated_groups(8) == (0, 2, 1, 2, 0, 2, 1, 2)
    sizes = lambda *a: [dilated_groups(*a).count(g) for g in range(max(dilated_groups(*a)) + 1)]  # noqa: E731
    assert sizes(12) == [2, 2, 8] and sizes(64) == [2, 2, 4, 8, 16, 32] and sizes(12, 2, True) == [2, 2, 8] and sizes(1) == [1]
    for size, base in itertools.product(range(1, 70), (2, 3, 5)):
        groups = dilated_groups(size, base)
        for t in range(max(groups) + 1):
            inside = [k for k, g in enumerate(groups) if g == t]
            assert all(k % max(1, size // base ** (t + 1)) == 0 for k in inside)
        assert len(groups) == size and max(groups) + 1 <= max(1, math.ceil(math.log(size, base) + 1e-9))


def test_credit():
    """alpha ln(1 + C) of the paper's example, read off the probabilities that the run reports: top1 (a, .4), (a, .5), (b, .45)."""
    a, b = 1, 2

    def spread(token: int, p: float) -> torch.Tensor:
        x = torch.full((VOCAB,), -50.0)
        x[[t for t in range(1, 8) if t != token]] = math.log((1 - p) / 6)
        x[token] = math.log(p)
        return x

    seen = [spread(a, 0.4), spread(a, 0.5), spread(b, 0.45)]
    lifts = [{a: 0.423997}, {a: 0.651575}, {a: 0.561173, b: 0.431537}]
    # the others are surer and go first, one a forward, so the first position only gathers credit until it commits, at forward k
    for k in range(3):
        table = torch.zeros((k + 1, k + 2, VOCAB))
        for f in range(k + 1):
            table[f, 1] = seen[f]
            for j in range(2, k + 2):
                table[f, j] = spread(3, 0.99 - 0.02 * j)
        result = unmask.infill(Script([table]), [0, *[None] * (k + 1)], policy="credit", threshold=1.0, block_size=8, trace=True)
        (position, token, p), = [c for x in result.trace for c in x["committed"] if c[0] == 1]
        fused = seen[k].double().clone()
        for t, lift in lifts[k].items():
            fused[t] += lift
        assert result.trace[k]["committed"][0][0] == 1
        assert p == pytest.approx(float(fused.softmax(0)[token]), abs=2e-6) and token == int(fused.argmax())


def test_credit_without_weight_is_the_threshold_rule():
    model = make(seed=2)
    base = unmask.generate(model, [[1, 2], [3]], threshold=0.4, variant="dinfer", trace=True, block_size=8)
    none = unmask.generate(model, [[1, 2], [3]], policy="credit", credit_alpha=0.0, threshold=0.4, trace=True, block_size=8)
    assert [(r.canvas, r.nfe, [x["committed"] for x in r.trace]) for r in base] == [(r.canvas, r.nfe, [x["committed"] for x in r.trace]) for r in none]


def test_plackett_luce():
    h = torch.tensor([0.5, -1.0, 2.0, 0.0])
    assert float(plackett_luce_log_prob(h, [2, 0])) == pytest.approx(-0.946480, abs=1e-6)
    for k in range(1, 5):
        total = sum(float(plackett_luce_log_prob(h, list(o)).exp()) for o in itertools.permutations(range(4), k))
        assert total == pytest.approx(1.0, abs=1e-12)
    assert float(plackett_luce_log_prob(h + 700.0, [2, 0])) == pytest.approx(-0.946480, abs=1e-6)


def test_plackett_luce_draws_by_its_probabilities():
    h = torch.tensor([0.5, -1.0, 2.0, 0.0]).double()
    found: dict[tuple[int, ...], int] = {}
    rows = [[0, None, None, None, None]] * 4000
    got = unmask.infill(
        Still(), rows, policy="plackett_luce", steps=2, block_size=4, trace=True, order_logits=lambda s: h[s.pos - 1], seed=3
    )
    for r in got:
        order = tuple(p - 1 for p, *_ in r.trace[0]["committed"])
        found[order] = found.get(order, 0) + 1
    assert {len(r.trace[1]["committed"]) for r in got} == {2}
    for order in itertools.permutations(range(4), 2):
        p = float(plackett_luce_log_prob(h, list(order)).exp())
        assert abs(found.get(order, 0) - 4000 * p) < 5 * math.sqrt(4000 * p * (1 - p)) + 1


class Still(torch.nn.Module):
    """The same logits everywhere, so that only the order is left to chance."""

    def __init__(self):
        super().__init__()
        self.config = Script([torch.zeros(1, 1, VOCAB)]).config

    def forward(self, ids):
        return torch.linspace(0, 2, VOCAB).expand(*ids.shape, VOCAB)


@pytest.mark.parametrize("p, lam", [((0.7, 0.2, 0.1), 0.41457), ((0.25,) * 4, 0.01423), ((0.97, 0.01, 0.01, 0.01), 0.97973)])
def test_soft_mask_weights(p, lam):
    entropy = -sum(x * math.log(x) for x in p)
    masks = unmask.SoftMasks(scale=1.0)
    assert float(masks.weights(torch.tensor([entropy]), 1.0)) == pytest.approx(lam, abs=1e-5)


def test_soft_masks_of_scale_0_are_plain_masks():
    for settings in (dict(threshold=0.3), dict(policy="quota", temperature=0.7), dict(threshold=0.3, cache="dual"), dict(policy="wino")):
        model = make(seed=6)
        a = unmask.generate(model, [[1, 2], [3]], trace=True, block_size=8, **settings)
        b = unmask.generate(model, [[1, 2], [3]], trace=True, block_size=8, soft_masks=unmask.SoftMasks(scale=0.0), **settings)
        c = unmask.generate(model, [[1, 2], [3]], trace=True, block_size=8, soft_masks=unmask.SoftMasks(scale=1.0), **settings)
        strip = lambda rs: [(r.canvas, [x["committed"] for x in r.trace]) for r in rs]  # noqa: E731
        assert strip(a) == strip(b) != strip(c)


def test_soft_masks_mix_undecided_positions_only():
    seen = []

    def look(module, args):
        f = args[0]
        seen.append((f.ids.clone(), f.pos.clone(), f.row.clone(), f.mix_ids.clone(), f.mix_weight.clone()))

    model = make(seed=6)
    handle = model.register_forward_pre_hook(look)
    unmask.generate(model, [1, 2, 3], block_size=8, threshold=0.5, soft_masks=unmask.SoftMasks(k=2))
    handle.remove()
    mixed = 0
    for forward, (ids, _, row, mix_ids, weight) in enumerate(seen):
        assert torch.allclose(weight.sum(1), torch.ones(len(ids)), atol=1e-6) and torch.equal(mix_ids[:, 0], ids)
        plain = (weight[:, 0] == 1.0) & (weight[:, 1:] == 0.0).all(1)
        assert bool(plain[(ids != 60) | (row < 0)].all())  # decided tokens and padding
        assert forward or bool(plain.all())  # the first step sees plain masks
        mixed += int((~plain).sum())
    assert mixed > 20


def test_a_decided_position_is_plain_whoever_decided_it():
    """Templates decide positions outside a step; a mix that such a position still carries is not used."""
    from unmask.models.backbone import full_forward

    state = DecodeState([[MASK] * 3], [[False] * 3], MASK, FixedBlocks(3), None, [0], torch.device("cpu"))
    soft = unmask.SoftMasks(k=2).start(state, MASK)
    mix = torch.tensor([0.5, 0.3, 0.2])
    soft.weight[0, 1] = mix
    plan = make_plan(state, ((0, 0, 3, 0, 3),))
    assert torch.equal(soft.mixed(full_forward(state.canvas), plan).mix_weight[1], mix)
    state.masked[0, 1] = False
    assert soft.mixed(full_forward(state.canvas), plan).mix_weight[1].tolist() == [1.0, 0.0, 0.0]


# AdaBlock


def blocks_of(trace) -> list[list[int]]:
    out: dict[int, list[int]] = {}
    for x in trace:
        out.setdefault(x["block"], []).extend(p for p, *_ in x["committed"])
    return [sorted(b) for b in out.values()]


@given(seed=st.integers(0, 10**6), size=st.integers(1, 12), n=st.integers(1, 24), threshold=st.sampled_from([0.0, 0.2, 0.5, math.inf]), window=st.sampled_from([0.0, 0.25, 1.0]))
def test_adablock(seed, size, n, threshold, window):
    """Blocks follow each other and fill the region; each ends behind a token that its first step predicted as the most confident delimiter of
    its window, or after block_size positions."""
    g = torch.Generator().manual_seed(seed)
    table = torch.randn((40, n + 1, VOCAB), generator=g) * 3
    script = Script([table])
    settings = dict(schedule="adablock", delimiters=[2, 5, 7], delimiter_threshold=threshold, delimiter_window=window)
    r = unmask.infill(script, [0, *[None] * n], block_size=size, trace=True, threshold=0.6, **settings)
    blocks = blocks_of(r.trace)
    assert [p for b in blocks for p in b] == list(range(1, n + 1))
    for number, block in enumerate(blocks):
        first = next(x["nfe"] - 1 for x in r.trace if x["block"] == number)
        p = table[min(first, 39)].softmax(-1)
        token = table[min(first, 39), :, :MASK].argmax(-1)
        reach = min(block[0] + int(window * n), n + 1)
        found = [i for i in range(block[0], reach) if int(token[i]) in (2, 5, 7)]
        best = max(found, key=lambda i: float(p[i, token[i]]), default=None)
        if best is not None and float(p[best, token[best]]) >= threshold:
            assert block[-1] == best
        else:
            assert len(block) == min(size, n + 1 - block[0])
    if threshold == math.inf:
        fixed = unmask.infill(Script([table]), [0, *[None] * n], block_size=size, trace=True, threshold=0.6)
        assert (r.canvas, r.nfe) == (fixed.canvas, fixed.nfe)


# OSDT


def test_osdt_tables(tmp_path):
    model = make(seed=3)
    prompts = [[1, 2], [3]]
    base = unmask.generate(model, prompts, threshold=0.9, block_size=8)
    constant = unmask.generate(model, prompts, policy="osdt", table=Table(((0.9,),)), block_size=8)
    assert [(r.canvas, r.nfe) for r in base] == [(r.canvas, r.nfe) for r in constant]
    assert unmask.generate(model, [1], policy="osdt", table=Table(((0.9,),)), cap=0.0, block_size=8).nfe == 4
    calibration = unmask.generate(model, [1, 2], threshold=0.5, block_size=8, trace=True)
    for summary, per in itertools.product(("mean", "median", "q1", "q3", "min"), ("block", "step")):
        table = Table.calibrate(calibration, summary=summary, per=per)
        table.save(tmp_path / "table.json")
        assert Table.load(tmp_path / "table.json") == table
        by_file = unmask.generate(model, [3], policy="osdt", table=str(tmp_path / "table.json"), block_size=8)
        assert by_file.canvas == unmask.generate(model, [3], policy="osdt", table=table, block_size=8).canvas
    scores = [c[2] for x in calibration.trace if x["block"] == 1 for c in x["committed"]]
    assert Table.calibrate(calibration).thresholds[1] == (pytest.approx(sum(scores) / len(scores)),)
    assert Table.calibrate(calibration, summary="min").threshold(99, 99) == min(c[2] for x in calibration.trace if x["block"] == 3 for c in x["committed"])


def test_osdt_cells_without_commits():
    record = lambda block, step, *scores: dict(row=0, block=block, step=step, committed=[[0, 1, s] for s in scores])  # noqa: E731
    trace = [record(0, 0, 0.5), record(0, 1), record(0, 2, 0.7), record(2, 0, 0.3)]
    table = Table.calibrate(trace, per="step")
    assert table.thresholds == ((0.5, pytest.approx(0.6), 0.7), (pytest.approx(0.5),), (0.3,))


@pytest.mark.parametrize("text", ["", "{", "[]", '{"thresholds": []}', '{"thresholds": [[2.0]], "summary": "mean", "per": "block"}', '{"thresholds": [["a"]], "summary": "mean", "per": "block"}', '{"thresholds": [[NaN]], "summary": "mean", "per": "block"}'])  # fmt: skip
def test_osdt_bad_files(tmp_path, text):
    (tmp_path / "t.json").write_text(text)
    with pytest.raises(SettingError, match="table: cannot read an OSDT table"):
        unmask.generate(make(), [1], policy="osdt", table=str(tmp_path / "t.json"))
    with pytest.raises(SettingError, match="table: cannot read"):
        Table.load(tmp_path / "missing.json")
    for bad in ([], [record for row in (0, 1) for record in [dict(row=row, block=0, step=0, committed=[[0, 1, 0.5]])]], [dict(row=0, block=0, step=0, committed=[])]):
        with pytest.raises(SettingError):
            Table.calibrate(bad)


# ReMDM


@pytest.mark.parametrize("strategy", ["cap", "rescale", "loop"])
@pytest.mark.parametrize("eta", [0.0, 0.02, 0.5])
def test_remdm_transition(strategy, eta):
    """From every step the posterior's rows sum to one and the expected share of masks is 1 - alpha_s; sigma = 0 is masked diffusion."""
    for steps in (1, 4, 50):
        for k in range(steps):
            a_t, a_s, sigma = transition(strategy, eta, k, steps, 0.55, 0.05, 0.9)
            assert 0.0 <= a_t <= a_s <= 1.0 and 0.0 <= sigma <= 1.0
            move = (a_s - (1 - sigma) * a_t) / (1 - a_t)
            stay = (1 - a_s - sigma * a_t) / (1 - a_t)
            assert move + stay == pytest.approx(1.0) and -1e-9 <= move <= 1 + 1e-9
            assert (1 - a_t) * stay + a_t * sigma == pytest.approx(1 - a_s)
            if eta == 0.0:
                assert sigma == 0.0 and move == pytest.approx((a_s - a_t) / (1 - a_t))


@pytest.mark.parametrize("strategy", ["cap", "rescale", "conf"])
def test_remdm_masks_as_many_as_it_should(strategy):
    """Simulation: after step k of T the share of undecided positions is 1 - alpha = t, within the noise of 60 rows of 40 positions (for
    strategy conf the masks' sigma is 0 as the authors' is, so more than that is undecided)."""
    rows, n, steps = 60, 40, 8
    got = unmask.infill(Still(), [[0, *[None] * n]] * rows, policy="remdm", strategy=strategy, eta=0.3, steps=steps, block_size=n, trace=True, seed=1)
    for k in range(steps - 1):
        share = sum(r.trace[k]["masks_left"] for r in got) / (rows * n)
        t = 1 - (k + 1) * (1 - 1e-5) / steps
        noise = 5 * math.sqrt(t * (1 - t) / (rows * n))
        assert share > t - noise and (strategy == "conf" or share < t + noise)
    assert all(r.trace[-1]["masks_left"] == 0 and r.nfe == steps for r in got) and any(x["remasked"] for r in got for x in r.trace)
    none = unmask.infill(Still(), [[0, *[None] * n]] * 3, policy="remdm", strategy="cap", eta=0.0, steps=steps, block_size=n, trace=True, seed=1)
    assert not any(x["remasked"] for r in none for x in r.trace)


# KLASS, LLaDA2.1, remasking


def test_klass_of_still_logits():
    """Nothing moves: KL is 0 from the second forward on, so with history n everything confident commits at forward n + 1."""
    p = [0.95, 0.97, 0.2, 0.99, 0.3]
    table = torch.cat([torch.zeros(1, VOCAB), with_probabilities(p)]).unsqueeze(0)
    for history in (1, 2):
        r = unmask.infill(Script([table]), [0, *[None] * 5], policy="klass", threshold=0.9, history=history, block_size=8, trace=True)
        counts = [len(x["committed"]) for x in r.trace]
        assert counts == ([1, 2, 1, 1] if history == 1 else [1, 1, 1, 1, 1])
        assert [c[0] for c in r.trace[0]["committed"]] == [4]  # a block's first forward has no predecessor: the best one
    r = unmask.infill(Script([table]), [0, *[None] * 5], policy="klass", threshold=0.9, history=2, kl_threshold=1e-5, block_size=2, trace=True)
    assert [x["step"] for x in r.trace if x["step"] == 0] == [0, 0, 0] and all(len(x["committed"]) == 1 for x in r.trace)


@pytest.mark.parametrize("options", [dict(suppress=[3]), dict(temperature=0.8), dict(temperature=0.8, top_p=0.8), dict(repetition_penalty=1.5)], ids=str)
def test_klass_measures_the_logits_themselves(options):
    """Filters, suppressed ids and penalties shape what is drawn; a distribution that does not move has KL 0 whatever they are."""
    p = [0.6, 0.55, 0.5, 0.65, 0.6]
    table = torch.cat([torch.zeros(1, VOCAB), with_probabilities(p)]).unsqueeze(0)
    r = unmask.infill(Script([table]), [0, *[None] * 5], policy="klass", threshold=0.0, history=1, kl_threshold=1e-5, block_size=8, trace=True, **options)
    assert [len(x["committed"]) for x in r.trace] == [1, 4]


def test_editing_that_is_off_is_llada2():
    model = make(seed=3)
    a = unmask.generate(model, [[1, 2], [3]], policy="llada2", threshold=0.4, block_size=8, trace=True)
    b = unmask.generate(model, [[1, 2], [3]], policy="edit", threshold=0.4, edit_threshold=1.5, block_size=8, trace=True)
    assert [(r.canvas, r.nfe) for r in a] == [(r.canvas, r.nfe) for r in b] and not any(x["edited"] for r in b for x in r.trace)
    c = unmask.generate(model, [[1, 2], [3]], policy="edit", threshold=0.4, edit_threshold=0.2, block_size=8, trace=True)
    assert any(x["edited"] for r in c for x in r.trace)


def test_edits_are_decided_by_probability_whatever_orders_the_masks():
    """The second forward predicts another token with p = 0.95 at position 1 and 0.4 at position 2; the score function says the opposite."""
    table = torch.cat([torch.zeros(1, VOCAB), with_probabilities([0.9, 0.8])]).repeat(3, 1, 1)
    table[1:, 1], table[1:, 2] = with_probabilities([0.95])[0].roll(3), with_probabilities([0.4])[0].roll(3)
    settings = dict(policy="edit", threshold=0.0, edit_threshold=0.6, block_size=8, trace=True)
    r = unmask.infill(Script([table]), [0, None, None], score=lambda step: step.pos.double() - 1.0 + 0.5 * (step.pos == 1), **settings)
    assert [e[:3] for x in r.trace for e in x["edited"]] == [[1, 1, 4]]


def test_remask_counts():
    model = make(seed=3)
    r = unmask.generate(model, [1], max_new_tokens=8, block_size=8, policy="remask", k=2, loop_steps=3, start_ratio=0.5, trace=True, eos_stop=False)
    committed, back = [len(x["committed"]) for x in r.trace], [len(x["remasked"]) for x in r.trace]
    assert committed == [1] * 4 + [0, 2] * 3 + [1] * 4 and back == [0] * 4 + [2, 0] * 3 + [0] * 4 and r.nfe == 8 + 2 * 3


# scores


@given(data=st.data())
def test_certainty_is_the_direct_sum(data):
    """sum of w(d) over decided neighbours, w Gaussian: the region's own, as many on its left as it is long, and on its right if its last one is."""
    n, lead = data.draw(st.integers(1, 12)), data.draw(st.integers(0, 3))
    sigma = data.draw(st.sampled_from([0.3, 1.0, 3.0, 20.0]))
    canvases = [[1] * lead + data.draw(st.lists(st.sampled_from([None, 2]), min_size=n, max_size=n)) for _ in range(2)]
    canvases = [c for c in canvases if None in c] or [[None]]
    canvases.append([None] * data.draw(st.integers(1, 30)))  # of another length
    state = DecodeState([[MASK if t is None else t for t in c] for c in canvases], [[t is not None for t in c] for c in canvases], MASK, FixedBlocks(64), None, [0] * len(canvases), torch.device("cpu"))
    entries = tuple((r.index, 0, r.end, r.block_start, r.block_end) for r in state.rows)
    step = StepView(state, state.rows, make_plan(state, entries), False)
    policy = Policy("quota", certainty_sigma=sigma)
    got = Score(Run(policy, state, MASK)).certainty(step)
    w = lambda d: math.exp(-(d * d) / (2 * sigma * sigma))  # noqa: E731
    want = []
    for c in canvases:
        start, end = c.index(None), len(c)
        size = end - start
        for i in range(start, end):
            total = math.fsum(w(i - j) for j in range(start, end) if c[j] is not None)
            total += math.fsum(w(i - j) for j in range(start - size, start))
            total += math.fsum(w(i - j) for j in range(end, end + size)) if c[-1] is not None else 0.0
            want.append(total / max(math.fsum(w(d) for d in range(-3 * size, 3 * size)), 1e-8))
    assert torch.allclose(got, torch.tensor(want, dtype=torch.float64), atol=1e-12, rtol=1e-10)
    alone = DecodeState([[MASK if t is None else t for t in canvases[0]]], [[t is not None for t in canvases[0]]], MASK, FixedBlocks(64), None, [0], torch.device("cpu"))
    row = alone.rows[0]
    one = StepView(alone, alone.rows, make_plan(alone, ((0, 0, row.end, row.block_start, row.block_end),)), False)
    assert torch.equal(Score(Run(policy, alone, MASK)).certainty(one), got[: one.pos.shape[0]])  # bit for bit


def test_position_bias():
    """-lambda (i - s) is added: a large lambda is left to right, and the scores that the trace reports are those."""
    model = make(seed=4)
    r = unmask.infill(model, [1, *[None] * 12], policy="quota", position_bias=10.0, block_size=6, trace=True)
    assert [p for x in r.trace for p, *_ in x["committed"]] == list(range(1, 13))
    plain = unmask.infill(model, [1, *[None] * 12], policy="quota", block_size=12, trace=True)
    small = unmask.infill(model, [1, *[None] * 12], policy="quota", block_size=12, position_bias=1e-9, trace=True)
    for a, b in zip(plain.trace, small.trace, strict=True):
        (p, t, s), (q, u, v) = a["committed"][0], b["committed"][0]
        assert (p, t) == (q, u) and v == pytest.approx(s - 1e-9 * (p - 1), abs=1e-13)


def test_pc_sampler_invariants():
    model = make(seed=4)
    flat = torch.full((61,), 1.0 / 61)
    a = unmask.generate(model, [1, 2], policy="quota", block_size=8, trace=True)
    b = unmask.generate(model, [1, 2], policy="pc", frequencies=flat, decay=0.0, block_size=8, trace=True)
    assert [c[:2] for x in a.trace for c in x["committed"]] == [c[:2] for x in b.trace for c in x["committed"]]
    c = unmask.generate(model, [1, 2], policy="pc", frequencies=flat, decay=50.0, block_size=8, trace=True)
    order = [p for x in c.trace for p, *_ in x["committed"]]
    assert order == sorted(order)
