"""Text in, text out, with the embedded model: stop strings, chat, streams of text, determinism."""

from __future__ import annotations

import pytest

import unmask

PROMPT = "sort d a c =>"


@pytest.fixture(scope="module")
def model():
    return unmask.load("tiny")


def test_text_comes_back(model):
    result = unmask.generate(model, PROMPT)
    assert result.text == model.tokenizer.decode(result.ids) and result.prompt_ids == model.tokenizer.encode(PROMPT)
    assert result.finish_reason in ("eos", "length") and result.nfe >= 1 and result.seconds > 0
    assert result.settings["model"] == "tiny" and result.exact
    assert unmask.generate("tiny", PROMPT).text == result.text  # a name is loaded on the spot


def test_a_batch_of_texts(model):
    texts = [PROMPT, "reverse a b =>", ""]
    batch = unmask.generate(model, texts)
    assert [r.text for r in batch] == [unmask.generate(model, t).text for t in texts]


def test_stop_strings_cut_the_text(model):
    full = unmask.generate(model, "sort f d b =>", policy="quota")
    words = full.text.split()
    assert len(words) >= 2
    stop = words[1]
    cut = unmask.generate(model, "sort f d b =>", policy="quota", stop=stop)
    assert cut.finish_reason == "stop" and stop not in cut.text
    assert full.text.startswith(cut.text) and cut.ids == full.ids[: len(cut.ids)] and cut.nfe <= full.nfe
    assert unmask.generate(model, "sort f d b =>", policy="quota", stop=["never there"]).text == full.text


def test_a_stop_string_is_not_in_the_ids_either(model):
    full = unmask.generate(model, "sort f d b =>", policy="quota")
    for stop in {w for w in full.text.split()[1:]} | {" " + w for w in full.text.split()[1:]}:
        cut = unmask.generate(model, "sort f d b =>", policy="quota", stop=stop)
        assert stop not in model.tokenizer.decode(cut.ids) and cut.text.startswith(model.tokenizer.decode(cut.ids))
        assert cut.tokens_per_forward == len(cut.ids) / cut.nfe


def test_mistakes_answer_at_the_call(model):
    for settings in (dict(seeds=[1, 2]), dict(suppress=[999]), dict(policy="quota", steps=1, max_new_tokens=40, block_size=4)):
        with pytest.raises(unmask.SettingError):
            unmask.stream(model, PROMPT, **settings)


def test_suppressed_tokens_never_appear(model):
    plain = unmask.generate(model, PROMPT)
    banned = plain.ids[0]
    result = unmask.generate(model, PROMPT, suppress=[banned])
    assert banned not in result.ids


def test_dtypes(model):
    import torch

    assert model.dtype is torch.float32 or model.dtype is torch.bfloat16
    half = unmask.load("tiny", dtype="bf16")
    assert half.dtype is torch.bfloat16
    assert unmask.generate(half, PROMPT).text == unmask.generate(unmask.load("tiny", dtype="float32"), PROMPT).text
    with pytest.raises(unmask.SettingError, match="bfloat16"):
        unmask.load("tiny", dtype="float16")


def test_chat_without_a_template_is_refused_or_rendered(model):
    if model.tokenizer.chat_template is None:
        with pytest.raises(unmask.SettingError, match="chat template"):
            unmask.generate(model, PROMPT, chat=True)
    else:
        one = unmask.generate(model, PROMPT, chat=True)
        assert unmask.generate(model, [{"role": "user", "content": PROMPT}], chat=True).text == one.text


def test_the_model_serves_in_the_authors_own_loops(model):
    """model(ids).logits, as their code calls it; one call is one forward."""
    import torch

    calls = []
    handle = model.register_forward_hook(lambda *_: calls.append(1))
    ids = torch.randint(0, 50, (2, 9))
    logits = model(ids).logits
    handle.remove()
    assert logits.shape == (2, 9, model.config.vocab_size) and len(calls) == 1
    assert torch.equal(logits, model.logits(ids)) and torch.equal(logits[1:], model.logits(ids[1:]))
    assert model.logits(ids[:0]).shape == (0, 9, model.config.vocab_size)
    for bad, text in ((ids.float(), "ids must be int64"), (ids[0], r"ids must be int64 \[B, L\]"), (ids + 10**6, "must be in 0")):
        with pytest.raises(ValueError, match=text):
            model.logits(bad)


def test_load_overrides(model):
    other = unmask.load("tiny", overrides={"eos_ids": (3,)})
    assert other.config.eos_ids == (3,)
    with pytest.raises(unmask.SettingError, match="unknown config override 'mask'"):
        unmask.load("tiny", overrides={"mask": 3})
