"""The mixture of experts: routing against one token at a time, bits that no batch changes, idle experts that cost nothing."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import random_models
from plain_model import plain_moe, plain_route
from unmask.models import moe
from unmask.models.config import Experts
from unmask.models.layer_weights import LayerWeights
from unmask.models.model import _expert_shapes
from unmask.models.moe import MoE, route
from unmask.ops import grouped_linear, silu_mul
from unmask.ops.linear import Linear, packing_available

SOFTMAX = Experts(
    layers=(0,), n_experts=8, top_k=3, expert_dim=24, shared_dim=0, scoring="softmax", selection_bias=False, n_groups=1, kept_groups=1,
    normalized=True, scale=1.0,
)  # fmt: skip
GROUPED = Experts(
    layers=(0,), n_experts=16, top_k=4, expert_dim=24, shared_dim=40, scoring="sigmoid", selection_bias=True, n_groups=4, kept_groups=2,
    normalized=True, scale=2.5,
)  # fmt: skip


def weights_of(config: Experts, d: int = 32, seed: int = 0, dtype: torch.dtype = torch.float32) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    shapes = _expert_shapes(dataclasses.replace(random_models.BASE, d_model=d, experts=config), 0)
    return {name: (torch.randn(shape, generator=generator) * 0.3).to(dtype) for name, shape in shapes.items()}


def layer_of(config: Experts, weights: dict[str, torch.Tensor], format: str = "packed") -> MoE:
    model = dataclasses.replace(random_models.BASE, d_model=weights["router"].shape[1], experts=config)
    w = LayerWeights.of(model, format, weights)
    shared = moe.SwiGLU(w.linears["shared_gate_up"], w.linears["shared_down"]) if config.shared_dim else None
    return MoE(config, w.tensors["router"], w.tensors.get("router_bias"), w.experts, shared, format)


# --- routing ----------------------------------------------------------------------------------------------------

LEVELS = st.sampled_from([-2.0, -0.5, 0.0, 0.0, 0.25, 1.0])  # few values: ties everywhere


@st.composite
def routers(draw) -> tuple[Experts, torch.Tensor, torch.Tensor | None]:
    groups, size = draw(st.sampled_from([(1, 6), (2, 4), (4, 2), (8, 1), (4, 4), (3, 3)]))
    kept = draw(st.integers(1, groups))
    biased = draw(st.booleans())
    config = Experts(
        layers=(0,), n_experts=groups * size, top_k=draw(st.integers(1, kept * size)), expert_dim=8, shared_dim=0,
        scoring=draw(st.sampled_from(["softmax", "sigmoid"])), selection_bias=biased, n_groups=groups, kept_groups=kept,
        normalized=draw(st.booleans()), scale=draw(st.sampled_from([1.0, 2.5])),
    )  # fmt: skip
    assert not config.problems(1)
    row = st.lists(LEVELS, min_size=groups * size, max_size=groups * size)
    logits = torch.tensor(draw(st.lists(row, min_size=1, max_size=5)))
    return config, logits, torch.tensor(draw(row)) if biased else None


@settings(max_examples=300)
@given(routers())
def test_routing_is_that_of_each_token_alone(case):
    config, logits, bias = case
    chosen, weight = route(logits, config, bias)[:2]
    assert weight.dtype == torch.float32 and chosen.shape == weight.shape == (logits.shape[0], config.top_k)
    for t, row in enumerate(logits):
        expected = plain_route(row, config, bias)
        assert chosen[t].tolist() == [expert for expert, _ in expected]
        assert torch.allclose(weight[t], torch.stack([w for _, w in expected]), rtol=1e-5, atol=1e-7)


def test_the_bias_chooses_and_does_not_weigh():
    logits = torch.zeros(1, 8)
    bias = torch.zeros(8)
    bias[[5, 6]] = torch.tensor([0.5, 1.0])
    config = dataclasses.replace(SOFTMAX, scoring="sigmoid", selection_bias=True, top_k=3)
    chosen, weight = route(logits, config, bias)[:2]
    assert chosen.tolist() == [[6, 5, 0]] and torch.allclose(weight, torch.full((1, 3), 1 / 3))
    raw = route(logits, dataclasses.replace(config, normalized=False, scale=2.5), bias).weight
    assert torch.equal(raw, torch.full((1, 3), 0.5 * 2.5))


def test_a_group_counts_by_its_two_best_and_a_strong_expert_of_a_left_out_group_is_not_chosen():
    logits = torch.tensor([[3.0, -9.0, -9.0, -9.0, 1.0, 1.0, -9.0, -9.0]])  # group 0: one strong expert; group 1: two good ones
    config = dataclasses.replace(SOFTMAX, scoring="sigmoid", n_groups=2, kept_groups=1, top_k=2)
    assert route(logits, config).expert.tolist() == [[4, 5]]
    everything = dataclasses.replace(config, kept_groups=2)
    assert route(logits, everything).expert.tolist() == [[0, 4]]


def test_nan_logits_stay_visible():
    logits = torch.zeros(2, 8)
    logits[1, 3] = torch.nan
    chosen, weight = route(logits, SOFTMAX)[:2]
    assert not weight[0].isnan().any() and weight[1].isnan().all() and int(chosen.max()) < 8


# --- the sum of experts -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("format", ["packed", "plain"])
@pytest.mark.parametrize("config", [SOFTMAX, GROUPED, dataclasses.replace(SOFTMAX, top_k=8, normalized=False)], ids=["softmax", "grouped", "all"])
def test_output_is_the_definition_s(config, format):
    weights = weights_of(config)
    x = torch.randn(48, 32, generator=torch.Generator().manual_seed(1))
    exact = torch.stack([plain_moe({n: w.double() for n, w in weights.items()}, config, token) for token in x.double()])
    assert (layer_of(config, weights, format)(x) - exact).abs().max() <= 1e-5 * exact.abs().max()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_grouped_product_gives_the_same(dtype):
    """torch's grouped product, which CUDA takes for bf16; torch runs it on the CPU too."""
    weights, d = weights_of(SOFTMAX, dtype=dtype), 32
    x = torch.randn(32, d, generator=torch.Generator().manual_seed(1)).to(dtype)
    logits = torch.randn(32, 8, generator=torch.Generator().manual_seed(2))
    logits[:, 5] = -9.0  # an expert without rows
    row = torch.zeros(32, dtype=torch.int64)
    row[[3, 31]] = -1  # the grouped product then leaves its last rows undefined
    results = []
    for grouped in (True, False):
        experts = grouped_linear.Experts(8, d, 24, dtype, torch.device("cpu"), "plain", grouped=grouped)
        for e in range(8):
            experts.put(e, "gate_up", [weights[f"experts.{e}.gate"], weights[f"experts.{e}.up"]])
            experts.put(e, "down", [weights[f"experts.{e}.down"]])
        routes = route(logits, SOFTMAX, row=row, multiple=experts.multiple)
        assert routes.offsets[5] == routes.offsets[6] and (routes.offsets[8] == 90) == grouped
        y = experts(x, routes, silu_mul)
        results.append(y[routes.place[row >= 0]].float())
    assert results[0].shape == (30, 3, d)
    assert (results[0] - results[1]).abs().max() <= (1e-5 if dtype is torch.float32 else 0.02) * results[1].abs().max()
    assert not grouped_linear.grouped_available(dtype, torch.device("cpu"), d, 24)  # packed weights are faster there


