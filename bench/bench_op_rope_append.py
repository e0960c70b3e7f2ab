"""rope_append at production shapes against the PyTorch code it replaces, in one run.

`torch` writes into a ready cache: RoPE as LLaDA's and Hugging Face's code has it (q * cos + rotate_half(q) * sin in fp32, cos and sin
ready), then two indexed writes. `torch cat` is what today's loops do with a prefix of 512: concatenate the past K and V with the
fresh ones. bytes = q, k, v read once and written once.
"""

from __future__ import annotations

import argparse

import torch

import report
import timing
from unmask import ops
from unmask.reference.elementwise import normalise

SHAPES = {  # name: (tokens, q heads, kv heads, head dim, rotated pairs, norm)
    "block of 32, 32 heads": (32, 32, 32, 128, 64, False),
    "block of 32, 28/4 heads": (32, 28, 4, 128, 64, False),
    "block of 32, 32/4 heads, qk-norm": (32, 32, 4, 128, 64, True),
    "block of 32, 16/4 heads, partial RoPE": (32, 16, 4, 128, 32, False),
    "8 blocks of 32, 32 heads": (256, 32, 32, 128, 64, False),
    "refresh of 1024, 32 heads": (1024, 32, 32, 128, 64, False),
}
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
PREFIX = 512


def rotate_half(x: torch.Tensor) -> torch.Tensor:
    a, b = x.chunk(2, -1)
    return torch.cat((-b, a), -1)


def case(name: str, dtype: torch.dtype, quick: bool) -> dict[str, object]:
    tokens, heads, kv_heads, dim, freqs, norm = SHAPES[name]
    q, k, v = (torch.randn(tokens, h, dim).to(dtype) for h in (heads, kv_heads, kv_heads))
    slots = PREFIX + tokens
    k_cache, v_cache = (torch.randn(1, kv_heads, slots, dim).to(dtype) for _ in range(2))
    row, slot = torch.zeros(tokens, dtype=torch.int64), torch.arange(PREFIX, slots)
    weight = torch.ones(dim, dtype=dtype) if norm else None
    inv_freq = 10000.0 ** (-torch.arange(freqs) / freqs)
    angle = (slot.float()[:, None] * inv_freq).repeat(1, 2)[:, None]
    cos, sin = angle.cos(), angle.sin()

    def rope(x: torch.Tensor) -> torch.Tensor:
        x = x if weight is None else normalise(x, weight, 1e-6)
        turn = x[..., : 2 * freqs].float()
        turned = (turn * cos + rotate_half(turn) * sin).to(dtype)
        return turned if 2 * freqs == dim else torch.cat((turned, x[..., 2 * freqs :]), -1)

    def ours():
        return ops.rope_append(q, k, v, k_cache, v_cache, row, slot, slot, None, weight, weight, inv_freq, 1e-6)

    def plain():
        k_cache[0, :, slot], v_cache[0, :, slot] = rope(k).transpose(0, 1), v.transpose(0, 1)
        return rope(q)

    past_k, past_v = k_cache[0, :, :PREFIX].clone(), v_cache[0, :, :PREFIX].clone()

    def cat():
        keys = torch.cat((past_k, rope(k).transpose(0, 1)), 1), torch.cat((past_v, v.transpose(0, 1)), 1)
        return rope(q), keys

    assert (ours().float() - plain().float()).abs().max() <= 0.05
    options = {"rounds": 3, "min_time": 0.05} if quick else {"rounds": 5, "min_time": 0.2}
    times = timing.measure({"ours": ours, "torch": plain, "torch cat": cat}, **options)
    moved = 2 * q.element_size() * tokens * (heads + 2 * kv_heads) * dim
    return {
        "shape": name,
        "dtype": str(dtype).removeprefix("torch."),
        "ours": report.seconds(times["ours"]),
        "GB/s": moved / times["ours"] / 1e9,
        "torch": report.seconds(times["torch"]),
        "x torch": times["torch"] / times["ours"],
        "torch cat": report.seconds(times["torch cat"]),
        "x torch cat": times["torch cat"] / times["ours"],
    }


@torch.inference_mode()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="a tenth of the time")
    args = parser.parse_args()
    copy = timing.bandwidth()["copy"]
    rows = [case(name, dtype, args.quick) | {"copy rate": copy} for dtype in DTYPES.values() for name in SHAPES]
    note = f"`copy rate`: this machine's DRAM copy, {copy:.1f} GB/s read plus written; inputs here stay in the caches between calls."
    report.write("op_rope_append", "rope_append", {"rope_append": rows}, [note])


if __name__ == "__main__":
    main()
