"""AR-ness, temporal voting and its metrics: the goldens of the papers, and what must hold for any run."""

from __future__ import annotations

import itertools
import json
import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import unmask
from unmask.analysis import (
    arness,
    clusters,
    commit_order,
    correctness,
    global_arness,
    intermediate_answers,
    local_arness,
    passes,
    temporal_semantic_entropy,
    vote,
    vote_answers,
    vote_weights,
)
from unmask.errors import SettingError

ORDERS = st.permutations(range(12)).flatmap(lambda p: st.integers(0, 12).map(lambda n: p[:n]))
ANSWERS = st.lists(st.one_of(st.none(), st.integers(0, 3)), max_size=20)


def record(*committed, **more) -> dict:
    return {"committed": [list(c) for c in committed], **more}


# AR-ness (arXiv 2506.20639)


@pytest.mark.parametrize(
    "order, local1, local2, global1, global2",
    [
        ([1, 2, 3, 4, 5, 6, 7], 1, 1, 1, 1),
        ([5, 6, 7, 2, 3, 4, 1], 4 / 6, 2 / 5, 1 / 7, 4 / 7),
        ([7, 6, 5, 4, 3, 2, 1], 0, 0, 1 / 7, 2 / 7),
    ],
)
def test_arness_goldens(order, local1, local2, global1, global2):
    trace = [record((p, 9, 0.5), nfe=i + 1) for i, p in enumerate(order)]
    for source in (order, trace):
        assert [tuple(a) for a in arness(source, (1, 2))] == [(1, local1, global1), (2, local2, global2)]
        assert arness(source, 2) == (2, local_arness(source, 2), global_arness(source, 2))


def test_one_forward_is_ordered_by_score_then_position():
    trace = [record((4, 1, 0.2), (3, 1, 0.9), (7, 1, 0.2), (0, 1, 1.0)), record((1, 1, 0.1))]
    assert commit_order(trace) == [0, 3, 4, 7, 1]
    assert commit_order([record((4, 1), (3, 1))]) == [3, 4]  # no scores: by position
    assert commit_order([record((4, 1, -0.3), (3, 1, -2))]) == [4, 3]  # entropies are scores too


def test_only_first_commits_count():
    """A remasked position keeps the place of its first commit; edits have none."""
    trace = [
        record((0, 5, 0.9), (1, 5, 0.8)),
        record((2, 5, 0.9), remasked=[[0, 5]], edited=[[1, 5, 6, 0.9]]),
        record((0, 7, 0.9), (3, 5, 0.5)),
    ]
    assert commit_order(trace) == [0, 1, 2, 3]
    assert arness(trace) == (1, 1.0, 1.0)
    assert commit_order([2, 1, 2, 0]) == [2, 1, 0]


@given(ORDERS, st.integers(1, 13))
def test_arness_is_its_definition(order, k):
    """Against a transcription of the definition that is slow on purpose."""
    n = len(order)
    windows = [order[t - k : t + 1] for t in range(k, n)]
    local = [all(b == a + 1 for a, b in itertools.pairwise(w)) for w in windows]
    left = [set(order[t:]) for t in range(n)]
    in_reach = [p in sorted(s)[:k] for p, s in zip(order, left, strict=True)]
    want = (k, sum(local) / len(local) if local else 0.0, sum(in_reach) / n if n else 0.0)
    assert arness(order, k) == want
    if n:
        assert global_arness(order, n) == 1.0 and global_arness(sorted(order), k) == 1.0
        assert global_arness(order, k) <= global_arness(order, k + 1)


def test_arness_of_nothing():
    assert arness([]) == (1, 0.0, 0.0) == arness([record()]) == arness([{"masks_left": 3}])
    assert local_arness([4], 1) == 0.0 and global_arness([4], 1) == 1.0


@pytest.mark.parametrize(
    "trace, text",
    [
        (None, "a trace must be a Result or a list of records, got NoneType"),
        ("abc", "a trace must be"),
        ({"committed": []}, "a trace must be"),
        ([record(), 3], "trace record 1 must be a dict, got int"),
        ([1, 2.5], "position 1 of the order must be an integer >= 0, got 2.5"),
        ([1, -2], "got -2"),
        ([[1]], "position 0 of the order"),
        ([record((0, 1, 2.0), row=0), record(row=1)], "one row, got records of rows 0, 1"),
        ([record(nfe=2), record(nfe=1)], "record 1 has nfe 1 after 2"),
        ([record(nfe="x")], "nfe 'x'"),
        ([record((0, 1, math.nan))], "trace record 0: the score of position 0 must be a number, got nan"),
        ([record((0, 1, "high"))], "got 'high'"),
        ([record((0, 1, None))], "got None"),
        ([record((True, 1, 0.5))], "committed position must be an integer"),
        ([{"committed": [7]}], r"committed must hold \[position, id, score\], got 7"),
        ([{"committed": [[]]}], "committed must hold"),
        ([{"committed": "01"}], "committed must be a list"),
    ],
)
def test_bad_traces_are_named(trace, text):
    with pytest.raises(SettingError, match=text):
        arness(trace)


