"""moe_route and moe_combine at the shapes of released mixtures against the PyTorch code they replace, and a whole MoE layer, in one run.

`torch route` is what decoding loops run: sigmoid or softmax, group selection, a stable sort for the top k, argsort, searchsorted and index
arithmetic for the groups. `torch combine` is a gather, a product and an addition per chosen expert. `reference` is unmask.reference.moe_route, the
definition with its float64 steps. The layer has one shared set of weights and either the ops or the PyTorch code around its products.
All rivals alternate; medians, and the median of the rounds' ratios where a layer is timed.
"""

from __future__ import annotations

import argparse
import statistics

import torch

import report
import timing
from unmask import ops, reference
from unmask.models.config import Experts
from unmask.models.moe import MoE
from unmask.ops import grouped_linear
from unmask.ops.linear import ROW_MULTIPLE, choose_format
from unmask.ops.moe_route import Routes

# Routers as released; the layers' widths are cut so that a layer's weights fit a small machine.
MIXTURES = {
    "LLaDA2": Experts(layers=(0,), n_experts=256, top_k=8, expert_dim=64, shared_dim=0, scoring="sigmoid", selection_bias=True, n_groups=8,
                      kept_groups=4, normalized=True, scale=2.5),
    "SDAR-MoE": Experts(layers=(0,), n_experts=128, top_k=8, expert_dim=64, shared_dim=0, scoring="softmax", selection_bias=False, n_groups=1,
                        kept_groups=1, normalized=True, scale=1.0),
}  # fmt: skip
TOKENS, WIDTH = (32, 64), 512


def torch_choice(logits: torch.Tensor, c: Experts, bias: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor]:
    score = torch.sigmoid(logits) if c.scoring == "sigmoid" else torch.softmax(logits, dim=-1)
    choice = score if bias is None else score + bias
    if c.n_groups > c.kept_groups:
        groups = choice.unflatten(-1, (c.n_groups, -1))
        best = groups.topk(2, dim=-1).values.sum(-1)
        kept = torch.zeros_like(best, dtype=torch.bool).scatter_(1, first(best, c.kept_groups), True)
        choice = groups.masked_fill(~kept.unsqueeze(-1), -torch.inf).flatten(1)
    chosen = first(choice, c.top_k)
    weight = score.gather(1, chosen)
    return weight / (weight.sum(-1, keepdim=True) + 1e-20) * c.scale, chosen


def first(values: torch.Tensor, k: int) -> torch.Tensor:
    return values.sort(dim=-1, descending=True, stable=True).indices[:, :k]


def torch_route(logits: torch.Tensor, row: torch.Tensor | None, c: Experts, bias: torch.Tensor | None) -> Routes:
    """As unmask did it before the op: padding tokens are found on the host, pairs are sorted by argsort."""
    weight, chosen = torch_choice(logits, c, bias)
    if row is not None and bool((row < 0).any()):
        raise ValueError("this bench times tokens without padding")
    flat = chosen.reshape(-1)
    order = torch.argsort(flat, stable=True)
    ends = torch.searchsorted(flat[order], torch.arange(c.n_experts), right=True)
    sizes = ends.diff(prepend=ends.new_zeros(1))
    padded = (sizes + ROW_MULTIPLE - 1) // ROW_MULTIPLE * ROW_MULTIPLE
    offsets = torch.cat((padded.new_zeros(1), padded.cumsum(0)))
    place = torch.arange(len(flat)) + (offsets[:-1] - (ends - sizes))[flat[order]]
    where = torch.empty_like(order)
    where[order] = place
    source = order.new_zeros(int(offsets[-1]))
    source[place] = order // c.top_k
    return Routes(chosen, weight, where.view(chosen.shape), source, offsets)


