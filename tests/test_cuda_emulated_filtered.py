"""The CUDA kernels of filtered_stats and kl_stats, run lane by lane on the CPU (emulate_warp.h), against the CPU kernels."""

from __future__ import annotations

from ctypes import POINTER, byref, c_bool, c_double, c_int64, c_void_p

import pytest
import torch

import emulated
from native import native
from stats_cases import DTYPES, assert_same, call, strided

FILTERS = (
    {}, {"top_p": 0.9}, {"top_p": 0.0}, {"top_k": 1}, {"top_k": 40}, {"top_p": 0.7, "top_k": 600}, {"top_p": 0.5, "top_k": 20, "top_k_first": True},
)  # fmt: skip
LAYOUTS = ("dense", "padded", "columns", "transposed")


def filtered_call(vocab: int, dtype: torch.dtype, seed: int, temperature: float = 0.0, layout: str = "dense", filters: dict | None = None) -> dict:
    """As stats_cases.call, without top-k and ids; rows 0 and 1 forbid their best ids where ids are forbidden at all."""
    a = call(vocab, dtype, seed, temperature, layout) | {"topk": 0, "ids": None, "top_p": 1.0, "top_k": 0, "top_k_first": False} | (filters or {})
    if a.get("forbid") is not None:
        a["forbid"] = torch.cat((a["forbid"], a["logits"][:2].float().argmax(1)))
    return a


def arguments(a: dict) -> tuple:
    names = ("logits", "rows", "forbid", "suppress", "bias_ids", "bias", "temperature", "top_p", "top_k", "top_k_first", "seed", "step", "pos")
    return tuple(a.get(name) for name in names)


def filtered(a: dict, at_once: int = 3) -> tuple[torch.Tensor, ...]:
    """The op's outputs by the CUDA kernel."""
    lib = emulated.build("emulate_filtered_stats.cpp")
    entries = a["logits"].shape[0] if a.get("rows") is None else len(a["rows"])
    job = emulated._job(a, entries, 0, a["logits"].shape[1])
    out, pointers = emulated._outputs(entries, 0, 0)
    lib.emulated_filtered_stats.argtypes = [POINTER(emulated.Inputs), POINTER(emulated.Ids), POINTER(emulated.Ids), c_void_p, *[c_int64] * 4,
                                            c_double, c_int64, c_bool, POINTER(emulated.Outputs)]  # fmt: skip
    where = (job.rows, job.rows_stride, job.n_rows, entries, at_once)
    if lib.emulated_filtered_stats(byref(job.inputs), byref(job.forbid), byref(job.suppress), *where, a["top_p"], a["top_k"], a["top_k_first"], byref(pointers)):
        raise RuntimeError(lib.emulated_error().decode())
    return out


def kl(x, y, rows, previous_rows, lse, previous_lse, dense: tuple[bool, bool] = (False, False)) -> torch.Tensor:
    lib = emulated.build("emulate_filtered_stats.cpp")
    lib.emulated_kl_stats.argtypes = [POINTER(c_void_p), POINTER(c_int64)]
    entries = lse.shape[0]
    out = torch.full((entries,), 777.0)
    tensors = (x, y, rows, previous_rows, lse, previous_lse, out)
    numbers = [emulated._TYPES[x.dtype], *x.stride(), *y.stride(), x.shape[1], x.shape[0], y.shape[0]]
    numbers += [0 if t is None else t.stride(0) for t in tensors[2:6]] + [entries, *dense]
    pointers = (c_void_p * 7)(*(None if t is None else t.data_ptr() for t in tensors))
    if lib.emulated_kl_stats(pointers, (c_int64 * len(numbers))(*map(int, numbers))):
        raise RuntimeError(lib.emulated_error().decode())
    return out


@pytest.mark.parametrize("vocab", (1, 2, 31, 511, 512, 513, 4097))
@pytest.mark.parametrize("temperature", (0.0, 0.7, 30.0))
def test_filtered_same_as_the_cpu_kernel(vocab, temperature):
    for i, filters in enumerate(FILTERS):
        a = filtered_call(vocab, DTYPES[i % 3], seed=vocab + 7 * i, temperature=temperature, layout=LAYOUTS[i % 4], filters=filters)
        assert_same(filtered(a), native("filtered_stats")(*arguments(a)))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("filters", ({"top_p": 0.6}, {"top_k": 9}, {"top_p": 0.8, "top_k": 700, "top_k_first": True}), ids=str)
def test_filtered_ties(dtype, filters):
    """Few distinct logits: cuts fall inside ties, lowest ids stay."""
    values = torch.randint(-2, 3, (4, 2500)).to(dtype)
    values[2] = 0.0
    values[3, ::2] = -0.0
    key = torch.arange(4)
    for temperature in (0.0, 1.0):
        a = {"logits": values, "topk": 0, "temperature": temperature, "seed": key, "step": key, "pos": key}
        a |= {"top_p": 1.0, "top_k": 0, "top_k_first": False} | filters
        assert_same(filtered(a), native("filtered_stats")(*arguments(a)))


def test_filtered_bits_do_not_depend_on_the_launch_or_the_layout():
    a = filtered_call(3000, torch.bfloat16, 12, 0.8, filters={"top_p": 0.9, "top_k": 200})
    want = filtered(a)
    for other in (filtered(a, 1), filtered(a, 10), filtered(filtered_call(3000, torch.bfloat16, 12, 0.8, "columns", {"top_p": 0.9, "top_k": 200}))):
        for g, w in zip(other, want, strict=True):
            assert torch.equal(g.nan_to_num(7.0), w.nan_to_num(7.0))


@pytest.mark.parametrize("temperature", (0.0, 0.5))
def test_filters_off_give_the_token_of_logit_stats(temperature):
    a = filtered_call(5000, torch.float32, 8, temperature)
    assert torch.equal(filtered(a)[0], emulated.logit_stats(a)[0])


@pytest.mark.parametrize("vocab", (1, 7, 8, 255, 257, 4096, 9001))
@pytest.mark.parametrize("dtype", DTYPES)
def test_kl_same_as_the_cpu_kernel(vocab, dtype):
    x = torch.randn(4, vocab) * 5
    y = x + torch.randn(4, vocab)
    x[1, 0], y[2, 0] = -float("inf"), -float("inf")
    x[3, vocab // 2] = float("nan")
    x, y = x.to(dtype), y.to(dtype)
    rows, previous = torch.tensor([0, 1, 2, 3, -1, 0, 4, 0, -1]), torch.tensor([0, 1, 2, 3, 0, -1, 0, 4, -1])
    lse = native("logit_stats")(x, rows, *[None] * 5, 0, 0.0, None, None, None)[1][:, 4].clone()
    previous_lse = native("logit_stats")(y, previous, *[None] * 5, 0, 0.0, None, None, None)[1][:, 4].clone()
    want = native("kl_stats")(x, y, rows, previous, lse, previous_lse)
    for layout in LAYOUTS:
        got = kl(strided(x, layout), strided(y, layout), rows, previous, lse, previous_lse)
        torch.testing.assert_close(got, want, rtol=1e-6, atol=4e-6, equal_nan=True)
        if layout == "dense":
            first = got
            wide = [torch.nn.functional.pad(t, (0, -vocab % 8))[:, :vocab] for t in (x, y)]  # rows at multiples of 16 bytes
            dense = kl(*wide, rows, previous, lse, previous_lse, (True, True))
            assert torch.equal(dense.nan_to_num(7.0), first.nan_to_num(7.0))
        else:
            assert torch.equal(got.nan_to_num(7.0), first.nan_to_num(7.0))
