"""Modules that are not ours, and ours in other people's loops."""

from __future__ import annotations

import functools
import json
import types
from pathlib import Path

import numpy as np
import pytest
import torch

import unmask
from random_models import make
from test_policies import ALL, CANVASES, SEEDS
from unmask.decode.table import RULES
from unmask.models import probe
from unmask.models.config import FAMILIES, family_module
from unmask.models.foreign import TRAITS
from unmask.models.model import Model


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
    theirs = Foreign(model, mask_token_id=60, eos_token_id=59, vocab_size=61, shifted=False)
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
    theirs = Foreign(model, mask_id=60, vocab_size=61, shifted=False)
    for prompt, settings, text in (
        ([1], dict(cache="dual"), "needs a model from unmask.load"),
        ([[1], [2, 3]], {}, r"rows must be equally long .* got lengths \[33, 34\]"),
        ([61], {}, r"must be in 0\.\.60"),
        ("text", {}, "pass ids instead"),
        ([1], dict(stop="x"), "stop needs a tokenizer"),
    ):
        with pytest.raises(unmask.UnmaskError, match=text):
            unmask.generate(theirs, prompt, **settings)


class Answers(torch.nn.Module):
    """Somebody's module whose forward is `answer(ids)`; config: its own, or a dict."""

    def __init__(self, answer=None, config: object = None, **others):
        super().__init__()
        self.answer, self.config, self.seen = answer, config, []
        for name, value in others.items():
            setattr(self, name, value)

    def forward(self, ids):
        self.seen.append(tuple(ids.shape))
        return self.answer(ids)


@functools.cache
def variant(**changes) -> Model:
    return make(seed=5, **changes)


def space(**fields) -> types.SimpleNamespace:
    return types.SimpleNamespace(**fields)


@pytest.mark.parametrize(
    "config, generation, given, want",
    [
        (space(mask_token_id=60, vocab_size=61), None, {}, 60),
        (space(mask_id=7), None, {}, 7),
        ({"mask_token_id": 8}, None, {}, 8),
        (space(mask_token_id=8), None, dict(mask_id=np.int64(9)), 9),
        (None, space(mask_token_id=10), {}, 10),
        (space(mask_token_id=None), None, dict(tokenizer=space(mask_token_id=11, encode=print, decode=print)), 11),
        (space(mask_token_id=0), space(mask_token_id=5), {}, 0),
        (space(model_type="llada", vocab_size=126464), None, {}, 126336),
        (space(model_type="Dream", vocab_size=152064), None, {}, 151666),
        (space(model_type="Fast_dLLM_Qwen", vocab_size=151936), None, {}, 151665),
        (space(model_type="sdar_moe", vocab_size=151936), None, {}, 151669),
        (space(architectures=["LLaDA2MoeModelLM"], vocab_size=157184), None, {}, 156895),
    ],
)  # fmt: skip
def test_where_the_mask_id_comes_from(config, generation, given, want):
    wrapped = unmask.wrap(Answers(config=config, generation_config=generation), shifted=False, **given)
    assert wrapped.config.mask_id == want


def test_an_unknown_mask_id():
    for config in (None, space(), space(mask_token_id="x"), space(mask_id=True), space(mask_token_id=-1), space(model_type="llada", vocab_size=500)):
        with pytest.raises(unmask.SettingError, match=r"Answers names no mask token .* unmask\.wrap\(module, mask_id=\.\.\.\)"):
            unmask.wrap(Answers(config=config), shifted=False)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_family_says_its_shift_and_its_attention(family):
    module = family_module(family)
    for config in ({"model_type": module.MODEL_TYPES[0]}, {"architectures": [module.ARCHITECTURES[0]]}):
        config = config | ({"architectures": [module.ARCHITECTURES[0]]} if family == "llada_moe" else {})
        c = unmask.wrap(Answers(config=config), mask_id=5).config
        assert (c.family, c.shifted, c.visibility) == (family, *TRAITS[family])
        assert c.block_size == (module.BLOCK_SIZE if c.visibility == "block_causal" else None)
    named = type(module.ARCHITECTURES[0], (Answers,), {})  # by its class alone
    assert unmask.wrap(named(config=space()), mask_id=5).config.family == family
    assert unmask.wrap(named(config=space(model_type="mine")), mask_id=5, shifted=True).config.family == "module"