def formats() -> list[tuple[torch.dtype, str]]:
    found = [(torch.float32, "packed"), (torch.bfloat16, "packed_fp32")]
    return [*found, (torch.bfloat16, "packed")] if packing_available(torch.bfloat16) else found


@pytest.mark.parametrize(("dtype", "format"), formats())
@pytest.mark.parametrize("config", [SOFTMAX, GROUPED], ids=["softmax", "grouped"])
def test_a_token_has_the_same_bits_in_any_batch(config, dtype, format, threads):
    d = 64
    layer = layer_of(config, {n: w if n.startswith("router") else w.to(dtype) for n, w in weights_of(config, d).items()}, format)
    x = torch.randn(160, d, generator=torch.Generator().manual_seed(1)).to(dtype)
    threads(1)
    whole = layer(x)
    for count in (1, 2):
        threads(count)
        assert torch.equal(layer(x), whole)
        for start, stop in ((0, 16), (16, 48), (32, 160)):
            assert torch.equal(layer(x[start:stop]), whole[start:stop])
        order = torch.randperm(160, generator=torch.Generator().manual_seed(count))
        assert torch.equal(layer(x[order]), whole[order])
        alone = torch.zeros(16, d, dtype=dtype)  # one token among padding
        row = torch.full((16,), -1)
        for t in (0, 77):
            alone[3], row[3] = x[t], 0
            assert torch.equal(layer(alone, row)[3], whole[t])


def test_row_bits_of_a_model():
    """Through a whole forward: a row alone, in a batch, and behind rows of another content."""
    model = random_models.make(experts=dataclasses.replace(GROUPED, layers=(0, 1)), block_size=4, visibility="block_causal", qk_norm=True)
    ids = torch.randint(0, 59, (3, 21), generator=torch.Generator().manual_seed(3))
    logits = model.logits(ids)
    for i in range(3):
        assert torch.equal(model.logits(ids[i : i + 1])[0], logits[i])
    assert torch.equal(model.logits(ids.flip(0)).flip(0), logits)


