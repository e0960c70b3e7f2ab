"""Likelihood estimators: the authors' recorded runs, the samplers' laws, invariants that hold for any model, illegal settings."""

from __future__ import annotations

import inspect
import itertools
import json
import math
import types
from fractions import Fraction
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file

import unmask
from random_models import make
from unmask import likelihood
from unmask.compat import llada
from unmask.errors import InvalidLogits, SettingError
from unmask.likelihood import (
    Masks,
    chain_masks,
    coupled_masks,
    log_likelihood,
    sample_masks,
    score_masks,
    scorer,
    stratified_counts,
    stratified_times,
    suffix_greedy_prediction,
)
from unmask.likelihood import masks as masks_module

GOLDEN = Path(__file__).parent / "golden" / "llada"
RUNS = json.loads((GOLDEN / "elbo.json").read_text())["runs"]
MASK = 60
PROMPT, ANSWER = [5, 6, 7], [8, 9, 10, 11, 12]


class Foreign(torch.nn.Module):
    """Somebody's module: logits of a model of ours."""

    def __init__(self, model, **config):
        super().__init__()
        self.inner, self.config, self.calls = [model], types.SimpleNamespace(**config), []

    def forward(self, ids):
        self.calls.append(tuple(ids.shape))
        return types.SimpleNamespace(logits=self.inner[0].logits(ids))


class Table(torch.nn.Module):
    """Logits that depend on the position alone: [L, V]."""

    def __init__(self, logits):
        super().__init__()
        self.logits, self.seen = logits, []
        self.config = types.SimpleNamespace(mask_id=MASK)

    def forward(self, ids):
        self.seen.append(ids.clone())
        return self.logits.expand(ids.shape[0], -1, -1)


@pytest.fixture(scope="module")
def model():
    return make(seed=12)


@pytest.fixture(scope="module")
def golden():
    return unmask.load(GOLDEN / "checkpoint"), load_file(GOLDEN / "elbo.safetensors")


def forwards_of(model, call):
    count = []
    handle = model.register_forward_hook(lambda *_: count.append(1))
    try:
        return call(), len(count)
    finally:
        handle.remove()


def literal(model, prompt, answer, masked, weights, cfg_scale=0.0, shifted=False):
    """Each sample's value from full logits in float64, position by position."""
    values, p = [], len(prompt)
    for row, weight in zip(masked.tolist(), weights.tolist(), strict=True):
        x = torch.tensor([prompt + [MASK if m else a for m, a in zip(row, answer, strict=True)]])
        logits = model.logits(x)[0].double()
        if cfg_scale:
            x[0, :p] = MASK
            null = model.logits(x)[0].double()
            logits = null + (cfg_scale + 1) * (logits - null)
        where = [p + j for j, m in enumerate(row) if m]
        read = [max(i - 1, 0) if shifted else i for i in where]
        lp = logits.log_softmax(-1)
        values.append(weight * sum(lp[r, answer[i - p]].item() for r, i in zip(read, where, strict=True)))
    return torch.tensor(values, dtype=torch.float64)


# --- the authors' runs ---


def test_every_golden_run_is_here():
    assert len(RUNS) == 5 and {r["args"]["cfg_scale"] for r in RUNS} == {0.0, 1.5}


@pytest.mark.parametrize("run", RUNS, ids=lambda r: r["id"])
def test_golden_run(golden, run):
    model, data = golden
    args = run["args"]
    get = {name: data[f"{run['id']}.{name}"] for name in ("prompt", "answer", "perturbed", "p_mask", "row_loss")}
    p, length = get["prompt"].numel(), get["answer"].numel()
    masked = (get["perturbed"] == args["mask_id"])[..., p:].reshape(args["mc_num"], length)
    got, forwards = forwards_of(
        model,
        lambda: log_likelihood(
            model, get["prompt"], get["answer"], masks=masked, batch_size=args["batch_size"], cfg_scale=args["cfg_scale"], mask_id=args["mask_id"]
        ),
    )
    torch.testing.assert_close(-got.values.float(), get["row_loss"].flatten(), rtol=1e-4, atol=0)
    assert got.value == pytest.approx(run["log_likelihood"], rel=1e-4)
    assert forwards == got.forwards <= run["nfe"] and got.samples == args["mc_num"]
    torch.testing.assert_close(got.masks.weights.float(), 1 / get["p_mask"][..., -1].flatten())
    # and the numbers of masks are those that stratified_counts gives for the first of them
    counts = masked.view(-1, args["batch_size"], length).sum(-1).tolist()
    assert counts == [stratified_counts(length, args["batch_size"], c[0]) for c in counts]


