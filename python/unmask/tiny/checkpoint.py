"""Folders of trained networks: config.json and model.safetensors."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

from safetensors.torch import load_file, save
from torch import Tensor, nn

N = TypeVar("N", bound=nn.Module)


def save_checkpoint(folder: Path, config: dict[str, object], weights: dict[str, Tensor]) -> None:
    """Write config.json and model.safetensors (fp32); each file appears whole or not at all."""
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {name: w.detach().float().cpu().contiguous() for name, w in weights.items()}
    (folder / "model.safetensors.part").write_bytes(save(tensors, metadata={"format": "pt"}))
    (folder / "config.json.part").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    for name in ("model.safetensors", "config.json"):
        (folder / f"{name}.part").replace(folder / name)


def load_checkpoint(folder: Path, network: Callable[[Any], N], shape: type) -> tuple[N, dict[str, object]]:
    """Read a folder written by `save_checkpoint`: the network in fp32 on the CPU, and its config.

    shape: the dataclass that `network` is built from; its fields are named as in config.json.
    """
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    built = network(shape(**{field.name: config[field.name] for field in dataclasses.fields(shape)}))
    built.load_state_dict({n: w.float() for n, w in load_file(folder / "model.safetensors").items()})
    return built.eval(), config