@pytest.mark.parametrize("family", ["llada", "dream", "sdar", "llada2", "fast_dllm_v2"])
def test_what_is_detected_is_what_a_checkpoint_is_read_as(family):
    folder = Path(__file__).parent / "golden"
    folder = folder / family / "checkpoint" if (folder / family).exists() else None
    raw = json.loads((folder / "config.json").read_text()) if folder else LLADA
    ids = {} if "mask_token_id" in raw else dict(mask_id=383)
    read = family_module(family).read_config(raw | ({} if not ids else {"mask_token_id": 383}), {})
    c = unmask.wrap(Answers(config=space(**raw)), **ids).config
    assert (c.shifted, c.visibility, c.mask_id, c.vocab_size) == (read.shifted, read.visibility, read.mask_id, read.vocab_size)
    assert c.block_size == (read.block_size if read.visibility == "block_causal" else None)
    assert c.eos_ids == read.eos_ids and c.max_positions == read.max_positions


LLADA = {
    "model_type": "llada", "architectures": ["LLaDAModelLM"], "block_type": "llama", "layer_norm_type": "rms", "activation_type": "silu", "rope": True,
    "d_model": 64, "n_heads": 4, "n_layers": 2, "mlp_hidden_size": 160, "vocab_size": 384, "embedding_size": 400, "mask_token_id": 383,
    "eos_token_id": 381, "max_sequence_length": 4096,
}  # fmt: skip


def test_end_ids():
    released = dict(model_type="llada", vocab_size=126464)
    for config, generation, given, want in (
        (space(**released), None, {}, (126081, 126348)),
        (space(**released, eos_token_id=126081), None, {}, (126081, 126348)),
        (space(**released, eos_token_id=3), None, {}, (3,)),
        (space(**released), None, dict(eos_ids=[]), ()),
        (space(**released), None, dict(eos_ids=4), (4,)),
        (space(model_type="Fast_dLLM_Qwen", vocab_size=152064, eos_token_id=151643), None, {}, (151643, 151645)),
        (space(eos_token_id=[1, 2, 1]), None, {}, (1, 2)),
        (space(eos_token_id=1), space(eos_token_id=[2]), {}, (2,)),
        (space(), None, dict(tokenizer=space(eos_token_id=6, encode=print, decode=print)), (6,)),
        (space(), None, {}, ()),
    ):
        wrapped = unmask.wrap(Answers(config=config, generation_config=generation), mask_id=9, shifted=False, **given)
        assert wrapped.config.eos_ids == want, (config, given)


def test_a_wrapper_is_looked_through():
    inner = Answers(config=space(mask_token_id=5, shifted=True, max_position_embeddings=12))
    compiled = torch.nn.Module()  # as torch.compile's wrapper holds it, without waking the compiler
    compiled._orig_mod = inner
    for outer in (torch.nn.DataParallel(inner), compiled):
        wrapped = unmask.wrap(outer)
        assert (wrapped.config.mask_id, wrapped.config.shifted, wrapped.name, wrapped.config.max_positions) == (5, True, "Answers", 12)


def test_an_unknown_shift_is_an_error(model):
    for make_it in (unmask.wrap, lambda m: unmask.generate(m, [1])):
        with pytest.raises(unmask.SettingError, match="does not say whether its logits are shifted.*shifted=False.*shifted=True.*shifted='detect'"):
            make_it(Foreign(model, mask_id=60))
    assert unmask.wrap(Foreign(model, mask_id=60, shifted=True)).config.shifted is True
    assert unmask.wrap(Foreign(model, mask_id=60, shifted=True), shifted=False).config.shifted is False