# --- cost -------------------------------------------------------------------------------------------------------


@pytest.fixture
def calls(monkeypatch) -> list[tuple[Linear, int]]:
    """(Linear, rows) of every product."""
    seen = []
    forward = Linear.forward
    monkeypatch.setattr(Linear, "forward", lambda self, x: (seen.append((self, x.shape[0])), forward(self, x))[1])
    return seen


def test_idle_experts_are_not_computed(calls):
    layer = layer_of(GROUPED, weights_of(GROUPED))
    layer.packed = None  # the op, whose lists hold no idle expert (tests/test_op_moe_experts.py), makes no calls that could be counted
    x = torch.randn(64, 32, generator=torch.Generator().manual_seed(1))
    chosen = route(layer.router(x), GROUPED, layer.bias).expert
    x = x[(chosen != 6).all(1)][:16]  # tokens that avoid one expert at least
    chosen = route(layer.router(x), GROUPED, layer.bias).expert
    active = chosen.unique().tolist()
    assert x.shape[0] == 16 and 6 not in active
    calls.clear()
    layer(x)
    products = {id(linear): rows for linear, rows in calls}
    experts = layer.experts
    for e in range(GROUPED.n_experts):
        expected = -(-int((chosen == e).sum()) // 16) * 16  # padded to a multiple of 16, and nothing for an idle one
        for linear in (experts.gate_up[e], experts.down[e]):
            assert products.get(id(linear), 0) == expected
    assert len(calls) == 1 + 2 * len(active) + 2  # the router, the active experts, the shared expert


def test_padding_goes_through_no_expert(calls):
    layer = layer_of(SOFTMAX, weights_of(SOFTMAX))
    layer.packed = None
    x, row = torch.randn(16, 32, generator=torch.Generator().manual_seed(1)), torch.full((16,), -1)
    row[0] = 0
    out = layer(x, row)
    assert len(calls) == 1 + 2 * SOFTMAX.top_k and torch.equal(out[1:], torch.zeros(15, 32)) and out[0].abs().sum() > 0
    calls.clear()
    assert torch.equal(layer(x, torch.full((16,), -1)), torch.zeros(16, 32)) and len(calls) == 1


def test_weights_are_packed_as_they_come():
    """Each product when its last tensor is there, whatever the order: nothing waits for the whole layer."""
    weights = weights_of(GROUPED)
    config = dataclasses.replace(random_models.BASE, d_model=32, experts=GROUPED)
    waiting = LayerWeights(config, "packed", weights)
    for name in sorted(weights, reverse=True):
        waiting.add(name, weights[name])
        assert sum(len(parts) for parts in waiting._parts.values()) <= 1  # gate waits for up, and nothing else waits
    assert not waiting.missing and len(waiting.experts.gate_up) == len(waiting.experts.down) == 16


# --- config -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"layers": ()}, "experts.layers must be a tuple of layer indices that is not empty, got ()"),
        ({"layers": [0]}, "experts.layers must be a tuple of layer indices that is not empty, got [0]"),
        ({"layers": (1, 0)}, "experts.layers must be ascending, got (1, 0)"),
        ({"layers": (2,)}, "experts.layers must be in [0, 1], got 2"),
        ({"n_experts": 0}, "experts.n_experts must be in [1, 4096], got 0"),
        ({"top_k": 9}, "experts.top_k must be at most the 8 experts of the kept groups, got 9"),
        ({"shared_dim": -1}, "experts.shared_dim must be in [0, 1048576], got -1"),
        ({"scoring": "topk"}, "experts.scoring must be one of ('softmax', 'sigmoid'), got 'topk'"),
        ({"normalized": 1}, "experts.normalized must be true or false, got 1"),
        ({"scale": float("nan")}, "experts.scale must be in [0.0, 1000000.0], got nan"),
        ({"n_groups": 3}, "experts.n_experts must be a multiple of n_groups, got 8 and 3"),
        ({"n_groups": 4, "kept_groups": 5}, "experts.kept_groups must be at most n_groups 4, got 5"),
    ],
)
def test_wrong_values_are_named(changes, text):
    model = dataclasses.replace(random_models.BASE, experts=dataclasses.replace(SOFTMAX, **changes))
    assert text in model.problems()


def test_parameters():
    config = dataclasses.replace(random_models.BASE, experts=GROUPED)  # two layers, the first a mixture
    dense = random_models.BASE.n_parameters
    mixture = 16 * 32 + 16 + 3 * 32 * (16 * 24 + 40)
    assert config.n_parameters == dense - 3 * 32 * 48 + mixture
    assert config.n_active_parameters == config.n_parameters - 3 * 32 * 24 * 12
    assert random_models.BASE.n_active_parameters == dense
