"""Linear weights in int8: what is lost is the rounding of the weights, rows do not depend on their batch, and models load and decode."""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch
from torch.nn import functional as F

import unmask
from models_kit import write_checkpoint
from random_models import BASE
from unmask import api
from unmask.models import model as models
from unmask.models.config import Experts
from unmask.ops import int8, linear
from unmask.ops.int8 import Int8Weight, digits
from unmask.ops.linear import Linear

LIKE = [torch.float32, torch.bfloat16]


def test_int8_is_available():
    """Fails when torch changes its quantised ops, or on a CPU without VNNI, whose product saturates: then load refuses, as tested below."""
    assert int8.int8_available() == bool(torch.cpu._is_vnni_supported())


needs_int8 = pytest.mark.skipif(not int8.int8_available(), reason="no exact int8 product on this CPU")


def make(dtype: torch.dtype = torch.float32, format: str | None = None, **changes) -> models.Model:
    return models.random_model(dataclasses.replace(BASE, **changes), dtype=dtype, seed=4, std=0.25, format=format)


def quantised(w: torch.Tensor) -> torch.Tensor:
    """The definition, in double: absmax of the row / 127 is one step, round half to even."""
    step = w.float().abs().amax(1, keepdim=True) * (1 / 127)
    return (w.float() / step).round().double() * step.double()


@needs_int8
@pytest.mark.parametrize("dtype", LIKE)
@pytest.mark.parametrize("k, n", [(64, 192), (160, 64), (512, 1536), (1536, 512), (33, 61), (1, 1), (4096, 32)])
@pytest.mark.parametrize("m", [1, 16, 37, 300])
def test_product(dtype, k, n, m):
    """Equal to the product with the rounded weights, up to 1/64,500 of a row's largest value a term."""
    x, w = (torch.randn(m, k) * 3).to(dtype), (torch.randn(n, k) * torch.rand(n, 1)).to(dtype)
    y = Linear(w, "int8")(x)
    q = quantised(w)
    exact = x.double() @ q.T
    terms = x.double().abs().amax(1, keepdim=True) / (2 * 127 * 254) * q.abs().sum(1)
    bound = terms * 1.01 + exact.abs() * (2**-8 if dtype is torch.bfloat16 else 2**-20) + 1e-6
    assert y.dtype == dtype and y.shape == (m, n)
    assert ((y.double() - exact).abs() <= bound).all()


@needs_int8
def test_the_error_is_that_of_the_weights():
    """Values of very different size in a row, which int8 activations would lose."""
    x, w = torch.randn(32, 1024), torch.randn(256, 1024)
    x[:, 7] *= 300.0
    exact = x.double() @ w.double().T
    error = lambda y: float((y.double() - exact).norm() / exact.norm())  # noqa: E731
    found, best = error(Linear(w, "int8")(x)), error(x.double() @ quantised(w).T)
    step = x.abs().amax(1, keepdim=True) / 127
    naive = error((x / step).round() * step @ quantised(w).float().T)
    assert abs(found - best) < 0.02 * best and best < 0.02 and naive > 3 * found


@needs_int8
@pytest.mark.parametrize("dtype", LIKE)
@pytest.mark.parametrize("k, n", [(64, 192), (512, 1536), (1536, 512), (256, 61)])
def test_row_bits_do_not_depend_on_the_batch(dtype, k, n, threads):
    x, product = torch.randn(600, k).to(dtype), Linear(torch.randn(n, k).to(dtype), "int8")
    threads(1)
    alone = product(x[:3])
    for count in (1, 2):
        threads(count)
        for rows in (3, 16, 33, 255, 256, 257, 600):
            assert torch.equal(product(x[:rows])[:3], alone), (count, rows)
        assert torch.equal(product(torch.cat([x[40:290], x[:3]]))[250:], alone), count
    assert torch.equal(product(product.prepared(x[:64])), product(x[:64]))


@needs_int8
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_invalid_rows_stay_invalid_and_alone(bad):
    x, product = torch.randn(16, 64), Linear(torch.randn(48, 64), "int8")
    want = product(x)
    x[5, 9] = bad
    got = product(x)
    assert not got[5].isfinite().any() and torch.equal(got[torch.arange(16) != 5], want[torch.arange(16) != 5])


