"""Calls of `logit_stats` that the CUDA tests compare with the CPU kernel: awkward sizes, strides, lists and values."""

from __future__ import annotations

import torch

from unmask.ops.logit_stats import LogitStats

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def call(vocab: int, dtype: torch.dtype, seed: int, temperature: float = 0.0, layout: str = "dense") -> dict:
    """Arguments of one call over 5 rows of the given vocabulary: some with NaN, infinities and ties, and every optional list."""
    g = torch.Generator().manual_seed(seed)
    n = 5
    values = torch.randn(n, vocab, generator=g) * 6
    values[1] = values[1].round()  # ties
    pick = torch.randint(vocab, (4,), generator=g).tolist()
    values[2, pick[0]] = float("inf")
    values[2, pick[1]] = float("inf")
    values[3] = float("-inf") if seed % 2 else torch.where(torch.rand(vocab, generator=g) < 0.9, float("-inf"), values[3])
    values[4, pick[2]] = float("nan") if seed % 3 == 0 else -0.0
    logits = strided(values.to(dtype), layout)
    rows = torch.tensor([0, 4, -1, 2, 1, 3, n, 0, -7, 1])
    t = len(rows)
    a = {"logits": logits, "rows": rows, "topk": seed % 9, "temperature": temperature}
    if seed % 2 == 0:
        a["forbid"] = torch.tensor([pick[0], pick[3], -1] + ([vocab + 3] if seed % 4 == 0 else []))
        a["bias_ids"] = torch.randint(-1, vocab, (t, 3), generator=g)
        a["bias_ids"][:, 2] = a["bias_ids"][:, 0]
        a["bias"] = torch.randn(t, 3, generator=g)
    if seed % 5 != 1:
        a["suppress"] = torch.unique(torch.randint(vocab, (min(20, vocab // 2),), generator=g))
    a["ids"] = torch.randint(-1, vocab + (seed % 7 == 0), (t, 4), generator=g)
    if seed % 4 == 1:  # expanded and transposed lists
        a["ids"] = torch.randint(vocab, (4, 1), generator=g).expand(4, t).T
    a["seed"], a["step"], a["pos"] = (torch.randint(0, 1 << 40, (t,), generator=g) for _ in range(3))
    return a


def guided(a: dict, weight: float, layout: str = "dense") -> dict:
    """The same call with null logits: infinities, ties and NaN on either side."""
    logits = a["logits"]
    null = (torch.randn(logits.shape, generator=torch.Generator().manual_seed(logits.shape[1])) * 6).to(logits.dtype)
    null[2] = torch.where(logits[2].isinf(), 1.0, null[2])
    null[1, logits.shape[1] // 2] = float("-inf")
    return {**a, "null_logits": strided(null, layout), "guidance": weight}


def strided(x: torch.Tensor, layout: str) -> torch.Tensor:
    """The same values, dense, with an odd row length, with a column stride, or transposed."""
    n, v = x.shape
    if layout == "dense":
        return x.contiguous()
    if layout == "padded":  # rows neither 16-byte aligned nor back to back
        return torch.full((n, v + 3), float("nan"), dtype=x.dtype).narrow(1, 1, v).copy_(x)
    if layout == "columns":
        return torch.full((n, v, 3), float("nan"), dtype=x.dtype)[:, :, 1].copy_(x)
    assert layout == "transposed"
    return x.T.contiguous().T


def arguments(a: dict) -> tuple:
    """In the order of the schema."""
    names = ("logits", "rows", "forbid", "suppress", "bias_ids", "bias", "ids", "topk", "temperature", "seed", "step", "pos")
    null = (a["null_logits"], a["guidance"]) if "null_logits" in a else ()
    return (*(a.get(name) for name in names), *null)


def assert_same(got: tuple, want: tuple) -> None:
    """Exact: token, status, logits at ids, top-k. Sums may differ in the order inside a chunk: 2e-6 of the largest term involved."""
    got, want = LogitStats(*got), LogitStats(*want)
    assert [t.shape for t in got] == [t.shape for t in want] and [t.dtype for t in got] == [t.dtype for t in want]
    torch.testing.assert_close(got.status, want.status, rtol=0, atol=0)
    torch.testing.assert_close(got.ids, want.ids, rtol=0, atol=0)
    torch.testing.assert_close(got.stats, want.stats, rtol=4e-6, atol=4e-6, equal_nan=True)
    torch.testing.assert_close(got.p_rest, want.p_rest, rtol=1e-5, atol=1e-37, equal_nan=True)
    torch.testing.assert_close(got.at_ids[..., 1], want.at_ids[..., 1], rtol=0, atol=0, equal_nan=True)
    torch.testing.assert_close(got.at_ids[..., 0], want.at_ids[..., 0], rtol=4e-6, atol=4e-6, equal_nan=True)
    torch.testing.assert_close(got.topk_logit, want.topk_logit, rtol=0, atol=0)
