"""commit: golden numbers of the rules, equality with the definition on anything, and the promises of the op."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass, replace
from random import Random

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from native import native
from strided import ALL_LAYOUTS, LAYOUTS, relayout
from unmask import ops, reference
from unmask.ops import Rule, Status

_native = native("commit")
RULES = list(Rule)


def kernel(canvas, masked, cu, row, pos, token, score, *, rule, params=(), cost=None, eligible=None, editable=None,
           quota=None, threshold=None, status=None):  # fmt: skip
    """The op itself, with the wrapper's signature."""
    args = (canvas, masked, cu, row, pos, token, score, cost, eligible, editable, int(rule), params, quota, threshold, status)
    return _native(*args)


@dataclass
class Call:
    canvas: torch.Tensor
    masked: torch.Tensor
    cu: torch.Tensor
    row: torch.Tensor
    pos: torch.Tensor
    token: torch.Tensor
    score: torch.Tensor
    options: dict

    def run(self, fn=kernel):
        """(canvas, masked, committed, count, left, status) after the call; this object stays as it is."""
        canvas, masked = self.canvas.clone(), self.masked.clone()
        options = dict(self.options)
        options["status"] = torch.zeros(self.row.shape[0], dtype=torch.int32)
        result = fn(canvas, masked, self.cu, self.row, self.pos, self.token, self.score, **options)
        assert result[0].dtype == torch.bool and result[1].dtype == result[2].dtype == torch.int64
        return canvas, masked, *result, options["status"]


def assert_equal(ours, theirs):
    for name, a, b in zip(("canvas", "masked", "committed", "count", "left", "status"), ours, theirs, strict=True):
        assert torch.equal(a, b), (name, a, b)


def one_row(scores, rule, *, masked=None, **options) -> Call:
    """One row, one candidate per position, token = 100 + position."""
    n = len(scores)
    return Call(
        torch.full((1, n), 9),
        torch.ones(1, n, dtype=torch.bool) if masked is None else torch.tensor([masked]),
        torch.tensor([0, n]),
        torch.tensor([0]),
        torch.arange(n),
        100 + torch.arange(n),
        torch.tensor(scores, dtype=torch.float32),
        {"rule": rule} | options,
    )


GOLDEN = [  # contract and algorithms: 3.1, 3.2, 4.3
    (Rule.FACTOR, (0.99, 0.98, 0.5, 0.4), [1.0], 2),
    (Rule.FACTOR, (0.9, 0.9, 0.9, 0.9), [1.0], 4),
    (Rule.FACTOR, (0.3,), [1.0], 1),
    (Rule.FACTOR, (0.99, 0.2), [1.0], 1),
    (Rule.FACTOR, (0.99, 0.98, 0.97, 0.5), [1.0], 3),
    (Rule.FACTOR, (0.5, 0.5), [1.0], 1),  # 2 (1 - 0.5) < 1 is false: the floor of one commits
    (Rule.FACTOR, (1.0, 1.0, 1.0), [1e-9], 3),
    (Rule.FACTOR_AUTHORS, (0.99, 0.98, 0.5, 0.4), [1.0], 2),
    (Rule.FACTOR_AUTHORS, (0.9, 0.9, 0.9, 0.9), [1.0], 4),
    (Rule.FACTOR_AUTHORS, (0.3,), [1.0], 1),
    (Rule.FACTOR_AUTHORS, (0.99, 0.2), [1.0], 2),
    (Rule.FACTOR_AUTHORS, (0.99, 0.98, 0.97, 0.5), [1.0], 4),
    (Rule.FACTOR_AUTHORS, (0.1, 0.75, 0.75), [0.75], 3),  # equality with the bar commits; rank 1 has none
    (Rule.FACTOR_AUTHORS, (0.1, 0.1, 0.1), [1.0], 1),
]


