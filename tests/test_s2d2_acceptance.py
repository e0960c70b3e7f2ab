"""S2D2: the laws of acceptance, and when a draft is worth a verification."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import unmask
from random_models import prompts
from s2d2_kit import MASK, alone, engine, model
from unmask import ops
from unmask.decode.policy import Policy
from unmask.speculate import acceptance, routing
from unmask.speculate.acceptance import Keyed, Transform
from unmask.speculate.routing import Look, Router
from unmask.speculate.s2d2_options import ESTIMATORS, Options
from unmask.speculate.spans import first_run
from unmask.speculate.verifier import scratch_slots

# -- acceptance ----------------------------------------------------------------------------------------------------------------------------------


def chi_square(counts: torch.Tensor, expected: torch.Tensor) -> tuple[float, int]:
    rare = expected < 5
    counts = torch.cat([counts[~rare], counts[rare].sum()[None]]).double()
    expected = torch.cat([expected[~rare], expected[rare].sum()[None]]).double()
    kept = expected > 0
    return float(((counts - expected)[kept] ** 2 / expected[kept]).sum()), int(kept.sum()) - 1


def check_law(counts: torch.Tensor, q: torch.Tensor) -> None:
    value, degrees = chi_square(counts, q * counts.sum())
    assert value < degrees + 5 * math.sqrt(2 * degrees), (value, degrees)


@pytest.mark.parametrize("transform", [Transform(), Transform(0.7), Transform(1.0, 0.9), Transform(1.3, 0.85, 5, True)])
def test_the_first_token_is_distributed_as_q(transform):
    """p and q fixed: draft from p, ratio test, residual. 40000 draws; a residual that is not taken, or one of p, fails by far."""
    generator = torch.Generator().manual_seed(1)
    vocab, n, mask = 12, 40000, 11
    p_logits, q_logits = (torch.randn(1, vocab, generator=generator) * 0.8 for _ in range(2))
    p_logits[0, mask] = q_logits[0, mask] = -torch.inf
    p, q = transform.probabilities(p_logits), transform.probabilities(q_logits)
    draft = torch.multinomial(p[0], n, replacement=True, generator=generator)
    key = dict(seed=torch.arange(n), step=torch.full((n,), 3), pos=torch.full((n,), 7))
    kept = ops.uniform(**key).double() < acceptance.ratios(q[0, draft], p[0, draft])
    other = acceptance.draw(acceptance.residual(q.clone(), p, mask).expand(n, vocab), **key)
    token = torch.where(kept, draft, other)
    assert 0.05 < float(kept.double().mean()) < 0.98
    check_law(torch.bincount(token, minlength=vocab), q[0])
    with pytest.raises(AssertionError):
        check_law(torch.bincount(draft, minlength=vocab), q[0])
    with pytest.raises(AssertionError):
        check_law(torch.bincount(torch.where(kept, draft, 0), minlength=vocab), q[0])


@pytest.mark.parametrize("policy", [dict(temperature=1.0, tempered=True), dict(temperature=1.0), dict(temperature=0.8, top_p=0.9, tempered=True)])
def test_an_engines_first_token_is_distributed_as_the_verifiers(policy):
    """4000 rows, one seed each: the first position's token follows the softmax that block size 1 has there, through the whole loop."""
    m, n, ids = model("sdar", 4), 4000, [1, 2, 3, 4, 5]
    policy = Policy("llada2", knobs=dict(threshold=1.0), **policy)
    e = engine(m, [ids] * n, 3, policy, seeds=list(range(1000, 1000 + n)))
    next(e.run())
    first = torch.tensor([e.state.canvas[i, 5] for i in range(n)])
    assert not e.state.masked[:, 5].any()
    logits = alone(m, [*ids, 0], 4, 5)[None].clone()
    logits[0, MASK] = -torch.inf
    q = Transform.of(policy).probabilities(logits)[0]
    check_law(torch.bincount(first, minlength=61), q)
    kept = sum(v.kept > 0 for v in e.verifications) / n
    assert 0.05 < kept < 0.95
    drafts = torch.tensor([v.draft[0] for v in e.verifications])
    with pytest.raises(AssertionError):
        check_law(torch.bincount(drafts, minlength=61), q)


def test_the_op_and_the_definition_accept_alike(monkeypatch):
    """verify_ratio and the plain code agree on what stands and on the ratios; the token that replaces a rejected one is drawn by other noise."""
    m, ids = model("plain", 8), prompts(4, seed=8, low=1)
    runs = []
    for plain in (False, True):
        e = engine(m, ids, 16, Policy("llada2", knobs=dict(threshold=0.7), temperature=0.9, tempered=True))
        if plain:
            monkeypatch.setattr(Transform, "filters", True)
        next(e.run())
        runs.append(e.verifications)
    for a, b in zip(*runs, strict=True):
        assert a.span == b.span and a.draft == b.draft and a.uniforms == b.uniforms and a.kept == b.kept
        assert all(abs(x - y) <= 1e-5 for u, v in ((a.p, b.p), (a.q, b.q), (a.ratio, b.ratio)) for x, y in zip(u, v, strict=True))
    assert any(a.kept < len(a.span) for a in runs[0]) and any(a.kept for a in runs[0])


