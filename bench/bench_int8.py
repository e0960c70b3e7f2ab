"""Linear weights in int8: every product that torch offers on the CPU, against the packed bf16 and fp32 ones, one thread.

What is asked: half the memory of bf16, at most 1.1x its time up to 32 rows, an error that is the weights' rounding. Inputs rotate through
copies of the weight that fill 256 MB (at least two), so that each call reads its weight from DRAM, as a decode does.

| way | weights | activations |
|---|---|---|
| packed | bf16 or fp32, oneDNN's layout (`unmask.ops.linear`) | as they are |
| int8 (ours) | int8, FBGEMM's layout | two int8 digits a value, exact to 1/64,500 of the row's largest (`unmask.ops.int8`) |
| one digit | the same | one int8 digit a value, a scale a row |
| weight_int8pack | int8, plain (`torch._weight_int8pack_mm`) | as they are |
| int4pack | int4, groups of 128 (`_weight_int4pack_mm_for_cpu`) | as they are; time only, its weights are random |
| int_mm | int8, plain (`torch._int_mm`) | one int8 digit; the product alone, without quantising |
| linear_dynamic | int8, FBGEMM's layout (`quantized.linear_dynamic`) | one 8-bit scale for all rows: a row's bits depend on its batch |
| fp16 | fp16, FBGEMM's layout (`quantized.linear_dynamic_fp16`) | fp32 |

onednn.qlinear_pointwise is left out: 200 to 2000 times the time of the packed product for signed activations. torchao was not tried.
"""

from __future__ import annotations

import argparse
import ctypes
import itertools
import warnings
from collections.abc import Callable

import torch

import report
import timing
from unmask.ops import int8
from unmask.ops.linear import Linear

WIDTHS = (512, 2048, 4096)
ROWS = (1, 16, 32, 64)
DTYPES = {"bfloat16": torch.bfloat16, "float32": torch.float32}
COPIES_BYTES = 256 << 20


def ways(d: int, m: int, dtype: torch.dtype, copies: int) -> tuple[dict[str, Callable[[int], torch.Tensor]], torch.Tensor, torch.Tensor]:
    """Way -> function of the iteration index; the product in double with the weights as they are, and with the rounded ones, of copy 0."""
    weight = (torch.randn(d, d) / d**0.5).to(dtype).float()
    x = torch.randn(m, d).to(dtype)
    q, scale = int8.Int8Weight(weight).unpacked()

    def many(make: Callable[[], object]) -> list:
        return [make() for _ in range(copies)]

    packed = many(lambda: Linear(weight.to(dtype), "packed"))
    ours = many(lambda: Linear(weight.to(dtype), "int8"))
    plain, t_scale = many(q.clone), scale.to(dtype)
    int8_packed = many(lambda: int8._pack(q, scale))
    fp16 = many(lambda: torch.ops.quantized.linear_prepack_fp16(weight, None))
    groups = torch.ones(d // 128, d, 2, dtype=dtype)
    int4 = many(lambda: torch._convert_weight_to_int4pack_for_cpu(torch.randint(0, 16, (d, d), dtype=torch.int32), 1))
    x8 = int8.digits(x)
    first = x8.digits[:m].to(torch.int8)
    wide = x.float()

    def one_digit(i: int) -> torch.Tensor:
        y = x.float()
        step = y.abs().amax(1, keepdim=True).mul_(1 / 127)
        return int8._whole_product(y / step, int8_packed[i % copies]).mul_(step).to(dtype)

    found = {
        "packed": lambda i: packed[i % copies](x),
        "int8 (ours)": lambda i: ours[i % copies](x),
        "one digit": one_digit,
        "weight_int8pack": lambda i: torch._weight_int8pack_mm(x, plain[i % copies], t_scale),
        "int4pack": lambda i: torch.ops.aten._weight_int4pack_mm_for_cpu(x, int4[i % copies], 128, groups),
        "int_mm": lambda i: torch._int_mm(first, plain[i % copies].t()).float().mul_(x8.scale).mul_(scale),
        "linear_dynamic": lambda i: torch.ops.quantized.linear_dynamic(wide, int8_packed[i % copies], False),
        "fp16": lambda i: torch.ops.quantized.linear_dynamic_fp16(wide, fp16[i % copies]),
    }
    if dtype is torch.float32:
        del found["int4pack"]  # 13 to 130 times the time of the fp32 product
    exact = x.double() @ weight.double().T
    return found, exact, x.double() @ (q.double() * scale.double()[:, None]).T


def case(d: int, m: int, kind: str, quick: bool) -> dict[str, object]:
    dtype = DTYPES[kind]
    copies = 2 if quick else max(2, COPIES_BYTES // (4 * d * d * 6))
    functions, exact, rounded = ways(d, m, dtype, copies)
    options = dict(rounds=3, min_time=0.01, min_samples=3) if quick else dict(rounds=5, min_time=0.05, min_samples=5)
    times = timing.measure(functions, **options)
    row: dict[str, object] = {"width": d, "rows": m, "dtype": kind, "packed": report.seconds(times["packed"])}
    row |= {f"x {name}": times[name] / times["packed"] for name in functions if name != "packed"}
    row["x int8 (ours), p10"] = times["int8 (ours)"].p10 / times["packed"].p10
    error = lambda y, like: float((y.double() - like).norm() / like.norm())  # noqa: E731
    row["error of ours"] = error(functions["int8 (ours)"](0), exact)
    row["of it, beyond the weights'"] = error(functions["int8 (ours)"](0), rounded)
    row["error of one digit beyond"] = error(functions["one digit"](0), rounded)
    return row


def memory(d: int = 4096, count: int = 8) -> dict[str, object]:
    """Growth of the process over `count` weights [d, d], bytes a value."""
    row: dict[str, object] = {"weights": f"{count} of [{d}, {d}]"}
    for name, dtype, format in (("bf16 packed", torch.bfloat16, "packed"), ("int8", torch.bfloat16, "int8")):
        Linear(torch.randn(d, d).to(dtype), format)  # what the first one loads is not the weight's
        ctypes.CDLL(None).malloc_trim(0)
        before = _resident()
        kept = [Linear(torch.randn(d, d).to(dtype), format) for _ in range(count)]
        ctypes.CDLL(None).malloc_trim(0)
        row[name] = (_resident() - before) / (count * d * d)
        del kept
    return row


def _resident() -> int:
    with open("/proc/self/statm") as f:
        return int(f.read().split()[1]) * 4096


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="two copies of each weight and short samples")
    parser.add_argument("--widths", type=int, nargs="+", default=WIDTHS)
    args = parser.parse_args()
    warnings.simplefilter("ignore")  # torch's quantised tensors are deprecated
    torch.set_num_threads(1)
    torch.backends.quantized.engine = "fbgemm"
    rows = [case(d, m, kind, args.quick) for d, kind, m in itertools.product(args.widths, DTYPES, ROWS)]
    report.write(
        "int8",
        "Linear weights in int8",
        {
            "Time of [rows, width] x [width, width], as a multiple of the packed product in the same dtype": rows,
            "Bytes a weight, from the memory of the process": [memory()],
        },
        notes=(
            "errors: norm of the difference over the norm of the product in double; of ours in all, what it adds to the weights' rounding (in bf16 the rounding of the result), and what one int8 digit adds",
            "int8 (ours) is unmask.load(..., weights=\"int8\"); it serves where x int8 (ours) is at most 1.1. x is of medians; p10: of the 10th percentiles, which a busy machine disturbs less",
        ),
    )


if __name__ == "__main__":
    main()
