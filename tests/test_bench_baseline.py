"""The benchmark's baseline does what the authors' code does: same tokens and same number of forwards on their recorded runs."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "bench"))

import baseline_llada  # noqa: E402

GOLDEN = ROOT / "tests" / "golden" / "llada"
LOOPS = {
    "llada_generate": baseline_llada.llada_generate,
    "fastdllm_plain": baseline_llada.generate,
    "fastdllm_prefix": baseline_llada.generate_with_prefix_cache,
    "fastdllm_dual": baseline_llada.generate_with_dual_cache,
}


def recorded_runs():
    """Runs of the four loops that the baseline has: no CFG, no options that a benchmark never sets."""
    for name in LOOPS:
        for run in json.loads((GOLDEN / "runs" / f"{name}.json").read_text())["runs"]:
            args = run["args"]
            plain = (
                not args.get("cfg_scale")
                and not args.get("logits_eos_inf")
                and not args.get("confidence_eos_eot_inf")
            )
            if plain:
                yield pytest.param(name, run, id=run["id"])


@pytest.fixture(scope="module")
def model():
    config = json.loads((GOLDEN / "checkpoint" / "config.json").read_text())
    return baseline_llada.Llada(config, load_file(GOLDEN / "checkpoint" / "model.safetensors"))


@pytest.mark.parametrize(("loop", "run"), list(recorded_runs()))
def test_tokens_and_forwards_equal_the_authors(model, threads, loop, run):
    threads(1)  # 64-wide layers
    args = {name: run["args"][name] for name in ("steps", "gen_length", "block_length", "mask_id")}
    if run["args"].get("threshold") is not None:
        args["threshold"] = run["args"]["threshold"]
    canvas, forwards = LOOPS[loop](model, torch.tensor(run["prompt_ids"]), **args)
    assert canvas.tolist() == run["output_ids"]
    assert forwards == run["nfe"]


def test_logits_equal_the_authors(model):
    forward = load_file(GOLDEN / "forward.safetensors")
    names = sorted(name.removesuffix(".input_ids") for name in forward if name.endswith(".input_ids"))
    assert names
    for name in names:
        for ids, logits in zip(forward[f"{name}.input_ids"], forward[f"{name}.logits"], strict=True):
            torch.testing.assert_close(model(ids[None].long())[0][0], logits, atol=3e-4, rtol=0)


def test_quotas():
    assert baseline_llada.quotas(torch.tensor([10, 3]), 5).tolist() == [[2, 2, 2, 2, 2], [1, 1, 1, 0, 0]]
    assert baseline_llada.quotas(torch.tensor([10]), 4).tolist() == [[3, 3, 2, 2]]