@given(st.integers(0, 10**6), st.sampled_from([0.0, 0.5, 1.0, 1.7]), st.sampled_from([1.0, 0.95, 0.5, 0.1]), st.sampled_from([0, 1, 4, 40]), st.booleans())
def test_transform_is_filtered_stats(seed, temperature, top_p, top_k, first):
    """The distributions of acceptance are those that the fused reduction draws from."""
    logits = torch.randn(5, 33, generator=torch.Generator().manual_seed(seed)) * 3
    p = Transform(temperature, top_p, top_k, first).probabilities(logits)
    key = dict(seed=torch.arange(5), step=torch.zeros(5, dtype=torch.int64), pos=torch.zeros(5, dtype=torch.int64))
    stats = ops.filtered_stats(logits, temperature=temperature, top_p=top_p, top_k=top_k, top_k_first=first, **(key if temperature else {}))
    assert torch.allclose(p.sum(1), torch.ones(5, dtype=torch.float64)) and torch.allclose(p.gather(1, stats.token[:, None])[:, 0].float(), stats.p, atol=2e-5)
    top = p.sort(1, descending=True).values
    assert torch.allclose(top[:, 0].float(), stats.p1, atol=2e-5) and torch.allclose(top[:, 1].float(), stats.p2, atol=2e-5)
    assert torch.allclose((acceptance.entropy(p) * math.log(33)).float(), stats.entropy, atol=1e-4)


def test_ratios_and_residuals():
    q, p = torch.tensor([0.3, 0.2, 0.0, 0.5]), torch.tensor([0.6, 0.1, 0.5, 0.0])
    assert torch.allclose(acceptance.ratios(q, p), torch.tensor([0.5, 1.0, 0.0, 1.0], dtype=torch.float64))
    assert torch.allclose(acceptance.ratios(q, p, 0.5), torch.tensor([0.5**0.5, 1.0, 0.0, 1.0], dtype=torch.float64))
    two = acceptance.residual(torch.stack([q, p]), torch.stack([p, p]), 1)  # where q = p nothing is left, so q itself; never the mask token
    assert torch.allclose(two, torch.tensor([[0.0, 0.0, 0.0, 0.5], [0.6, 0.0, 0.5, 0.0]]))
    assert acceptance.accepted([True, True, False, True]) == 2 and acceptance.accepted([]) == 0 and acceptance.accepted([True]) == 1
    weights = torch.tensor([[0.0, 1.0, 0.0]]).expand(50, 3)
    assert acceptance.draw(weights, torch.arange(50), torch.zeros(50, dtype=torch.int64), torch.zeros(50, dtype=torch.int64)).eq(1).all()


# -- routing -------------------------------------------------------------------------------------------------------------------------------------


def test_spans():
    assert first_run([]) == first_run([False, False]) == (0, 0)
    assert first_run([True]) == (0, 1) and first_run([False, True, True]) == (1, 3) and first_run([True, False, True]) == (0, 1)


@pytest.mark.parametrize("name", ESTIMATORS)
def test_estimators(name):
    o = Options(
        estimator=name, entropy_temperature=2.0, margin_threshold=0.2, confidence_power=0.5, margin_coef=1.5, entropy_threshold=0.6,
    )  # fmt: skip
    probabilities = torch.tensor([[0.7, 0.2, 0.1, 0.0], [0.3, 0.3, 0.2, 0.2], [1.0, 0.0, 0.0, 0.0], [0.4, 0.25, 0.2, 0.15]], dtype=torch.float64)
    margin, uncertainty, square = routing.statistics(probabilities)
    got = routing.estimate(o, probabilities[:, 0], margin, uncertainty, square).tolist()
    for alpha, row in zip(got, probabilities.tolist(), strict=True):
        h = -sum(x * math.log(x) for x in row if x) / math.log(4)
        expected = {
            "soft_entropy_negexp": math.exp(-2.0 * h), "hard_margin_threshold": float(row[0] - row[1] > 0.2),
            "soft_confidence_power": row[0] ** 0.5, "soft_clipped_linear_margin": min(1.0, 1.5 * (row[0] - row[1])),
            "soft_renyi_2_entropy": sum(x * x for x in row), "hard_entropy_threshold": float(h < 0.6),
        }[name]  # fmt: skip
        assert alpha == pytest.approx(expected, abs=1e-9)