@pytest.mark.parametrize("fn", [kernel, reference.commit, ops.commit])
@pytest.mark.parametrize(("rule", "scores", "params", "count"), GOLDEN)
def test_golden_factor(rule, scores, params, count, fn):
    result = one_row(scores, rule, params=params).run(fn)
    assert result[3].tolist() == [count] and result[2].tolist() == [True] * count + [False] * (len(scores) - count)


@pytest.mark.parametrize("fn", [kernel, reference.commit])
@pytest.mark.parametrize(
    ("costs", "gamma", "count"),
    [
        ((0.001, 0.002, 0.004, 0.02, 0.5), 0.01, 4),
        ((0.004,) * 4, 0.01, 3),
        ((0.5, 0.6), 0.01, 1),
        ((0.0, 0.0, 0.0, 3.0), 0.0, 4),
        ((1.0, 1.0, -1.5), 0.0, 3),  # the largest k, not the first failure
    ],
)
def test_golden_entropy_bound(costs, gamma, count, fn):
    scores = [-float(i) for i in range(len(costs))]
    call = one_row(scores, Rule.ENTROPY_BOUND, params=[gamma], cost=torch.tensor(costs))
    assert call.run(fn)[3].tolist() == [count]


@pytest.mark.parametrize("fn", [kernel, reference.commit])
@pytest.mark.parametrize(
    ("rule", "threshold", "count"),
    [
        (Rule.THRESHOLD, 0.5, 3),
        (Rule.THRESHOLD_STRICT, 0.5, 2),
        (Rule.THRESHOLD, 1.5, 1),
        (Rule.THRESHOLD_STRICT, 0.9, 1),
        (Rule.THRESHOLD, -1.0, 4),
        (Rule.THRESHOLD, math.inf, 1),
        (Rule.THRESHOLD_STRICT, -math.inf, 4),
    ],
)
def test_golden_threshold(rule, threshold, count, fn):
    call = one_row((0.25, 0.5, 0.9, 0.75), rule, threshold=torch.tensor([threshold]))
    result = call.run(fn)
    assert result[3].tolist() == [count] and result[4].tolist() == [4 - count] and bool(result[2][2])


@pytest.mark.parametrize("quota", [0, 1, 2, 4, 99])
def test_quota(quota):
    call = one_row((0.2, 0.9, 0.9, 0.1), Rule.QUOTA, quota=torch.tensor([quota]))
    canvas, masked, committed, count, left, _ = call.run()
    order = [1, 2, 0, 3][:quota]  # ties by lowest position
    assert committed.nonzero().flatten().tolist() == sorted(order)
    assert canvas[0].tolist() == [100 + i if i in order else 9 for i in range(4)]
    assert masked[0].tolist() == [i not in order for i in range(4)]
    assert count.tolist() == [len(order)] and left.tolist() == [4 - len(order)]


def test_scores_of_any_kind():
    inf, nan = math.inf, math.nan
    call = one_row((nan, -inf, inf, -0.0, 0.0), Rule.QUOTA, quota=torch.tensor([3]))
    _, _, committed, count, left, status = call.run()
    assert committed.tolist() == [False, False, True, True, True] and count.tolist() == [3] and left.tolist() == [2]
    assert status.tolist() == [Status.NAN_SCORE]


def test_edits_overwrite_decided_positions_only_where_allowed():
    call = one_row(
        (0.9, 0.9, 0.9, 0.9, 0.5, 0.9),
        Rule.THRESHOLD,
        masked=[True, False, False, False, False, False],
        threshold=torch.tensor([0.95]),
        editable=torch.tensor([True, True, False, True, True, True]),
        params=[0.0, 0.5],
    )
    call.token[3], call.token[5] = 9, -1  # the same token; no token
    canvas, masked, committed, count, left, _ = call.run()
    assert committed.tolist() == [True, True, False, False, False, False]  # 4: not above the edit threshold
    assert canvas.tolist() == [[100, 101, 9, 9, 9, 9]] and count.tolist() == [1] and left.tolist() == [0]
    assert not masked.any()