@pytest.mark.parametrize("k", [0, -1, 1.5, True, "1", [1, 0]])
def test_k_is_checked(k):
    with pytest.raises(SettingError, match="k must be an integer >= 1|k must be"):
        arness([1, 2, 3], k)


def test_arness_of_runs():
    model = unmask.load("tiny")
    one = unmask.generate(model, "sort d a c =>", policy="quota", trace=True)
    assert commit_order(one) == [r["committed"][0][0] for r in one.trace]  # one token per step
    assert arness(one, (1, 3)) == arness(json.loads(json.dumps(one.trace)), (1, 3))
    everything = unmask.generate(model, "sort d a c =>", threshold=0.0, trace=True, eos_stop=False, max_new_tokens=6)
    n = len(everything.prompt_ids)
    assert sorted(commit_order(everything)) == list(range(n, n + 6))
    with pytest.raises(SettingError, match="holds no trace"):
        arness(unmask.generate(model, "sort d a c =>"))


# Voting (arXiv 2508.09138)


def test_weights():
    assert vote_weights("exp", 4) == pytest.approx([1, 3.4903, 12.1825, 42.5211], abs=5e-5)
    assert vote_weights("linear", 4) == [0.25, 0.5, 0.75, 1.0]
    assert vote_weights("fixed", 3) == [1.0, 1.0, 1.0] and vote_weights("exp", 2, alpha=0) == [1.0, 1.0]
    assert vote_weights("exp", 0) == []


def test_late_steps_outvote_early_ones():
    answers = ["a", "a", "a", "b"]
    assert vote_answers(answers, weights="fixed").answer == "a"
    assert vote_answers(answers, weights="linear").answer == "a"  # 1.5 to 1
    won = vote_answers(answers)
    assert won.answer == "b" and won.weight == pytest.approx(42.5211, abs=5e-5)
    assert dict(won.totals)["a"] == pytest.approx(16.6728, abs=1e-4) and won.answers == answers


def test_ties_go_to_the_answer_seen_first():
    assert vote_answers(["b", "a", "a", "b"], weights="fixed").answer == "b"
    # 0.1 + 0.2 against 0.3 is a tie in the rule, and would not be in doubles
    won = vote_answers(["x", "x", "y", *[None] * 7], weights="linear")
    assert won.answer == "x" and won.totals == [("x", 0.3), ("y", 0.3)]
    won = vote_answers(["y", None, "x", None, None, "z", *[None] * 4], weights="linear")
    assert [a for a, _ in won.totals] == ["z", "x", "y"]


def test_steps_may_be_more_than_were_run():
    assert vote_answers(["a", "b"], steps=4).totals == [("b", math.exp(1.25)), ("a", 1.0)]
    with pytest.raises(SettingError, match="steps must be at least the number of answers, 2 here, got 1"):
        vote_answers(["a", "b"], steps=1)


@given(ANSWERS, st.sampled_from(["fixed", "linear", "exp"]))
def test_vote_is_its_definition(answers, weights):
    n = len(answers)
    each = vote_weights(weights, n)
    totals = {}
    for answer, weight in zip(answers, each, strict=True):
        if answer is not None:
            totals[answer] = totals.get(answer, 0.0) + weight
    won = vote_answers(answers, weights=weights)
    if not totals:
        assert won.answer is None and won.weight == 0.0 and won.totals == []
        return
    assert won.weight == pytest.approx(max(totals.values()))
    assert dict(won.totals) == pytest.approx(totals) and won.totals[0] == (won.answer, won.weight)
    # a step without an answer that keeps its place changes nothing
    assert vote_answers([*answers, None], weights=weights, steps=n + 1).totals == vote_answers(answers, weights=weights, steps=n + 1).totals


def first_digit(text: str) -> str | None:
    return next((c for c in text if c.isdigit()), None)


def test_vote_on_filled_sequences_and_records():
    filled = [[9, 9, 1, 0], [9, 9, 2, 0], [9, 9, 2, 0]]
    trace = [record(filled=f, nfe=i + 1) for i, f in enumerate(filled)]
    last_but_one = lambda ids: ids[-2] or None  # noqa: E731
    for source in (filled, trace, torch.tensor(filled), [np.array(f) for f in filled]):
        assert intermediate_answers(source, last_but_one) == [1, 2, 2]
        assert vote(source, last_but_one, weights="fixed").answer == 2
    text = lambda ids: "".join(map(str, ids))  # noqa: E731
    assert vote(trace, first_digit, decode=text).answer == "9"
    assert vote(trace, first_digit, decode=text, start=2).totals[0][0] == "2"
    assert vote(trace, lambda ids: None) == (None, 0.0, [], [None] * 3)
    assert vote([], first_digit).answer is None


def test_predictions_are_asked_for():
    with pytest.raises(SettingError, match=r"trace record 1 has no prediction .* run with trace='predictions'"):
        vote([record(filled=[1]), record()], lambda ids: 1)
    model = unmask.load("tiny")
    with pytest.raises(SettingError, match="trace='predictions'"):
        vote(unmask.generate(model, "sort d a =>"), lambda ids: 1)
    with pytest.raises(SettingError, match="trace='predictions'"):
        vote(unmask.generate(model, "sort d a =>", trace=True), lambda ids: 1)