def torch_combine(y: torch.Tensor, place: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    total = torch.zeros(place.shape[0], y.shape[1])
    for j in range(place.shape[1]):
        total += y.index_select(0, place[:, j]).float() * weight[:, j : j + 1]
    return total.to(y.dtype)


def ours(c: Experts, logits: torch.Tensor, bias: torch.Tensor | None, function=ops.moe_route) -> Routes:
    return function(
        logits, None, bias, top_k=c.top_k, scoring=c.scoring, n_groups=c.n_groups, groups_kept=c.kept_groups, renormalise=c.normalized,
        scale=c.scale, multiple=ROW_MULTIPLE,
    )  # fmt: skip


def layer_of(c: Experts) -> MoE:
    device = torch.device("cpu")
    format = choose_format(torch.float32, device, 3 * c.n_experts * WIDTH * c.expert_dim)
    experts = grouped_linear.Experts(c.n_experts, WIDTH, c.expert_dim, torch.float32, device, format)
    for e in range(c.n_experts):
        experts.put(e, "gate_up", [torch.randn(c.expert_dim, WIDTH) * 0.05 for _ in range(2)])
        experts.put(e, "down", [torch.randn(WIDTH, c.expert_dim) * 0.05])
    bias = torch.randn(c.n_experts) * 0.05 if c.selection_bias else None
    return MoE(c, torch.randn(c.n_experts, WIDTH) * 0.05, bias, experts, None, format)


def case(name: str, tokens: int, layer: MoE, rounds: int, min_time: float) -> tuple[list[dict], dict]:
    c, x, row = MIXTURES[name], torch.randn(tokens, WIDTH), torch.zeros(tokens, dtype=torch.int64)
    logits = layer.router(x)
    routes = ours(c, logits, layer.bias)
    y = layer.experts(x, routes, ops.silu_mul)
    theirs = torch_route(logits, row, c, layer.bias)
    assert torch.equal(routes.expert, theirs.expert) and torch.equal(routes.offsets, theirs.offsets.int())

    def torch_layer() -> torch.Tensor:
        found = torch_route(layer.router(x.float()), row, c, layer.bias)
        return torch_combine(layer.experts(x, found, ops.silu_mul), found.place, found.weight)

    pairs = {
        "moe_route": {
            "ours": lambda: ours(c, logits, layer.bias), "torch": lambda: torch_route(logits, row, c, layer.bias),
            "reference": lambda: ours(c, logits, layer.bias, reference.moe_route),
        },
        "moe_combine": {"ours": lambda: ops.moe_combine(y, routes.place, routes.weight), "torch": lambda: torch_combine(y, routes.place, routes.weight)},
    }  # fmt: skip
    rows = []
    for op, fns in pairs.items():
        times = timing.measure(fns, rounds=rounds, min_time=min_time)
        line = {"op": op, "router": name, "tokens": tokens, "ours": report.seconds(times["ours"]), "torch": report.seconds(times["torch"])}
        line |= {"x torch": times["torch"] / times["ours"], "10th percentile": report.seconds(times["ours"].p10)}
        rows.append(line | ({"reference": report.seconds(times["reference"])} if "reference" in times else {}))
    products = lambda: layer.experts(x, routes, ops.silu_mul)  # noqa: E731
    whole = {"ours": lambda: layer(x, row), "torch": torch_layer, "products": products}
    turns = [timing.measure(whole, rounds=1, min_time=min_time / 2) for _ in range(2 * rounds)]
    medians = {key: statistics.median(float(turn[key]) for turn in turns) for key in whole}
    return rows, {
        "router": name,
        "tokens": tokens,
        "ours": report.seconds(medians["ours"]),
        "torch": report.seconds(medians["torch"]),
        "torch / ours": statistics.median(turn["torch"] / turn["ours"] for turn in turns),
        "of it products of experts": report.seconds(medians["products"]),
        "active experts": int((routes.offsets.diff() > 0).sum()),
    }


@torch.inference_mode()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="a fifth of the time")
    args = parser.parse_args()
    torch.manual_seed(0)
    rounds, min_time = (3, 0.05) if args.quick else (7, 0.2)
    op_rows, layer_rows = [], []
    for name, c in MIXTURES.items():
        layer = layer_of(c)
        for tokens in TOKENS:
            rows, line = case(name, tokens, layer, rounds, min_time)
            op_rows += rows
            layer_rows.append(line)
    notes = [
        f"layers: width {WIDTH}, experts' inner width 64, fp32, no shared expert; every active expert's product has at least 16 rows (bit invariance)",
        "torch / ours of a layer: median over turns in which both were timed one after the other",
    ]
    report.write("op_moe_route", "Routing of a mixture of experts", {"Ops": op_rows, "A whole MoE layer": layer_rows}, notes)


if __name__ == "__main__":
    main()