@pytest.mark.parametrize("settings", [{}, dict(policy="quota", steps=6), dict(temperature=1.0, seed=4), dict(cfg_scale=0.7), dict(schedule="adablock", delimiters=[7])], ids=str)
def test_shifted_logits(settings):
    ours = variant(shifted=True, qkv_bias=True)
    theirs = unmask.wrap(Foreign(ours), mask_id=60, shifted=True, eos_ids=59)
    plain = unmask.wrap(Foreign(ours), mask_id=60, shifted=False, eos_ids=59)
    for prompt in ([1, 2, 3], [1], [[4, 5], [6, 7]]):
        got, want = unmask.generate(theirs, prompt, max_new_tokens=12, block_size=4, **settings), unmask.generate(ours, prompt, max_new_tokens=12, block_size=4, **settings)
        rows = zip(got, want, strict=True) if isinstance(got, list) else [(got, want)]
        assert all(a.ids == b.ids and a.nfe == b.nfe for a, b in rows)
    assert unmask.generate(plain, [1, 2, 3], max_new_tokens=12).ids != unmask.generate(theirs, [1, 2, 3], max_new_tokens=12).ids


def causal(**changes) -> tuple[Model, unmask.models.foreign.Foreign]:
    ours = variant(visibility="block_causal", block_size=4, **changes)
    answers = Answers(ours.logits)
    return ours, unmask.wrap(answers, mask_id=60, shifted=ours.config.shifted, eos_ids=59, visibility="block_causal", block_size=4)


@pytest.mark.parametrize("name, knobs", [p for p in ALL if "model" not in RULES[p.values[0]].needs])
@pytest.mark.parametrize("kind", ["shifted", "block_causal", "block_causal, shifted"])
def test_every_rule(kind, name, knobs):
    """A wrapped module decodes as the model that gives its logits."""
    if "block_causal" in kind:
        ours, theirs = causal(**dict(shifted=True, qkv_bias=True) if "shifted" in kind else {})
    else:
        ours = variant(shifted=True, qkv_bias=True)
        theirs = unmask.wrap(Foreign(ours), mask_id=60, shifted=True, eos_ids=59)
    settings = dict(policy=name, cache="none", seeds=SEEDS[:2], **knobs)
    if "block_causal" not in kind:
        settings["block_size"] = 7
    canvases = [CANVASES[0], CANVASES[2][:20]]
    try:
        want = unmask.infill(ours, canvases, **settings)
    except unmask.SettingError as refused:
        with pytest.raises(unmask.SettingError, match=str(refused).split(":")[0].split("(")[0].split(";")[0][:40]):
            unmask.infill(theirs, canvases, **settings)
        return
    got = unmask.infill(theirs, canvases, **settings)
    assert [(r.canvas, r.nfe, r.ids) for r in got] == [(r.canvas, r.nfe, r.ids) for r in want]
    assert all(r.exact and r.settings["cache"] == "none" for r in got)


@pytest.mark.parametrize("settings", [{}, dict(policy="quota", steps=7), dict(temperature=0.8), dict(cfg_scale=0.7), dict(block_size=2), dict(block_size=8), dict(eos_stop=False)], ids=str)
def test_a_block_causal_module_sees_its_canvas_to_the_end_of_the_block(settings):
    ours, theirs = causal()
    for prompt in ([1, 2, 3], [1], [[4, 5, 6, 7, 8], [9, 10, 11, 12, 13]]):
        theirs.module.seen.clear()
        got, want = unmask.generate(theirs, prompt, max_new_tokens=14, **settings), unmask.generate(ours, prompt, max_new_tokens=14, cache="none", **settings)
        rows = list(zip(got, want, strict=True)) if isinstance(got, list) else [(got, want)]
        assert all(a.ids == b.ids and a.nfe == b.nfe and a.exact and a.settings["cache"] == "none" for a, b in rows)
        lengths = [length for _, length in theirs.module.seen]
        assert all(length % 4 == 0 for length in lengths) and lengths[0] < max(len(r.canvas) for r, _ in rows)
    full = unmask.wrap(Answers(ours.logits), mask_id=60, shifted=False)
    assert unmask.generate(full, [1, 2, 3], max_new_tokens=14).nfe  # the same module as a bidirectional one: whole canvases
    assert full.module.seen[0][1] == 17


