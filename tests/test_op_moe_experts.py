"""moe_experts: the bits of the products, silu_mul and moe_combine one by one, close to the definition, any choice of experts, clear errors."""

from __future__ import annotations

import re

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from native import native
from unmask import ops, reference
from unmask.ops.linear import Linear, packing_available

pytestmark = pytest.mark.skipif(not packing_available(torch.float32), reason="this torch has no packed weights")

DTYPES = [d for d in (torch.float32, torch.bfloat16) if packing_available(d)]


def kernel(*args):
    return native("moe_experts", "MkldnnCPU")(*args)


class Call:
    """Random tokens, choices (-1 among them), weights of every expert and of a shared one."""

    def __init__(self, tokens=16, experts=6, top_k=2, width=24, inner=12, shared=20, dtype=torch.float32, seed=0, idle=0.2):
        g = torch.Generator().manual_seed(seed)

        def draw(*shape):
            return (torch.randn(*shape, generator=g) * shape[-1] ** -0.5).to(dtype)

        self.x = torch.randn(tokens, width, generator=g).to(dtype)
        self.expert = torch.stack([torch.randperm(experts, generator=g)[:top_k] for _ in range(tokens)]) if tokens else torch.zeros(0, top_k, dtype=torch.int64)
        self.expert[torch.rand(tokens, generator=g) < idle] = -1
        self.weight = torch.rand(tokens, top_k, generator=g)
        self.all = [(draw(2 * inner, width), draw(width, inner)) for _ in range(experts)]
        self.shared = (draw(2 * shared, width), draw(width, shared)) if shared else (None, None)

    @property
    def used(self) -> list[int]:
        return sorted({*self.expert.flatten().tolist()} - {-1})

    def args(self, pack=lambda w: Linear(w, "packed").packed_weight) -> list:
        gate_up, down = ([pack(self.all[e][i]) for e in self.used] for i in (0, 1))
        return [self.x, self.expert, self.weight, gate_up, down, *(None if w is None else pack(w) for w in self.shared)]


def one_by_one(c: Call) -> torch.Tensor:
    """Groups padded to 16 rows, a Linear for each product, then moe_combine."""

    def swiglu(x, gate_up, down):
        return Linear(down, "packed")(ops.silu_mul(Linear(gate_up, "packed")(x)))

    k = c.expert.shape[1]
    y = torch.zeros(c.expert.numel(), c.x.shape[1], dtype=c.x.dtype)
    for e in c.used:
        pairs = torch.nonzero(c.expert.flatten() == e).flatten()
        rows = torch.cat([c.x[pairs // k], c.x.new_zeros(-len(pairs) % 16, c.x.shape[1])])
        y[pairs] = swiglu(rows, *c.all[e])[: len(pairs)]
    place = torch.arange(c.expert.numel()).view(c.expert.shape)
    out = ops.moe_combine(y, torch.where(c.expert < 0, -1, place), c.weight)
    return out if c.shared[0] is None else out + swiglu(c.x, *c.shared)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    "options",
    [
        dict(), dict(shared=0), dict(tokens=48, experts=3, top_k=3), dict(tokens=16, experts=64, top_k=8, width=512, inner=128),
        dict(top_k=1, idle=0.0), dict(idle=1.1), dict(tokens=0), dict(tokens=100, experts=2, top_k=2, width=40, inner=8), dict(experts=1, top_k=1),
    ],
    ids=str,
)  # fmt: skip
def test_the_bits_of_the_parts(options, dtype, threads):
    call = Call(dtype=dtype, **options)
    for count in (1, 2):
        threads(count)
        assert torch.equal(kernel(*call.args()), one_by_one(call))


@given(st.data())
def test_any_choice(data):
    draw = data.draw
    experts = draw(st.integers(1, 9))
    call = Call(
        tokens=16 * draw(st.integers(0, 3)), experts=experts, top_k=draw(st.integers(1, experts)), width=draw(st.sampled_from([8, 24])),
        inner=draw(st.sampled_from([4, 12])), shared=draw(st.sampled_from([0, 16])), dtype=draw(st.sampled_from(DTYPES)), seed=draw(st.integers(0, 2**31)),
        idle=draw(st.sampled_from([0.0, 0.5, 1.1])),
    )  # fmt: skip
    assert torch.equal(kernel(*call.args()), one_by_one(call))


@pytest.mark.parametrize("dtype", DTYPES)
def test_close_to_the_definition(dtype):
    call = Call(dtype=dtype)
    want = reference.moe_experts(*call.args(pack=lambda w: w))
    assert (kernel(*call.args()).double() - want.double()).abs().max() <= 16 * torch.finfo(dtype).eps * want.abs().max()


def test_a_token_has_the_same_bits_in_any_batch():
    call = Call(tokens=64, experts=4, idle=0.0)
    whole = kernel(*call.args())
    call.x, call.expert, call.weight = call.x[16:32], call.expert[16:32], call.weight[16:32]
    assert torch.equal(kernel(*call.args()), whole[16:32])


def test_any_strides():
    call = Call()
    want = kernel(*call.args())
    call.x, call.expert, call.weight = (t.T.contiguous().T for t in (call.x, call.expert, call.weight))
    assert torch.equal(kernel(*call.args()), want)


def packed(*shape):
    return Linear(torch.zeros(shape), "packed").packed_weight


@pytest.mark.parametrize(
    "change, message",
    [
        ({0: torch.zeros(16, 24).half()}, "x must be float32 or bfloat16 on the CPU, got float16"),
        ({1: torch.zeros(16, 2)}, "expert must be int64, got float32"),
        ({1: torch.zeros(15, 2, dtype=torch.int64)}, "expert must be [T, K] = [16, any], got [15, 2]"),
        ({1: torch.full((16, 2), 4096)}, "expert must be below 4096, got 4096"),
        ({2: torch.zeros(16, 3)}, "weight must be [T, K] = [16, 2], got [16, 3]"),
        ({3: []}, "gate_up must be a list of the weights of the 6 experts that occur in expert, in order, got 0 weights"),
        ({4: [torch.zeros(24, 12)] * 6}, "a weight of down must be packed by oneDNN (torch.ops.mkldnn._reorder_linear_weight), got an ordinary tensor"),
        ({3: [packed(22, 24)] * 6}, "a weight of gate_up must be [2 F, d] = [24, 24], got [22, 24]"),
        ({4: [packed(24, 12)] * 5 + [packed(24, 10)]}, "a weight of down must be [d, F] = [24, 12], got [24, 10]"),
        ({5: None}, "shared_gate_up must be given with shared_down, got None"),
        ({6: packed(23, 20)}, "shared_down must be [d, F] = [24, any], got [23, 20]"),
    ],
    ids=["half", "float", "tokens", "number", "weight", "short", "plain", "gate_up", "down", "alone", "shared"],
)
def test_errors(change, message):
    args = Call(idle=0.0).args()
    for i, value in change.items():
        args[i] = value
    with pytest.raises(RuntimeError, match=re.escape(f"moe_experts: {message}")):
        torch.ops.unmask.moe_experts(*args)
