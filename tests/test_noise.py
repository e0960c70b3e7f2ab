"""The noise of sampling: header, kernel and definition agree bit for bit; the draws follow softmax(x / T)."""

from __future__ import annotations

import ctypes
import math
import subprocess
from fractions import Fraction
from pathlib import Path

import pytest
import torch

from native import native
from unmask import reference
from unmask.reference import noise

ROOT = Path(__file__).resolve().parent.parent
SOURCE = """
#include "common/online.h"
using namespace unmask;
extern "C" void run(int what, long n, const uint32_t* in, float* out) {
  for (long i = 0; i < n; ++i)
    out[i] = what == 0 ? exponential_from_bits(in[i]) : what == 1 ? gumbel_from_bits(in[i])
           : what == 2 ? log_positive(float_of_bits(in[i])) : exp_neg(float_of_bits(in[i]));
}
"""
EXPONENTIAL, GUMBEL, LOG, EXP = range(4)


@pytest.fixture(scope="module")
def header(tmp_path_factory):
    """csrc/common/noise.h compiled alone, with the compiler's default contraction switched off: (what, int32 bits) -> float32."""
    folder = tmp_path_factory.mktemp("noise")
    (folder / "noise.cpp").write_text(SOURCE)
    flags = ["-std=c++20", "-O2", "-fPIC", "-shared", "-ffp-contract=off", f"-I{ROOT / 'csrc'}"]
    subprocess.run(["g++", *flags, str(folder / "noise.cpp"), "-o", str(folder / "noise.so")], check=True)
    run = ctypes.CDLL(str(folder / "noise.so")).run

    def call(what: int, bits: torch.Tensor) -> torch.Tensor:
        bits = bits.contiguous()
        out = torch.empty(bits.shape, dtype=torch.float32)
        run(what, ctypes.c_long(bits.numel()), ctypes.c_void_p(bits.data_ptr()), ctypes.c_void_p(out.data_ptr()))
        return out

    return call


def words() -> torch.Tensor:
    """int64: every region of the unit interval, its edges, and 2 million random words."""
    split = int(noise.V_SPLIT * 2**32)
    edges = [k + d for k in (0, split, 2**31, 2**32) for d in range(-300, 300)] + [2**k for k in range(32)]
    random = torch.randint(0, 2**32, (2_000_000,))
    small = torch.randint(0, 2**32, (100_000,)) >> torch.randint(0, 32, (100_000,))
    all_words = torch.cat((torch.tensor(edges), random, small, 2**32 - 1 - small))
    return all_words[(all_words >= 0) & (all_words < 2**32)]


def as_int32(w: torch.Tensor) -> torch.Tensor:
    return torch.where(w >= 2**31, w - 2**32, w).int()


def test_header_equals_definition_bit_for_bit(header):
    w = words()
    e = header(EXPONENTIAL, as_int32(w))
    assert torch.equal(e, noise.exponential(w))
    assert torch.equal(header(GUMBEL, as_int32(w)), -noise.log_positive(noise.exponential(w)))


def test_both_tails_keep_full_relative_precision(header):
    w = words()
    v = (w.double() + 0.5) * 2.0**-32  # exact: 33 bits
    e, want = header(EXPONENTIAL, as_int32(w)).double(), -torch.log1p(-v)
    u = (2.0**32 - 1 - w.double() + 0.5) * 2.0**-32
    want = torch.where(w < 2**31, want, -torch.log(u))
    assert ((e - want).abs() / want).max() < 4e-7
    g = header(GUMBEL, as_int32(w)).double()
    assert (g + torch.log(want)).abs().max() < 4e-6
    assert g.min() > -3.14 and g.max() < 22.9
    assert header(GUMBEL, torch.tensor([0], dtype=torch.int32)).item() > 22.8


def test_exp_and_log(header):
    d = -torch.rand(1_000_000) * 87.3
    d[:4] = torch.tensor([0.0, -0.0, -87.5, -1e-8])
    e, want = header(EXP, d.view(torch.int32)).double(), d.double().exp()
    assert ((e - want).abs() / want / (1 + d.double().abs() / 10)).max() < 2.5e-7
    special = torch.tensor([0.0, -88.0, -1e30, -math.inf, math.nan])
    assert header(EXP, special.view(torch.int32)).nan_to_num(nan=-1.0).tolist() == [1.0, 0.0, 0.0, 0.0, -1.0]
    x = torch.cat((torch.rand(500_000) * 2, torch.rand(500_000).exp2() ** 40, torch.tensor([1.0])))
    x = x[x >= 2.0**-100]
    got, want = header(LOG, x.view(torch.int32)).double(), x.double().log()
    assert ((got - want).abs() / want.abs().clamp(min=1e-30))[x != 1].max() < 2e-7
    assert got[-1] == 0
    assert torch.equal(got.float(), noise.log_positive(x))


