"""The authors' own forwards of SDAR, LLaDA2 and Fast-dLLM v2, recorded: the same logits, router logits and experts here."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from family_kit import build_from
from unmask.models.moe import MoE, route

GOLDEN = Path(__file__).parent / "golden"
FAMILIES = ("sdar", "llada2", "fast_dllm_v2")
IDS = {"mask_id": 383, "eos_ids": (381,)}  # the configs of two of them lack them, as the released ones do
BLOCKS = {
    "full_attention": None, "block_causal_4": 4, "block_causal_8": 8, "block_causal_8_masked_tail": 8, "block_causal_4_masked_tail": 4,
    "batch2_block_causal_4": 4, "causal": 1, "batch2_block_causal_8": 8, "block_causal_32": 32, "single_block": 32,
}  # fmt: skip
"""Input -> its block length; None: every position sees every other one."""
DATA = {family: load_file(GOLDEN / family / "forward.safetensors") for family in FAMILIES}
CASES = [
    (family, entry["name"])
    for family in FAMILIES
    for entry in json.loads((GOLDEN / family / "forward.json").read_text())["inputs"]
]


def load(family: str, name: str):
    block = BLOCKS[name]
    visible = {"visibility": "bidirectional"} if block is None else {"block_size": block}
    return build_from(GOLDEN / family / "checkpoint", IDS | visible)


def test_every_golden_input_is_here():
    for family in FAMILIES:
        names = [name for f, name in CASES if f == family]
        assert {key.split(".")[0] for key in DATA[family]} == set(names) and len(names) == {"sdar": 7}.get(family, 5)


@pytest.mark.parametrize(("family", "name"), CASES)
def test_the_recorded_mask_is_the_visibility(family, name):
    mask = DATA[family][f"{name}.attention_mask"].bool()
    length, block = mask.shape[-1], BLOCKS[name] or mask.shape[-1]
    place = torch.arange(length) // block
    assert (mask == (place[None, :] <= place[:, None])).all()


@pytest.mark.parametrize("format", ["packed", "plain"])
@pytest.mark.parametrize(("family", "name"), CASES)
def test_forward_logits(family, name, format, monkeypatch):
    monkeypatch.setenv("UNMASK_GEMM", format)
    model, data = load(family, name), DATA[family]
    logits = model.logits(data[f"{name}.input_ids"].long())
    # raw, as recorded, also where the family shifts; 3e-4 is expected of correct fp32 code (golden/README.md), 1e-3 is the limit
    assert model.format == format and (logits - data[f"{name}.logits"]).abs().max().item() <= 3e-4


@pytest.mark.parametrize("name", [name for family, name in CASES if family == "llada2"])
def test_router_logits_and_experts(name):
    model, data = load("llada2", name), DATA["llada2"]
    ids = data[f"{name}.input_ids"].long()
    seen = {}
    for i in (1, 2):
        model.backbone.layers[i].mlp.router.register_forward_hook(lambda _m, _a, out, i=i: seen.__setitem__(i, out[: ids.numel()]))
    model.logits(ids)
    assert not isinstance(model.backbone.layers[0].mlp, MoE)
    for i, logits in seen.items():
        mlp = model.backbone.layers[i].mlp
        expected = data[f"{name}.layer{i}.router_logits"].flatten(0, 1)
        assert (logits - expected).abs().max() <= 3e-5
        chosen = route(logits, mlp.config, mlp.bias).expert
        assert torch.equal(chosen.sort().values, data[f"{name}.layer{i}.topk_experts"].flatten(0, 1).long().sort().values)
        theirs = route(expected, mlp.config, mlp.bias).expert  # from their logits: no rounding of ours in between
        assert torch.equal(theirs.sort().values, chosen.sort().values)


@pytest.mark.parametrize("family", FAMILIES)
def test_blocks_of_a_longer_text_do_not_see_what_follows(family):
    model = build_from(GOLDEN / family / "checkpoint", IDS | {"block_size": 8})
    ids = torch.arange(40).view(1, -1)
    whole = model.logits(ids)
    for end in (8, 16, 21, 33):
        block = end // 8 * 8  # the part of the last block that is cut off changes what its other tokens see
        assert torch.equal(model.logits(ids[:, :end])[:, :block], whole[:, :block])
