"""Small checkpoints for the tests of unmask.models: written on the spot, then broken on purpose."""

from __future__ import annotations

import json
import os
import shutil
import struct
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from unmask.errors import CheckpointError
from unmask.models import inspect, load_tensors

GOLDEN = Path(__file__).resolve().parent / "golden" / "llada" / "checkpoint"


def golden_config(**changes) -> dict:
    """config.json of the golden checkpoint, with changes (a value of ... removes the field)."""
    config = json.loads((GOLDEN / "config.json").read_text())
    config.update(changes)
    return {name: value for name, value in config.items() if value is not ...}


def golden_tensors() -> dict[str, torch.Tensor]:
    return load_file(GOLDEN / "model.safetensors")


def write_config(folder: Path, config: dict | str) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(config if isinstance(config, str) else json.dumps(config))


def write_checkpoint(folder: Path, tensors: dict | None = None, **changes) -> Path:
    """A single-file checkpoint: the golden one, with other tensors or changed config fields."""
    write_config(folder, golden_config(**changes))
    if tensors is None:
        shutil.copy(GOLDEN / "model.safetensors", folder)
    else:
        save_file(tensors, folder / "model.safetensors")
    return folder


def write_shards(folder: Path, count: int = 3, tensors: dict | None = None) -> dict[str, str]:
    """The same checkpoint in `count` shards with an index; returns the index (tensor name -> file name)."""
    tensors = golden_tensors() if tensors is None else tensors
    write_config(folder, golden_config())
    names = sorted(tensors)
    index = {}
    for i in range(count):
        file = f"model-{i + 1:05d}-of-{count:05d}.safetensors"
        part = {name: tensors[name] for name in names[i::count]}
        save_file(part, folder / file)
        index |= dict.fromkeys(part, file)
    write_index(folder, index)
    return index


def write_index(folder: Path, index: dict | str) -> None:
    text = (
        index if isinstance(index, str) else json.dumps({"metadata": {"total_size": 0}, "weight_map": index})
    )
    (folder / "model.safetensors.index.json").write_text(text)


def write_cache(
    cache: Path, repo_id: str = "org/model", commit: str = "a1b2c3", source: Path = GOLDEN, main: bool = True
) -> Path:
    """A model in the Hugging Face cache layout, its files links into blobs; returns the snapshot folder."""
    root = cache / ("models--" + repo_id.replace("/", "--"))
    snapshot = root / "snapshots" / commit
    snapshot.mkdir(parents=True)
    (root / "blobs").mkdir(exist_ok=True)
    for i, file in enumerate(sorted(source.iterdir())):
        blob = root / "blobs" / f"{i:040x}"
        shutil.copy(file, blob)
        (snapshot / file.name).symlink_to(Path("..") / ".." / "blobs" / blob.name)
    if main:
        (root / "refs").mkdir(exist_ok=True)
        (root / "refs" / "main").write_text(commit)
    return snapshot


def header_of(file: Path) -> tuple[dict, bytes]:
    """(header, data) of a safetensors file."""
    raw = file.read_bytes()
    (size,) = struct.unpack("<Q", raw[:8])
    return json.loads(raw[8 : 8 + size]), raw[8 + size :]


def write_raw(file: Path, header: dict | bytes, data: bytes) -> None:
    """A safetensors file with any header, right or wrong."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    file.write_bytes(struct.pack("<Q", len(text)) + text + data)


def load(folder: Path, **arguments) -> dict[str, torch.Tensor]:
    return dict(load_tensors(inspect(folder), **arguments))


def problems(folder: Path) -> list[str]:
    with pytest.raises(CheckpointError) as caught:
        inspect(folder)
    return caught.value.problems


def assert_equal(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> None:
    assert a.keys() == b.keys()
    for name in a:
        assert torch.equal(a[name], b[name]), name


def environment() -> dict[str, str]:
    """Of a process that runs these sources with the op library that the tests use."""
    from unmask._library import LIBRARY_PATH

    source = str(Path(__file__).resolve().parent.parent / "python")
    path = source + os.pathsep + os.environ.get("PYTHONPATH", "")
    return os.environ | {"PYTHONPATH": path, "UNMASK_C_LIBRARY": str(LIBRARY_PATH)}