def test_attention_that_is_not_possible():
    module = Answers(config=space(model_type="sdar", vocab_size=151936, block_size=8))
    assert unmask.wrap(module).config.block_size == 8 and unmask.wrap(module, block_size=16).config.block_size == 16
    assert unmask.wrap(module, visibility="bidirectional").config.block_size is None
    plain = Answers(config=space(mask_id=5, shifted=False))
    for wrong, text in (
        (dict(visibility="causal"), "unknown visibility 'causal'"),
        (dict(visibility="block_causal"), "needs block_size"),
        (dict(visibility="block_causal", block_size=0), r"block_size must be in \[1, 65536\], got 0"),
        (dict(visibility="block_causal", block_size=True), "block_size must be an integer"),
        (dict(block_size=4), "for visibility='block_causal'"),
    ):
        with pytest.raises(unmask.SettingError, match=text):
            unmask.wrap(plain, **wrong)
    theirs = causal()[1]
    for settings, text in (
        (dict(cache="block"), "needs a model from unmask.load"),
        (dict(schedule="adablock", delimiters=[3]), "needs a bidirectional model, got a block-causal one"),
        (dict(block_size=3), "divisor or a multiple"),
    ):
        with pytest.raises(unmask.SettingError, match=text):
            unmask.generate(theirs, [1], **settings)
    with pytest.raises(unmask.SettingError, match="rows must be equally long"):
        unmask.generate(theirs, [[1], [1, 2, 3, 4, 5, 6]])


def test_wrong_arguments(model):
    module = Foreign(model, mask_id=60, vocab_size=61, shifted=False)
    for wrong, text in (
        (dict(mask_id=61), "mask_id must be below the vocabulary size of the module's config, 61, got 61"),
        (dict(mask_id=-1), "mask_id must be a token id"),
        (dict(mask_id="x"), "mask_id must be a token id"),
        (dict(mask_id=True), "mask_id must be a token id"),
        (dict(eos_ids=[61]), r"eos_ids\[0\] must be below"),
        (dict(eos_ids="x"), "eos_ids must be a token id or a list"),
        (dict(eos_ids=[60]), r"mask_id 60 must not be one of eos_ids \[60\]"),
        (dict(shifted="yes"), "shifted must be True, False, 'detect' or None, got 'yes'"),
        (dict(shifted="detect"), "go together"),
        (dict(probe=[1, 2]), "go together"),
        (dict(tokenizer=5), "tokenizer must have encode"),
    ):
        with pytest.raises(unmask.SettingError, match=text):
            unmask.wrap(module, **wrong)
    with pytest.raises(unmask.SettingError, match="must be a torch.nn.Module"):
        unmask.wrap(lambda ids: ids, mask_id=1)
    with pytest.raises(TypeError):
        unmask.wrap(module, mask=1)


@pytest.mark.parametrize(
    "answer, text",
    [
        (lambda z: z[:, :-1], r"Answers must return logits \[B, L, V\] = \[1, 9, any\].* got \[1, 8, 61\]"),
        (lambda z: z.transpose(1, 2), r"got \[1, 61, 9\]"),
        (lambda z: z[0], r"got \[9, 61\]"),
        (lambda z: z[:, :, :60], "mask_id must be below the module's vocabulary size 60, got 60"),
        (lambda z: z.argmax(-1, keepdim=True), "must be float32, bfloat16 or float16, got torch.int64"),
        (lambda z: z.double(), "must be float32, bfloat16 or float16, got torch.float64"),
        (lambda z: (z,), "must return logits .* got tuple"),
        (lambda z: None, "got NoneType"),
        (lambda z: types.SimpleNamespace(logits=None), "got SimpleNamespace"),
        (lambda z: z.to("meta"), "must be on cpu, where the ids are, got meta"),
    ],
)  # fmt: skip
@pytest.mark.parametrize("guided", [False, True])
def test_wrong_logits(model, answer, text, guided):
    theirs = unmask.wrap(Answers(lambda ids: answer(model.logits(ids))), mask_id=60, shifted=False)
    if guided:
        text = text.replace(r"\[1, ", r"\[2, ")
    with pytest.raises(unmask.SettingError, match=text):
        unmask.generate(theirs, [1], max_new_tokens=8, cfg_scale=0.5 if guided else 0.0)


