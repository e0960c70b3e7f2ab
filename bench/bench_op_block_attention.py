"""block_attention at production shapes against torch's attention (SDPA), in one run.

`sdpa` gets K and V ready in one tensor; `cat + sdpa` is what today's cached loops do at every step and layer: concatenate the past K and V
with the block's own, then SDPA. FLOPs = 4 x query heads x query tokens x keys x D; GEMM = this machine's best matmul, measured in the
same run: in fp32, and for bf16 in that dtype too (`of GEMM` is the share of the larger).
"""

from __future__ import annotations

import argparse

import torch
import torch.nn.functional as F

import report
import timing
from unmask import ops

SHAPES = {  # name: (query heads, kv heads, D, query tokens, prefix keys)
    "32 heads x 128, q 32, prefix 4096": (32, 32, 128, 32, 4096),
    "32 heads x 128, q 32, prefix 512": (32, 32, 128, 32, 512),
    "28/4 heads x 128, q 32, prefix 4096": (28, 4, 128, 32, 4096),
    "8 heads x 64, q 32, prefix 256": (8, 8, 64, 32, 256),
    "8 heads x 64, q 256 of 256": (8, 8, 64, 256, 0),
    "32 heads x 128, q 1024 of 1024": (32, 32, 128, 1024, 0),
    "4 heads x 16, q 16 of 16": (4, 4, 16, 16, 0),
}
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


def case(name: str, dtype: torch.dtype, gemm: float, quick: bool) -> dict[str, object]:
    heads, kv_heads, dim, tokens, prefix = SHAPES[name]
    keys = prefix + tokens
    q = torch.randn(tokens, heads, dim).to(dtype)
    k_cache, v_cache = (torch.randn(1, kv_heads, keys, dim).to(dtype) for _ in range(2))
    offsets, row, seg = torch.tensor([0, tokens]), torch.tensor([0]), torch.tensor([[[0, keys]]])
    past, own = [[c[:, :, s].clone() for c in (k_cache, v_cache)] for s in (slice(0, prefix), slice(prefix, None))]
    q_heads = q.transpose(0, 1)[None].contiguous()
    scale, gqa = dim**-0.5, heads != kv_heads

    def ours():
        return ops.block_attention(q, k_cache, v_cache, offsets, row, seg, None, None, scale)[0]

    def sdpa():
        return F.scaled_dot_product_attention(q_heads, k_cache, v_cache, scale=scale, enable_gqa=gqa)

    def cat_sdpa():
        k, v = (torch.cat((a, b), 2) for a, b in zip(past, own, strict=True))
        return F.scaled_dot_product_attention(q_heads, k, v, scale=scale, enable_gqa=gqa)

    assert (ours().float() - sdpa()[0].transpose(0, 1).float()).abs().max() <= (1e-5 if dtype is torch.float32 else 3e-2)
    rivals = {"ours": ours, "sdpa": sdpa} | ({"cat + sdpa": cat_sdpa} if prefix else {})
    options = {"rounds": 3, "min_time": 0.05} if quick else {"rounds": 5, "min_time": 0.3}
    times = timing.measure(rivals, **options)
    rate = 4 * heads * tokens * keys * dim / times["ours"] / 1e9
    found = {
        "shape": name,
        "dtype": str(dtype).removeprefix("torch."),
        "ours": report.seconds(times["ours"]),
        "GFLOP/s": rate,
        "of GEMM": f"{100 * rate / gemm:.0f}%",
        "sdpa": report.seconds(times["sdpa"]),
        "x sdpa": times["sdpa"] / times["ours"],
    }
    if prefix:
        found |= {"cat + sdpa": report.seconds(times["cat + sdpa"]), "x cat + sdpa": times["cat + sdpa"] / times["ours"]}
    return found


@torch.inference_mode()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="a tenth of the time")
    args = parser.parse_args()
    rates = {name: timing.ceilings(dtype)["gemm"]["2048x2048x2048"]["best"] for name, dtype in DTYPES.items()}
    best = {"float32": rates["float32"], "bfloat16": max(rates.values())}
    rows = [case(name, dtype, best[kind], args.quick) for kind, dtype in DTYPES.items() for name in SHAPES]
    notes = ["Best matmul 2048^3: " + ", ".join(f"{kind} {rate:.0f} GFLOP/s" for kind, rate in rates.items())]
    report.write("op_block_attention", "block_attention", {"block_attention": rows}, notes, gemm=rates)


if __name__ == "__main__":
    main()