def test_compat_function(golden, model):
    names = inspect.signature(llada.get_log_likelihood).parameters
    empty = inspect.Parameter.empty
    assert {n: p.default for n, p in names.items()} == dict(
        model=empty, prompt=empty, answer=empty, mc_num=128, batch_size=16, cfg_scale=0.0, mask_id=126336
    )
    full, data = golden
    single = [r for r in RUNS if data[f"{r['id']}.answer"].numel() == 1]
    assert single  # one token: nothing is random, so the authors' number must come out of a run of our own
    for run in single:
        args = dict(run["args"])
        got = llada.get_log_likelihood(full, data[f"{run['id']}.prompt"].long(), data[f"{run['id']}.answer"].long(), **args)
        assert isinstance(got, float) and got == pytest.approx(run["log_likelihood"], rel=1e-4)
    prompt, answer = torch.tensor(PROMPT), torch.tensor(ANSWER)
    draws = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        draws.append(llada.get_log_likelihood(model, prompt, answer, 32, 8, 0.0, MASK))
    assert draws[0] == draws[1] != draws[2]
    torch.manual_seed(1)
    assert llada.get_log_likelihood(model, prompt, answer, 32, 8, -1.0, MASK) == draws[0]  # the authors test cfg_scale > 0
    torch.manual_seed(1)
    assert llada.get_log_likelihood(model, prompt, answer, 32, 8, 1.0, MASK) != draws[0]


# --- samplers ---


def test_counts_of_the_specification():
    assert stratified_counts(5, 4, 3) == [3, 4, 1, 2]
    assert stratified_counts(8, 4, 3) == [3, 5, 7, 1]


@given(st.integers(1, 300), st.integers(1, 40), st.data())
def test_counts_are_in_range_and_stratified(length, batch, data):
    k = data.draw(st.integers(1, length))
    counts = stratified_counts(length, batch, k)
    assert counts[0] == k and all(1 <= n <= length for n in counts)
    # Python rounds fractions exactly, halves to even
    exact = [round(Fraction(k * batch + i * length, batch)) for i in range(batch)]
    assert counts == [(r - 1) % length + 1 for r in exact]
    if batch == length:  # one of each
        assert sorted(counts) == list(range(1, length + 1))



@given(st.floats(0, 1), st.integers(1, 64))
def test_times_are_evenly_spaced(u0, batch):
    for eps in (0.0, 1e-3):
        t = stratified_times(u0, batch, eps).sort().values
        assert float(t.min()) >= eps and float(t.max()) <= 1
        gaps = t.diff()
        torch.testing.assert_close(gaps, torch.full_like(gaps, (1 - eps) / batch), rtol=0, atol=1e-12)


@given(st.integers(1, 40), st.integers(1, 8), st.integers(1, 4), st.integers(-(2**63), 2**64 - 1))
def test_llada_masks(length, batch, batches, seed):
    masks = sample_masks(length, batch * batches, batch, seed=seed)
    counts = masks.masked.sum(1)
    assert masks.masked.shape == (batch * batches, length) and masks.masked.dtype is torch.bool and masks.replicate == batch
    for part in counts.view(batches, batch).tolist():
        assert part == stratified_counts(length, batch, part[0])
    torch.testing.assert_close(masks.weights, length / counts.double())
    again = sample_masks(length, batch * batches, batch, seed=seed)
    assert torch.equal(masks.masked, again.masked) and torch.equal(masks.weights, again.weights)
    longer = sample_masks(length, batch * (batches + 1), batch, seed=seed)
    assert torch.equal(longer.masked[: len(masks)], masks.masked) and torch.equal(longer.weights[: len(masks)], masks.weights)
    assert masks.exact == (length == 1)


def test_llada_subsets_and_first_counts_are_uniform():
    masks = sample_masks(4, 4096, 1, seed=3)
    counts = masks.masked.sum(1)
    assert chi2(torch.bincount(counts, minlength=5)[1:]) < 16.3  # 3 degrees of freedom, alpha 1e-3
    pairs = masks.masked[counts == 2]
    codes = (pairs.long() * torch.tensor([8, 4, 2, 1])).sum(1)
    seen = torch.bincount(codes, minlength=16)
    assert chi2(seen[seen > 0]) < 20.6 and int((seen > 0).sum()) == 6  # 5 degrees of freedom


def chi2(seen):
    expected = seen.sum() / seen.numel()
    return float(((seen - expected) ** 2 / expected).sum())


@given(st.integers(2, 40), st.integers(1, 8), st.integers(0, 2**32))
def test_dream_masks(length, batch, seed):
    masks = sample_masks(length, 3 * batch, batch, estimator="dream", seed=seed, protect=[0, -1])
    assert not masks.masked[:, 0].any() and not masks.masked[:, -1].any()
    p = 1 / masks.weights
    assert float(p.min()) >= 1e-3 and float(p.max()) <= 1
    for part in p.view(3, batch):
        gaps = part.sort().values.diff()
        torch.testing.assert_close(gaps, torch.full_like(gaps, (1 - 1e-3) / batch), rtol=0, atol=1e-12)


