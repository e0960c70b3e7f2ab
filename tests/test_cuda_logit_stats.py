"""The CUDA path of logit_stats, stats_tile, stats_finish and uniform on a GPU, against the CPU kernels."""

from __future__ import annotations

import pytest
import torch

from native import native
from on_gpu import to_cuda
from stats_cases import DTYPES, arguments, assert_same, call, guided

pytestmark = pytest.mark.usefixtures("cuda")


def on_gpu(a: dict) -> tuple[torch.Tensor, ...]:
    return tuple(t.cpu() for t in native("logit_stats", "CUDA")(*(to_cuda(x) for x in arguments(a))))


def assert_same_bits(got, want):
    for g, w in zip(got, want, strict=True):
        assert torch.equal(g.view(torch.int32) if g.is_floating_point() else g, w.view(torch.int32) if w.is_floating_point() else w)


@pytest.mark.parametrize("vocab", (1, 2, 7, 8, 511, 512, 513, 4095, 4096, 4097, 9001, 32000, 126464, 152064))
@pytest.mark.parametrize("temperature", (0.0, 0.7, 30.0))
def test_same_as_the_cpu_kernel(vocab, temperature):
    for i, dtype in enumerate(DTYPES):
        for j, layout in enumerate(("dense", "padded", "columns", "transposed")):
            a = call(vocab, dtype, seed=vocab + 3 * i + j, temperature=temperature, layout=layout)
            assert_same(on_gpu(a), native("logit_stats")(*arguments(a)))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("temperature", (0.0, 1.0))
def test_bits_do_not_depend_on_the_batch_or_the_layout(dtype, temperature):
    a = call(126464, dtype, seed=12, temperature=temperature)
    want = on_gpu(a)
    for layout in ("padded", "columns"):
        assert_same_bits(on_gpu(call(126464, dtype, seed=12, temperature=temperature, layout=layout)), want)
    for e in range(10):
        alone = dict(a)
        for name in ("rows", "bias_ids", "bias", "ids", "seed", "step", "pos"):
            alone[name] = a[name][e : e + 1]
        assert_same_bits(on_gpu(alone), tuple(t[e : e + 1] for t in want))
    many = {**a, **{name: a[name].repeat(400, *[1] * (a[name].dim() - 1)) for name in ("rows", "bias_ids", "bias", "ids", "seed", "step", "pos")}}
    assert_same_bits(on_gpu(many), tuple(t.repeat(400, *[1] * (t.dim() - 1)) for t in want))


@pytest.mark.parametrize("vocab", (1, 513, 4097, 9001, 126464))
@pytest.mark.parametrize("temperature", (0.0, 0.7))
def test_guidance_is_the_cpu_kernels_and_has_the_bits_of_the_torch_expression(vocab, temperature):
    for i, dtype in enumerate(DTYPES):
        plain = call(vocab, dtype, seed=vocab + 3 * i, temperature=temperature)
        for layout in ("dense", "padded", "columns", "transposed"):
            a = guided(plain, 1.7, layout)
            got = on_gpu(a)
            assert_same(got, native("logit_stats")(*arguments(a)))
            c, u = (to_cuda(a[name]) for name in ("logits", "null_logits"))
            assert_same_bits(got, on_gpu({**plain, "logits": u + 1.7 * (c - u)}))


def test_tiles_give_the_same_bits_as_one_pass():
    from unmask.ops.logit_stats import STATE_WORDS

    vocab = 126464
    for temperature in (0.0, 0.9):
        a = call(vocab, torch.float32, 5, temperature)
        whole = {**a, "logits": a["logits"][a["rows"].clamp(0, 4)], "rows": None}
        x = [to_cuda(v) for v in arguments(whole)]
        state = torch.zeros(10, STATE_WORDS, dtype=torch.int32, device="cuda")
        id_logit = torch.empty(10, 4, device="cuda")
        for begin in range(0, vocab, 8192):
            native("stats_tile", "CUDA")(x[0][:, begin : begin + 8192], state, id_logit, begin, vocab, *x[2:])
        got = native("stats_finish", "CUDA")(state, id_logit, a["topk"])
        assert_same_bits([t.cpu() for t in got], on_gpu(whole))


