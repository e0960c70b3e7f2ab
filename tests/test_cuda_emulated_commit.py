"""The CUDA kernel of commit, run lane by lane on the CPU, against the CPU kernel: equal in every output and every write."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import emulated
from strided import LAYOUTS, relayout
from test_op_commit import RULES, Call, calls, kernel, one_row


def on_emulated_warps(canvas, masked, cu, row, pos, token, score, *, rule, params=(), cost=None, eligible=None, editable=None,
                      quota=None, threshold=None, status=None):  # fmt: skip
    return emulated.commit(canvas, masked, cu, row, pos, token, score, cost, eligible, editable, rule, params, quota, threshold, status)


def assert_equal(call: Call) -> None:
    for got, want in zip(call.run(on_emulated_warps), call.run(kernel), strict=True):
        assert torch.equal(got, want)


@given(calls())
def test_any_call(call):
    assert_equal(call)


@given(calls(clean=True), st.sampled_from(LAYOUTS))
def test_strides(call, how):
    call.pos, call.token, call.score = (relayout(t, how) for t in (call.pos, call.token, call.score))
    assert_equal(call)


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("n", [1, 31, 32, 33, 129, 256, 300])
def test_more_candidates_than_lanes(rule, n):
    options = {
        0: {"quota": torch.tensor([n // 2])}, 1: {"threshold": torch.tensor([0.5])}, 2: {"threshold": torch.tensor([0.5])},
        3: {"params": [0.4]}, 4: {"params": [0.4]}, 5: {"params": [1.5], "cost": torch.rand(n)},
    }[int(rule)]  # fmt: skip
    call = one_row(torch.rand(n).sort(descending=True).values.pow(0.1).tolist(), rule, **options)
    call.pos = torch.randperm(n)
    assert_equal(call)
    call.pos = torch.randint(0, n, (n,))  # several candidates for one position
    assert_equal(call)


def test_entries_on_one_row_run_in_order():
    """The second entry sees what the first has written, as on the CPU."""
    call = one_row([0.9, 0.8, 0.7, 0.6], RULES[0], quota=torch.tensor([1, 1, 2]))
    call.cu, call.row = torch.tensor([0, 2, 2, 4]), torch.tensor([0, 0, 0])
    call.pos = torch.tensor([0, 1, 0, 1])
    call.token = torch.tensor([10, 11, 20, 21])
    assert_equal(call)
    canvas, _, committed, count, *_ = call.run(on_emulated_warps)
    assert committed.tolist() == [True, False, False, True] and count.tolist() == [1, 0, 1] and canvas[0, :2].tolist() == [10, 21]