def test_dream_masks_have_the_frequency_that_their_weight_says():
    masks = sample_masks(64, 512, 8, estimator="dream", seed=5)
    p = 1 / masks.weights
    z = (masks.masked.sum(1) - 64 * p) / (64 * p * (1 - p)).sqrt()
    assert abs(float(z.mean())) < 4 / math.sqrt(512) and 0.8 < float(z.std()) < 1.2


@given(st.integers(1, 60), st.one_of(st.none(), st.floats(0.01, 0.99)), st.integers(0, 2**40))
def test_coupled_masks_cover_each_token_once(length, t, seed):
    masks = coupled_masks(length, t, seed=seed)
    everything, a, b = masks.masked
    assert everything.all() and torch.equal(a, ~b)
    w = masks.weights.tolist()
    assert w[0] == 1 and 1 / w[1] + 1 / w[2] == pytest.approx(1)
    assert t is None or w[1] == 1 / t
    assert t is not None or 0.2 <= 1 / w[1] <= 0.8
    again = coupled_masks(length, t, seed=seed)
    assert torch.equal(masks.masked, again.masked) and torch.equal(masks.weights, again.weights)


def test_coupled_masks_of_a_given_field():
    masks = coupled_masks(4, 0.5, field=torch.tensor([0.1, 0.5, 0.9, 0.49]))
    assert masks.masked[1].tolist() == [True, False, False, True]
    assert masks.weights.tolist() == [1, 2, 2]


def test_different_seeds_and_samples_give_different_masks():
    a, b = sample_masks(30, 64, 16, seed=1), sample_masks(30, 64, 16, seed=2)
    assert not torch.equal(a.masked, b.masked) and len(torch.unique(a.masked, dim=0)) > 60
    assert not torch.equal(a.weights, b.weights)


def test_random_numbers_do_not_tie_in_long_rows():
    field = masks_module._field(7, 1, 40000, "cpu")  # 2^23 numbers would tie about 95 times
    assert field.unique().numel() == field.numel() and 0 < float(field.min()) and float(field.max()) < 1
    assert abs(float(field.mean()) - 0.5) < 4 * math.sqrt(1 / 12 / 40000)


# --- estimates ---


@pytest.mark.parametrize("cfg_scale", [0.0, 1.5])
@pytest.mark.parametrize("shifted", [False, True])
@pytest.mark.parametrize("prompt", [PROMPT, []], ids=["prompt", "no_prompt"])
@pytest.mark.parametrize("estimator", ["llada", "dream"])
def test_values_are_those_of_full_logits(estimator, prompt, shifted, cfg_scale):
    model = make(seed=4, shifted=shifted)
    got = log_likelihood(model, prompt, ANSWER, estimator=estimator, samples=16, batch_size=4, cfg_scale=cfg_scale, seed=9)
    want = literal(model, prompt, ANSWER, got.masks.masked, got.masks.weights, cfg_scale, shifted)
    torch.testing.assert_close(got.values, want, rtol=1e-5, atol=1e-4)
    assert got.value == pytest.approx(float(got.values.mean()), rel=1e-12)
    means = got.values.view(4, 4).mean(1)
    assert got.standard_error == pytest.approx(float(means.std()) / 2, rel=1e-9)
    if estimator == "dream":
        assert not got.masks.masked[:, -1].any() and (prompt or not got.masks.masked[:, 0].any())


@pytest.mark.parametrize("shifted", [False, True])
def test_chain_rule(shifted):
    model = make(seed=5, shifted=shifted)
    got = log_likelihood(model, PROMPT, ANSWER, estimator="ar", batch_size=2)
    total = 0.0
    for j in range(len(ANSWER)):
        x = torch.tensor([PROMPT + ANSWER[:j] + [MASK] * (len(ANSWER) - j)])
        row = len(PROMPT) + j - shifted
        one = model.logits(x)[0, row].double().log_softmax(-1)[ANSWER[j]].item()
        assert got.values[j].item() == pytest.approx(one, rel=1e-5)
        total += one
    assert got.value == pytest.approx(total, rel=1e-5) and got.standard_error == 0 and got.samples == 5 and got.forwards == 3