@needs_int8
def test_rows_and_weights_of_zeros():
    w = torch.randn(8, 32)
    w[3] = 0.0
    x = torch.randn(4, 32)
    x[1] = 0.0
    y = Linear(w, "int8")(x)
    assert (y[1] == 0).all() and (y[:, 3] == 0).all() and y.isfinite().all()
    assert (Linear(torch.zeros(2, 5), "int8")(torch.zeros(3, 5)) == 0).all()
    assert Linear(torch.randn(8, 32), "int8")(torch.zeros(0, 32)).shape == (0, 8)
    tiny = Linear(torch.full((2, 4), 1e-30), "int8")(torch.full((1, 4), 1e30))
    assert torch.allclose(tiny, torch.full((1, 2), 4.0), rtol=1e-3)


@needs_int8
def test_digits():
    x = torch.randn(20, 100) * 10.0 ** torch.arange(-5, 15).float()[:, None]
    both, scale = digits(x)
    assert both.shape == (40, 100) and both.abs().max() <= 127.001
    high, low = both.round().double().chunk(2)
    back = (high + low / 254) * scale.double()
    assert ((back - x.double()).abs() <= scale.double() / 508 * 1.001).all()


@needs_int8
@pytest.mark.parametrize("dtype", LIKE)
def test_unpacked_parts_and_bias(dtype):
    w, b, x = torch.randn(24, 40).to(dtype), torch.randn(24).to(dtype), torch.randn(5, 40).to(dtype)
    whole = Linear(w, "int8", b)
    q, scale = Int8Weight(w).unpacked()
    assert torch.equal(q.double() * scale.double()[:, None], quantised(w)) and q.dtype == torch.int8 and int(q.abs().amax(1).min()) == 127
    assert torch.equal(whole(x), Linear(w, "int8")(x) + b)
    assert torch.equal(whole.part(3, 11)(x), whole(x)[:, 3:11])


@needs_int8
def test_longest_rows():
    k = int8._MOST_K
    q = torch.full((1, k), 127, dtype=torch.int8)
    y = Int8Weight.of(q, torch.ones(1)).product(torch.ones(1, k), torch.float32)
    assert abs(float(y) / (127 * k) - 1) < 1e-6
    with pytest.raises(ValueError, match=f"at most {k} long"):
        Int8Weight.of(torch.zeros((1, k + 1), dtype=torch.int8), torch.ones(1))


@needs_int8
@pytest.mark.parametrize("dtype", LIKE)
@pytest.mark.parametrize("changes", [{}, dict(qkv_bias=True, shifted=True), dict(visibility="block_causal", block_size=4), dict(tied_head=True)], ids=str)
def test_a_model_decodes_as_one_of_the_rounded_weights(dtype, changes, monkeypatch):
    """Linear products alone are rounded: the same model with the rounded weights in its dtype gives the same logits, up to rounding."""
    ours = make(dtype, format="int8", **changes)
    assert ours.format == "int8"
    rounded = []

    class Rounded(Linear):
        def __init__(self, weight, format, bias=None):
            assert format == "int8"
            rounded.append(weight.shape)
            super().__init__(quantised(weight).float(), "plain", None if bias is None else bias.float())
            self.dtype = weight.dtype

        def forward(self, x):
            return super().forward(x.float()).to(self.dtype)

    for module in ("models.layer_weights", "ops.head_stats"):
        monkeypatch.setattr(f"unmask.{module}.Linear", Rounded)
    same = make(dtype, format="int8", **changes)
    assert len(rounded) == 2 * 4 + 1
    ids = torch.randint(0, 59, (2, 24))
    a, b = ours.logits(ids).float(), same.logits(ids).float()
    assert (a - b).abs().max() <= (0.06 if dtype is torch.bfloat16 else 1e-3) * b.abs().max()
    monkeypatch.undo()
    full = make(dtype, **changes).logits(ids).float()
    assert 0 < (a - full).norm() <= 0.1 * full.norm()


