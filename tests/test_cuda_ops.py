"""commit, rope_append, rms_norm, add_rms_norm, silu_mul, filtered_stats and kl_stats on a GPU, against the CPU kernels
(tests/test_cuda_emulated_*.py runs the same device code without one)."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings

from native import native
from on_gpu import op_on_gpu
from stats_cases import assert_same
from strided import LAYOUTS, relayout
from test_cuda_emulated_filtered import FILTERS, filtered_call
from test_cuda_emulated_filtered import arguments as filter_arguments
from test_cuda_emulated_rows import DTYPES, STEP, rows
from test_op_commit import RULES, Call, calls, kernel, one_row
from test_op_rope_append import assert_same_within_rounding, build
from test_op_rope_append import run as run_rope

pytestmark = pytest.mark.usefixtures("cuda")
_commit = op_on_gpu("commit", written=(0, 1, 14))
_rope = op_on_gpu("rope_append", written=(3, 4, 13))


def commit_on_gpu(canvas, masked, cu, row, pos, token, score, *, rule, params=(), cost=None, eligible=None, editable=None,
                  quota=None, threshold=None, status=None):  # fmt: skip
    return _commit(canvas, masked, cu, row, pos, token, score, cost, eligible, editable, int(rule), params, quota, threshold, status)


def same_commit(call: Call) -> None:
    for got, want in zip(call.run(commit_on_gpu), call.run(kernel), strict=True):
        assert torch.equal(got, want)


@given(calls())
@settings(max_examples=200)
def test_any_commit(call):
    same_commit(call)


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("n", [1, 31, 32, 33, 128, 5000])
def test_many_candidates(rule, n):
    options = {
        0: {"quota": torch.tensor([n // 2])}, 1: {"threshold": torch.tensor([0.5])}, 2: {"threshold": torch.tensor([0.5])},
        3: {"params": [0.4]}, 4: {"params": [0.4]}, 5: {"params": [1.5], "cost": torch.rand(n)},
    }[int(rule)]  # fmt: skip
    call = one_row(torch.rand(n).tolist(), rule, **options)
    call.pos = torch.randperm(n)
    same_commit(call)
    call.pos = torch.randint(0, n, (n,))
    same_commit(call)


def test_entries_on_one_row():
    call = one_row([0.9, 0.8, 0.7, 0.6], RULES[0], quota=torch.tensor([1, 1, 2]))
    call.cu, call.row, call.pos = torch.tensor([0, 2, 2, 4]), torch.tensor([0, 0, 0]), torch.tensor([0, 1, 0, 1])
    same_commit(call)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("norm", [False, True])
@pytest.mark.parametrize("tokens", [1, 9, 128, 129, 700])
def test_rope_append(dtype, norm, tokens):
    for dim, freqs in ((128, None), (48, 11), (8, 0)):
        call = build(tokens=tokens, dim=dim, freqs=freqs, heads=7, kv_heads=3, slots=800, dtype=dtype, norm=norm)
        for how in LAYOUTS:
            for name in ("q", "k", "v", "row", "pos", "slot"):
                setattr(call, name, relayout(getattr(call, name), how))
            got, want = run_rope(call, _rope), run_rope(call)
            assert_same_within_rounding(got, want, dtype, norm)


def test_rope_faults_and_duplicate_slots():
    for seed in range(50):
        call = build(tokens=200, dim=8, rows=2, slots=4, seed=seed)
        g = torch.Generator().manual_seed(seed)
        call.row = torch.randint(-2, 4, call.row.shape, generator=g)
        call.slot = torch.randint(-2, 6, call.row.shape, generator=g)
        call.pos[torch.rand(call.row.shape, generator=g) < 0.2] = -3
        assert all(torch.equal(a, b) for a, b in zip(run_rope(call, _rope), run_rope(call), strict=True))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("dim", (1, 7, 8, 264, 1000, 4096))
@pytest.mark.parametrize("pad", (0, 8, 3))
def test_rows(dtype, dim, pad):
    for n in (0, 1, 5, 300):
        x, residual, weight = rows(n, dim, dtype, pad), rows(n, dim, dtype, pad), torch.rand(dim).to(dtype)
        got = op_on_gpu("rms_norm")(x, weight, 1e-5)
        torch.testing.assert_close(got, native("rms_norm")(x, weight, 1e-5), rtol=STEP[dtype], atol=1e-30)
        ours, theirs = residual.clone(), residual.clone()
        got = op_on_gpu("add_rms_norm", written=(0,))(ours, x, weight, 1e-5)
        torch.testing.assert_close(got, native("add_rms_norm")(theirs, x, weight, 1e-5), rtol=STEP[dtype], atol=1e-30)
        assert torch.equal(ours, theirs)
        gate = rows(n, 2 * dim, dtype, pad)
        got = op_on_gpu("silu_mul")(gate)
        torch.testing.assert_close(got, native("silu_mul")(gate), rtol=STEP[dtype], atol=1e-30)


@pytest.mark.parametrize("vocab", (1, 2, 511, 512, 513, 4097, 32000, 126464))
@pytest.mark.parametrize("temperature", (0.0, 0.7, 30.0))
def test_filtered_stats(vocab, temperature):
    for i, filters in enumerate(FILTERS):
        for j, layout in enumerate(("dense", "padded", "columns", "transposed")):
            a = filtered_call(vocab, DTYPES[(i + j) % 3], vocab + 7 * i + j, temperature, layout, filters)
            assert_same(op_on_gpu("filtered_stats")(*filter_arguments(a)), native("filtered_stats")(*filter_arguments(a)))


def test_filtered_stats_of_more_rows_than_one_workspace_holds():
    """64 MiB of copied rows are 132 rows of this vocabulary; a row has the same bits in each launch."""
    a = filtered_call(126464, torch.bfloat16, 13, 0.8, filters={"top_p": 0.9})
    many = {**a, **{k: a[k].repeat(30, *[1] * (a[k].dim() - 1)) for k in ("rows", "seed", "step", "pos")}}
    want, got = (op_on_gpu("filtered_stats")(*filter_arguments(x)) for x in (a, many))
    for g, w in zip(got, want, strict=True):
        assert torch.equal(g.nan_to_num(7.0), w.repeat(30, *[1] * (w.dim() - 1)).nan_to_num(7.0))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("vocab", (1, 7, 4096, 126464))
@pytest.mark.parametrize("how", LAYOUTS)
def test_kl_stats(dtype, vocab, how):
    x = torch.randn(5, vocab) * 4
    y = relayout((x + torch.randn(5, vocab)).to(dtype), how)
    x = relayout(x.to(dtype), how)
    rows, previous = torch.tensor([0, 4, -1, 2, 5, 1]), torch.tensor([1, 4, 0, -1, 0, 9])
    lse, previous_lse = (torch.logsumexp(t.float(), 1)[r.clamp(0, 4)] for t, r in ((x, rows), (y, previous)))
    a = (x, y, rows, previous, lse, previous_lse)
    torch.testing.assert_close(op_on_gpu("kl_stats")(*a), native("kl_stats")(*a), rtol=1e-6, atol=4e-6, equal_nan=True)


def test_a_graph_captures_the_filtered_statistics():
    x, y = torch.randn(4, 9000, device="cuda"), torch.randn(4, 9000, device="cuda")
    lse = torch.logsumexp(x, 1)
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.stream(side), torch.cuda.graph(graph, stream=side):
        out = native("filtered_stats", "CUDA")(x, *[None] * 5, 0.0, 0.9, 50, False, None, None, None)
        kl = native("kl_stats", "CUDA")(x, y, None, None, lse, lse)
    x.copy_(y)
    graph.replay()
    torch.cuda.synchronize()
    assert_same(tuple(t.cpu() for t in out), native("filtered_stats")(y.cpu(), *[None] * 5, 0.0, 0.9, 50, False, None, None, None))
    assert kl.abs().max() < 1e-5


def test_a_graph_captures_a_step_of_the_small_ops():
    call = one_row([0.9, 0.8, 0.7], RULES[1], threshold=torch.tensor([0.75]))
    tensors = [t.cuda() for t in (call.canvas, call.masked, call.cu, call.row, call.pos, call.token, call.score)]
    bar = call.options["threshold"].cuda()
    first = [t.clone() for t in tensors[:2]]
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.stream(side), torch.cuda.graph(graph, stream=side):
        out = native("commit", "CUDA")(*tensors, None, None, None, 1, [], None, bar, None)
    for t, value in zip(tensors, first, strict=False):
        t.copy_(value)
    graph.replay()
    torch.cuda.synchronize()
    assert out[1].tolist() == [2] and tensors[0].tolist() == [[100, 101, 9]]