def test_chain_rule_is_a_distribution():
    """Over every answer of two tokens from a vocabulary of 10 (mask included), the probabilities add up to one."""
    model = make(seed=6, vocab_size=10, mask_id=9, eos_ids=(8,), pad_id=8)
    total = 0.0
    first = torch.log_softmax(model.logits(torch.tensor([[1, 9, 9]]))[0, 1].double(), -1)
    for a, b in itertools.product(range(9), repeat=2):
        total += math.exp(log_likelihood(model, [1], [a, b], estimator="ar").value)
    lost = 0.0  # mask tokens, which answers may not hold
    for a in range(9):
        second = torch.log_softmax(model.logits(torch.tensor([[1, a, 9]]))[0, 2].double(), -1)
        lost += math.exp(first[a] + second[9])
    assert total + lost + math.exp(first[9]) == pytest.approx(1, abs=1e-5)


@given(st.integers(0, 2**63), st.integers(1, 12), st.sampled_from(["llada", "ar"]), st.sampled_from([1, 2, 4]))
def test_uniform_logits_give_the_exact_value_without_variance(seed, length, estimator, batch):
    table = Table(torch.full((1, 3 + length, 61), 2.5))
    got = log_likelihood(table, PROMPT, list(range(length)), estimator=estimator, samples=8, batch_size=batch, seed=seed)
    assert got.value == pytest.approx(-length * math.log(61), rel=1e-6)
    assert float(got.values.max() - got.values.min()) <= 1e-12 * abs(got.value)
    assert got.standard_error <= 1e-12 * abs(got.value)
    for x in table.seen:
        assert (x[:, :3] == torch.tensor(PROMPT)).all()


@pytest.mark.parametrize("estimator", ["llada", "dream"])
def test_context_independent_logits_are_estimated_without_bias(estimator):
    torch.manual_seed(7)
    length = 9
    table = Table(torch.randn(1, 3 + length, 61) * 3)
    answer = torch.randint(0, MASK, (length,))
    lp = table.logits[0, 3:].double().log_softmax(-1)[torch.arange(length), answer]
    truth = float(lp.sum() if estimator == "llada" else lp[:-1].sum())  # Dream's last position is never masked
    got = log_likelihood(table, PROMPT, answer, estimator=estimator, samples=4096, batch_size=8, seed=1)
    assert 0 < got.standard_error < abs(truth)
    assert abs(got.value - truth) < 4 * got.standard_error
    for x in table.seen:
        assert (x[:, :3] == torch.tensor(PROMPT)).all()


def test_standard_error_is_that_of_repeated_runs():
    torch.manual_seed(8)
    table = Table(torch.randn(1, 12, 61) * 3)
    answer = list(range(9))
    runs = [log_likelihood(table, PROMPT, answer, samples=64, batch_size=4, seed=s) for s in range(200)]
    spread = torch.tensor([r.value for r in runs]).double().std().item()
    said = torch.tensor([r.standard_error for r in runs]).square().mean().sqrt().item()
    assert 0.8 < said / spread < 1.25


def test_one_batch_has_no_standard_error_and_one_token_needs_none(model):
    assert math.isnan(log_likelihood(model, PROMPT, ANSWER, samples=4, batch_size=4).standard_error)
    one = log_likelihood(model, PROMPT, [9], samples=1, batch_size=1)
    many = log_likelihood(model, PROMPT, [9], seed=5)
    assert one.value == many.value == log_likelihood(model, PROMPT, [9], estimator="ar").value
    assert one.standard_error == many.standard_error == 0 and one.forwards == many.forwards == 1 and many.samples == 128


def test_equal_masks_are_scored_once(model):
    got, forwards = forwards_of(model, lambda: log_likelihood(model, PROMPT, [9, 8], samples=256, batch_size=1))
    assert forwards == got.forwards == 3  # two tokens have three masks


@pytest.mark.parametrize("estimator", ["llada", "dream", "ar"])
@pytest.mark.parametrize("cfg_scale", [0.0, 0.7])
def test_replay_gives_the_same_bits(model, estimator, cfg_scale, threads):
    args = dict(estimator=estimator, samples=32, batch_size=8, cfg_scale=cfg_scale)
    first = log_likelihood(model, PROMPT, ANSWER, seed=3, **args)
    threads(1)
    again = log_likelihood(model, PROMPT, ANSWER, seed=3, **args)
    replayed = log_likelihood(model, PROMPT, ANSWER, masks=first.masks, **args)
    other = log_likelihood(model, PROMPT, ANSWER, seed=4, **args)
    for run in (again, replayed):
        assert torch.equal(run.values, first.values) and (run.value, run.standard_error) == (first.value, first.standard_error)
    assert torch.equal(other.values, first.values) == (estimator == "ar")


