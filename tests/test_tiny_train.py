"""The trainer: LLaDA's architecture to the bit, masking that respects prompts, and runs that survive interruption."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from unmask.tiny import train
from unmask.tiny.network import Network, Shape, load_model
from unmask.tiny.tokenizer import EOS, MASK, build_tokenizer

GOLDEN = Path(__file__).parent / "golden" / "llada"
SMALL = Shape(vocab_size=224, d_model=32, n_layers=2, n_heads=2, mlp_hidden_size=48)


def run_steps(run: train.Run, steps: int, total: int = 6) -> None:
    tokenizer = build_tokenizer()
    while run.step < steps:
        batch = train.make_batch(tokenizer, 7, run.step, 8)
        train.one_step(run, batch, train.learning_rate(run.step, total, 1e-3), torch.float32)


def test_resumed_run_equals_straight_run(tmp_path: Path, threads) -> None:
    threads(1)
    straight = train.new_run(SMALL, 3, torch.device("cpu"))
    run_steps(straight, 6)
    first = train.new_run(SMALL, 3, torch.device("cpu"))
    run_steps(first, 3)
    first.save(tmp_path)
    resumed = train.new_run(SMALL, 99, torch.device("cpu"))
    resumed.load(tmp_path)
    assert resumed.step == 3
    run_steps(resumed, 6)
    for name, weight in straight.network.named_parameters():
        assert torch.equal(weight, dict(resumed.network.named_parameters())[name]), name
        assert torch.equal(straight.average[name], resumed.average[name]), name


def test_save_keeps_one_state_and_no_partial_files(tmp_path: Path) -> None:
    run = train.new_run(SMALL, 0, torch.device("cpu"))
    for steps in (1, 2):
        run_steps(run, steps)
        run.save(tmp_path)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["state-2.safetensors", "state.json"]


def test_masks_lie_in_the_answer_region_and_weights_on_masks() -> None:
    tokenizer = build_tokenizer()
    mask_id, eos_id, mark = (tokenizer.token_to_id(t) for t in (MASK, EOS, "\u2581=>"))
    lengths = set()
    for step in range(40):
        batch = train.make_batch(tokenizer, 0, step, 32)
        lengths.add(batch.noisy.shape[1])
        masked = batch.noisy == mask_id
        assert torch.equal(masked, batch.weight > 0)
        assert torch.equal(batch.noisy[~masked], batch.clean[~masked])
        before_mark = (batch.clean == mark).int().cumsum(1) == 0
        assert not (masked & (before_mark | (batch.clean == mark))).any()
        assert (batch.clean[:, -1] == eos_id).all(), "every row has room for its answer and an EOS"
        again = train.make_batch(tokenizer, 0, step, 32)
        assert torch.equal(batch.noisy, again.noisy) and torch.equal(batch.weight, again.weight)
    assert len(lengths) >= 3


def test_learning_rate_hold_does_not_depend_on_steps() -> None:
    assert [train.learning_rate(s, 5000, 1.0) for s in range(2400)] == [
        train.learning_rate(s, 4000, 1.0) for s in range(2400)
    ]
    assert 0 < train.learning_rate(4999, 5000, 1.0) < 1e-3


def test_small_run_from_the_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str], threads) -> None:
    out = tmp_path / "run"
    command = ["--out", str(out), "--steps", "2", "--rows", "4", "--threads", "1", "--dtype", "fp32"]
    command += ["--device", "cpu", "--final-count", "3"]
    train.main(command)
    assert "average" in capsys.readouterr().out
    network, config = load_model(out / "model")
    assert config["mask_token_id"] == 0 and network.shape.vocab_size == config["embedding_size"]
    assert (out / "model" / "tokenizer.json").exists() and (out / "model" / "tokenizer_config.json").exists()
    with pytest.raises(SystemExit, match="--resume"):
        train.main(command)
    train.main([*command, "--resume", "--steps", "3"])


def test_network_gives_the_authors_logits() -> None:
    network, _ = load_model(GOLDEN / "checkpoint")
    tensors = load_file(GOLDEN / "forward.safetensors")
    names = [key.split(".")[0] for key in tensors if key.endswith(".input_ids")]
    assert len(names) == 5
    for name in names:
        with torch.no_grad():
            logits = network(tensors[f"{name}.input_ids"].long())
        torch.testing.assert_close(logits, tensors[f"{name}.logits"], rtol=0, atol=1e-4)


def test_weight_names_are_lladas() -> None:
    names = set(Network(SMALL).state_dict())
    per_block = "attn_norm ff_norm q_proj k_proj v_proj attn_out ff_proj up_proj ff_out".split()
    expected = {f"model.transformer.blocks.{i}.{part}.weight" for i in range(2) for part in per_block}
    expected |= {f"model.transformer.{part}.weight" for part in ("wte", "ln_f", "ff_out")}
    assert names == expected