def test_a_position_named_twice_commits_once_with_its_best_candidate():
    call = Call(
        torch.zeros(1, 4, dtype=torch.int64), torch.ones(1, 4, dtype=torch.bool), torch.tensor([0, 5]), torch.tensor([0]),
        torch.tensor([2, 0, 2, 0, 1]), torch.tensor([5, 6, 7, 4, 8]), torch.tensor([0.5, 0.9, 0.75, 0.9, 0.25]),
        {"rule": Rule.QUOTA, "quota": torch.tensor([2])},
    )  # fmt: skip
    canvas, _, committed, count, left, _ = call.run()
    assert canvas.tolist() == [[4, 0, 7, 0]] and committed.tolist() == [False, False, True, True, False]
    assert count.tolist() == [2] and left.tolist() == [1]


FAULTS = [
    (dict(row=torch.tensor([2, 1])), [Status.BAD_ROW, 0]),
    (dict(row=torch.tensor([0, -2])), [0, Status.BAD_ROW]),
    (dict(row=torch.tensor([-1, 1])), [0, 0]),
    (dict(pos=torch.tensor([0, 1, 4, 0, 1, 2])), [Status.BAD_SLOT, 0]),
    (dict(pos=torch.tensor([0, 1, 2, -1, 1, 2])), [0, Status.BAD_SLOT]),
    (dict(cu=torch.tensor([0, 3, 7])), [0, Status.BAD_SEGMENT]),
    (dict(cu=torch.tensor([-1, 3, 6])), [Status.BAD_SEGMENT, 0]),
    (dict(cu=torch.tensor([4, 2, 6])), [Status.BAD_SEGMENT] * 2),
    (dict(quota=torch.tensor([1, -1])), [0, Status.BAD_SEGMENT]),
]


@pytest.mark.parametrize(("change", "expected"), FAULTS)
def test_a_faulty_entry_is_left_alone_and_reported(change, expected):
    call = Call(
        torch.zeros(2, 4, dtype=torch.int64), torch.ones(2, 4, dtype=torch.bool), torch.tensor([0, 3, 6]), torch.tensor([0, 1]),
        torch.tensor([0, 1, 2, 0, 1, 2]), torch.arange(1, 7), torch.rand(6), {"rule": Rule.QUOTA, "quota": torch.tensor([1, 2])},
    )  # fmt: skip
    options = call.options | {k: v for k, v in change.items() if k == "quota"}
    call = replace(call, options=options, **{k: v for k, v in change.items() if k != "quota"})
    result = call.run()
    assert_equal(result, call.run(reference.commit))
    canvas, _, _, count, left, status = result
    assert status.tolist() == expected
    for b, r in enumerate(call.row.tolist()):
        if expected[b] or r == -1:
            assert count[b] == 0 and left[b] == 0
            assert r not in (0, 1) or (canvas[r] == 0).all()
        else:
            assert count[b] == call.options["quota"][b]


def test_nan_threshold_and_nan_cost():
    call = one_row((0.5, 0.9), Rule.THRESHOLD, threshold=torch.tensor([math.nan]))
    assert call.run()[5].tolist() == [Status.NAN_SCORE] and call.run()[3].tolist() == [0]
    call = one_row((0.9, 0.5), Rule.ENTROPY_BOUND, cost=torch.tensor([math.nan, 0.0]), params=[0.1])
    assert call.run()[2].tolist() == [False, True] and call.run()[5].tolist() == [Status.NAN_SCORE]


def test_status_bits_are_added():
    call = one_row((math.nan, 0.5), Rule.QUOTA, quota=torch.tensor([1]))
    status = torch.tensor([int(Status.BAD_ID)], dtype=torch.int32)
    kernel(call.canvas, call.masked, call.cu, call.row, call.pos, call.token, call.score, **call.options, status=status)
    assert status.tolist() == [Status.BAD_ID | Status.NAN_SCORE]


