"""The block-causal sibling of the embedded model: its checkpoint, what it knows at both block sizes, and how it was trained."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from safetensors import safe_open
from safetensors.torch import load_file
from tokenizers import Tokenizer

import unmask
from unmask.models.hub import EMBEDDED
from unmask.tiny import BLOCK_MODEL_DIR, FOLDERS, MODEL_DIR, evaluate, train
from unmask.tiny.block_causal import (
    BLOCK,
    KINDS,
    BlockBatch,
    block_ids,
    draw_masks,
    make_block_batch,
    packed_mask,
)
from unmask.tiny.network import Network, Shape, load_model
from unmask.tiny.sdar_network import BlockNetwork, BlockShape, from_llada, load_block_model
from unmask.tiny.tasks import TASKS, Example, held_out_examples
from unmask.tiny.tokenizer import EOS, MASK, build_tokenizer

GOLDEN = Path(__file__).parent / "golden" / "sdar"
SMALL = Shape(vocab_size=224, d_model=32, n_layers=2, n_heads=2, mlp_hidden_size=48)
ONE_ANSWER = [name for name, task in TASKS.items() if not task.many_answers]


@pytest.fixture(scope="module")
def network() -> BlockNetwork:
    return load_block_model(BLOCK_MODEL_DIR)[0]


@pytest.fixture(scope="module")
def model():
    return unmask.load("tiny-block")


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return build_tokenizer()


def ids_of(tokenizer: Tokenizer, *tokens: str) -> list[int]:
    return [tokenizer.token_to_id(token) for token in tokens]


def small_network(seed: int = 0) -> BlockNetwork:
    source = Network(SMALL)
    source.initialise(torch.Generator().manual_seed(seed))
    return from_llada(source, torch.randint(3, 224, (4, 16), generator=torch.Generator().manual_seed(seed)))


# --- the checkpoint ---------------------------------------------------------------------------------------------


def test_folder_is_small_and_complete() -> None:
    files = {p.name: p.stat().st_size for p in BLOCK_MODEL_DIR.iterdir()}
    assert set(files) == {"config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"}
    assert sum(files.values()) <= 8_000_000
    assert FOLDERS.keys() == EMBEDDED.keys() and all(FOLDERS[name].name == folder for name, folder in EMBEDDED.items())


def test_tokenizer_is_the_first_models() -> None:
    for name in ("tokenizer.json", "tokenizer_config.json"):
        assert (BLOCK_MODEL_DIR / name).read_bytes() == (MODEL_DIR / name).read_bytes()


def test_config_and_size() -> None:
    config = json.loads((BLOCK_MODEL_DIR / "config.json").read_text(encoding="utf-8"))
    assert config["model_type"] == "sdar" and config["block_size"] == BLOCK and config["head_dim"] == 32
    with safe_open(BLOCK_MODEL_DIR / "model.safetensors", "pt") as file:
        sizes = {name: math.prod(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118 (no dict)
    assert len(sizes) == 11 * config["num_hidden_layers"] + 3
    with safe_open(MODEL_DIR / "model.safetensors", "pt") as file:
        first = sum(math.prod(file.get_slice(name).get_shape()) for name in file.keys())  # noqa: SIM118
    assert 0 <= sum(sizes.values()) - first <= 2 * 32 * config["num_hidden_layers"], "only the norms of q and k are new"


def test_it_loads_as_a_block_causal_model(model) -> None:
    config = model.config
    assert config.family == "sdar" and config.visibility == "block_causal" and config.block_size == BLOCK
    assert config.qk_norm and not config.shifted and config.mask_id == 0 and config.eos_ids == (1,)
    result = unmask.generate(model, "close ([{ =>")
    assert result.text.strip() == "}])" and result.exact
    assert result.settings["block_size"] == BLOCK and result.settings["cache"] == "block"


def test_plain_network_and_library_give_equal_logits(model, network) -> None:
    ids = torch.randint(3, 224, (3, 23), generator=torch.Generator().manual_seed(1))
    ids[:, 12:18] = 0
    with torch.no_grad():
        torch.testing.assert_close(model.logits(ids), network(ids), rtol=0, atol=1e-3)


@pytest.mark.parametrize("threshold", [0.5, 0.9, None])
def test_exact_cache_equals_recomputing(model, tokenizer, threshold) -> None:
    prompts = [tokenizer.encode(e.prompt).ids for name in TASKS for e in held_out_examples(name, 6)]
    rule = {"policy": "quota"} if threshold is None else {"threshold": threshold}
    cached, recomputed = (unmask.generate(model, prompts, cache=cache, **rule) for cache in ("block", "none"))
    assert [r.ids for r in cached] == [r.ids for r in recomputed]
    assert all(r.exact for r in cached)


def test_later_blocks_change_nothing_before_them(network) -> None:
    ids = torch.randint(3, 224, (2, 20), generator=torch.Generator().manual_seed(2))
    other = ids.clone()
    other[:, 12:] = 0
    with torch.no_grad():
        assert torch.equal(network(ids)[:, :12], network(other)[:, :12])
        assert not torch.equal(network(ids)[:, 12:], network(other)[:, 12:])


# --- what it knows ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", TASKS)
@pytest.mark.parametrize("block_size", [BLOCK, 1])
def test_one_token_per_step_on_held_out_prompts(name: str, block_size: int, tokenizer: Tokenizer) -> None:
    """Block size 1 is the autoregressive model: every mask is alone and sees what is before it, token by token."""
    decode = evaluate.plain_decoder_of(BLOCK_MODEL_DIR, block_size)
    assert evaluate.score(held_out_examples(name, 60), tokenizer, decode, evaluate.ONE_PER_STEP, 32).accuracy >= 0.9


def test_low_thresholds_lose_where_one_block_holds_dependent_places(tokenizer) -> None:
    decode = evaluate.plain_decoder_of(BLOCK_MODEL_DIR)
    low, high = (evaluate.score(held_out_examples("finish", 60), tokenizer, decode, t, 32) for t in (0.5, 0.9))
    assert low.accuracy <= high.accuracy - 0.2
    assert low.tokens_per_forward > high.tokens_per_forward


def packed_answers(tokenizer: Tokenizer, examples: list[Example], whole_before: bool) -> BlockBatch:
    """Every answer position as a lone mask. whole_before: the finished blocks before a mask's own are whole, as a verifier
    of drafted blocks meets them; such a row is one block's answer, so examples become several rows."""
    mask_id, eos_id = ids_of(tokenizer, MASK, EOS)
    rows = []
    for example in examples:
        begin = len(tokenizer.encode(example.prompt).ids)
        ids = tokenizer.encode(f"{example.prompt} {example.answer}").ids
        clean = torch.tensor(ids + [eos_id] * (48 - len(ids)))
        chunks = [None] if not whole_before else range(begin // BLOCK, len(ids) // BLOCK + 1)
        for chunk in chunks:
            split = torch.ones(12, dtype=torch.bool) if chunk is None else torch.arange(12) == chunk
            scored = torch.arange(48)
            scored = (scored >= begin) & (scored <= len(ids)) & split.repeat_interleave(BLOCK)
            rows.append((clean, split, scored))
    clean, split, scored = (torch.stack(parts) for parts in zip(*rows, strict=True))
    blocks, position = block_ids(split), torch.arange(48).expand(len(rows), -1)
    return BlockBatch(
        torch.cat((torch.where(scored, mask_id, clean), clean), 1),
        torch.cat((position, position), 1),
        packed_mask(blocks, blocks),
        clean,
        scored.float(),
    )


@pytest.mark.parametrize("whole_before", [False, True])
def test_it_verifies_right_answers(whole_before: bool, network, tokenizer) -> None:
    """Block size 1 on the right answer: it likes nearly every token, after token-causal and after whole blocks alike."""
    examples = [e for name in ONE_ANSWER for e in held_out_examples(name, 12)]
    batch = packed_answers(tokenizer, examples, whole_before)
    with torch.no_grad():
        states = network.hidden(batch.ids, batch.positions, batch.mask)[:, : batch.target.shape[1]]
    chosen = batch.weight > 0
    logits, target = network.head(states[chosen]), batch.target[chosen]
    assert int(chosen.sum()) == sum(len(tokenizer.encode(e.answer).ids) + 1 for e in examples)
    assert (logits.argmax(-1) == target).float().mean() >= 0.99
    assert F.cross_entropy(logits, target).exp() <= 1.05


@pytest.mark.parametrize("threshold", [0.5, 0.9, evaluate.ONE_PER_STEP])
@pytest.mark.parametrize("block_size", [None, 1])
def test_library_decodes_the_same_tokens(threshold: float, block_size: int | None, tokenizer) -> None:
    prompts = [tokenizer.encode(e.prompt).ids for name in TASKS for e in held_out_examples(name, 6)]
    plain = evaluate.plain_decoder_of(BLOCK_MODEL_DIR, block_size)(prompts, threshold, 24)
    library = evaluate.library_decoder(BLOCK_MODEL_DIR, block_size)(prompts, threshold, 24)
    assert [row.ids for row in library] == [row.ids for row in plain]
    if threshold != evaluate.ONE_PER_STEP:  # where EOS confidences round to 1, which of them comes first is rounding too, and with it the row's end
        assert [row.nfe for row in library] == [row.nfe for row in plain]


def test_report_is_written(tmp_path: Path) -> None:
    evaluate.main(["--model", "tiny-block", "--out", str(tmp_path), "--count", "3", "--new-tokens", "24", "--threads", "1"])
    assert {p.name for p in tmp_path.iterdir()} >= {f"tiny-block-sweep.{ending}" for ending in ("json", "csv", "md")}
    report = json.loads((tmp_path / "tiny-block-sweep.json").read_text())
    assert report["block_size"] == BLOCK and report["command"].endswith("--model tiny-block")
    assert len(report["scores"]) == len(TASKS) * len(evaluate.THRESHOLDS) and len(report["block_size_1"]) == len(TASKS)
    assert "| block size 1 |" in (tmp_path / "tiny-block-sweep.md").read_text()
    with pytest.raises(SystemExit):
        evaluate.main(["--model", str(tmp_path)])


# --- how it was trained -----------------------------------------------------------------------------------------


def test_network_gives_the_authors_logits() -> None:
    network, _ = load_block_model(GOLDEN / "checkpoint")
    tensors = load_file(GOLDEN / "forward.safetensors")
    seen = 0
    for key, ids in tensors.items():
        name, _, kind = key.rpartition(".")
        if kind != "input_ids" or "block_causal" not in name:
            continue
        size = int(name.split("block_causal_")[1][0])
        with torch.no_grad():
            torch.testing.assert_close(network(ids.long(), size), tensors[f"{name}.logits"], rtol=0, atol=1e-4)
        seen += 1
    assert seen == 5


def test_packed_mask_against_its_definition() -> None:
    generator = torch.Generator().manual_seed(5)
    for trial in range(20):
        split = torch.rand(3, 5, generator=generator) < (0.0, 1.0, 0.5)[trial % 3]
        blocks = block_ids(split)
        first = int(torch.randint(0, 4, (1,), generator=generator)) * BLOCK
        mask = packed_mask(blocks[:, first:], blocks)
        width = 20 - first

        def block(row: int, position: int, split=split) -> tuple[int, int]:
            """First and last position of the block."""
            start = position // BLOCK * BLOCK
            return (position, position) if split[row, position // BLOCK] else (start, start + BLOCK - 1)

        for row in range(3):
            for i in range(width + 20):
                for j in range(width + 20):
                    of_i, of_j = (x + first if x < width else x - width for x in (i, j))
                    if j < width:
                        expected = i < width and block(row, of_i) == block(row, of_j)
                    else:
                        low, high = block(row, of_i)
                        expected = of_j < low if i < width else of_j <= high
                    assert bool(mask[row, i, j]) == expected, (trial, row, i, j)


def test_packed_forward_equals_decoding_blocks_one_by_one(tokenizer) -> None:
    """Every noised block, run alone behind its clean prefix under the row's own partition, gives the packed forward's logits."""
    network = small_network()
    for step in range(3):
        batch = make_block_batch(tokenizer, 3, step, 6)
        width = batch.target.shape[1]
        noised, clean = batch.ids[:, :width], batch.ids[:, width:]
        with torch.no_grad():
            packed = network.head(network.hidden(batch.ids, batch.positions, batch.mask))
            for row in range(6):
                for i in range(width):
                    own = batch.mask[row, i, :width]
                    start = int(batch.positions[row, :width][own][0])
                    length = start + int(own.sum())
                    mask = torch.ones(length, length, dtype=torch.bool)
                    mask[:start, :start] = batch.mask[row, width : width + start, width : width + start]
                    mask[:start, start:] = False
                    ids = torch.cat((clean[row, :start], noised[row, own]))
                    alone = network.head(network.hidden(ids[None], torch.arange(length)[None], mask[None]))
                    torch.testing.assert_close(alone[0, start:], packed[row, :width][own], rtol=0, atol=1e-4)


def test_batches_mask_answers_only_and_repeat(tokenizer) -> None:
    mask_id, eos_id, mark = ids_of(tokenizer, MASK, EOS, "\u2581=>")
    lengths, kept = set(), []
    for step in range(40):
        batch = make_block_batch(tokenizer, 0, step, 24)
        width = batch.target.shape[1]
        noised, clean = batch.ids[:, :width], batch.ids[:, width:]
        masked = noised == mask_id
        assert torch.equal(masked, batch.weight > 0) and not (clean == mask_id).any()
        assert torch.equal(noised[~masked], batch.target[~masked])
        assert torch.equal(batch.target, clean.gather(1, batch.positions[:, :width]))
        ends = (clean == mark).int().argmax(1)[:, None]
        assert (batch.positions[:, :width][masked] > ends.expand(-1, width)[masked]).all()
        assert (clean[:, -1] == eos_id).all() and clean.shape[1] % BLOCK == 0
        answers = (batch.positions[:, width:] > ends) & ((clean == eos_id).int().cumsum(1) <= 1)
        covered = torch.zeros_like(clean, dtype=torch.bool).scatter_(1, batch.positions[:, :width], True)
        assert not (answers & ~covered).any(), "the noised part holds every answer position"
        again = make_block_batch(tokenizer, 0, step, 24)
        assert all(torch.equal(a, b) for a, b in zip(vars(batch).values(), vars(again).values(), strict=True))
        lengths.add(clean.shape[1])
        whole = batch.mask[:, width:, width:][:, ::BLOCK, BLOCK - 1 :: BLOCK].diagonal(dim1=1, dim2=2)  # the first sees the last
        kept.append(torch.stack((whole.all(1), (~whole).all(1)), 1))
    assert len(lengths) >= 3
    all_whole, all_split = torch.cat(kept).float().mean(0).tolist()
    assert 0.3 < all_whole < 0.45 and 0.3 < all_split < 0.45  # a third each, and a few of the rest by chance
    assert all(set(shares) <= set(TASKS) for *_, shares in KINDS)
    assert set().union(*(shares for *_, shares in KINDS)) == set(TASKS)


def test_masks_of_blocks() -> None:
    generator = torch.Generator().manual_seed(0)
    split = torch.tensor([[False, True, False, False]]).expand(4000, -1)
    eligible = (torch.arange(16) >= 3).expand(4000, -1)
    masked, weight = draw_masks(split, eligible, generator)
    assert torch.equal(masked, weight > 0) and not masked[:, :3].any()
    assert masked[:, 3].all(), "a block with one eligible position masks it"
    assert masked[:, 4:8].all() and (weight[:, 4:8] == 1).all()
    counts = masked[:, 8:12].sum(1)
    shares = torch.bincount(counts, minlength=5) / 4000
    assert shares[0] == 0 and (shares[1:] - 0.25).abs().max() < 0.03
    assert (masked[:, 8:12].float().mean(0) - 0.625).abs().max() < 0.03, "no place is preferred"
    for count, expected in ((1, 2.5), (2, 2.0), (3, 4 / 3), (4, 1.0)):
        rows = counts == count
        assert torch.allclose(weight[rows, 8:12][masked[rows, 8:12]], torch.tensor(expected))


def test_conversion_keeps_every_weight_and_fits_the_norms() -> None:
    source, _ = load_model(MODEL_DIR)
    sample = train.make_batch(build_tokenizer(), 0, 3500, 16).noisy
    network = from_llada(source, sample)
    ours, theirs = dict(network.named_parameters()), dict(source.named_parameters())
    assert torch.equal(ours["model.layers.1.mlp.gate_proj.weight"], theirs["model.transformer.blocks.1.ff_proj.weight"])
    assert torch.equal(ours["model.layers.2.self_attn.o_proj.weight"], theirs["model.transformer.blocks.2.attn_out.weight"])
    assert torch.equal(ours["lm_head.weight"], theirs["model.transformer.ff_out.weight"])
    with torch.no_grad():
        first = source.model["transformer"]["blocks"][0]
        q = first.q_proj(first.attn_norm(source.model["transformer"]["wte"](sample))).unflatten(-1, (6, 32))
    norm = ours["model.layers.0.self_attn.q_norm.weight"]
    assert torch.allclose(norm, q.square().mean(-1).sqrt().mean().expand(32), rtol=1e-4)


def test_a_few_steps_reduce_the_loss(tokenizer, threads) -> None:
    threads(1)
    run = train.run_of(small_network(), torch.device("cpu"))
    losses = [train.one_step(run, make_block_batch(tokenizer, 1, step, 16), 3e-3, torch.float32) for step in range(40)]
    assert sum(losses[-8:]) < 0.75 * sum(losses[:8])


def test_resumed_run_equals_straight_run(tmp_path: Path, tokenizer, threads) -> None:
    threads(1)

    def go_on(run: train.Run, steps: int) -> train.Run:
        while run.step < steps:
            train.one_step(run, make_block_batch(tokenizer, 7, run.step, 8), 1e-3, torch.float32)
        return run

    straight = go_on(train.run_of(small_network(), torch.device("cpu")), 4)
    go_on(train.run_of(small_network(), torch.device("cpu")), 2).save(tmp_path)
    resumed = train.run_of(small_network(9), torch.device("cpu"))
    resumed.load(tmp_path)
    go_on(resumed, 4)
    for name, weight in straight.network.named_parameters():
        assert torch.equal(weight, dict(resumed.network.named_parameters())[name]), name
        assert torch.equal(straight.average[name], resumed.average[name]), name


def test_small_run_from_the_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str], threads) -> None:
    out = tmp_path / "run"
    command = ["--model", "tiny-block", "--out", str(out), "--steps", "2", "--rows", "4", "--threads", "1"]
    train.main([*command, "--dtype", "fp32", "--device", "cpu", "--final-count", "3"])
    assert "finish@1" in capsys.readouterr().out
    network, config = load_block_model(out / "model")
    assert network.shape == BlockShape(vocab_size=224) and config["model_type"] == "sdar"
    assert unmask.load(out / "model").config.visibility == "block_causal"
    with pytest.raises(SystemExit, match="another model"):
        train.main(["--out", str(out), "--resume", "--threads", "1", "--dtype", "fp32", "--device", "cpu"])
