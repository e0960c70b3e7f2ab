"""head_stats = logit_stats on the head's logits, bit for bit, without the logits."""

from __future__ import annotations

import re
import sys

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from native import native
from unmask import ops
from unmask.ops import LogitStats
from unmask.ops.head_stats import Head, head_stats
from unmask.ops.info import Status
from unmask.ops.linear import packing_available

module = sys.modules["unmask.ops.head_stats"]  # the name in the package is the function


def make_head(vocab=9000, width=32, dtype=torch.float32, format="packed"):
    return Head(torch.randn(vocab, width).to(dtype), format)


def same(a, b):
    for name, x, y in zip(a._fields, a, b, strict=True):
        assert torch.equal(x.nan_to_num(7.0) if x.is_floating_point() else x, y.nan_to_num(7.0) if y.is_floating_point() else y), name


@pytest.mark.parametrize("dtype, format", [(torch.float32, "packed"), (torch.float32, "plain"), (torch.bfloat16, "packed_fp32")])
@pytest.mark.parametrize("vocab", [61, 4096, 9000, 20000])
def test_equals_logit_stats_on_the_logits(dtype, format, vocab):
    head, hidden = make_head(vocab, 32, dtype, format), torch.randn(20, 32).to(dtype)
    n = 20
    key = dict(seed=torch.arange(n), step=torch.arange(n) % 3, pos=torch.arange(n) + 5)
    for options in (
        {},
        dict(forbid=torch.tensor([3, vocab - 1]), topk=4),
        dict(suppress=torch.tensor([0, 7]), ids=torch.randint(0, vocab, (n, 3))),
        dict(temperature=0.8, **key),
        dict(bias_ids=torch.randint(0, vocab, (n, 2)), bias=torch.randn(n, 2)),
    ):
        same(head_stats(hidden, head, **options), ops.logit_stats(head.logits(hidden), **options))


@given(st.data())
def test_rows(data):
    """Only the rows asked for, in the order asked for; -1 reads as none; an entry does not depend on the others."""
    m = data.draw(st.integers(1, 40))
    rows = data.draw(st.lists(st.integers(-1, m - 1), max_size=40))
    generator = torch.Generator().manual_seed(data.draw(st.integers(0, 99)))
    head = Head(torch.randn(100, 16, generator=generator), "packed")
    hidden = torch.randn(m, 16, generator=generator)
    got = head_stats(hidden, head, torch.tensor(rows, dtype=torch.int64))
    everything = head_stats(hidden, head)
    for e, row in enumerate(rows):
        if row < 0:
            assert got.token[e] == -1 and got.status[e] == 0 and bool((got.stats[e] == 0).all())
        else:
            assert torch.equal(got.stats[e], everything.stats[row]) and got.token[e] == everything.token[row]


@pytest.mark.parametrize("options", [{}, dict(topk=3, temperature=0.7), dict(ids=True, bias=True)])
@pytest.mark.parametrize("m, n", [(0, 5), (7, 0), (20, 3), (20, 700)])
def test_the_way_without_host_reads_gives_the_same_bits(options, m, n, monkeypatch):
    """What CUDA takes (here on CPU tensors): all entries computed in chunks, absent ones blanked."""
    head, hidden = make_head(9000), torch.randn(m, 32)
    rows = torch.randint(-3, m + 2, (n,))
    key = dict(seed=torch.arange(n), step=torch.arange(n) % 3, pos=torch.arange(n) + 5)
    ids, bias = (torch.randint(0, 9000, (n, 2)), torch.randn(n, 2)) if "ids" in options else (None, None)
    shared = dict(forbid=torch.tensor([3]), suppress=None, topk=options.get("topk", 0), temperature=options.get("temperature", 0.0))
    per_entry = dict(bias_ids=ids, bias=bias, ids=ids, **key)
    want = module._live_entries(hidden, head, rows, shared, per_entry)
    monkeypatch.setattr(module, "LOGITS_BYTES", 200 * head.tile * 4)
    same(module._all_entries(hidden, head, rows, shared, per_entry), want)


def test_bad_rows_and_errors():
    head, hidden = make_head(61), torch.randn(4, 32)
    out = head_stats(hidden, head, torch.tensor([0, 4, -2]))
    assert out.status.tolist() == [0, int(Status.BAD_ROW), int(Status.BAD_ROW)] and out.token[1:].tolist() == [-1, -1]
    with pytest.raises(RuntimeError, match=r"head_stats: hidden must be \[M, d\] = \[any, 32\], got \[4, 31\]"):
        head_stats(hidden[:, :31], head)
    with pytest.raises(RuntimeError, match="head_stats: hidden must be torch.float32, got torch.float64"):
        head_stats(hidden.double(), head)
    with pytest.raises(ValueError, match="multiple of 4096"):
        Head(torch.randn(61, 32), "plain", tile=100)


