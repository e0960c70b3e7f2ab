"""rms_norm, add_rms_norm and silu_mul at production shapes against the PyTorch code they replace, in one run.

`torch` is the models' own code: x.float() ... rsqrt ... to(dtype) * weight, and F.silu(gate) * up. bytes = every operand read once and
every result written once (add_rms_norm: residual and x read, residual and y written).
"""

from __future__ import annotations

import argparse

import torch
import torch.nn.functional as F

import report
import timing
from unmask import ops
from unmask.reference.elementwise import normalise

SHAPES = {"block of 32": 32, "8 blocks of 32": 256, "refresh of 1024": 1024}
WIDTH, FFN, EPS = 4096, 12288, 1e-5
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


def case(name: str, dtype: torch.dtype, quick: bool) -> list[dict[str, object]]:
    tokens = SHAPES[name]
    x, residual, weight = torch.randn(tokens, WIDTH).to(dtype), torch.randn(tokens, WIDTH).to(dtype), torch.ones(WIDTH, dtype=dtype)
    small = 1e-3 * x  # added again and again below
    gate_up = torch.randn(tokens, 2 * FFN).to(dtype)

    def torch_add():
        residual.add_(small)
        return normalise(residual, weight, EPS)

    def torch_silu():
        gate, up = gate_up.chunk(2, -1)
        return F.silu(gate) * up

    pairs = {
        "rms_norm": (lambda: ops.rms_norm(x, weight, EPS), lambda: normalise(x, weight, EPS), 2 * WIDTH),
        "add_rms_norm": (lambda: ops.add_rms_norm(residual, small, weight, EPS), torch_add, 4 * WIDTH),
        "silu_mul": (lambda: ops.silu_mul(gate_up), torch_silu, 3 * FFN),
    }
    options = {"rounds": 3, "min_time": 0.05} if quick else {"rounds": 5, "min_time": 0.2}
    rows = []
    for op, (ours, theirs, elements) in pairs.items():
        times = timing.measure({"ours": ours, "torch": theirs}, **options)
        rows.append(
            {
                "op": op,
                "shape": name,
                "dtype": str(dtype).removeprefix("torch."),
                "ours": report.seconds(times["ours"]),
                "GB/s": tokens * elements * x.element_size() / times["ours"] / 1e9,
                "torch": report.seconds(times["torch"]),
                "x torch": times["torch"] / times["ours"],
            }
        )
    return rows


@torch.inference_mode()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="a tenth of the time")
    args = parser.parse_args()
    copy = timing.bandwidth()["copy"]
    rows = [row for dtype in DTYPES.values() for name in SHAPES for row in case(name, dtype, args.quick)]
    rows = [row | {"of copy rate": row["GB/s"] / copy} for row in rows]
    note = f"DRAM copy rate of this machine: {copy:.1f} GB/s read plus written; above 1 the operands came from the caches."
    title = f"Row-wise ops, width {WIDTH}, FFN {FFN}"
    report.write("op_elementwise", title, {"rows": rows}, [note])


if __name__ == "__main__":
    main()
