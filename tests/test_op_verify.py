"""verify_greedy: against the definition, chains and trees and subsets, hostile contents, invariance, errors. verify_ratio: test_op_verify_ratio.py."""

from __future__ import annotations

import re

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from strided import LAYOUTS, relayout
from unmask import ops, reference
from unmask.ops import Status
from verify_kit import GREEDY, MASK, NODE, greedy_calls, ids, native_greedy


@given(greedy_calls(), st.sampled_from(LAYOUTS[:-1]))
def test_greedy_equals_the_definition(call, layout):
    status, expected = (torch.full((len(call[3]),), 3, dtype=torch.int32) for _ in range(2))
    status = relayout(status, layout)
    got, want = native_greedy(*call, status), reference.verify_greedy(*call, expected)
    for g, w in zip((*got, status), (*want, expected), strict=True):
        assert torch.equal(g, w)
    for g, w in zip(native_greedy(*call), want, strict=True):
        assert torch.equal(g, w)


@GREEDY
def test_a_chain_stands_up_to_the_first_difference(greedy):
    """SSD: node 0 is the canvas that plain decoding has, so it always stands."""
    g = torch.Generator().manual_seed(4)
    for n in range(1, 7):
        for broken in range(1, n + 1):
            after = torch.randint(0, 5, (1, n, 8), generator=g)
            node = torch.cat((torch.randint(0, 5, (1, 1, 8), generator=g), after[:, :-1]), 1)
            if broken < n:
                node[0, broken, 3] += 1
            last, length = greedy(node, after, None, ids(n), MASK, False)
            assert (last.item(), length.item()) == (broken - 1, broken)


@GREEDY
def test_a_tree_takes_the_lowest_matching_child(greedy):
    """      0 -> 1 (differs), 2 (same), 3 (same); 2 -> 4 (differs), 6 (same); 3 -> 5 (same): the path is 0, 2, 6."""
    node, after = torch.zeros(1, 8, 3, dtype=torch.int64), torch.zeros(1, 8, 3, dtype=torch.int64)
    parent = ids(-1, 0, 0, 0, 2, 3, 2, -1)[None]
    after[0, 0], after[0, 2], after[0, 3] = 1, 2, 3
    node[0, 1], node[0, 2], node[0, 3], node[0, 4], node[0, 5], node[0, 6] = 7, 1, 1, 7, 3, 2
    assert [t.item() for t in greedy(node, after, parent, ids(8), MASK, False)] == [6, 3]
    assert [t.item() for t in greedy(node, after, parent, ids(6), MASK, False)] == [2, 2]


@GREEDY
def test_subset_goes_to_the_fixed_point(greedy):
    """FreeDave: 0 reaches 2 over 1, which disagrees; 2 (not 0) then agrees with 3; nothing agrees with 4."""
    m = MASK
    node = ids(m, m, m, m), ids(5, m, m, m), ids(m, 1, m, m), ids(m, 1, 2, m), ids(m, 1, 2, 8)
    after = ids(4, 1, m, m), ids(5, 5, m, m), ids(m, 1, 2, m), ids(m, 1, 2, 7), ids(m, 1, 2, 8)
    node, after = torch.stack(node)[None], torch.stack(after)[None]
    assert [t.item() for t in greedy(node, after, None, ids(5), m, True)] == [3, 3]
    assert [t.item() for t in greedy(node, after, None, ids(3), m, True)] == [2, 2]
    assert [t.item() for t in greedy(node, after, None, ids(5), 4, True)] == [0, 1]  # another mask id: 9 is a token like any other


@GREEDY
def test_greedy_bad_contents(greedy):
    node = torch.zeros(6, 3, 2, dtype=torch.int64)
    count = ids(3, -1, 4, 3, 3, 2)
    parent = torch.tensor([[-1, 0, 1], [-1, 0, 1], [-1, 0, 1], [0, 0, 1], [-1, 1, 1], [-1, 0, 99]])
    status = torch.tensor([1, 1, 1, 1, 1, 1], dtype=torch.int32)
    last, length = greedy(node, node, parent, count, MASK, False, status)
    bad = 1 | int(Status.BAD_SEGMENT)
    assert status.tolist() == [1, bad, bad, bad, bad, 1]
    assert last.tolist() == [2, -1, -1, -1, -1, 1] and length.tolist() == [3, 0, 0, 0, 0, 2]


def test_greedy_does_not_depend_on_threads_or_batch(threads):
    g = torch.Generator().manual_seed(1)
    after = torch.randint(0, 2, (600, 6, 64), generator=g)
    node = after.roll(1, 1)
    node[torch.rand(600, 6, generator=g) < 0.3] = 0
    count = torch.randint(0, 7, (600,), generator=g)
    threads(1)
    want = native_greedy(node, after, None, count, MASK, False)
    for n in (2, 3):
        threads(n)
        assert all(torch.equal(a, b) for a, b in zip(native_greedy(node, after, None, count, MASK, False), want, strict=True))
    for b in (0, 77, 599):
        one = slice(b, b + 1)
        got = native_greedy(node[one], after[one], None, count[one], MASK, False)
        assert all(torch.equal(a, w[one]) for a, w in zip(got, want, strict=True))
GREEDY_ERRORS = {
    "node must be int64, got int32": dict(node=NODE.int()),
    "after must be int64, got float32": dict(after=NODE.float()),
    "parent must be int64, got int32": dict(parent=NODE[..., 0].int()),
    "count must be int64, got bool": dict(count=ids(1, 1).bool()),
    "status must be int32, got int64": dict(status=ids(1, 1)),
    "node must be [B, N, W] = [any, any, any], got [2, 3]": dict(node=NODE[..., 0]),
    "after must be [B, N, W] = [2, 3, 4], got [2, 3, 3]": dict(after=NODE[..., :3]),
    "parent must be [B, N] = [2, 3], got [2, 2]": dict(parent=NODE[:, :2, 0]),
    "count must be [B] = [2], got [3]": dict(count=ids(1, 1, 1)),
    "status must be [B] = [2], got [1]": dict(status=torch.zeros(1, dtype=torch.int32)),
    "parent must be None when subset is set, got a tensor": dict(parent=NODE[..., 0], subset=True),
    "status must be without expanded dimensions (it is written), got stride 0 in dimension 0": dict(
        status=torch.zeros(1, dtype=torch.int32).expand(2)
    ),
}


@pytest.mark.parametrize("fn", (ops.verify_greedy, reference.verify_greedy))
@pytest.mark.parametrize("message", GREEDY_ERRORS)
def test_greedy_errors(fn, message):
    with pytest.raises(RuntimeError, match=re.escape(f"verify_greedy: {message}")):
        fn(**dict(node=NODE, after=NODE, parent=None, count=ids(1, 1), mask_id=MASK, subset=False) | GREEDY_ERRORS[message])
