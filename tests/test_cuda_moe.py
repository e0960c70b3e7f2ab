"""moe_route and moe_combine on a GPU, against the CPU kernels: the same bits (tests/test_cuda_emulated_moe.py runs the same device code
without one)."""

from __future__ import annotations

import pytest
import torch

from native import native
from on_gpu import op_on_gpu, to_cuda
from strided import LAYOUTS, relayout
from test_cuda_emulated_moe import CASES, DTYPES, assert_same_bits

pytestmark = pytest.mark.usefixtures("cuda")
_route, _combine = op_on_gpu("moe_route"), op_on_gpu("moe_combine")


@pytest.mark.parametrize("case", [*CASES, (4096, 1, 1, 8), (4096, 4096, 5, 5)], ids=str)
@pytest.mark.parametrize("scoring", (0, 1))
@pytest.mark.parametrize("tokens", (0, 1, 64, 1000))
def test_routes(case, scoring, tokens):
    experts, groups, kept, top_k = case
    for i, layout in enumerate(LAYOUTS):
        logits = torch.randn(tokens, experts) * 3
        logits = logits.round() if i % 2 else logits
        row = None if i == 0 else torch.randint(-1, 3, (tokens,))
        bias = None if i == 1 else torch.randn(experts) * 0.2
        args = (relayout(logits, layout), row, bias, scoring, groups, kept, top_k, i != 2, 2.5, (1, 16)[i % 2])
        assert_same_bits(_route(*args), native("moe_route")(*args))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("dim", (1, 255, 2048, 4100))
def test_combine(dtype, dim):
    y, place, weight = (torch.randn(500, dim) * 2).to(dtype), torch.randint(-2, 502, (64, 8)), torch.rand(64, 8)
    for layout in LAYOUTS:
        args = (relayout(y, layout), relayout(place, layout), relayout(weight, layout))
        assert torch.equal(_combine(*args), native("moe_combine")(*args))


def test_a_graph_captures_both():
    """Output shapes and launches do not depend on the logits: a replay with others gives theirs."""
    a, b = torch.randn(32, 64), torch.randn(32, 64)
    x = to_cuda(a)
    args = (None, None, 1, 1, 1, 4, True, 1.0, 1)
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.stream(side), torch.cuda.graph(graph, stream=side):
        routes = native("moe_route", "CUDA")(x, *args)
        out = native("moe_combine", "CUDA")(x.index_select(0, routes[3]), routes[2], routes[1])
    x.copy_(b)
    graph.replay()
    torch.cuda.synchronize()
    want = native("moe_route")(b, *args)
    assert_same_bits(tuple(t.cpu() for t in routes), want)
    assert torch.equal(out.cpu(), native("moe_combine")(b[want[3]], want[2], want[1]))
