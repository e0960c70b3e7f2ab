"""uniform: Philox known answers, equality with the definition, keys that matter and keys that do not."""

from __future__ import annotations

import re

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from native import native
from strided import ALL_LAYOUTS, relayout
from unmask import ops, reference

kernel = native("uniform")
INT64 = st.integers(-(2**63), 2**63 - 1)


def tensor(values):
    return torch.tensor(values, dtype=torch.int64)


# Random123's known answers for philox4x32-10: counter, key, result.
KNOWN = [
    ((0, 0, 0, 0), (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
    ((0xFFFFFFFF,) * 4, (0xFFFFFFFF,) * 2, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
    (
        (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
        (0xA4093822, 0x299F31D0),
        (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
    ),
]


@pytest.mark.parametrize(("counter", "key", "result"), KNOWN)
def test_philox_known_answers(counter, key, result):
    seed = key[0] | key[1] << 32
    seed -= 2**64 if seed >= 2**63 else 0
    assert tuple(int(w) for w in reference.philox(tensor(seed), *counter)) == result


@given(st.lists(st.tuples(INT64, INT64, INT64), max_size=8), st.sampled_from(ALL_LAYOUTS))
def test_equals_the_definition_at_any_layout(keys, how):
    columns = [relayout(tensor([k[i] for k in keys]), how) for i in range(3)]
    ours = kernel(*columns)
    assert ours.dtype == torch.float32 and ours.shape == (len(keys),)
    assert torch.equal(ours, reference.uniform(*columns))
    assert ((ours > 0) & (ours < 1)).all()


@given(INT64, st.integers(0, 2**32 - 1), st.integers(0, 2**32 - 1), st.integers(1, 5))
def test_a_draw_depends_on_its_key_alone(seed, step, pos, others):
    one = kernel(tensor([seed]), tensor([step]), tensor([pos]))
    batch = kernel(tensor([1] * others + [seed]), tensor([2] * others + [step]), tensor([3] * others + [pos]))
    assert batch[-1] == one[0]


def test_every_part_of_the_key_matters():
    base = kernel(tensor([7]), tensor([11]), tensor([13]))
    for changed in ([8, 11, 13], [7, 12, 13], [7, 11, 14], [7 + 2**32, 11, 13], [7, 13, 11]):
        assert kernel(*(tensor([c]) for c in changed)) != base


def test_draws_are_uniform_and_uncorrelated():
    n = 100_000
    pos = torch.arange(n)
    u = kernel(torch.full((n,), 5), torch.zeros_like(pos), pos)
    v = kernel(torch.full((n,), 5), torch.ones_like(pos), pos)
    expected = n / 50
    chi = ((torch.histc(u, 50, 0, 1) - expected) ** 2 / expected).sum()
    assert chi < 100  # 49 degrees of freedom: P(chi > 100) is 2e-5
    assert torch.corrcoef(torch.stack((u, v)))[0, 1].abs() < 5 / n**0.5
    assert torch.corrcoef(torch.stack((u[1:], u[:-1])))[0, 1].abs() < 5 / n**0.5


i3 = torch.zeros(3, dtype=torch.int64)
ERRORS = [
    ((i3.int(), i3, i3), "uniform: seed must be int64, got int32"),
    ((i3, i3.float(), i3), "uniform: step must be int64, got float32"),
    ((i3, i3, i3.bool()), "uniform: pos must be int64, got bool"),
    ((i3[None], i3, i3), "uniform: seed must be [N] = [any], got [1, 3]"),
    ((i3, i3[:2], i3), "uniform: step must be [N] = [3], got [2]"),
    ((i3, i3, i3[:1]), "uniform: pos must be [N] = [3], got [1]"),
]


@pytest.mark.parametrize(("args", "text"), ERRORS)
def test_errors(args, text):
    for fn in (kernel, ops.uniform):
        with pytest.raises(RuntimeError, match=re.escape(text)):
            fn(*args)


def test_opcheck_and_compile():
    args = (tensor([1, 2]), tensor([3, 4]), tensor([5, 6]))
    torch.library.opcheck(kernel.default, args)
    compiled = torch.compile(lambda *a: ops.uniform(*a) * 2, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(*args), ops.uniform(*args) * 2)
