"""Tokenizers: text and back, the files around tokenizer.json, and everything that does not fit the model."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer as RustTokenizer
from tokenizers import decoders, models, pre_tokenizers, processors

from models_kit import GOLDEN, write_checkpoint
from unmask.errors import CheckpointError, SettingError
from unmask.models import Tokenizer, inspect

MASK, EOS, BOS = "<|mdm_mask|>", "<|endoftext|>", "<|startoftext|>"
CONFIG = inspect(GOLDEN).config  # mask 383, eos 381, vocabulary 384


def rust_tokenizer(largest: int = 383) -> RustTokenizer:
    """Bytes as tokens (ids 0-255, with holes above), and special tokens at the golden model's ids."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {token: i for i, token in enumerate(alphabet)} | {MASK: largest, EOS: 381, BOS: 380, "hello": 300}
    tokenizer = RustTokenizer(models.BPE(vocab, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([MASK, EOS, BOS])
    return tokenizer


def write(
    folder: Path, rust: RustTokenizer | str | bytes | None = None, settings: dict | str | None = None
) -> Path:
    write_checkpoint(folder)
    rust = rust_tokenizer() if rust is None else rust
    text = rust.to_str() if isinstance(rust, RustTokenizer) else rust
    (folder / "tokenizer.json").write_bytes(text if isinstance(text, bytes) else text.encode())
    if settings is not None:
        (folder / "tokenizer_config.json").write_text(
            settings if isinstance(settings, str) else json.dumps(settings)
        )
    return folder


def load(folder: Path) -> Tokenizer:
    return Tokenizer.load(folder, CONFIG)


def problems(folder: Path) -> list[str]:
    with pytest.raises(CheckpointError) as caught:
        load(folder)
    return caught.value.problems


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory) -> Tokenizer:
    return load(write(tmp_path_factory.mktemp("model")))


@given(text=st.text(max_size=100))
def test_round_trip(tokenizer, text):
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == text and tokenizer.decode(torch.tensor(ids, dtype=torch.long)) == text
    assert all(0 <= i < CONFIG.vocab_size for i in ids)


def test_special_tokens(tokenizer):
    ids = tokenizer.encode(f"a{MASK}b{EOS}")
    assert ids.count(383) == 1 and ids[-1] == 381
    assert tokenizer.decode(ids) == "ab" and tokenizer.decode(ids, skip_special=False) == f"a{MASK}b{EOS}"
    assert tokenizer.token_to_id(MASK) == 383 and tokenizer.id_to_token(383) == MASK
    assert tokenizer.token_to_id("nothing") is None and tokenizer.id_to_token(382) is None
    assert (tokenizer.mask_id, tokenizer.eos_ids, tokenizer.vocab_size) == (383, (381,), 260)


def test_ids_without_a_token_give_nothing(tokenizer):
    assert tokenizer.decode([382, 10**6, 4_000_000_000]) == ""
    assert tokenizer.decode([]) == "" and tokenizer.encode("") == []


@pytest.mark.parametrize("ids", [[-1], [2**32], [1.5], ["a"], [None], [True], torch.tensor([0.5])])
def test_bad_ids(tokenizer, ids):
    with pytest.raises(SettingError, match="ids must be integers"):
        tokenizer.decode(ids)
    with pytest.raises(SettingError, match="an id must be an integer"):
        tokenizer.id_to_token(ids[0])


def test_bad_text(tokenizer):
    with pytest.raises(SettingError, match="text must be a str, got bytes"):
        tokenizer.encode(b"x")
    with pytest.raises(SettingError, match="lone surrogates"):
        tokenizer.encode("\ud800")


def test_settings_of_a_training_run_are_dropped(tmp_path):
    rust = rust_tokenizer()
    rust.enable_truncation(4)
    rust.enable_padding(length=64)
    tokenizer = load(write(tmp_path, rust))
    assert len(tokenizer.encode("0123456789")) == 10 and len(tokenizer.encode("0")) == 1


def test_tokens_around_a_text(tmp_path):
    rust = rust_tokenizer()
    rust.post_processor = processors.TemplateProcessing(single=f"{BOS} $A", special_tokens=[(BOS, 380)])
    tokenizer = load(write(tmp_path, rust))
    assert tokenizer.encode("a")[0] == 380 and tokenizer.encode("a", add_special=False)[0] != 380


# --- files that are missing or wrong ----------------------------------------------------------------------------


def test_no_tokenizer(tmp_path):
    tokenizer = load(write_checkpoint(tmp_path))
    assert not tokenizer.available and tokenizer.chat_template is None
    for call in (lambda: tokenizer.encode("a"), lambda: tokenizer.decode([1]), lambda: tokenizer.vocab_size):
        with pytest.raises(CheckpointError, match="it has no tokenizer.json; pass ids instead"):
            call()
    with pytest.raises(SettingError, match="no chat template"):
        tokenizer.chat([{"role": "user", "content": "x"}])


GARBAGE = {
    "empty": b"",
    "text": b"hello",
    "object": b"{}",
    "list": b"[]",
    "deep": b"[" * 100_000,
    "deep objects": b'{"model":' * 100_000,
    "not utf-8": b"\xff\xfe\x00",
    "wrong model": b'{"version": "1.0", "model": {"type": "Nonsense"}}',
    "wrong vocab": b'{"version": "1.0", "added_tokens": [], "model": {"type": "WordLevel", "vocab": {"a": -1}, "unk_token": "a"}}',
    "wrong regex": b'{"version": "1.0", "added_tokens": [], "pre_tokenizer": {"type": "Split", "pattern": {"Regex": "(("}, '
    b'"behavior": "Isolated", "invert": false}, "model": {"type": "WordLevel", "vocab": {"a": 1}, "unk_token": "a"}}',
}


@pytest.mark.parametrize("name", GARBAGE)
def test_garbage(tmp_path, name):
    assert any("tokenizer.json" in problem for problem in problems(write(tmp_path, GARBAGE[name])))


def test_mutants_never_crash(tmp_path):
    import random

    rng, whole = random.Random(0), rust_tokenizer().to_str().encode()
    write(tmp_path)
    for _ in range(200):
        mutant = bytearray(whole)
        for _ in range(rng.choice((1, 1, 3))):
            mutant[rng.randrange(len(mutant))] = rng.randrange(256)
        if rng.random() < 0.2:
            mutant = mutant[: rng.randrange(len(mutant))]
        (tmp_path / "tokenizer.json").write_bytes(mutant)
        try:
            tokenizer = load(tmp_path)
        except CheckpointError:
            continue
        tokenizer.encode("hello world")


def test_a_tokenizer_beyond_the_size_limit(tmp_path, monkeypatch):
    from unmask.models import tokenizer as module

    monkeypatch.setattr(module, "TOKENIZER_BYTES", 100)
    assert any("at most 100 are read" in problem for problem in problems(write(tmp_path)))


def test_a_gigabyte_is_not_read(tmp_path):
    write(tmp_path)
    os.truncate(tmp_path / "tokenizer.json", 1 << 30)
    assert problems(tmp_path) == ["tokenizer.json: 1,073,741,824 bytes; at most 209,715,200 are read"]


def test_a_tokenizer_for_a_larger_model_names_both_sizes(tmp_path):
    rust = rust_tokenizer()
    rust.add_tokens([f"<extra {i}>" for i in range(200)])
    (problem,) = problems(write(tmp_path, rust))
    assert problem == "the tokenizer has ids up to 459 (460 tokens), but the model's vocabulary is 384"


def test_no_token_for_the_mask(tmp_path):
    (problem,) = problems(write(tmp_path, rust_tokenizer(largest=382)))
    assert problem == "the tokenizer (260 tokens) has no token for the mask id 383"


def test_links_out_of_the_folder(tmp_path):
    outside = write(tmp_path / "outside") / "tokenizer.json"
    folder = write_checkpoint(tmp_path / "model")
    (folder / "tokenizer.json").symlink_to(outside)
    assert "outside of" in problems(folder)[0]


def test_no_code_from_the_folder_runs(tmp_path):
    mark = tmp_path / "mark"
    settings = {"tokenizer_class": "X", "auto_map": {"AutoTokenizer": ["tokenization_x.X", None]}}
    folder = write(tmp_path / "model", settings=settings)
    (folder / "tokenization_x.py").write_text(f"open({str(mark)!r}, 'w')")
    script = (
        f"import unmask.models as m; m.Tokenizer.load('.', m.inspect({str(GOLDEN)!r}).config).encode('a')"
    )
    source = str(Path(__file__).resolve().parent.parent / "python")
    subprocess.run(
        [sys.executable, "-c", script], cwd=folder, env=os.environ | {"PYTHONPATH": source}, check=True
    )
    assert not mark.exists()


# --- tokenizer_config.json --------------------------------------------------------------------------------------


def test_tokens_that_only_the_settings_list_are_added(tmp_path):
    # The library gives a new token the next id above those of the model, with no holes.
    rust = RustTokenizer(models.WordLevel({f"w{i}": i for i in range(384 - 3)}, unk_token="w0"))
    added = {
        "382": {"content": "<b>", "special": True},
        "381": {"content": "<a>", "special": False},
        "383": {"content": MASK, "special": True},
    }
    tokenizer = load(write(tmp_path, rust, {"added_tokens_decoder": added}))
    assert [tokenizer.token_to_id(t) for t in ("<a>", "<b>", MASK)] == [381, 382, 383]
    assert tokenizer.decode([381, 382, 383]) == "<a>"


def test_contradicting_ids_of_added_tokens(tmp_path):
    (problem,) = problems(write(tmp_path, settings={"added_tokens_decoder": {"5": {"content": MASK}}}))
    assert problem == f"token '{MASK}' has id 383 in tokenizer.json, 5 in tokenizer_config.json"


@pytest.mark.parametrize(
    "settings",
    [
        "", "[]", "{" * 10_000, {"added_tokens_decoder": []}, {"added_tokens_decoder": {"x": {"content": "a"}}},
        {"added_tokens_decoder": {"1": "a"}}, {"added_tokens_decoder": {"1" * 5000: {"content": "a"}}},
        {"added_tokens_decoder": {"-1": {"content": "a"}}}, {"added_tokens_decoder": {"²": {"content": "a"}}},
        {"chat_template": 3}, {"chat_template": {"a": 1}}, {"bos_token": 3}, {"bos_token": {"text": []} | {"content": 4}},
        {"chat_template": [{"name": "default", "template": 4}]},
    ],
)  # fmt: skip
def test_broken_settings(tmp_path, settings):
    assert any("tokenizer_config.json" in problem for problem in problems(write(tmp_path, settings=settings)))


def test_all_problems_come_at_once(tmp_path):
    folder = write(tmp_path, rust_tokenizer(largest=382), {"chat_template": 3, "bos_token": 1})
    (folder / "chat_template.jinja").mkdir()
    assert len(problems(folder)) == 4


# --- chat -------------------------------------------------------------------------------------------------------

MESSAGES = [{"role": "user", "content": " Hi "}]
LLADA = f"{BOS}<|start_header_id|>user<|end_header_id|>\n\nHi<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\n"


def test_default_template_is_the_family_s(tmp_path):
    assert load(write(tmp_path)).chat(MESSAGES) == LLADA
    assert (
        load(tmp_path).chat(MESSAGES, add_generation_prompt=False)
        == LLADA[: LLADA.index("<|start_header_id|>assistant")]
    )


def test_a_tokenizer_without_the_family_s_tokens_has_no_default_template(tmp_path):
    rust = RustTokenizer(models.WordLevel({"a": 0, "[M]": 383, "[U]": 1}, unk_token="[U]"))
    tokenizer = load(write(tmp_path, rust))
    assert tokenizer.available and tokenizer.chat_template is None


def test_template_and_special_tokens_of_the_settings(tmp_path):
    settings = {
        "bos_token": {"content": "<s>", "special": True},
        "eos_token": "</s>",
        "chat_template": "{{ bos_token }}{{ messages[0]['content'] }}{{ eos_token }}{{ mood }}",
    }
    tokenizer = load(write(tmp_path, settings=settings))
    assert tokenizer.chat(MESSAGES, mood="!") == "<s> Hi </s>!"
    (tmp_path / "chat_template.jinja").write_text("from the file")
    assert load(tmp_path).chat(MESSAGES) == "from the file"


def test_named_templates(tmp_path):
    named = [{"name": "tools", "template": "t"}, {"name": "default", "template": "d"}]
    assert load(write(tmp_path, settings={"chat_template": named})).chat(MESSAGES) == "d"


def test_embedded_tokenizer_files(tmp_path):
    """What the training script of the embedded model writes is read as it should be."""
    from unmask.tiny.tokenizer import EOS as TINY_EOS
    from unmask.tiny.tokenizer import MASK as TINY_MASK
    from unmask.tiny.tokenizer import write_tokenizer

    write_tokenizer(tmp_path)
    rust = RustTokenizer.from_file(str(tmp_path / "tokenizer.json"))
    import dataclasses

    ids = {"mask_id": rust.token_to_id(TINY_MASK), "eos_ids": (rust.token_to_id(TINY_EOS),), "pad_id": None}
    tokenizer = Tokenizer.load(tmp_path, dataclasses.replace(CONFIG, **ids))
    assert tokenizer.chat([{"role": "user", "content": "sort d a c"}]) == "sort d a c =>"
    assert tokenizer.decode(tokenizer.encode("sort d a c =>")) == "sort d a c =>"


def test_embedded_model():
    from unmask.models import resolve

    folder = resolve("tiny")
    config = inspect(folder).config
    tokenizer = Tokenizer.load(folder, config)
    assert tokenizer.available and tokenizer.vocab_size <= config.vocab_size <= 256
    text = tokenizer.chat([{"role": "user", "content": "sort d a c"}])
    assert tokenizer.decode(tokenizer.encode(text, add_special=False)) == text == "sort d a c =>"
    assert sum(file.stat().st_size for file in folder.iterdir()) <= 8 << 20


def test_copying_the_folder_changes_nothing(tmp_path):
    write(tmp_path / "a")
    shutil.copytree(tmp_path / "a", tmp_path / "b")
    assert load(tmp_path / "b").encode("hello") == load(tmp_path / "a").encode("hello")