def test_emulated_fma_rounds_once():
    g = torch.Generator().manual_seed(3)
    a, b = (torch.randn(1500, generator=g) for _ in range(2))
    c = -(a * b) * (1 + torch.randn(1500, generator=g) * 2.0 ** -torch.randint(0, 40, (1500,), generator=g))
    for x, y, z, got in zip(a.tolist(), b.tolist(), c.tolist(), noise.fma(a, b, c).tolist(), strict=True):
        exact = Fraction(x) * Fraction(y) + Fraction(z)
        near = [torch.tensor(got).nextafter(torch.tensor(s)).item() for s in (-math.inf, math.inf)]
        assert all(abs(Fraction(got) - exact) <= abs(Fraction(n) - exact) for n in near)


@pytest.mark.parametrize("temperature", (0.05, 1.0, 1e6))
def test_kernel_tokens_equal_the_definition_on_millions_of_ids(temperature):
    vocab, n = 151_000, 8  # 1.2 million ids each
    logits = torch.randn(n, vocab) * torch.tensor([[0.0], [0.0], [1e-3], [0.1], [1.0], [3.0], [10.0], [30.0]])
    seed = torch.tensor([0, -1, 2**40 + 7, 5, 5, 5, 5, 5])
    step, pos = torch.arange(n) % 2, torch.tensor([0, 2**31 + 5, 3, 4, 5, 6, 7, 8])
    args = (logits, None, None, None, None, None, None, 0, temperature, seed, step, pos)
    got, want = native("logit_stats")(*args), reference.logit_stats(*args)
    assert torch.equal(got[0][:, 0], want.token)
    assert len(set(want.token.tolist())) > 4


def chi_square_bar(k: int) -> float:
    """0.999 quantile of chi-square with k degrees of freedom (Wilson-Hilferty)."""
    return k * (1 - 2 / (9 * k) + 3.0902 * math.sqrt(2 / (9 * k))) ** 3


@pytest.mark.parametrize("varies", ("seed", "step", "pos"))
@pytest.mark.parametrize("temperature", (0.5, 1.0, 2.5))
def test_draws_follow_the_tempered_softmax(varies, temperature):
    draws, vocab = 200_000, 40
    g = torch.Generator().manual_seed(7)
    logits = torch.randn(1, vocab, generator=g) * 1.5
    logits[0, [4, 9]] = -math.inf
    forbid, suppress = torch.tensor([5, 30]), torch.tensor([6])
    key = {name: torch.full((draws,), 12345) for name in ("seed", "step", "pos")}
    key[varies] = torch.arange(draws)
    rows = torch.zeros(draws, dtype=torch.int64)
    out = native("logit_stats")(logits, rows, forbid, suppress, None, None, None, 0, temperature, *key.values())
    counts = torch.bincount(out[0][:, 0], minlength=vocab).double()
    logits[0, [5, 30, 6]] = -math.inf
    expected = (logits[0].double() / temperature).softmax(0) * draws
    assert (counts[expected == 0] == 0).all()
    live = expected > 5
    rest, rest_expected = counts[~live].sum(), expected[~live].sum()
    statistic = ((counts - expected) ** 2 / expected)[live].sum() + ((rest - rest_expected) ** 2 / rest_expected if rest_expected > 5 else 0)
    assert statistic < chi_square_bar(int(live.sum()) - 1), float(statistic)


def test_the_batch_never_enters():
    """Same key, same token: alone, elsewhere in a batch, in either order."""
    logits = torch.randn(20, 5000) * 2
    seed, step, pos = torch.arange(20), torch.arange(20) * 3, torch.arange(20) * 7
    args = (None, None, None, None, None, None, 0, 0.8)
    whole = native("logit_stats")(logits, None, *args[1:], seed, step, pos)
    flipped = native("logit_stats")(logits.flip(0), None, *args[1:], seed.flip(0), step.flip(0), pos.flip(0))
    for i, (a, b) in enumerate(zip(whole, flipped, strict=True)):
        assert torch.equal(a, b.flip(0)), i
    alone = [native("logit_stats")(logits[i : i + 1], None, *args[1:], seed[i : i + 1], step[i : i + 1], pos[i : i + 1])[0] for i in range(20)]
    assert torch.equal(torch.cat(alone), whole[0])
