"""The authors' own forward of Dream, recorded: biases, grouped K/V heads and the angles give the same logits here."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from unmask.models import Tokenizer, inspect
from unmask.models.model import Model, build

GOLDEN = Path(__file__).parent / "golden" / "dream"
INPUTS = json.loads((GOLDEN / "forward.json").read_text())["inputs"]


def load() -> Model:
    info = inspect(GOLDEN / "checkpoint")
    return build(info, Tokenizer.load(info.folder, info.config), "dream", None, torch.device("cpu"))


@pytest.fixture(scope="module")
def data():
    return load_file(GOLDEN / "forward.safetensors")


def test_every_golden_input_is_here(data):
    names = [entry["name"] for entry in INPUTS]
    assert names == ["full", "half_masked", "batch2", "all_masked", "single_token"]
    assert data.keys() == {f"{name}.{part}" for name in names for part in ("input_ids", "logits")}


@pytest.mark.parametrize("format", ["packed", "plain"])
def test_forward_logits(data, monkeypatch, format):
    monkeypatch.setenv("UNMASK_GEMM", format)
    model = load()
    assert model.format == format
    for entry in INPUTS:
        ids, expected = data[f"{entry['name']}.input_ids"].long(), data[f"{entry['name']}.logits"]
        logits = model.logits(ids)
        assert list(ids.shape) == entry["shape"] and logits.shape == expected.shape
        # raw, as recorded; 3e-4 is expected of correct fp32 code (golden/README.md), 1e-3 is the limit
        assert (logits - expected).abs().max().item() <= 3e-4, entry["name"]