def test_invalid_row_leaves_the_others_alone():
    head, hidden = make_head(5000), torch.randn(6, 32)
    clean = head_stats(hidden, head)
    hidden[2, 3] = float("nan")
    got = head_stats(hidden, head)
    assert got.status[2] == Status.NAN and got.token[2] == -1
    keep = torch.tensor([0, 1, 3, 4, 5])
    assert torch.equal(got.stats[keep], clean.stats[keep])


def test_no_row_at_all():
    head = make_head(61)
    out = head_stats(torch.randn(3, 32), head, torch.full((5,), -1))
    assert out.token.tolist() == [-1] * 5
    assert head_stats(torch.randn(0, 32), head).token.shape == (0,)


# --- the op on packed tiles: torch.ops.unmask.head_stats ----------------------------------------------------------

needs_packed = pytest.mark.skipif(not packing_available(torch.float32), reason="this torch has no packed weights")
NONE = dict(forbid=None, suppress=None, bias_ids=None, bias=None, ids=None, topk=0, temperature=0.0, seed=None, step=None, pos=None)


def op(hidden, tiles, rows=None, **options):
    return LogitStats(*native("head_stats", "MkldnnCPU")(hidden, tiles, rows, *(NONE | options).values()))


@needs_packed
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("tile", [4096, 8192])
def test_the_op_has_the_bits_of_the_tiles_one_by_one(dtype, tile, threads):
    """Every option, absent and bad rows, several threads: as products and stats_tile from Python."""
    if not packing_available(dtype):
        return
    head, hidden, n = Head(torch.randn(9000, 32).to(dtype), "packed", tile), torch.randn(20, 32).to(dtype), 45
    rows = torch.randint(-2, 22, (n,))
    key = dict(seed=torch.arange(n), step=torch.arange(n) % 3, pos=torch.arange(n) + 5)
    shared = dict(forbid=torch.tensor([3, 8999, 9001, -1]), suppress=torch.tensor([5]), topk=3, temperature=0.7)
    per_entry = dict(bias_ids=torch.randint(-1, 9000, (n, 2)), bias=torch.randn(n, 2), ids=torch.randint(-1, 9001, (n, 3)), **key)
    want = module._live_entries(hidden, head, rows, shared, per_entry)
    for count in (1, 2):
        threads(count)
        same(op(hidden, head.packed, rows, **shared, **per_entry), want)
        same(op(hidden.repeat(1, 2)[:, :32], head.packed, rows, **shared, **per_entry), want)


@needs_packed
def test_rows_that_are_not_dense():
    head, hidden = make_head(61), torch.randn(32, 7)
    same(op(hidden.T, head.packed), op(hidden.T.contiguous(), head.packed))


@needs_packed
@pytest.mark.parametrize(
    "change, message",
    [
        (dict(hidden=torch.zeros(4, 32).half()), "hidden must be float32 or bfloat16 on the CPU, got float16"),
        (dict(hidden=torch.zeros(4, 31)), "a tile must be [ids, d] = [any, 31], got [61, 32]"),
        (dict(tiles=[]), "V, the ids of all tiles must be 1 to 2147483647, got 0"),
        (dict(twice=True), "tiles must be of a multiple of 4096 ids each, but for the last, got 61 ids before one"),
        (dict(plain=True), "a tile must be packed by oneDNN (torch.ops.mkldnn._reorder_linear_weight), got an ordinary tensor"),
        (dict(rows=torch.zeros(4)), "rows must be int64, got float32"),
        (dict(topk=9), "topk must be 0 to 8, got 9"),
        (dict(temperature=1.0), "seed must be given when temperature > 0, got None"),
        (dict(ids=torch.zeros(3, 1, dtype=torch.int64)), "ids must be [T', J] = [4, any], got [3, 1]"),
    ],
    ids=["half", "width", "none", "middle", "plain", "rows", "topk", "temperature", "ids"],
)
def test_errors_of_the_op(change, message):
    tiles = make_head(61).packed
    call = dict(hidden=torch.zeros(4, 32), tiles=tiles) | change
    if call.pop("twice", False):
        call["tiles"] = tiles * 2
    if call.pop("plain", False):
        call["tiles"] = [torch.zeros(61, 32)]
    with pytest.raises(RuntimeError, match=re.escape(f"head_stats: {message}")):
        torch.ops.unmask.head_stats(call.pop("hidden"), call.pop("tiles"), call.pop("rows", None), *(NONE | call).values())