@needs_int8
def test_experts():
    mixture = Experts((1,), 6, 2, 16, 24, "softmax", False, 1, 1, True, 1.0)
    ids = torch.randint(0, 59, (2, 24))
    a, b = (make(format=format, experts=mixture).logits(ids) for format in ("int8", None))
    assert 0 < (a - b).norm() <= 0.1 * b.norm()


@needs_int8
def test_batches_and_settings():
    ours = make(format="int8")
    rows = [[1, 2, 3], [4], [5, 6, 7, 8, 9]]
    together = unmask.generate(ours, rows, max_new_tokens=13, block_size=4)
    assert [r.ids for r in together] == [unmask.generate(ours, row, max_new_tokens=13, block_size=4).ids for row in rows]
    assert together[0].settings["linear_weights"] == "int8" and together[0].settings["dtype"] == "float32"


@needs_int8
@pytest.mark.parametrize("dtype", [None, "float32", "bfloat16"])
def test_load(tmp_path, dtype):
    write_checkpoint(tmp_path)
    m = unmask.load(tmp_path, weights="int8", dtype=dtype)
    assert m.format == "int8" and m.dtype == {None: m.dtype, "float32": torch.float32, "bfloat16": torch.bfloat16}[dtype]
    plain = unmask.load(tmp_path, dtype=dtype)
    ids = torch.randint(0, 59, (1, 20))
    a, b = m.logits(ids).float(), plain.logits(ids).float()
    assert F.cosine_similarity(a, b, dim=-1).min() > 0.99 and not torch.equal(a, b)
    assert unmask.generate(unmask.load("tiny", weights="int8"), "sort d a c b =>").text == "a b c d"


def test_weights_that_load_refuses(tmp_path, monkeypatch):
    write_checkpoint(tmp_path)
    assert unmask.load(tmp_path, weights="bf16").dtype == torch.bfloat16 == unmask.load(tmp_path, weights="bf16", dtype="bf16").dtype
    for arguments, text in (
        (dict(weights="int4"), "unknown weights 'int4'; did you mean 'int8'"),
        (dict(weights=8), "unknown weights 8"),
        (dict(weights="bf16", dtype="float32"), "weights='bf16' is dtype='bfloat16', got dtype=torch.float32"),
    ):
        with pytest.raises(unmask.SettingError, match=text):
            unmask.load(tmp_path, **arguments)
    with pytest.raises(unmask.SettingError, match="weights='int8' is for device='cpu' in this release, got cuda"):
        api._weights("int8", None, torch.device("cuda"))
    monkeypatch.setattr(api, "int8_available", lambda: False)
    with pytest.raises(unmask.SettingError, match="needs a torch with FBGEMM and a CPU with AVX-512 VNNI.*use weights='bf16'"):
        unmask.load(tmp_path, weights="int8")


def test_where_it_is_missing(monkeypatch):
    monkeypatch.setattr(int8, "int8_available", lambda: False)
    with pytest.raises(ValueError, match="need FBGEMM and a CPU with AVX-512 VNNI"):
        Int8Weight(torch.ones(2, 2))
    monkeypatch.undo()
    check = int8.int8_available.__wrapped__

    def saturated(x, packed):
        return (x @ torch.full((512, 32), 127.0)).clamp(-1e6, 1e6)

    def gone(x, packed):
        raise AttributeError("no such op")

    for broken in (saturated, gone):
        monkeypatch.setattr(int8, "_whole_product", broken)
        assert check() is False
    monkeypatch.undo()
    monkeypatch.setattr(int8, "_ENGINE", "no such engine")
    assert check() is False


@needs_int8
def test_the_engine_is_put_back():
    before = torch.backends.quantized.engine
    Linear(torch.randn(4, 4), "int8")
    assert torch.backends.quantized.engine == before


def test_formats_that_keep_the_weights_values():
    assert "int8" not in linear.FORMATS  # UNMASK_GEMM and choose_format never lose precision unasked
    assert models.choose_format(torch.bfloat16, torch.device("cpu"), 10) in linear.FORMATS