def test_rows_of_a_forward_do_not_change_the_values(model, monkeypatch):
    """batch_size decides how samples are stratified, so it changes the masks; for given masks it changes nothing, nor does the split."""
    masks = sample_masks(len(ANSWER), 24, 4, seed=1)
    runs = [log_likelihood(model, PROMPT, ANSWER, masks=masks, batch_size=b) for b in (1, 3, 24, 1000)]
    monkeypatch.setattr(scorer, "TOKENS", 20)
    monkeypatch.setattr(scorer, "ENTRIES", 3)
    runs.append(log_likelihood(model, PROMPT, ANSWER, masks=masks, batch_size=24))
    assert runs[0].forwards > runs[1].forwards > runs[2].forwards == 1 and runs[-1].forwards > 1
    assert all(torch.equal(r.values, runs[0].values) and r.standard_error == runs[0].standard_error for r in runs)
    ar = [log_likelihood(model, PROMPT, ANSWER, estimator="ar", batch_size=b).values for b in (1, 2, 16)]
    assert torch.equal(ar[0], ar[1]) and torch.equal(ar[0], ar[2])


@pytest.mark.parametrize("estimator", ["llada", "dream", "ar"])
def test_no_guidance_is_scale_zero_and_an_empty_prompt_cannot_guide(model, estimator):
    plain = log_likelihood(model, PROMPT, ANSWER, estimator=estimator, samples=8, batch_size=4)
    zero = log_likelihood(model, PROMPT, ANSWER, estimator=estimator, samples=8, batch_size=4, cfg_scale=0)
    assert torch.equal(plain.values, zero.values)
    assert not torch.equal(plain.values, log_likelihood(model, PROMPT, ANSWER, estimator=estimator, samples=8, batch_size=4, cfg_scale=1e-1).values)
    for wrapped in (model, Foreign(model, mask_token_id=MASK)):  # conditional = unconditional: unchanged for any scale
        a = log_likelihood(wrapped, [], ANSWER, estimator=estimator, samples=8, batch_size=4)
        b = log_likelihood(wrapped, [], ANSWER, estimator=estimator, samples=8, batch_size=4, cfg_scale=3.0)
        assert torch.equal(a.values, b.values)


@pytest.mark.parametrize("cfg_scale", [0.0, 1.5])
@pytest.mark.parametrize("estimator", ["llada", "dream", "ar"])
def test_modules_and_native_models_agree(model, estimator, cfg_scale):
    args = dict(estimator=estimator, samples=16, batch_size=4, cfg_scale=cfg_scale)
    theirs = Foreign(model, mask_token_id=MASK, vocab_size=61)
    got, want = log_likelihood(theirs, PROMPT, ANSWER, **args), log_likelihood(model, PROMPT, ANSWER, **args)
    torch.testing.assert_close(got.values, want.values, rtol=1e-5, atol=1e-4)
    assert len(theirs.calls) == got.forwards == want.forwards
    assert all(b <= (8 if cfg_scale else 4) and length == 8 for b, length in theirs.calls)
    named = log_likelihood(Foreign(model), PROMPT, ANSWER, mask_id=MASK, shifted=True, **args)
    own = log_likelihood(make(seed=12, shifted=True), PROMPT, ANSWER, **args)
    torch.testing.assert_close(named.values, own.values, rtol=1e-5, atol=1e-4)
    assert not torch.allclose(named.values, got.values, rtol=1e-3)


def test_bfloat16_models_agree_with_their_own_logits():
    model = make(seed=12, dtype=torch.bfloat16)
    got = log_likelihood(model, PROMPT, ANSWER, samples=8, batch_size=4)
    want = literal(model, PROMPT, ANSWER, got.masks.masked, got.masks.weights)
    torch.testing.assert_close(got.values, want, rtol=1e-3, atol=1e-2)


def test_no_logits_of_all_positions_and_kv_of_one_layer(model, monkeypatch):
    """The head sees masked positions only, and the cache of a forward holds one layer whatever the model has."""
    rows, caches = [], []
    real_head, real_cache = scorer.head_stats, scorer.KVCache
    monkeypatch.setattr(scorer, "head_stats", lambda h, head, r=None, **k: rows.append(r.numel()) or real_head(h, head, r, **k))
    monkeypatch.setattr(scorer, "KVCache", lambda *a: caches.append(real_cache(*a)) or caches[-1])
    got = log_likelihood(model, PROMPT, ANSWER, samples=4, batch_size=4)
    assert sum(rows) == int(torch.unique(got.masks.masked, dim=0).sum())
    assert all(c.k.shape[0] == 1 for c in caches) and caches


# --- greedy ---


def literal_greedy(model, prompt, n, cfg_scale=0.0, shifted=False):
    x = torch.tensor([prompt + [MASK] * n])
    for _ in range(n):
        logits = model.logits(x)[0].double()
        if cfg_scale:
            empty = x.clone()
            empty[0, : len(prompt)] = MASK
            null = model.logits(empty)[0].double()
            logits = null + (cfg_scale + 1) * (logits - null)
        logits[:, MASK] = -1e30
        prob, token = logits.softmax(-1).max(-1)
        holes = [i for i in range(len(prompt), x.shape[1]) if x[0, i] == MASK]
        read = {i: max(i - 1, 0) if shifted else i for i in holes}
        best = max(holes, key=lambda i: (prob[read[i]].item(), -i))
        x[0, best] = token[read[best]]
    return x[0, len(prompt) :].tolist()