# ---- properties ------------------------------------------------------------------------------------------------------------------

@st.composite
def calls(draw, clean=False, rules=RULES) -> Call:
    """Anything; `clean`: valid contents, distinct rows and positions, so that the promises below apply. Shapes, rule and options
    are drawn by hypothesis, contents by a generator that it seeds. Scores come from few values, so ties are common and sums exact."""
    rows, length = draw(st.integers(1, 4)), draw(st.integers(1, 9))
    sizes = draw(st.lists(st.integers(0, length), max_size=rows if clean else 4))
    batch, n = len(sizes), sum(sizes)
    rule, given_options = draw(st.sampled_from(rules)), draw(st.integers(0, 31))
    random = Random(draw(st.integers(0, 2**32)))

    def ints(low, high, k):
        return torch.tensor([random.randint(low, high) for _ in range(k)], dtype=torch.int64)

    def floats(k, odd=(math.nan, math.inf, -math.inf, -0.0)):
        odd = () if clean else odd
        values = [random.choice(odd) if odd and random.random() < 0.2 else random.randint(0, 8) / 8 for _ in range(k)]
        return torch.tensor(values, dtype=torch.float32)

    def flags(k):
        return torch.tensor([random.random() < 0.6 for _ in range(k)], dtype=torch.bool)

    cu = torch.tensor([sum(sizes[:b]) for b in range(batch + 1)])
    if clean:
        row = torch.tensor(random.sample(range(rows), batch), dtype=torch.int64)
        pos = torch.tensor([p for size in sizes for p in random.sample(range(length), size)], dtype=torch.int64)
    else:
        row, pos = ints(-1, rows - 1, batch), ints(0, length - 1, n)
        if batch and random.random() < 0.2:
            row[random.randrange(batch)] = random.choice([-2, rows])
        if n and random.random() < 0.2:
            pos[random.randrange(n)] = random.choice([-1, length])
        if random.random() < 0.2:
            cu[random.randint(0, batch)] += random.randint(-3, 3)
    factor = random.choice([0.25, 0.5, 1.0, 2.0])
    options = {"rule": rule, "params": [factor]}
    if given_options & 1 or rule is Rule.QUOTA:
        options["quota"] = ints(0 if clean else -1, 5, batch)
    if given_options & 2 or rule in (Rule.THRESHOLD, Rule.THRESHOLD_STRICT):
        options["threshold"] = floats(batch).to(random.choice([torch.float32, torch.float64]))
    if given_options & 4 or rule is Rule.ENTROPY_BOUND:
        options["cost"] = floats(n, odd=(math.nan, -0.125))
    if given_options & 8:
        options["eligible"] = flags(n)
    if given_options & 16:
        options["editable"], options["params"] = flags(n), [factor, random.randint(0, 8) / 8]
    return Call(
        ints(0, 3, rows * length).view(rows, length), flags(rows * length).view(rows, length), cu, row, pos,
        ints(0 if clean else -1, 3, n), floats(n).to(random.choice([torch.float32, torch.float64])), options,
    )  # fmt: skip


def live_of(call: Call, b: int) -> list[int]:
    """Candidates of entry b that may commit, by the contract."""
    eligible = call.options.get("eligible")
    return [
        i
        for i in range(int(call.cu[b]), int(call.cu[b + 1]))
        if call.masked[call.row[b], call.pos[i]] and (eligible is None or eligible[i]) and call.token[i] >= 0
    ]


