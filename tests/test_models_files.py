"""Every way the files of a checkpoint folder can be wrong: truncated, lying, missing, linked elsewhere, executable."""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from models_kit import (
    GOLDEN,
    assert_equal,
    environment,
    golden_config,
    golden_tensors,
    header_of,
    load,
    problems,
    write_cache,
    write_checkpoint,
    write_config,
    write_index,
    write_raw,
    write_shards,
)
from unmask.errors import CheckpointError
from unmask.models import inspect, load_tensors

ROOT = "model.transformer."


# --- files ------------------------------------------------------------------------------------------------------


def test_no_folder_no_config_no_weights(tmp_path):
    with pytest.raises(CheckpointError, match="not a folder"):
        inspect(tmp_path / "nothing")
    with pytest.raises(CheckpointError, match="not a folder"):
        inspect(GOLDEN / "config.json")
    assert problems(tmp_path) == [
        "config.json is missing or empty",
        "no weights: neither model.safetensors nor model.safetensors.index.json",
    ]


def test_truncation_at_many_offsets(tmp_path):
    write_checkpoint(tmp_path)
    whole = (GOLDEN / "model.safetensors").read_bytes()
    size = len(whole)
    rng = random.Random(0)
    for cut in [0, 1, 7, 8, 9, 100, size // 2, size - 4, size - 1, *(rng.randrange(size) for _ in range(50))]:
        (tmp_path / "model.safetensors").write_bytes(whole[:cut])
        assert any(p.startswith("model.safetensors is truncated or corrupt") for p in problems(tmp_path)), cut
    (tmp_path / "model.safetensors").write_bytes(whole + b"\0")
    assert problems(tmp_path)


def test_mutated_headers_never_crash(tmp_path):
    write_checkpoint(tmp_path)
    whole = (GOLDEN / "model.safetensors").read_bytes()
    length = 8 + int.from_bytes(whole[:8], "little")
    rng = random.Random(0)
    outcomes = {"loaded": 0, "refused": 0}
    for _ in range(400):
        mutant = bytearray(whole)
        for _ in range(rng.choice((1, 1, 1, 2, 8))):
            position = rng.randrange(8) if rng.random() < 0.1 else rng.randrange(length)
            mutant[position] = rng.choice(
                (rng.randrange(256), mutant[position] ^ (1 << rng.randrange(8)), 0x30, 0x22)
            )
        (tmp_path / "model.safetensors").write_bytes(mutant)
        try:
            weights = load(tmp_path)
        except CheckpointError as error:
            outcomes["refused"] += 1
            assert error.problems
        else:  # a mutant of padding or metadata, or of the same value: then it is the whole model
            outcomes["loaded"] += 1
            assert len(weights) == 30
    assert outcomes["refused"] > 330, outcomes


@pytest.mark.parametrize(
    "change",
    [
        lambda h: h[ROOT + "wte.weight"].update(shape=[384, 64, 1]),
        lambda h: h[ROOT + "wte.weight"].update(shape=[-1, 64]),
        lambda h: h[ROOT + "wte.weight"].update(shape=[2**62, 64]),
        lambda h: h[ROOT + "wte.weight"].update(shape=[384.0, 64]),
        lambda h: h[ROOT + "wte.weight"].update(dtype="F7"),
        lambda h: h[ROOT + "wte.weight"].update(data_offsets=[0, 10**15]),
        lambda h: h[ROOT + "wte.weight"].update(data_offsets=[2**63, 2**64 - 1]),
        lambda h: h[ROOT + "wte.weight"].update(data_offsets=[0, 4]),
        lambda h: h[ROOT + "wte.weight"].update(data_offsets=[4, 0]),
        lambda h: h[ROOT + "wte.weight"].pop("shape"),
        lambda h: h.update({"__metadata__": {"a": 1}}),
        lambda h: h.update({"overlap": dict(h[ROOT + "wte.weight"])}),
    ],
)
def test_lying_headers(tmp_path, change):
    write_checkpoint(tmp_path)
    header, data = header_of(GOLDEN / "model.safetensors")
    change(header)
    write_raw(tmp_path / "model.safetensors", header, data)
    assert problems(tmp_path)


@pytest.mark.parametrize(
    "header", [b"", b"{}", b"[]", b"null", b"{" * 100_000, b'{"a":' * 50_000, b"\xff" * 100]
)
def test_headers_that_are_no_headers(tmp_path, header):
    write_checkpoint(tmp_path)
    write_raw(tmp_path / "model.safetensors", header, b"")
    assert problems(tmp_path)


@pytest.mark.parametrize("size", [0, 2**63, 2**64 - 1, 100_000_001])
def test_absurd_header_sizes(tmp_path, size):
    write_checkpoint(tmp_path)
    (tmp_path / "model.safetensors").write_bytes(size.to_bytes(8, "little") + b"{}" + b"\0" * 100)
    assert problems(tmp_path)


def test_a_duplicate_name_in_a_header(tmp_path):
    write_checkpoint(tmp_path)
    header, data = header_of(GOLDEN / "model.safetensors")
    text = json.dumps(header)
    entry = json.dumps(header[ROOT + "ln_f.weight"])
    twice = (
        text[:-1] + f', "{ROOT}ln_f.weight": {{"dtype": "F32", "shape": [64], "data_offsets": [0, 256]}}}}'
    )
    assert entry in text
    write_raw(tmp_path / "model.safetensors", twice.encode(), data)
    assert problems(tmp_path)


def test_a_fifo_or_folder_in_place_of_the_weights(tmp_path):
    write_config(tmp_path, golden_config())
    os.mkfifo(tmp_path / "model.safetensors")
    assert problems(tmp_path) == ["'model.safetensors' is not a regular file"]
    (tmp_path / "model.safetensors").unlink()
    (tmp_path / "model.safetensors").mkdir()
    assert problems(tmp_path) == ["'model.safetensors' is not a regular file"]


def test_a_file_that_changes_after_the_checks(tmp_path):
    write_checkpoint(tmp_path)
    info = inspect(tmp_path)
    save_file({n: t.bfloat16() for n, t in golden_tensors().items()}, tmp_path / "model.safetensors")
    with pytest.raises(CheckpointError, match="changed while loading"):
        dict(load_tensors(info))
    (tmp_path / "model.safetensors").unlink()
    with pytest.raises(CheckpointError, match="changed while loading"):
        dict(load_tensors(info))


# --- index ------------------------------------------------------------------------------------------------------


def test_missing_shard_is_named_once(tmp_path):
    write_shards(tmp_path, 3)
    (tmp_path / "model-00002-of-00003.safetensors").unlink()
    found = problems(tmp_path)
    assert found[0] == "shard 'model-00002-of-00003.safetensors' is missing"
    assert sum(p.startswith("missing tensor") for p in found) == 10


def test_truncated_shard(tmp_path):
    write_shards(tmp_path, 3)
    shard = tmp_path / "model-00003-of-00003.safetensors"
    shard.write_bytes(shard.read_bytes()[:-100])
    found = problems(tmp_path)
    assert found[0].startswith("model-00003-of-00003.safetensors is truncated or corrupt")


def test_a_tensor_in_two_shards(tmp_path):
    index = write_shards(tmp_path, 2)
    name, shard = next(iter(index.items()))
    other = next(file for file in index.values() if file != shard)
    save_file(load_file(tmp_path / other) | {name: golden_tensors()[name]}, tmp_path / other)
    assert any("is in more than one file" in p for p in problems(tmp_path))


def test_index_and_shards_disagree(tmp_path):
    index = write_shards(tmp_path, 2)
    moved = dict(index)
    name = ROOT + "ln_f.weight"
    moved[name] = next(file for file in index.values() if file != index[name])
    write_index(tmp_path, moved)
    found = problems(tmp_path)
    assert found == [
        f"tensor '{name}' is in {index[name]}, but model.safetensors.index.json says {moved[name]}"
    ]
    write_index(tmp_path, {n: f for n, f in index.items() if n != name})
    assert problems(tmp_path) == [f"tensor '{name}' of {index[name]} is not in model.safetensors.index.json"]
    write_index(tmp_path, index | {"ghost": index[name]})
    assert problems(tmp_path) == [
        f"tensor 'ghost' is not in {index[name]}, where model.safetensors.index.json says it is"
    ]


@pytest.mark.parametrize(
    "file",
    [
        "../x.safetensors", "../../x.safetensors", "/etc/x.safetensors", "sub/x.safetensors", "..\\x.safetensors",
        "./x.safetensors", "x\0.safetensors", "a" * 5000 + ".safetensors",
    ],
)  # fmt: skip
def test_shard_paths_are_confined(tmp_path, file):
    folder = tmp_path / "model"
    index = write_shards(folder, 1)
    save_file(golden_tensors(), tmp_path / "x.safetensors")
    (folder / "sub").mkdir()
    save_file(golden_tensors(), folder / "sub" / "x.safetensors")
    write_index(folder, dict.fromkeys(index, file))
    with pytest.raises(CheckpointError, match="plain name inside the folder|too long"):
        inspect(folder)


@pytest.mark.parametrize("file", [None, 3, [], {}, "model.bin", "", "model.safetensors.py"])
def test_shards_must_be_safetensors(tmp_path, file):
    index = write_shards(tmp_path, 1)
    write_index(tmp_path, index | {ROOT + "ln_f.weight": file})
    assert any("which is no .safetensors file" in p for p in problems(tmp_path))


@pytest.mark.parametrize(
    "index", ["", "[]", "{}", '{"weight_map": []}', '{"weight_map": {}}', '{"weight_map": 3}', "{" * 99999]
)
def test_broken_indexes(tmp_path, index):
    write_shards(tmp_path, 1)
    write_index(tmp_path, index)
    assert any("model.safetensors.index.json" in p for p in problems(tmp_path))


def test_single_file_and_index_together_are_ambiguous(tmp_path):
    write_shards(tmp_path, 2)
    write_checkpoint(tmp_path)
    assert problems(tmp_path) == [
        "both model.safetensors and model.safetensors.index.json are present: remove the one that is not meant"
    ]


def test_shards_without_an_index(tmp_path):
    write_shards(tmp_path, 2)
    (tmp_path / "model.safetensors.index.json").unlink()
    assert problems(tmp_path)[0].startswith("2 .safetensors files but no model.safetensors.index.json")


# --- links ------------------------------------------------------------------------------------------------------


def test_links_out_of_the_folder_are_refused(tmp_path):
    outside = write_checkpoint(tmp_path / "outside")
    for name in ("config.json", "model.safetensors"):
        folder = write_checkpoint(tmp_path / f"inside-{name}")
        (folder / name).unlink()
        (folder / name).symlink_to(outside / name)
        assert any("outside of" in p for p in problems(folder))


def test_links_within_the_folder_and_to_the_folder_work(tmp_path):
    folder = write_checkpoint(tmp_path / "model")
    (folder / "model.safetensors").rename(folder / "data.bin")
    (folder / "model.safetensors").symlink_to("data.bin")
    (tmp_path / "link").symlink_to("model")
    assert_equal(load(tmp_path / "link"), load(GOLDEN))


def test_the_cache_links_work_but_not_beyond_the_model(tmp_path):
    snapshot = write_cache(tmp_path)
    assert_equal(load(snapshot), load(GOLDEN))
    other = write_cache(tmp_path, "org/other")
    (snapshot / "model.safetensors").unlink()
    (snapshot / "model.safetensors").symlink_to(other.parent.parent / "blobs" / f"{1:040x}")
    assert any("outside of" in p for p in problems(snapshot))


def test_broken_and_looping_links(tmp_path):
    folder = write_checkpoint(tmp_path)
    (folder / "model.safetensors").unlink()
    (folder / "model.safetensors").symlink_to("gone")
    assert problems(folder) == ["model.safetensors is a broken link (incomplete download?)"]
    (folder / "model.safetensors").unlink()
    (folder / "model.safetensors").symlink_to("model.safetensors")
    assert len(problems(folder)) == 1


# --- nothing from the folder runs -------------------------------------------------------------------------------


class Bomb:
    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self):
        return os.system, (f"touch {self.path}",)