def test_the_score():
    assert routing.expected([0.5, 0.5, 1.0]) == 0.5 + 0.25 + 0.25 and routing.expected([]) == 0.0
    look = Look(3, 5, 2, [0.5, 0.5, 1.0])
    assert routing.score(Options(cost_coef=0.4), look) == pytest.approx(0.6)
    assert routing.score(Options(cost_coef=0.4, cost="dynamic"), look) == pytest.approx(0.2)
    at = Router(Options(route="score", score_threshold=1.0, cost_coef=0.0))
    assert at.decide(0, Look(1, 1, 0, [1.0])) and not at.decide(0, Look(1, 1, 0, [0.99]))
    short = Router(Options(min_span=3))
    assert [short.decide(0, Look(n, 4)) for n in (0, 1, 2, 3, 4)] == [False, False, False, True, True]
    legacy = Router(Options(min_span=3, legacy_span=True))
    assert legacy.decide(0, Look(1, 4, 2)) and not legacy.decide(0, Look(1, 4, 3)) and not legacy.decide(0, Look(1, 2, 2))


def test_hysteresis():
    """On above `on`, strictly; off below `off`; between them as before; rows apart; a forward without masks turns it off where asked."""
    o = Options(route="hysteresis", on=0.5, off=0.25, cost_coef=0.0)
    script = [0.4, 0.5, 0.6, 0.3, 0.25, 0.2, 0.4, 0.9]
    for row in (0, 3):
        router = Router(o)
        assert [router.decide(row, Look(1, 1, 0, [a])) for a in script] == [False, False, True, True, True, False, False, True]
        assert not router.decide(row + 1, Look(1, 1, 0, [0.4])) and router.decide(row, Look(1, 1, 0, [0.4]))
        assert not router.decide(row, Look(0, 0)) and router.decide(row, Look(1, 1, 0, [0.4]))
    reset = Router(o, empty_turns_off=True)
    assert reset.decide(0, Look(1, 1, 0, [0.9])) and not reset.decide(0, Look(0, 0)) and not reset.decide(0, Look(1, 1, 0, [0.4]))


def test_the_bandit():
    """Against UCB1 written out: both arms once per bucket, verify first, then mean reward + beta sqrt(ln t / n)."""
    o = Options(route="ucb", ucb_beta=0.7, ucb_span_bins=2, ucb_progress_bins=2, ucb_entropy_bins=2)
    router = Router(o)
    generator = torch.Generator().manual_seed(0)
    seen: dict[tuple, dict[int, list[float]]] = {}
    decisions = []
    for t in range(1, 200):
        span, decoded, masks, h = (torch.rand(4, generator=generator) * torch.tensor([8, 8, 8, 1])).tolist()
        look = Look(int(span) + 1, int(masks) + 1, length=8, decoded=int(decoded), entropy=h)
        bucket = (int(min(1, (look.span - 1) / 7 * 2)), int(decoded) / 8 >= 0.5, h >= 0.5)
        arms = seen.setdefault(bucket, {0: [], 1: []})
        value = [math.inf if not arms[a] else sum(arms[a]) / len(arms[a]) + 0.7 * math.sqrt(math.log(t) / len(arms[a])) for a in (0, 1)]
        got = router.decide(0, look)
        assert got == (value[1] >= value[0])
        reward = int(torch.randint(1, 6, (1,), generator=generator))
        router.note(0, reward)
        arms[int(got)].append(reward / (1 + got))
        decisions.append(got)
    assert len(seen) == 8 and 20 < sum(decisions) < 180


def test_a_tempering_of_zero_accepts_every_draft():
    """(q / p)^0 is 1. The op's exponent is above 0: it had refused this option's value in the middle of a run."""
    for shape in ("sdar", "v2"):
        result = unmask.generate(model(shape, 4), [1, 2], max_new_tokens=10, policy="sdar_dynamic", eos_stop=False, speculate="s2d2:tempering=0")
        assert result.accepted == result.drafted > 0 and MASK not in result.canvas


def test_keyed_numbers_do_not_depend_on_the_batch():
    seeds = torch.tensor([5, 9, 5])
    keyed = Keyed(seeds)
    assert keyed.uniforms(0, 3, [7, 8]) == keyed.uniforms(2, 3, [7, 8]) == [keyed.uniforms(0, 3, [p])[0] for p in (7, 8)]
    assert keyed.uniforms(0, 3, [7]) != keyed.uniforms(1, 3, [7]) and keyed.uniforms(0, 4, [7]) != keyed.uniforms(0, 3, [7])
    state = engine(model("sdar", 8), [[1]], 7).state
    assert scratch_slots(state, 8) >= 15