@pytest.mark.parametrize("bad", [float("nan"), -float("inf")])
def test_logits_that_say_nothing(model, bad):
    theirs = unmask.wrap(Answers(lambda ids: torch.where((ids[:, :1, None] == 2), bad, model.logits(ids))), mask_id=60, shifted=False)
    with pytest.raises(unmask.InvalidLogits):
        unmask.generate(theirs, [2], max_new_tokens=4)
    got = unmask.generate(theirs, [[2], [3]], max_new_tokens=4, on_invalid="skip")
    assert got[1].ids == unmask.generate(theirs, [3], max_new_tokens=4).ids and got[0].finish_reason != "length"


def test_a_module_that_still_drops_units(model):
    class Drops(Foreign):
        def __init__(self, p):
            super().__init__(model, mask_id=60, shifted=False)
            self.drop = torch.nn.Dropout(p)

        def forward(self, ids):
            return self.drop(super().forward(ids).logits)

    assert unmask.generate(Drops(0.0), [1], max_new_tokens=2).ids == unmask.generate(Drops(0.5).eval(), [1], max_new_tokens=2).ids
    with pytest.raises(unmask.SettingError, match=r"in training mode and drops units at random; call module\.eval\(\) first"):
        unmask.generate(Drops(0.5), [1], max_new_tokens=2)


class Named:
    """The methods of transformers' tokenizers, over one of ours."""

    mask_token_id, eos_token_id = None, None

    def __init__(self, ours):
        self.ours = ours

    def encode(self, text, add_special_tokens=True):
        return self.ours.encode(text, add_special=add_special_tokens)

    def decode(self, ids, skip_special_tokens=False):
        return self.ours.decode(ids, skip_special=skip_special_tokens)

    def apply_chat_template(self, messages, tokenize=True, add_generation_prompt=False):
        assert not tokenize and add_generation_prompt
        return " ".join(m["content"] for m in messages) + " =>"

    def get_vocab(self):
        return {"a": self.ours.token_to_id("a")}


def test_text_through_a_tokenizer():
    tiny = unmask.load("tiny")
    for tokenizer in (tiny.tokenizer, tiny.tokenizer._rust, Named(tiny.tokenizer)):
        theirs = unmask.wrap(Answers(tiny.logits), mask_id=tiny.config.mask_id, shifted=False, eos_ids=tiny.config.eos_ids, tokenizer=tokenizer)
        for settings in ({}, dict(stop="c"), dict(schedule="adablock", delimiters=["b"])):
            got, want = unmask.generate(theirs, "sort d a c b =>", **settings), unmask.generate(tiny, "sort d a c b =>", cache="none", **settings)
            assert got.text == want.text and got.ids == want.ids and got.text
        assert unmask.infill(theirs, "sort b a => [[MASK*2]]").canvas == unmask.infill(tiny, "sort b a => [[MASK*2]]", cache="none").canvas
        assert theirs.tokenizer.token_to_id("a") == tiny.tokenizer.token_to_id("a")
    named = unmask.wrap(Answers(tiny.logits), mask_id=tiny.config.mask_id, shifted=False, tokenizer=Named(tiny.tokenizer))
    chat = unmask.generate(named, [{"role": "user", "content": "sort b a"}], chat=True, max_new_tokens=2)
    assert chat.prompt_ids == tiny.tokenizer.encode("sort b a =>", add_special=False)
    bare = unmask.wrap(Answers(tiny.logits), mask_id=tiny.config.mask_id, shifted=False, tokenizer=tiny.tokenizer._rust)
    with pytest.raises(unmask.SettingError, match="needs a tokenizer with apply_chat_template"):
        unmask.generate(bare, "x", chat=True)