def test_booby_trapped_folder(tmp_path):
    mark = tmp_path / "mark"
    folder = write_checkpoint(
        tmp_path / "model",
        auto_map={"AutoModel": "modeling_x.X", "AutoConfig": "configuration_x.C"},
        trust_remote_code=True,
    )
    code = f"open({str(mark)!r}, 'w').close()\n"
    for name in (
        "modeling_x.py",
        "configuration_x.py",
        "__init__.py",
        "conftest.py",
        "tokenization_x.py",
        "config.py",
    ):
        (folder / name).write_text(code)
    for name in ("pytorch_model.bin", "model.pt", "model.ckpt", "training_args.bin", "optimizer.pth"):
        torch.save(Bomb(mark), folder / name)
    script = f"import unmask.models as m; info = m.inspect({str(folder)!r}); print(len(dict(m.load_tensors(info))))"
    done = subprocess.run(
        [sys.executable, "-c", script], cwd=folder, env=environment(), capture_output=True, text=True
    )
    assert done.stdout.strip() == "30", done.stderr
    assert not mark.exists()


@pytest.mark.parametrize("suffix", ["bin", "pt", "pth", "ckpt", "pkl"])
def test_pickle_only_is_refused_with_a_hint(tmp_path, suffix):
    mark = tmp_path / "mark"
    folder = tmp_path / "model"
    write_config(folder, golden_config())
    torch.save(Bomb(mark), folder / f"pytorch_model.{suffix}")
    (problem,) = problems(folder)
    assert (
        problem.startswith(f"no safetensors, only pytorch_model.{suffix}: pickle files can run code")
        and "save_file" in problem
    )
    assert not mark.exists()


def test_a_pickle_under_a_safetensors_name(tmp_path):
    mark = tmp_path / "mark"
    folder = tmp_path / "model"
    write_config(folder, golden_config())
    torch.save(Bomb(mark), folder / "model.safetensors")
    assert len(problems(folder)) == 1 and not mark.exists()