@pytest.mark.parametrize("cfg_scale", [0.0, 1.0])
@pytest.mark.parametrize("shifted", [False, True])
def test_greedy_prediction(shifted, cfg_scale):
    model = make(seed=15, shifted=shifted)
    for prompt in (PROMPT, [1]):
        right = literal_greedy(model, prompt, 6, cfg_scale, shifted)
        foreign = Foreign(model, mask_id=MASK, shifted=shifted)
        for one in (model, foreign):
            assert suffix_greedy_prediction(one, prompt, right, cfg_scale=cfg_scale) is True
        assert len(foreign.calls) == 6
        for i in (0, 3, 5):
            wrong = list(right)
            wrong[i] = (right[i] + 1) % MASK
            foreign.calls.clear()
            assert suffix_greedy_prediction(model, prompt, wrong, cfg_scale=cfg_scale) is False
            assert suffix_greedy_prediction(foreign, prompt, wrong, cfg_scale=cfg_scale) is False
            assert 1 <= len(foreign.calls) <= 6


# --- several models ---


def test_scores_of_two_models_on_identical_masks(model):
    policy, reference = model, make(seed=12, std=0.2501)
    masks = sample_masks(len(ANSWER), 64, 8, seed=2)
    ids = torch.tensor(PROMPT + ANSWER)
    scores = score_masks([policy, reference], ids, masks.after(3), prompt_length=3)
    for one, estimate in zip((policy, reference), scores.estimates, strict=True):
        alone = log_likelihood(one, PROMPT, ANSWER, masks=masks)
        assert torch.equal(alone.values, estimate.values) and alone.standard_error == estimate.standard_error
    gap = scores.difference()
    assert gap.value == pytest.approx(scores.estimates[0].value - scores.estimates[1].value, rel=1e-9)
    assert torch.equal(gap.values, scores.estimates[0].values - scores.estimates[1].values)
    assert gap.standard_error < 0.1 * scores.estimates[0].standard_error  # nearly the same model: the noise is common
    assert scores.difference(0, 0).value == 0 == scores.difference(0, 0).standard_error
    assert scores.difference(1, 0).value == -gap.value
    weighted = (scores.log_probs[0].double().sum(1) * masks.weights).numpy()
    assert weighted == pytest.approx(scores.estimates[0].values.numpy(), rel=1e-12)
    assert bool(((scores.log_probs[0] != 0) == masks.after(3).masked).all())


def test_scores_of_bool_masks_and_of_one_sequence_per_mask(model):
    coupled = coupled_masks(5, 0.4, seed=3).after(3)
    ids = torch.tensor(PROMPT + ANSWER)
    a = score_masks(model, ids, coupled)
    b = score_masks([model], ids.repeat(3, 1), coupled.masked, coupled.weights, batch_size=2)
    assert torch.equal(a.estimates[0].values, b.estimates[0].values) and torch.equal(a.log_probs[0], b.log_probs[0])
    assert math.isnan(a.estimates[0].standard_error) and b.estimates[0].standard_error > 0  # one replicate of three, or three rows
    want = literal(model, PROMPT, ANSWER, coupled.masked[:, 3:], coupled.weights)
    torch.testing.assert_close(a.estimates[0].values, want, rtol=1e-5, atol=1e-4)
    other = torch.tensor([[1, 2, 3, 4, 5, 6, 7, 8], PROMPT + ANSWER, [9] * 8])
    mixed = score_masks(model, other, coupled.masked, coupled.weights)
    assert mixed.estimates[0].values[1] == a.estimates[0].values[1] and mixed.estimates[0].values[0] != a.estimates[0].values[0]
    pair = a.log_probs[0][1] + a.log_probs[0][2]
    assert bool((pair[3:] != 0).all()) and bool((pair[:3] == 0).all())


def test_guided_scores(model):
    masks = sample_masks(5, 8, 4)
    ids = torch.tensor(PROMPT + ANSWER)
    got = score_masks(model, ids, masks.after(3), prompt_length=3, cfg_scale=1.2)
    assert torch.equal(got.estimates[0].values, log_likelihood(model, PROMPT, ANSWER, masks=masks, cfg_scale=1.2).values)