@pytest.mark.parametrize("fn", (kernel, reference.commit), ids=("kernel", "definition"))
def test_float64_scores_and_thresholds(fn):
    """Scores that are one number in float32 are ordered and compared as given."""
    score = 1.0 - torch.tensor([1e-9, 1e-12, 1e-10], dtype=torch.float64)
    call = one_row([0.0] * 3, Rule.QUOTA, quota=torch.tensor([1]))
    assert replace(call, score=score).run(fn)[2].tolist() == [False, True, False]
    for bar, passing in ((1.0 - 1e-11, 1), (1.0 - 5e-10, 2), (0.9, 3)):
        call = one_row([0.0] * 3, Rule.THRESHOLD, threshold=torch.tensor([bar], dtype=torch.float64))
        assert replace(call, score=score).run(fn)[3].tolist() == [passing]


@given(calls())
def test_equals_the_definition(call):
    assert_equal(call.run(), call.run(reference.commit))


@given(calls(), st.data())
def test_any_layout(call, data):
    expected = call.run()
    canvas = relayout(call.canvas, data.draw(st.sampled_from(LAYOUTS)))
    masked = relayout(call.masked, data.draw(st.sampled_from(LAYOUTS)))
    options = {
        name: relayout(value, data.draw(st.sampled_from(LAYOUTS))) if isinstance(value, torch.Tensor) else value
        for name, value in call.options.items()
    }
    status = relayout(torch.zeros(call.row.shape[0], dtype=torch.int32), data.draw(st.sampled_from(LAYOUTS)))
    inputs = [relayout(t, data.draw(st.sampled_from(LAYOUTS))) for t in (call.cu, call.row, call.pos, call.token, call.score)]
    result = kernel(canvas, masked, *inputs, **options, status=status)
    assert_equal((canvas, masked, *result, status), expected)


@pytest.mark.parametrize("how", ALL_LAYOUTS)
def test_expanded_inputs(how):
    call = one_row((0.5, 0.5, 0.5), Rule.THRESHOLD, threshold=torch.tensor([0.25]))
    call = replace(call, token=relayout(torch.tensor([7, 7, 7]), how), score=relayout(call.score, how))
    assert_equal(call.run(), call.run(reference.commit))


@given(calls(clean=True, rules=[r for r in RULES if r is not Rule.QUOTA]))
def test_every_rule_but_quota_makes_progress(call):
    _, _, _, count, left, _ = call.run()
    for b in range(call.row.shape[0]):
        assert bool(count[b] >= 1) == bool(live_of(call, b))
        inside = call.masked[call.row[b], call.pos[call.cu[b] : call.cu[b + 1]]]
        assert count[b] + left[b] == inside.sum()


@given(calls(clean=True))
def test_commits_are_live_and_given_positions_never_change(call):
    call.options.pop("editable", None)
    canvas, masked, committed, count, _, _ = call.run()
    expected = call.canvas.clone()
    for b in range(call.row.shape[0]):
        chosen = [i for i in range(int(call.cu[b]), int(call.cu[b + 1])) if committed[i]]
        assert set(chosen) <= set(live_of(call, b)) and len(chosen) == count[b]
        expected[call.row[b], call.pos[chosen]] = call.token[chosen]
        waiting = [i for i in live_of(call, b) if not committed[i]]
        order = [(-float(call.score[i]), int(call.pos[i])) for i in chosen + waiting]
        assert not chosen or not waiting or max(order[: len(chosen)]) < min(order[len(chosen) :])  # ties: lowest position
    assert torch.equal(canvas, expected)
    assert (call.masked | ~masked).all() and (canvas == call.canvas)[~call.masked].all()


@given(calls(clean=True), st.randoms(use_true_random=False))
def test_the_order_of_candidates_does_not_matter(call, random):
    perm = []
    for b in range(call.row.shape[0]):
        part = list(range(int(call.cu[b]), int(call.cu[b + 1])))
        random.shuffle(part)
        perm += part
    perm = torch.tensor(perm, dtype=torch.int64)
    per_candidate = ("cost", "eligible", "editable")
    options = {k: v[perm] if k in per_candidate else v for k, v in call.options.items()}
    other = replace(call, pos=call.pos[perm], token=call.token[perm], score=call.score[perm], options=options)
    ours, theirs = list(call.run()), list(other.run())
    ours[2] = ours[2][perm]
    assert_equal(ours, theirs)


