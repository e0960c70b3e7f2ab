"""The embedded checkpoint: what it must be (layout, size) and what it must know (held-out accuracy)."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from tokenizers import Tokenizer

from unmask.tiny import MODEL_DIR, evaluate
from unmask.tiny.network import load_model
from unmask.tiny.tasks import TASKS, held_out_examples
from unmask.tiny.tokenizer import build_tokenizer, write_tokenizer


@pytest.fixture(scope="module")
def decode() -> evaluate.Decode:
    return evaluate.plain_decoder_of(MODEL_DIR)


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer.from_file(str(MODEL_DIR / "tokenizer.json"))


def test_folder_is_small_and_complete() -> None:
    files = {p.name: p.stat().st_size for p in MODEL_DIR.iterdir()}
    assert set(files) == {"config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"}
    assert sum(files.values()) <= 8_000_000


def test_config_and_tensors_agree() -> None:
    config = json.loads((MODEL_DIR / "config.json").read_text(encoding="utf-8"))
    assert config["model_type"] == "llada" and config["n_layers"] == 4 and 192 <= config["d_model"] <= 256
    assert config["vocab_size"] == config["embedding_size"] <= 256
    with safe_open(MODEL_DIR / "model.safetensors", "pt") as file:
        assert len(list(file.keys())) == 9 * config["n_layers"] + 3
        assert file.get_slice("model.transformer.wte.weight").get_shape() == [
            config["vocab_size"],
            config["d_model"],
        ]


def test_tokenizer_files_are_what_the_code_writes(tmp_path: Path) -> None:
    write_tokenizer(tmp_path)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        assert json.loads((tmp_path / name).read_text()) == json.loads((MODEL_DIR / name).read_text())
    config = json.loads((MODEL_DIR / "config.json").read_text())
    for key, token in (
        ("mask_token_id", "<|mask|>"),
        ("eos_token_id", "<|eos|>"),
        ("pad_token_id", "<|eos|>"),
    ):
        assert build_tokenizer().token_to_id(token) == config[key]


def test_chat_template_adds_the_mark_once() -> None:
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    config = json.loads((MODEL_DIR / "tokenizer_config.json").read_text())
    template = ImmutableSandboxedEnvironment().from_string(config["chat_template"])
    for typed in ("sort b a", "sort b a =>", " sort b a "):
        assert template.render(messages=[{"role": "user", "content": typed}]) == "sort b a =>"


@pytest.mark.parametrize("name", TASKS)
def test_one_token_per_step_on_held_out_prompts(
    name: str, decode: evaluate.Decode, tokenizer: Tokenizer
) -> None:
    examples = held_out_examples(name, 60)
    assert evaluate.score(examples, tokenizer, decode, evaluate.ONE_PER_STEP, 32).accuracy >= 0.8


@pytest.mark.parametrize("name", [n for n, t in TASKS.items() if t.many_answers])
def test_threshold_half_loses_on_many_answers(
    name: str, decode: evaluate.Decode, tokenizer: Tokenizer
) -> None:
    examples = held_out_examples(name, 60)
    low, high = (evaluate.score(examples, tokenizer, decode, t, 32) for t in (0.5, 0.95))
    assert low.accuracy <= high.accuracy - 0.05
    assert low.tokens_per_forward > high.tokens_per_forward


@pytest.mark.parametrize("new_tokens", [16, 24, 32, 48])
def test_canvas_length_hardly_matters(new_tokens: int, decode: evaluate.Decode, tokenizer: Tokenizer) -> None:
    right = total = 0
    for name in set(TASKS) - {"json"}:  # a record may need more than 16 tokens
        result = evaluate.score(held_out_examples(name, 15), tokenizer, decode, 0.95, new_tokens)
        right, total = right + result.right, total + result.prompts
    assert right / total >= 0.85


def test_rows_do_not_depend_on_their_batch(decode: evaluate.Decode, tokenizer: Tokenizer) -> None:
    prompts = [tokenizer.encode(e.prompt).ids for e in held_out_examples("sort", 12)]
    together = decode(prompts, 0.9, 32)
    alone = [decode([p], 0.9, 32)[0] for p in prompts]
    assert together == alone


def test_decoder_never_writes_the_mask_and_always_ends() -> None:
    class AllMask(torch.nn.Module):
        def forward(self, ids: torch.Tensor) -> torch.Tensor:
            logits = torch.zeros(*ids.shape, 5)
            logits[..., 0] = 50.0
            return logits

    canvas = torch.tensor([[3, 0, 0, 0]])
    (row,) = evaluate.decode_batch(AllMask(), canvas, 1, 0.9, mask_id=0, eos_id=4)
    assert row.ids == [1, 1, 1] and row.nfe == 3


@pytest.mark.parametrize("threshold", [0.5, 0.9, evaluate.ONE_PER_STEP])
def test_library_decodes_the_same_tokens(
    threshold: float, decode: evaluate.Decode, tokenizer: Tokenizer
) -> None:
    """The library's own loader, backbone, ops and loop against the plain PyTorch ones: same tokens, same forwards."""
    library = evaluate.library_decoder(MODEL_DIR)
    prompts = [tokenizer.encode(e.prompt).ids for name in TASKS for e in held_out_examples(name, 8)]
    assert library(prompts, threshold, 24) == decode(prompts, threshold, 24)


def test_report_is_written(tmp_path: Path) -> None:
    evaluate.main(["--out", str(tmp_path), "--count", "4", "--new-tokens", "24"])
    names = {p.name for p in tmp_path.iterdir()}
    assert {"tiny-sweep.json", "tiny-sweep.csv", "tiny-sweep.md"} <= names
    report = json.loads((tmp_path / "tiny-sweep.json").read_text())
    assert len(report["scores"]) == len(TASKS) * len(evaluate.THRESHOLDS)


def test_damaged_checkpoint_is_refused(tmp_path: Path) -> None:
    folder = tmp_path / "model"
    shutil.copytree(MODEL_DIR, folder)
    whole = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(Exception, match="(?i)safetensor|header|deserializ|incomplete"):
        load_model(folder)