@pytest.mark.parametrize(
    "call, text",
    [
        (lambda: vote([[1]], "answer"), "parse must be a function"),
        (lambda: vote([[1]], list), "answers must be hashable, step 0 holds a list"),
        (lambda: vote([[1]], lambda ids: (ids,)), "answers must be hashable, step 0 holds a tuple"),
        (lambda: vote([[1]], tuple, weights="expo"), "unknown weights 'expo'; did you mean 'exp'"),
        (lambda: vote([[1]], tuple, alpha=math.inf), "alpha must be a number"),
        (lambda: vote([[1]], tuple, alpha=501), "alpha must be a number"),
        (lambda: vote([[1]], tuple, steps=1.5), "steps must be an integer"),
        (lambda: vote([[1]], tuple, start=-1), "start must be an integer"),
        (lambda: vote([[1], "ab"], tuple), "step 1 must be a list of token ids, got str"),
        (lambda: vote([record(filled=[1, None])], tuple), "trace record 0: filled: token id 1 must be an integer, got None"),
        (lambda: vote([record(filled=3)], tuple), "filled must be a list"),
        (lambda: vote(5, tuple), "a trace must be"),
        (lambda: vote_answers(["a"], same="eq"), "same must be a function"),
    ],
)
def test_bad_votes_are_named(call, text):
    with pytest.raises(SettingError, match=text):
        call()


def test_extremes_of_alpha_stay_finite():
    for alpha in (-500, 500):
        won = vote_answers(["a", "b"] * 500, alpha=alpha)
        assert math.isfinite(won.weight) and won.answer == ("b" if alpha > 0 else "a")


# Clusters and entropy


def test_clusters():
    assert clusters([1, None, 2, 1]) == [[0, 3], [2]]
    assert clusters([[1], None, [2], [1]], same=lambda a, b: a == b) == [[0, 3], [2]]
    # each answer is compared with the first of a cluster only
    assert clusters([0, 1, 2], same=lambda a, b: abs(a - b) <= 1) == [[0, 1], [2]]


def test_entropy_goldens():
    assert temporal_semantic_entropy(["a"] * 5) == 0.0
    assert temporal_semantic_entropy(["a", "b", None, None]) == pytest.approx(math.log(2))
    assert temporal_semantic_entropy(["a", "a", "a", "b"]) == pytest.approx(0.562335, abs=1e-6)
    assert temporal_semantic_entropy(["1", "1.0", "2"], same=lambda a, b: float(a) == float(b)) == pytest.approx(0.636514, abs=1e-6)
    assert math.isnan(temporal_semantic_entropy([])) and math.isnan(temporal_semantic_entropy([None, None]))


@given(ANSWERS)
def test_entropy_properties(answers):
    tse = temporal_semantic_entropy(answers)
    held = [a for a in answers if a is not None]
    if not held:
        assert math.isnan(tse)
        return
    kinds = len(set(held))
    assert -1e-12 <= tse <= math.log(kinds) + 1e-12 and (kinds > 1 or tse == 0)
    assert temporal_semantic_entropy(held) == tse == pytest.approx(temporal_semantic_entropy(held[::-1]))
    assert temporal_semantic_entropy(held * 2) == pytest.approx(tse)
    counts = [held.count(a) / len(held) for a in set(held)]
    assert tse == pytest.approx(-sum(p * math.log(p) for p in counts))


# EverPass, FullPass, oscillation


def test_passes_golden():
    runs = [[0, 1, 0], [0, 0, 1], [0, 0, 0], [1, 1]]
    assert passes(runs) == (0.75, 0.5, 0.25)
    assert passes(np.array([[True, False], [False, True]])) == passes(torch.tensor([[1, 0], [0, 1]])) == (1.0, 0.5, 0.5)


@given(st.lists(st.lists(st.booleans(), min_size=1, max_size=6), min_size=1, max_size=8))
def test_passes_properties(runs):
    ever, full, oscillation = passes(runs)
    assert ever >= full and oscillation == pytest.approx(ever - full) and oscillation >= 0
    assert passes([sorted(run) for run in runs])[2] == 0  # right once, right until the end


@pytest.mark.parametrize(
    "runs, text",
    [
        ([], "at least one sample"),
        ([[True], []], "sample 1 must hold at least one step"),
        ([[True, None]], "sample 0, step 1 must be True or False, got None; a step without an answer is False"),
        ([[0.5]], "got 0.5"),
        ([[math.nan]], "got nan"),
        (["10"], "sample 0 must be a list"),
        ([True], "sample 0 must be a list"),
        (3, "samples x steps"),
        ({"a": [True]}, "samples x steps"),
    ],
)
def test_bad_runs_are_named(runs, text):
    with pytest.raises(SettingError, match=text):
        passes(runs)


def test_correctness():
    assert correctness([None, "4", "5"], "4") == [False, True, False]
    assert correctness([None, "4", "5"], lambda a: int(a) > 4) == [False, False, True]
    assert passes([correctness(["4", None], "4")]) == (1.0, 0.0, 1.0)
