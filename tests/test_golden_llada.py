"""The authors' own code, recorded: every run of LLaDA's generate and Fast-dLLM's three samplers gives the same tokens and NFE here."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import unmask
from unmask.compat import fast_dllm, llada

GOLDEN = Path(__file__).parent / "golden" / "llada"
FILES = sorted(
    p for p in (GOLDEN / "runs").glob("*.json") if p.stem.startswith(("llada_generate", "fastdllm_", "adablock_baseline_"))
)
RUNS = [pytest.param(path.stem, run, id=run["id"]) for path in FILES for run in json.loads(path.read_text())["runs"]]


@pytest.fixture(scope="module")
def model():
    return unmask.load(GOLDEN / "checkpoint")


def test_every_golden_file_is_here():
    assert len(FILES) == 7 and len(RUNS) == 40


def test_forward_logits(model):
    data = load_file(GOLDEN / "forward.safetensors")
    worst = 0.0
    for entry in json.loads((GOLDEN / "forward.json").read_text())["inputs"]:
        ids, expected = data[f"{entry['name']}.input_ids"].long(), data[f"{entry['name']}.logits"]
        worst = max(worst, (model.logits(ids) - expected).abs().max().item())
    assert worst <= 3e-4  # the tolerance expected of correct fp32 code (golden/README.md); 1e-3 is the limit


@pytest.mark.parametrize("sampler, run", RUNS)
def test_run(model, sampler, run):
    args = dict(run["args"])
    prompt = torch.tensor(run["prompt_ids"], device=model.device)
    forwards = []
    handle = model.register_forward_hook(lambda *_: forwards.append(1))
    try:
        if sampler == "llada_generate":
            if args["attention_mask"] == "ones":
                args["attention_mask"] = torch.ones_like(prompt)
            out = llada.generate(model, prompt, **args)
        else:
            name = {"plain": "generate", "prefix": "generate_with_prefix_cache", "dual": "generate_with_dual_cache"}[sampler.rsplit("_", 1)[1]]
            out, nfe = getattr(fast_dllm, name)(model, prompt, **args)
            assert nfe == run["nfe"]
    finally:
        handle.remove()
    assert out.tolist() == run["output_ids"]
    assert len(forwards) == run["nfe"]
