"""The authors' own code, recorded: every run gives the same tokens, forwards and block lengths here, from our models and, for the functions
of unmask.compat, from plain torch modules called as the authors call theirs."""

from __future__ import annotations

import collections
import json

import pytest
import torch
from safetensors.torch import load_file

import author_modules
import unmask
from golden_runs import FAMILIES, GOLDEN, RUNS, files, replay

PER_FILE = {
    "llada": dict(
        adablock_baseline_dual=5, adablock_baseline_plain=5, adablock_baseline_prefix=5, adablock_dual=4, adablock_plain=4, adablock_prefix=4,
        d2cache_eb=3, d2cache_klass=3, d2cache_kv_dual=2, d2cache_kv_prefix=2, d2cache_padded_batch=1, d2cache_pc=2, d2cache_vanilla=7,
        d2cache_wino=3, dinfer_decoders=8, fastdllm_dual=5, fastdllm_plain=5, fastdllm_prefix=5, llada_generate=10,
    ),
    "dream": dict(
        adablock_dual=3, adablock_plain=3, adablock_repo_parallel=2, d2cache_eb=3, d2cache_klass=3, d2cache_kv_dual=2, d2cache_kv_prefix=2,
        d2cache_padded_batch=1, d2cache_pc=2, d2cache_vanilla=7, d2cache_wino=3, dream_confidence_threshold=2, dream_entropy=4,
        dream_maskgit_plus=5, dream_origin=2, dream_topk_margin=4, fastdllm_block_dual=5, fastdllm_block_prefix=5,
    ),
}  # fmt: skip
LIMIT = 3e-4  # expected of correct fp32 code (golden/README.md); 1e-3 is what it allows


@pytest.fixture(scope="module")
def models():
    return {family: unmask.load(GOLDEN / family / "checkpoint") for family in FAMILIES}


@pytest.fixture(scope="module")
def modules():
    return {"llada": author_modules.LLaDA(), "dream": author_modules.Dream()}


@pytest.mark.parametrize("family", FAMILIES)
def test_every_file_and_run_is_here(family):
    assert {path.stem: len(json.loads(path.read_text())["runs"]) for path in files(family)} == PER_FILE[family]
    assert collections.Counter(r.file for r in RUNS if r.family == family) == PER_FILE[family]


def check(run, model):
    """Replays a run, counting the forwards of the model."""
    forwards = []
    handle = model.register_forward_hook(lambda *_: forwards.append(1))
    try:
        outcome = replay(run, model)
    finally:
        handle.remove()
    assert outcome.ids == run.data["output_ids"]
    assert len(forwards) == run.data["nfe"] and outcome.nfe in (None, run.data["nfe"])
    if outcome.histories is not None:
        assert outcome.histories == (run.data["reported_nfe"], run.data["block_history"])


@pytest.mark.parametrize("run", RUNS, ids=str)
def test_run(models, run):
    check(run, models[run.family])


@pytest.mark.parametrize("run", [r for r in RUNS if r.replays], ids=str)
def test_run_with_a_users_module(modules, run):
    module = modules[run.family]
    module.calls.clear()
    check(run, module)
    cached = [s for s in run.data["steps"] if s["cached"]]
    assert len([names for _, names in module.calls if "past_key_values" in names]) == len(cached)
    lengths = [s["input_len"] for s in run.data["steps"]]
    assert run.file == "llada_generate" or [shape[1] for shape, _ in module.calls] == lengths


@pytest.mark.parametrize("family", FAMILIES)
def test_forward_logits(models, modules, family):
    data = load_file(GOLDEN / family / "forward.safetensors")
    worst = {"model": 0.0, "module": 0.0}
    for entry in json.loads((GOLDEN / family / "forward.json").read_text())["inputs"]:
        ids, expected = data[f"{entry['name']}.input_ids"].long(), data[f"{entry['name']}.logits"]
        module = modules[family](ids, "full") if family == "dream" else modules[family](ids)
        worst["model"] = max(worst["model"], (models[family].logits(ids) - expected).abs().max().item())
        worst["module"] = max(worst["module"], (module.logits - expected).abs().max().item())
    assert max(worst.values()) <= LIMIT, worst


LOGITS = {family: load_file(GOLDEN / family / "run_logits.safetensors") for family in FAMILIES}


@pytest.mark.parametrize("key", [(family, key) for family in FAMILIES for key in LOGITS[family]], ids="/".join)
def test_logits_inside_runs(models, key):
    """The logits of a forward within a run, cached windows among them: of every token that it forwards."""
    family, name = key
    run_id, forward = name.split("/forward")
    (run,) = [r for r in RUNS if r.family == family and r.data["id"] == run_id]
    model, expected = models[family], LOGITS[family][name]
    hidden: list[torch.Tensor] = []
    handle = model.register_forward_hook(lambda _, args, out: hidden.append(out))
    try:
        replay(run, model)
    finally:
        handle.remove()
    rows = expected.shape[0] * expected.shape[1]
    logits = model.head.logits(hidden[int(forward)])[:rows].view(expected.shape)
    assert (logits - expected).abs().max().item() <= LIMIT
