"""Every recorded run of the authors' code on a GPU, in fp32: same tokens and forwards as on the CPU (tests/test_golden.py)."""

from __future__ import annotations

import pytest
import torch

import test_golden as golden
import unmask
from golden_runs import BLOCK_FAMILIES, BLOCK_RUNS, FAMILIES, RUNS, load

pytestmark = pytest.mark.usefixtures("cuda")


@pytest.fixture(scope="module")
def models():
    return {family: load(family, "cuda") for family in (*FAMILIES, *BLOCK_FAMILIES)}


@pytest.mark.parametrize("run", (*RUNS, *BLOCK_RUNS), ids=str)
def test_run_on_the_gpu(models, run):
    golden.check(run, models[run.family])


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16, torch.float16))
@pytest.mark.parametrize("cache", ("none", "prefix", "dual"))
def test_the_embedded_model(dtype, cache):
    cpu = unmask.generate(unmask.load("tiny", dtype="float32"), "sort d a c b =>", cache=cache)
    gpu = unmask.generate(unmask.load("tiny", dtype=dtype, device="cuda"), "sort d a c b =>", cache=cache)
    assert gpu.text == cpu.text
    if dtype is torch.float32:
        assert gpu.ids == cpu.ids and gpu.nfe == cpu.nfe


def test_ragged_batches():
    model = unmask.load("tiny", dtype="float32", device="cuda")
    prompts = ["sort d a c b =>", "reverse a b =>", "close ( ( ( =>"]
    for row, alone in zip(unmask.generate(model, prompts), (unmask.generate(model, p) for p in prompts), strict=True):
        assert row.ids == alone.ids and row.nfe == alone.nfe