@given(calls(clean=True))
def test_an_entry_alone_gives_what_it_gives_in_a_batch(call):
    canvas, masked, committed, count, left, status = call.run()
    for b in range(call.row.shape[0]):
        begin, end = int(call.cu[b]), int(call.cu[b + 1])
        cut = {"cost": (begin, end), "eligible": (begin, end), "editable": (begin, end), "quota": (b, b + 1), "threshold": (b, b + 1)}
        alone = Call(
            call.canvas, call.masked, torch.tensor([0, end - begin]), call.row[b : b + 1], call.pos[begin:end],
            call.token[begin:end], call.score[begin:end], {k: v[slice(*cut[k])] if k in cut else v for k, v in call.options.items()},
        ).run()  # fmt: skip
        r = int(call.row[b])
        assert torch.equal(alone[0][r], canvas[r]) and torch.equal(alone[1][r], masked[r])
        assert torch.equal(alone[2], committed[begin:end])
        assert (alone[3], alone[4], alone[5]) == (count[b], left[b], status[b])


@pytest.mark.parametrize("rule", RULES)
def test_many_candidates_at_any_thread_count(rule, threads):
    batch, length, per_row = 40, 500, 300  # beyond the stack buffer and the single-thread size
    n = batch * per_row
    pos = torch.stack([torch.randperm(length)[:per_row] for _ in range(batch)]).flatten()
    call = Call(
        torch.zeros(batch, length, dtype=torch.int64), torch.rand(batch, length) < 0.7, torch.arange(0, n + 1, per_row),
        torch.arange(batch), pos, torch.randint(-1, 5, (n,)), torch.randint(0, 64, (n,)) / 64,
        {"rule": rule, "params": [1.0, 0.5], "quota": torch.randint(0, 50, (batch,)), "threshold": torch.rand(batch),
         "cost": torch.randint(0, 8, (n,)) / 64, "editable": torch.rand(n) < 0.5},
    )  # fmt: skip
    threads(1)
    one = call.run()
    threads(2)
    assert_equal(call.run(), one)
    assert_equal(one, call.run(reference.commit))


