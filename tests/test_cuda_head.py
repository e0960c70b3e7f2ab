"""The fused LM head on a Hopper GPU, against logit_stats on the logits of the same product; and head_stats on any GPU."""

from __future__ import annotations

import pytest
import torch

from native import native
from on_gpu import op_on_gpu
from stats_cases import arguments, assert_same, call
from test_cuda_emulated_head import as_product, finite
from unmask import ops
from unmask.ops.head_stats import Head, fused_head_fits, head_stats
from unmask.ops.info import Status

pytestmark = pytest.mark.usefixtures("cuda")
HALF = (torch.bfloat16, torch.float16)


def fused(a: dict, hidden: torch.Tensor, weight: torch.Tensor) -> tuple[torch.Tensor, ...]:
    _, *rest = arguments(a | {"logits": None})
    return op_on_gpu("fused_head_stats")(hidden, weight, *rest)


def key(n: int) -> dict:
    return {"topk": 2, "temperature": 0.6, **{name: torch.arange(n) + i for i, name in enumerate(("seed", "step", "pos"))}}


@pytest.mark.parametrize("vocab", (1, 63, 65, 192, 193, 1500, 12_345, 126_464))
@pytest.mark.parametrize("temperature", (0.0, 0.7))
def test_same_as_logit_stats(vocab, temperature, hopper):
    for i, dtype in enumerate(HALF):
        a = finite(vocab, dtype, vocab + 3 * i, temperature)
        hidden, weight = as_product(a["logits"])
        assert_same(fused(a, hidden, weight), native("logit_stats")(*arguments(a)))


@pytest.mark.parametrize("dtype", HALF)
@pytest.mark.parametrize("entries, width", [(1, 8), (8, 72), (32, 4096), (33, 3584), (64, 2048)])
def test_products(entries, width, dtype, hopper):
    """Tokens are those of the float64 logits wherever the two best differ by more than a step of the dtype."""
    torch.manual_seed(entries)
    hidden, weight = torch.randn(entries, width).to(dtype), (torch.randn(20_000, width) * width**-0.5).to(dtype)
    got = ops.LogitStats(*fused(key(entries) | {"temperature": 0.0}, hidden, weight))
    logits = hidden.double() @ weight.double().T
    top = logits.topk(2)
    sure = top.values[:, 0] - top.values[:, 1] > top.values[:, 0].abs() * 2 * torch.finfo(dtype).eps
    assert torch.equal(got.token[sure], top.indices[sure, 0]) and (got.status == 0).all()
    exact = torch.logsumexp(logits, -1)
    torch.testing.assert_close(got.logsumexp.double(), exact, rtol=0, atol=4 * torch.finfo(dtype).eps)


def test_bits_do_not_depend_on_other_rows_or_runs(hopper):
    hidden, weight = torch.randn(64, 4096).bfloat16(), torch.randn(32_000, 4096).bfloat16()
    a = key(64)
    whole = fused(a, hidden, weight)
    for _ in range(3):
        assert all(torch.equal(g, w) for g, w in zip(fused(a, hidden, weight), whole, strict=True))
    for rows in ([5], [5, -1, 63], list(range(32))):
        some = {name: v[rows] if isinstance(v, torch.Tensor) else v for name, v in a.items()} | {"rows": torch.tensor(rows)}
        got = fused(some, hidden, weight)
        for e, r in enumerate(rows):
            assert r < 0 or all(torch.equal(g[e], w[r]) for g, w in zip(got, whole, strict=True))


def test_a_nan_stays_in_its_row(hopper):
    hidden, weight = torch.randn(6, 64).bfloat16(), torch.randn(3000, 64).bfloat16()
    hidden[2, 5] = float("nan")
    assert fused(key(6), hidden, weight)[2].tolist() == [0, 0, int(Status.NAN), 0, 0, 0]


@pytest.mark.parametrize("dtype", (torch.float32, *HALF))
@pytest.mark.parametrize("entries", (3, 32, 65, 300))
def test_head_stats_on_any_gpu(entries, dtype):
    """The wrapper: fused where it fits, tiles elsewhere; the same tokens either way."""
    torch.manual_seed(1)
    hidden, weight = torch.randn(entries, 256).to(dtype).cuda(), torch.randn(20_000, 256).to(dtype).cuda()
    head = Head(weight, "plain")
    got = head_stats(hidden, head)
    want = ops.logit_stats(torch.nn.functional.linear(hidden, weight))
    margin = want.p1 - want.p2
    sure = margin > 0.05
    assert torch.equal(got.token[sure], want.token[sure])
    if fused_head_fits(hidden, head, entries):
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        head_stats(hidden, head)
        assert torch.cuda.max_memory_allocated() - before < 20e6


def test_a_graph_captures_it(hopper):
    hidden, weight = torch.randn(32, 512).bfloat16().cuda(), torch.randn(9000, 512).bfloat16().cuda()
    head, rows = Head(weight, "plain"), torch.arange(32, device="cuda")
    head_stats(hidden, head, rows)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = head_stats(hidden, head, rows)
    hidden.copy_(torch.randn_like(hidden))
    graph.replay()
    torch.cuda.synchronize()
    want = head_stats(hidden, head, rows)
    assert all(torch.equal(a, b) for a, b in zip(out, want, strict=True))


def test_what_it_does_not_take_is_said(hopper):
    op = native("fused_head_stats", "CUDA")
    weight, hidden = torch.zeros(100, 64, device="cuda").bfloat16(), torch.zeros(4, 64, device="cuda").bfloat16()
    rest = (None,) * 6 + (0, 0.0, None, None, None)
    for h, w, words in (
        (hidden.float(), weight.float(), "bfloat16 or float16"),
        (hidden, weight.half(), "weight must be"),
        (hidden[:, :60], weight[:, :60], "multiple of 8"),
        (hidden[:, :32], weight, "weight must be"),
        (torch.zeros(65, 64, device="cuda").bfloat16(), weight, "at most 64"),
        (hidden[:, 1:57], weight[:, :56], "multiples of 16 bytes"),
    ):
        with pytest.raises(RuntimeError, match=words):
            op(h, w, *rest)


def test_a_call_of_a_case_list_runs(hopper):
    a = call(700, torch.bfloat16, 4, 0.5)
    a["logits"] = a["logits"].float().nan_to_num(0.0, 1.0, -1.0).bfloat16()
    assert_same(fused(a, *as_product(a["logits"])), native("logit_stats")(*arguments(a)))