def test_empty_and_many_rows():
    for rows, vocab in ((0, 100), (300_000, 3)):
        logits = torch.randn(rows, vocab)
        a = {"logits": logits, "topk": 2, "temperature": 0.0}
        assert_same(on_gpu(a), native("logit_stats")(*arguments(a)))


@pytest.mark.usefixtures("six_gb_of_gpu_memory")
def test_more_than_2_to_the_31_elements():
    vocab, n = 126464, 17_000
    logits = torch.zeros(n, vocab, dtype=torch.float16, device="cuda")
    logits[n - 1, vocab - 1] = 9.0
    ids, values, status = native("logit_stats", "CUDA")(logits, *[None] * 6, 0, 0.0, None, None, None)
    assert ids[n - 1, 0] == vocab - 1 and (ids[: n - 1] == 0).all() and (status == 0).all()
    assert (values[: n - 1] == values[0]).all()


def test_current_stream_and_graph_capture():
    a = call(32000, torch.bfloat16, 4, 0.8)
    want = on_gpu(a)
    x = [to_cuda(v) for v in arguments(a)]
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        got = native("logit_stats", "CUDA")(*x)
    side.synchronize()
    assert_same_bits([t.cpu() for t in got], want)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        got = native("logit_stats", "CUDA")(*x)
    for _ in range(3):
        x[0].copy_(to_cuda(call(32000, torch.bfloat16, 7, 0.8)["logits"]))
        graph.replay()
        x[0].copy_(to_cuda(a["logits"]))
        graph.replay()
    torch.cuda.synchronize()
    assert_same_bits([t.cpu() for t in got], want)


@pytest.mark.usefixtures("second_gpu")
def test_another_device_than_the_current_one():
    a = call(4097, torch.float32, 2)
    got = native("logit_stats", "CUDA")(*(v.to("cuda:1") if isinstance(v, torch.Tensor) else v for v in arguments(a)))
    assert got[0].device.index == 1 and torch.cuda.current_device() == 0
    assert_same([t.cpu() for t in got], native("logit_stats")(*arguments(a)))


def test_errors_read_as_on_the_cpu():
    logits = torch.randn(2, 8)
    ids = torch.zeros(2, 1, dtype=torch.int64)
    bad = [
        {"logits": logits.double()},
        {"logits": logits[0]},
        {"logits": logits, "topk": 9},
        {"logits": logits, "temperature": -1.0},
        {"logits": logits, "temperature": 1.0},
        {"logits": logits, "ids": ids.int()},
        {"logits": logits, "ids": ids[:1]},
        {"logits": logits, "bias_ids": ids},
    ]
    for a in bad:
        a = {"topk": 0, "temperature": 0.0, **a}
        words = []
        for op, x in ((native("logit_stats"), arguments(a)), (native("logit_stats", "CUDA"), [to_cuda(v) for v in arguments(a)])):
            with pytest.raises(RuntimeError) as error:
                op(*x)
            words.append(str(error.value).splitlines()[0])
        assert words[0] == words[1]
    with pytest.raises(RuntimeError, match="logit_stats: rows must be on cuda:0, got on the CPU"):
        native("logit_stats", "CUDA")(logits.cuda(), torch.zeros(1, dtype=torch.int64), *[None] * 5, 0, 0.0, None, None, None)


def test_uniform_has_the_same_bits():
    key = [torch.randint(-(1 << 62), 1 << 62, (1000, 2))[:, 0] for _ in range(3)]
    got = native("uniform", "CUDA")(*(to_cuda(k) for k in key))
    assert torch.equal(got.cpu(), native("uniform")(*key))