i64 = torch.zeros(3, dtype=torch.int64)
ERRORS = [
    (dict(canvas=torch.zeros(1, 3)), {}, "commit: canvas must be int64, got float32"),
    (dict(masked=torch.zeros(1, 3)), {}, "commit: masked must be bool, got float32"),
    (dict(score=torch.zeros(3).half()), {}, "commit: score must be float32 or float64, got float16"),
    (dict(), dict(cost=i64), "commit: cost must be float32, got int64"),
    (dict(), dict(eligible=i64), "commit: eligible must be bool, got int64"),
    (dict(), dict(quota=torch.ones(1)), "commit: quota must be int64, got float32"),
    (dict(), dict(status=torch.zeros(1, dtype=torch.int64)), "commit: status must be int32, got int64"),
    (dict(canvas=i64), {}, "commit: canvas must be [R, L] = [any, any], got [3]"),
    (dict(masked=torch.ones(1, 2).bool()), {}, "commit: masked must be [R, L] = [1, 3], got [1, 2]"),
    (dict(cu=torch.tensor([0])), {}, "commit: cu must be [B + 1] = [2], got [1]"),
    (dict(token=i64[:2]), {}, "commit: token must be [N] = [3], got [2]"),
    (dict(), dict(editable=torch.ones(2).bool()), "commit: editable must be [N] = [3], got [2]"),
    (dict(), dict(threshold=torch.ones(2)), "commit: threshold must be [B] = [1], got [2]"),
    (dict(), dict(rule=6), "commit: rule must be 0 to 5, got 6"),
    (dict(), dict(rule=-1), "commit: rule must be 0 to 5, got -1"),
    (dict(), dict(rule=Rule.QUOTA, quota=None), "commit: quota must be given for rule QUOTA, got None"),
    (dict(), dict(rule=Rule.THRESHOLD), "commit: threshold must be given for the THRESHOLD rules, got None"),
    (dict(), dict(rule=Rule.THRESHOLD_STRICT), "commit: threshold must be given for the THRESHOLD rules, got None"),
    (dict(), dict(rule=Rule.ENTROPY_BOUND, params=[0.1]), "commit: cost must be given for rule ENTROPY_BOUND, got None"),
    (dict(), dict(rule=Rule.FACTOR), "commit: params must be at least 1 number for this rule, got 0"),
    (dict(), dict(rule=Rule.FACTOR, params=[0.0]), "commit: params[0] must be a finite factor > 0, got 0.000000"),
    (dict(), dict(rule=Rule.FACTOR_AUTHORS, params=[math.inf]), "commit: params[0] must be a finite factor > 0, got inf"),
    (
        dict(),
        dict(rule=Rule.ENTROPY_BOUND, params=[-0.5], cost=torch.zeros(3)),
        "commit: params[0] must be a finite bound >= 0, got -0.500000",
    ),
    (dict(), dict(params=[1.0, 2.0, 3.0]), "commit: params must be at most 2 numbers, got 3"),
    (
        dict(),
        dict(editable=torch.ones(3).bool()),
        "commit: params must be 2 numbers when editable is given (the second is the edit threshold), got 0",
    ),
    (
        dict(),
        dict(editable=torch.ones(3).bool(), params=[1.0, math.nan]),
        "commit: params[1] must be an edit threshold, got nan",
    ),
    (
        dict(canvas=i64[:1].expand(1, 3)),
        {},
        "commit: canvas must be without expanded dimensions (it is written), got stride 0 in dimension 1",
    ),
]


@pytest.mark.parametrize(("change", "options", "text"), ERRORS)
def test_errors(change, options, text):
    call = replace(one_row((0.1, 0.2, 0.3), Rule.QUOTA, quota=torch.tensor([1])), **change)
    tensors = (call.canvas, call.masked, call.cu, call.row, call.pos, call.token, call.score)
    for fn in (kernel, reference.commit, ops.commit):
        with pytest.raises(RuntimeError, match=re.escape(text)):
            fn(*tensors, **(call.options | options))


@pytest.mark.parametrize("editable", [None, torch.tensor([True, False, True])])
def test_opcheck(editable):
    call = one_row((0.1, 0.2, 0.3), Rule.THRESHOLD)
    tail = (torch.rand(3), torch.ones(3, dtype=torch.bool), editable, 1, [0.0, 0.5], None, torch.tensor([0.2]))
    status = torch.zeros(1, dtype=torch.int32)
    args = (call.canvas, call.masked, call.cu, call.row, call.pos, call.token, call.score, *tail, status)
    torch.library.opcheck(_native.default, args)


def test_compiles_without_graph_breaks():
    call = one_row((0.1, 0.2, 0.3), Rule.THRESHOLD, threshold=torch.tensor([0.15]))

    def step(canvas, masked, score):
        result = ops.commit(canvas, masked, call.cu, call.row, call.pos, call.token, score, **call.options)
        return result.count + result.left

    canvas, masked = call.canvas.clone(), call.masked.clone()
    total = torch.compile(step, fullgraph=True, backend="aot_eager")(canvas, masked, call.score)
    assert total.tolist() == [3] and canvas.tolist() == [[9, 101, 102]] and masked.tolist() == [[True, False, False]]


def test_python_and_cpp_name_the_same_rules():
    assert [r.name for r in Rule] == ["QUOTA", "THRESHOLD", "THRESHOLD_STRICT", "FACTOR", "FACTOR_AUTHORS", "ENTROPY_BOUND"]
    assert list(Rule) == list(range(6))
