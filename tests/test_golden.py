"""The authors' own code, recorded: every run gives the same tokens, forwards and block lengths here, from our models and, for the functions
of unmask.compat, from plain torch modules called as the authors call theirs."""

from __future__ import annotations

import collections
import json

import pytest
import torch
from safetensors.torch import load_file

import author_modules
import golden_runs
from golden_runs import BLOCK_FAMILIES, BLOCK_RUNS, FAMILIES, GOLDEN, RUNS, files, replay
from unmask.compat._blocks import BlockLoop

PER_FILE = {
    "llada": dict(
        adablock_baseline_dual=5, adablock_baseline_plain=5, adablock_baseline_prefix=5, adablock_dual=4, adablock_plain=4, adablock_prefix=4,
        d2cache_eb=3, d2cache_klass=3, d2cache_kv_d2=2, d2cache_kv_dllm=2, d2cache_kv_dual=2, d2cache_kv_prefix=2, d2cache_padded_batch=1,
        d2cache_pc=2, d2cache_vanilla=7, d2cache_wino=3, dinfer_decoders=8, fastdllm_dual=5, fastdllm_plain=5, fastdllm_prefix=5, llada_generate=10,
    ),
    "dream": dict(
        adablock_dual=3, adablock_plain=3, adablock_repo_parallel=2, d2cache_eb=3, d2cache_klass=3, d2cache_kv_d2=2, d2cache_kv_dllm=2,
        d2cache_kv_dual=2, d2cache_kv_prefix=2, d2cache_padded_batch=1, d2cache_pc=2, d2cache_vanilla=7, d2cache_wino=3,
        dream_confidence_threshold=2, dream_entropy=4, dream_maskgit_plus=5, dream_origin=2, dream_topk_margin=4, fastdllm_block_dual=5,
        fastdllm_block_prefix=5,
    ),
    "sdar": dict(sdar_generate=13, sdar_generate_sampled=2),
    "llada2": dict(llada2_cached=9, llada2_nocache=7),
    "fast_dllm_v2": dict(fast_dllm_v2=7, fast_dllm_v2_blockcache=7),
}  # fmt: skip
LIMIT = 3e-4  # expected of correct fp32 code (golden/README.md); 1e-3 is what it allows


@pytest.fixture(scope="module")
def models():
    return {family: golden_runs.load(family) for family in (*FAMILIES, *BLOCK_FAMILIES)}


@pytest.fixture(scope="module")
def modules():
    return {"llada": author_modules.LLaDA(), "dream": author_modules.Dream()}


@pytest.mark.parametrize("family", (*FAMILIES, *BLOCK_FAMILIES))
def test_every_file_and_run_is_here(family):
    assert {path.stem: len(json.loads(path.read_text())["runs"]) for path in files(family)} == PER_FILE[family]
    assert collections.Counter(r.file for r in (*RUNS, *BLOCK_RUNS) if r.family == family) == PER_FILE[family]


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
    return outcome


@pytest.mark.parametrize("run", RUNS, ids=str)
def test_run(models, run):
    check(run, models[run.family])


@pytest.mark.parametrize("run", BLOCK_RUNS, ids=str)
def test_run_of_a_block_causal_model(models, run, monkeypatch):
    """Tokens, also those behind the end that the functions cut off, forwards with stores, their windows, and what each settled."""
    loops, windows = [], []
    decode = BlockLoop.run
    monkeypatch.setattr(BlockLoop, "run", lambda self: loops.append(self) or decode(self))
    handle = models[run.family].register_forward_hook(lambda _, args, out: windows.append(args[0].pos[args[0].row >= 0].tolist()))
    try:
        outcome = check(run, models[run.family])
    finally:
        handle.remove()
    (loop,) = loops
    canvas, whole = loop.state.canvas[0].tolist(), run.data.get("full_ids", [])
    assert canvas == whole + [run.args["mask_id"]] * (len(canvas) - len(whole)) or not whole
    assert windows == [list(range(s["input_start"], s["input_start"] + s["input_len"])) for s in run.data["steps"]]
    assert run.data["steps"][-1]["forward"] + 1 == loop.forwards == loop.row.nfe
    if "decoding_order" in run.data:
        assert json.loads(json.dumps(outcome.order)) == run.data["decoding_order"]


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


LOGITS = {family: load_file(GOLDEN / family / "run_logits.safetensors") for family in (*FAMILIES, *BLOCK_FAMILIES)}


@pytest.mark.parametrize("key", [(family, key) for family in LOGITS for key in LOGITS[family] if not key.startswith("s2d2")], ids="/".join)
def test_logits_inside_runs(models, key):
    """The logits of a forward within a run, cached windows among them: of every token that it forwards."""
    family, name = key
    run_id, forward = name.split("/forward")
    (run,) = [r for r in (*RUNS, *BLOCK_RUNS) if r.family == family and r.data["id"] == run_id]
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