def test_results_can_be_used_in_a_graph(model):
    """A frozen model's scores enter the loss of a training loop: they must be ordinary tensors."""
    scores = score_masks([model, Foreign(model, mask_id=MASK)], torch.tensor(PROMPT + ANSWER), sample_masks(5, 4, 4).after(3))
    weight = torch.ones((), requires_grad=True)
    for log_probs in scores.log_probs:
        assert not log_probs.requires_grad and not log_probs.is_inference()
        (weight * log_probs).exp().sum().backward()
    assert weight.grad is not None


# --- illegal settings ---


BOOL = torch.ones(4, 5, dtype=torch.bool)
BAD = [
    (dict(samples=0), "samples must be an integer in 1"),
    (dict(samples=20), "samples must be a positive multiple of batch_size, got samples=20, batch_size=16; the nearest: samples=16"),
    (dict(samples=3), "the nearest: samples=16"),
    (dict(samples=16.0), "samples must be an integer"),
    (dict(batch_size=0), "batch_size must be an integer in 1"),
    (dict(batch_size=0, estimator="ar"), "batch_size must be an integer in 1"),
    (dict(estimator="lada"), "did you mean 'llada'"),
    (dict(cfg_scale=-1.0), "cfg_scale must be a number in"),
    (dict(cfg_scale=math.nan), "cfg_scale must be a number in"),
    (dict(seed=1.5), "seed must be an integer"),
    (dict(seed=2**64), "seed must be an integer"),
    (dict(mask_id=61), "mask_id must be below the model's vocabulary size 61, got 61; this model's is 60"),
    (dict(mask_id=-1), "mask_id must be an integer in 0"),
    (dict(shifted=1), "shifted must be True, False or None"),
    (dict(answer_ids=[]), "answer_ids must hold at least one token"),
    (dict(answer_ids=[1, 61]), r"answer_ids: token id at \[1\] must be in 0..60, got 61"),
    (dict(answer_ids=[1, MASK]), "must not hold the mask token 60"),
    (dict(prompt_ids=[-1]), r"prompt_ids: token id at \[0\] must be in 0..60, got -1"),
    (dict(prompt_ids="text"), "prompt_ids must be a list of token ids"),
    (dict(prompt_ids=[[1]]), "prompt_ids must be a list of token ids"),
    (dict(prompt_ids=torch.tensor([1.0])), "prompt_ids must be a list of token ids"),
    (dict(prompt_ids=[1] * 252), "257 positions, but random takes at most 256"),
    (dict(estimator="dream", answer_ids=[3]), "which leaves nothing of 1 answer token"),
    (dict(estimator="dream", prompt_ids=[], answer_ids=[3, 4]), "which leaves nothing of 2 answer token"),
    (dict(masks=BOOL, estimator="dream", batch_size=4), "masks must be Masks"),
    (dict(masks=BOOL[:, :4], batch_size=4), r"masks must be bool \[N, L\] = \[at least 1, 5\], got torch.bool \[4, 4\]"),
    (dict(masks=BOOL.long(), batch_size=4), "masks must be bool"),
    (dict(masks=BOOL[:0], batch_size=4), "masks must be bool"),
    (dict(masks=~BOOL, batch_size=4), "at least one position in every row"),
    (dict(masks=BOOL, batch_size=3), "the number of rows of masks must be a positive multiple of batch_size"),
    (dict(masks=[[True] * 5]), "masks must be Masks or a bool tensor"),
    (dict(masks=Masks(BOOL, torch.ones(3))), r"weights must be floating point \[N\] = \[4\]"),
    (dict(masks=Masks(BOOL, torch.ones(4), 3)), "rows of masks must be a positive multiple"),
    (dict(masks=Masks(~BOOL, torch.ones(4), scored=BOOL)), "scored must be a part of masked"),
]


@pytest.mark.parametrize("settings, text", BAD, ids=lambda x: x if isinstance(x, str) else "")
def test_illegal_settings_are_named_before_the_first_forward(model, settings, text):
    args = dict(prompt_ids=PROMPT, answer_ids=ANSWER) | settings

    def call():
        with pytest.raises(SettingError, match=text):
            log_likelihood(model, args.pop("prompt_ids"), args.pop("answer_ids"), **args)

    assert forwards_of(model, call)[1] == 0


