"""Modules that are not ours, and ours in other people's loops."""

from __future__ import annotations

import types

import numpy as np
import pytest
import torch

import unmask
from random_models import make


class Foreign(torch.nn.Module):
    """Somebody's module: logits of a model of ours."""

    def __init__(self, model, **config):
        super().__init__()
        self.inner, self.scale = [model], torch.nn.Parameter(torch.ones(()))
        self.config = types.SimpleNamespace(**config)

    def forward(self, ids):
        return types.SimpleNamespace(logits=self.inner[0].logits(ids) * self.scale)


@pytest.fixture(scope="module")
def model():
    return make(seed=3)


@pytest.mark.parametrize("settings", [{}, dict(policy="quota", steps=6), dict(temperature=1.0, seed=4), dict(cfg_scale=0.7)], ids=str)
def test_generate_takes_any_module(model, settings):
    theirs = Foreign(model, mask_token_id=60, eos_token_id=59, vocab_size=61)
    settings = dict(max_new_tokens=12, block_size=4, **settings)
    for prompt in ([1, 2, 3], torch.tensor([[4, 5], [6, 7]]), np.array([8, 9])):
        got, want = unmask.generate(theirs, prompt, **settings), unmask.generate(model, prompt, **settings)
        rows = zip(got, want, strict=True) if isinstance(got, list) else [(got, want)]
        assert all(a.ids == b.ids and a.nfe == b.nfe and a.exact and a.text is None for a, b in rows)
    assert got.settings["model"] == "Foreign" and got.settings["linear_weights"] == "module"
    filled = unmask.infill(theirs, [1, None, 3, None])
    assert filled.canvas == unmask.infill(model, [1, None, 3, None]).canvas
    assert [e.kind for e in unmask.stream(theirs, [1], max_new_tokens=2)][-1] == "done"


def test_what_a_module_cannot_do(model):
    with pytest.raises(unmask.SettingError, match="names no mask token"):
        unmask.generate(Foreign(model), [1])
    theirs = Foreign(model, mask_id=60, vocab_size=61)
    for prompt, settings, text in (
        ([1], dict(cache="dual"), "needs a model from unmask.load"),
        ([[1], [2, 3]], {}, r"rows must be equally long .* got lengths \[33, 34\]"),
        ([61], {}, r"must be in 0\.\.60"),
        ("text", {}, "pass ids instead"),
        ([1], dict(stop="x"), "stop needs a tokenizer"),
    ):
        with pytest.raises(unmask.UnmaskError, match=text):
            unmask.generate(theirs, prompt, **settings)


def test_our_model_in_their_loop(model):
    ids = torch.tensor([[1, 2, 60]])
    want = model.logits(ids)
    assert torch.equal(model(ids).logits, want) and torch.equal(model(input_ids=ids).logits, want)
    assert torch.equal(model(ids, attention_mask=None).logits, want)
    assert torch.equal(model(ids, attention_mask=torch.ones_like(ids)).logits, want)
    for kwargs, text in (
        (dict(attention_mask=torch.tensor([[0, 1, 1]])), "attention_mask must be all ones"),
        (dict(use_cache=True, past_key_values=None), r"got \['past_key_values', 'use_cache'\]"),
    ):
        with pytest.raises(unmask.SettingError, match=text):
            model(ids, **kwargs)
    with pytest.raises(unmask.SettingError, match="called with token ids"):
        model([1, 2])


def test_a_model_is_never_converted_in_silence(model):
    assert model.to("cpu").eval().float() is model
    for change in (lambda: model.to(torch.bfloat16), model.half, lambda: model.to("meta")):
        with pytest.raises(unmask.SettingError, match="load it again"):
            change()


def test_numbers_of_numpy_and_torch(model):
    plain = unmask.generate(model, [1, 2], max_new_tokens=8, threshold=0.75, seed=3)
    settings = dict(max_new_tokens=np.int64(8), threshold=np.float32(0.75), seed=torch.tensor(3))
    other = unmask.generate(model, [np.int64(1), torch.tensor(2)], **settings)
    assert other.ids == plain.ids and other.settings == plain.settings and type(other.settings["threshold"]) is float
    policy = unmask.generate(model, [1, 2], max_new_tokens=8, policy="quota", steps=np.int64(4))
    assert policy.nfe == 4


def test_overrides_that_the_loop_would_ignore(tmp_path):
    from models_kit import write_checkpoint

    write_checkpoint(tmp_path)
    for overrides in ({"visibility": "block_causal"}, {"block_size": 4}, 5):
        with pytest.raises((unmask.SettingError, unmask.CheckpointError)):
            unmask.load(tmp_path, overrides=overrides)
    plain, shifted = unmask.load(tmp_path), unmask.load(tmp_path, overrides={"shifted": True})  # the loop does shift, so this one counts
    r = unmask.infill(shifted, [1, 2, None], block_size=1)
    z = plain.logits(torch.tensor([[1, 2, plain.config.mask_id]]))[0, 1].clone()
    z[plain.config.mask_id] = -torch.inf
    assert r.canvas[2] == int(z.argmax())