def counts(ids: torch.Tensor, at: int) -> torch.Tensor:
    """Logits of a model that knows how to count: row i tells the token behind (at = 1) or at i (at = 0), from the token before that one;
    where it predicts its own place and sees a token there, it gives that back."""
    known = (ids + 1) % 59 if at else torch.where(ids == 60, (ids.roll(1, 1) + 1) % 59, ids)
    noise = torch.rand(*ids.shape, 61, generator=torch.Generator().manual_seed(1))
    return torch.nn.functional.one_hot(known, 61) * 6 + noise


@pytest.mark.parametrize("shifted", [False, True])
def test_the_shift_is_detected_by_an_experiment(shifted):
    module = Answers(lambda ids: counts(ids, int(shifted)))
    text = [i % 59 for i in range(3, 203)]
    for given in (text, torch.tensor(text), text[:17]):
        module.seen.clear()
        found = unmask.wrap(module, mask_id=60, shifted="detect", probe=given)
        assert found.config.shifted is shifted and 16 <= sum(rows for rows, _ in module.seen) <= probe.MOST
    assert unmask.generate(found, [5, 6], max_new_tokens=5, policy="quota", score="leftmost").ids == [7, 8, 9, 10, 11]
    named = types.SimpleNamespace(encode=lambda text, add_special_tokens=True: [int(t) for t in text.split()], decode=str)
    assert unmask.wrap(module, mask_id=60, shifted="detect", tokenizer=named, probe=" ".join(map(str, text))).config.shifted is shifted


def test_a_shift_that_shows_in_nothing_is_not_guessed(model):
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(0, 59, (200,), generator=generator).tolist()
    copies = Answers(lambda x: torch.nn.functional.one_hot(x, 61).float() * 20)  # gives back what it sees, and nothing else
    flat = Answers(lambda x: torch.zeros(*x.shape, 61))
    both = Answers(lambda x: torch.nn.functional.one_hot(torch.tensor([ids]).expand_as(x), 61).float() * 9 + torch.nn.functional.one_hot(torch.tensor([ids[1:] + ids[:1]]).expand_as(x), 61).float() * 9)
    for module in (Answers(model.logits), copies, flat, both):
        with pytest.raises(unmask.SettingError, match="shifted cannot be detected with this probe: over 64 masked tokens .* pass shifted=True or False"):
            unmask.wrap(module, mask_id=60, shifted="detect", probe=ids)
    with pytest.raises(unmask.SettingError, match="NaN or infinite"):
        unmask.wrap(Answers(lambda x: torch.full((*x.shape, 61), torch.nan)), mask_id=60, shifted="detect", probe=ids)
    for short, text in (
        (ids[:15], "the probe must be 16 to 4096 tokens, got 15 of 15"),
        ([3] * 40, "16 positions or more whose token differs from both neighbours, got 0"),
        ([1, 2, 60, *range(12), 60, 60], "differs from both neighbours, got 1[0-9]"),
        ([70, *range(30)], "below the module's vocabulary size 61, got 70"),
        ([1, "x"], r"probe\[1\] must be a token id"),
        ("some text", "needs a tokenizer"),
        (5, "probe must be a text or a list of token ids, got int"),
    ):
        with pytest.raises(unmask.SettingError, match=text):
            unmask.wrap(flat, mask_id=60, shifted="detect", probe=short)


def test_the_probe_masks_one_position_at_a_time_and_none_beside_its_equal():
    text = [5, 5, 6, 7, 60, 8, *range(10, 40)]
    seen = []

    def answer(ids):
        seen.append(ids.clone())
        return torch.nn.functional.one_hot(torch.tensor([text + text])[:, : ids.shape[1]].expand_as(ids), 61).float() * 9

    assert probe.shift_of(answer, text, 60) is False
    rows = torch.cat(seen)
    changed = rows != torch.tensor(text)
    assert (changed.sum(1) == 1).all() and (rows[changed] == 60).all()
    places = sorted(changed.nonzero()[:, 1].tolist())
    assert places == sorted(set(places)) and not {0, 1, 4} & set(places) and len(places) == len(text) - 3
    seen.clear()
    assert probe.shift_of(answer, text + text, 60, block_size=32) is False and seen[0].shape[1] == 64


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