def test_other_illegal_settings(model):
    ids, masks = torch.tensor(PROMPT + ANSWER), sample_masks(5, 4, 4).after(3)
    calls = []
    handle = model.register_forward_hook(lambda *_: calls.append(1))
    for call, text in (
        (lambda: log_likelihood("tiny", PROMPT, ANSWER), "model must be a model from unmask.load"),
        (lambda: log_likelihood(Foreign(model), PROMPT, ANSWER), "names no mask token .* pass mask_id="),
        (lambda: log_likelihood(make(visibility="block_causal", block_size=4), PROMPT, ANSWER), "visibility must be 'bidirectional'"),
        (lambda: suffix_greedy_prediction(model, PROMPT, []), "answer_ids must hold at least one token"),
        (lambda: suffix_greedy_prediction(model, PROMPT, ANSWER, cfg_scale=-1), "cfg_scale must be a number"),
        (lambda: score_masks([], ids, masks), "models must be at least one model"),
        (lambda: score_masks([model, 3], ids, masks), "model must be a model from unmask.load"),
        (lambda: score_masks(model, ids.int(), masks), r"ids must be int64 \[L\] or \[N, L\]"),
        (lambda: score_masks(model, ids[:7], masks), r"masks must be bool \[N, L\] = \[at least 1, 7\]"),
        (lambda: score_masks(model, ids.repeat(3, 1), masks), r"ids must have one row per mask, \[N, L\] = \[4, 8\], got \[3, 8\]"),
        (lambda: score_masks(model, ids, masks.masked), "weights must be given"),
        (lambda: score_masks(model, ids, masks, masks.weights), "weights come with Masks"),
        (lambda: score_masks(model, ids, masks, cfg_scale=1.0), "cfg_scale needs prompt_length"),
        (lambda: score_masks(model, ids, masks, prompt_length=9), "prompt_length must be an integer in 0..8"),
        (lambda: score_masks(model, ids, masks, prompt_length=8), "must not cover the prompt, the first 8 positions"),
        (lambda: score_masks(model, ids, masks, batch_size=0), "batch_size must be an integer"),
        (lambda: score_masks(model, ids + 60, masks), "must be in 0..60"),
        (lambda: score_masks(model, torch.full_like(ids, MASK), masks), "must not be a token to score"),
        (lambda: score_masks(model, torch.zeros(257, dtype=torch.int64), sample_masks(257, 1, 1)), "takes at most 256"),
        (lambda: stratified_counts(5, 4, 6), "k must be an integer in 1..5"),
        (lambda: stratified_times(1.5, 4), "u0 must be a number"),
        (lambda: stratified_times(0.5, 4, 1.0), r"eps must be a number in \[0, 1\), got 1"),
        (lambda: sample_masks(5, protect=[1]), "protect is for estimator='dream'"),
        (lambda: sample_masks(5, estimator="dream", protect=[5]), r"protect\[0\] must be an integer in -5..4"),
        (lambda: sample_masks(5, estimator="ar"), "unknown estimator 'ar'"),
        (lambda: coupled_masks(5, 1.0), r"t must be a number in \(0, 1\)"),
        (lambda: coupled_masks(5, 0.0), "t must be a number in"),
        (lambda: coupled_masks(5, 0.5, field=torch.rand(4)), r"field must be a floating point tensor \[length\] = \[5\]"),
        (lambda: chain_masks(0), "length must be an integer in 1"),
        (lambda: llada.get_log_likelihood(model, ids, ids, mc_num=20), "mc_num must be a positive multiple of batch_size, got mc_num=20"),
        (lambda: llada.get_log_likelihood(model, ids, ids), "mask_id must be below the model's vocabulary size 61, got 126336"),
        (lambda: llada.get_log_likelihood(model, ids, ids[:0], mask_id=MASK), "must hold at least one token"),
    ):
        with pytest.raises(SettingError, match=text):
            call()
    handle.remove()
    assert not calls


def test_invalid_logits_are_named():
    logits = torch.zeros(1, 8, 61)
    logits[0, 5, 3] = math.nan
    with pytest.raises(InvalidLogits, match=r"sample \d+, position 5: a NaN in the logits"):
        log_likelihood(Table(logits), PROMPT, ANSWER)
    with pytest.raises(InvalidLogits, match="step 0, position 5: a NaN"):
        suffix_greedy_prediction(Table(logits), PROMPT, ANSWER)
    with pytest.raises(SettingError, match=r"inside the model's vocabulary; sample 0, position 7: a token id outside"):
        log_likelihood(Table(torch.zeros(1, 8, 61)), PROMPT, [1, 2, 3, 4, 61], masks=BOOL, batch_size=4)
    with pytest.raises(SettingError, match=r"must return logits \[B, L, V\]"):
        log_likelihood(Table(torch.zeros(1, 5, 61)), PROMPT, ANSWER)
    with pytest.raises(SettingError, match="mask_id must be below the module's vocabulary size 50, got 60"):
        log_likelihood(Table(torch.zeros(1, 8, 50)), PROMPT, ANSWER)


def test_a_token_that_cannot_occur_has_probability_zero():
    logits = torch.zeros(1, 8, 61)
    logits[0, 3, 8] = -math.inf
    assert log_likelihood(Table(logits), PROMPT, ANSWER, estimator="ar").value == -math.inf


def test_every_public_name_is_documented():
    assert all(getattr(likelihood, name).__doc__ for name in likelihood.__all__)
