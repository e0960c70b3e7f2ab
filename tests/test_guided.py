"""Guided logits of a module: read as one, with the bits of the whole."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from unmask import ops
from unmask.decode.guided import GuidedLogits, joined


def pair(m: int, vocab: int, dtype: torch.dtype, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    g = torch.Generator().manual_seed(seed)
    return tuple((torch.randn(m, vocab, generator=g) * 3).to(dtype) for _ in range(2))


def same(a: torch.Tensor, b: torch.Tensor) -> bool:
    return a.shape == b.shape and torch.equal(a.isnan(), b.isnan()) and torch.equal(a.nan_to_num(0.0), b.nan_to_num(0.0))


@given(
    m=st.integers(1, 40), vocab=st.sampled_from([1, 7, 224, 4096, 4097, 20_000]), weight=st.sampled_from([0.0, 0.5, 1.5, 2.0, 3.7]),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float16]), kind=st.sampled_from(["all", "some", "none"]), seed=st.integers(0, 9),
    option=st.sampled_from(["plain", "lists", "noise", "bias"]),
)  # fmt: skip
def test_statistics_have_the_bits_of_the_whole(m, vocab, weight, dtype, kind, seed, option):
    c, u = pair(m, vocab, dtype, seed)
    g = torch.Generator().manual_seed(seed)
    rows = {
        "all": torch.arange(m), "some": torch.randint(-1, m, (2 * m,), generator=g), "none": torch.full((3,), -1),
    }[kind]  # fmt: skip
    n = rows.shape[0]
    ids = torch.randint(0, vocab, (n, 2), generator=g)
    options = {
        "plain": {}, "lists": dict(suppress=torch.tensor([vocab // 2]), ids=ids, topk=3), "bias": dict(bias_ids=ids, bias=torch.randn(n, 2, generator=g)),
        "noise": dict(temperature=0.7, seed=torch.arange(n), step=torch.arange(n), pos=torch.arange(n)),
    }[option]  # fmt: skip
    forbid = torch.tensor([vocab - 1])
    want = ops.logit_stats(u + weight * (c - u), rows, forbid=forbid, **options)
    got = GuidedLogits(c, u, weight).stats(rows, forbid=forbid, **options)
    assert all(same(a, b) for a, b in zip(got, want, strict=True))


@pytest.mark.parametrize("bad", [float("nan"), float("-inf")])
def test_invalid_rows_are_reported(bad):
    c, u = pair(4, 300, torch.float32)
    c[2] = bad
    got = GuidedLogits(c, u, 1.5).stats(torch.arange(4)).status
    assert (got != 0).tolist() == [False, False, True, False]


def test_shapes_read_as_those_of_the_logits():
    c, u = pair(6, 50, torch.float32)
    whole = u + 1.5 * (c - u)
    three = GuidedLogits(c.view(2, 3, 50), u.view(2, 3, 50), 1.5)
    assert three.dim() == 3 and three.shape == (2, 3, 50) and three.dtype is torch.float32
    for flat in (three.flatten(0, 1), three.reshape(-1, 50)):
        assert torch.equal(flat.index_select(0, torch.tensor([5, 1])), whole[[5, 1]])
    both = joined([three.flatten(0, 1), three.flatten(0, 1)])
    assert torch.equal(both.index_select(0, torch.arange(12)), whole.repeat(2, 1))
    assert torch.equal(joined([c, u]), torch.cat([c, u]))


def test_nothing_of_the_size_of_the_vocabulary_is_made():
    from torch.utils._python_dispatch import TorchDispatchMode

    largest = 0

    class Seen(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            nonlocal largest
            out = func(*args, **(kwargs or {}))
            largest = max(largest, *(t.numel() for t in (out if isinstance(out, tuple) else (out,))))
            return out

    c, u = pair(32, 126_464, torch.bfloat16)
    guided = GuidedLogits(c, u, 2.0)
    with Seen():
        guided.stats(torch.arange(32), forbid=torch.tensor([0]))
    assert 0 < largest <= 32 * 8
