"""verify_greedy and verify_ratio on a GPU, against the CPU kernels (tests/test_cuda_emulated_verify.py runs the same device code without one)."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given

import verify_kit as cpu
from native import native
from on_gpu import op_on_gpu, to_cuda
from stats_cases import strided
from unmask import ops

pytestmark = pytest.mark.usefixtures("cuda")
_greedy, _ratio = op_on_gpu("verify_greedy", written=(6,)), op_on_gpu("verify_ratio")


def ratio(call: cpu.Call) -> ops.RatioResult:
    return ops.RatioResult(*_ratio(*call))


@given(cpu.greedy_calls())
def test_any_chain_or_tree(call):
    status, expected = (torch.full((len(call[3]),), 1, dtype=torch.int32) for _ in range(2))
    for g, w in zip((*_greedy(*call, status), status), (*native("verify_greedy")(*call, expected), expected), strict=True):
        assert torch.equal(g, w)


@given(cpu.ratio_calls())
def test_any_spans(call):
    cpu.assert_explained(call, ratio(call), call.kernel())


@pytest.mark.parametrize("dtype", cpu.DTYPES)
@pytest.mark.parametrize("vocab", (4096, 32000, 126464, 151936))
def test_production_vocabularies_in_any_layout(dtype, vocab):
    call = cpu.spans(4, 3, vocab, dtype, spread=2.0)._replace(forbid=cpu.ids(vocab - 3, 5))
    want = ratio(call)
    assert int((want.next >= 0).sum()) > 0
    cpu.assert_explained(call, want, call.kernel())
    for layout in ("padded", "columns", "transposed"):
        moved = call._replace(p_logits=strided(call.p_logits, layout), q_logits=strided(call.q_logits, layout))
        assert cpu.equal(ratio(moved), want)


def test_the_committed_token_is_distributed_as_the_target():
    """As in test_op_verify_ratio.py, drafts and verification on the GPU."""
    g = torch.Generator().manual_seed(11)
    p, q = (torch.randn(1, 12, generator=g) * s for s in (1.0, 1.5))
    n = cpu.DRAWS
    row, seed = torch.zeros(n, dtype=torch.int64), torch.arange(n)
    token = op_on_gpu("logit_stats")(p, row, *(None,) * 5, 0, 1.0, seed, row, row)[0][:, 0].contiguous()
    got = ratio(cpu.Call(p, q, row, row, token, torch.arange(n + 1), seed, row, row))
    committed = torch.where(got.accepted == 1, token, got.next)
    assert cpu.chi_square(committed, q[0].double().softmax(0)) < cpu.CRITICAL[11]


def test_a_graph_captures_a_verification():
    """No host sync between the drafts and the committed counts."""
    first, second = cpu.spans(5, 4, 9000), cpu.spans(5, 4, 9000, spread=2.0)
    node = torch.randint(0, 2, (3, 5, 40))
    moved = [to_cuda(t) for t in first]
    chain = to_cuda(node), to_cuda(node), None, to_cuda(torch.tensor([5, 4, 0])), 9, False
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.stream(side), torch.cuda.graph(graph, stream=side):
        out = native("verify_ratio", "CUDA")(*moved)
        path = native("verify_greedy", "CUDA")(*chain)
    for into, source in zip(moved, second, strict=True):
        if isinstance(into, torch.Tensor):
            into.copy_(source)
    graph.replay()
    torch.cuda.synchronize()
    cpu.assert_explained(second, ops.RatioResult(*(t.cpu() for t in out)), second.kernel())
    for g, w in zip(path, native("verify_greedy")(*(t.cpu() if isinstance(t, torch.Tensor) else t for t in chain)), strict=True):
        assert torch.equal(g.cpu(), w)
