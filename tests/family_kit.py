"""A family's golden checkpoint for its tests: written anew with changed fields or tensors, read, refused and built."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from models_kit import load, write_index
from plain_model import plain_forward
from unmask.errors import CheckpointError
from unmask.models import Tokenizer, inspect
from unmask.models.config import ModelConfig
from unmask.models.model import Model, build

BAD_INTEGERS = [0.5, 64.0, "64", True, [64, "x"], {}, float("nan"), -1, 10**9, 10**5000]
BAD_FLOATS = ["1", True, [], float("nan"), float("inf"), -1.0, 1e300]


def build_from(folder: Path, overrides: dict[str, Any] | None = None, dtype: torch.dtype | None = None) -> Model:
    info = inspect(folder, overrides=overrides)
    return build(info, Tokenizer.load(folder, info.config), info.config.family, dtype, torch.device("cpu"))


class Family:
    """module: the family file. config: its config.json as a dict; tensors: of the checkpoint. ids: fields that config lacks."""

    def __init__(self, module: ModuleType, config: dict[str, Any], tensors: dict[str, torch.Tensor], ids: dict[str, Any] | None = None):
        self.module, self.raw, self.tensors, self.ids = module, config, tensors, ids or {}

    @classmethod
    def golden(cls, module: ModuleType, name: str, ids: dict[str, Any] | None = None) -> Family:
        folder = Path(__file__).parent / "golden" / name / "checkpoint"
        return cls(module, json.loads((folder / "config.json").read_text()), load_file(folder / "model.safetensors"), ids)

    def config(self, **changes: Any) -> dict[str, Any]:
        """Its config.json with changes; ... removes a field."""
        return {name: value for name, value in (self.raw | self.ids | changes).items() if value is not ...}

    def read(self, changes: dict[str, Any] | None = None, generation: dict[str, Any] | None = None) -> ModelConfig:
        return self.module.read_config(self.config(**changes or {}), generation or {}).validate()

    def wrong(self, changes: dict[str, Any], generation: dict[str, Any] | None = None) -> list[str]:
        with pytest.raises(CheckpointError) as caught:
            self.read(changes, generation)
        return caught.value.problems

    def write(self, folder: Path, tensors: dict[str, torch.Tensor] | None = None, **changes: Any) -> Path:
        folder.mkdir(exist_ok=True)
        for old in folder.glob("*.safetensors*"):
            old.unlink()
        (folder / "config.json").write_text(json.dumps(self.config(**changes)))
        save_file(self.tensors if tensors is None else tensors, folder / "model.safetensors")
        return folder

    def write_shards(self, folder: Path, count: int) -> Path:
        """In `count` files, every layer spread over all of them."""
        self.write(folder)
        (folder / "model.safetensors").unlink()
        index = {}
        for i in range(count):
            part = {name: self.tensors[name] for name in sorted(self.tensors)[i::count]}
            file = f"model-{i + 1:05d}-of-{count:05d}.safetensors"
            save_file(part, folder / file)
            index |= dict.fromkeys(part, file)
        write_index(folder, index)
        return folder

    def without(self, *names: str) -> dict[str, torch.Tensor]:
        return {name: tensor for name, tensor in self.tensors.items() if name not in names}

    def random(self, changes: dict[str, Any], std: float = 0.2, seed: int = 0) -> dict[str, torch.Tensor]:
        """Random tensors of the layout that the changed config describes."""
        generator = torch.Generator().manual_seed(seed)
        specs = self.module.weight_map(self.read(changes)).values()
        return {s.name: torch.randn(s.shape, generator=generator) * std for s in specs}

    def check_against_the_definition(self, folder: Path, changes: dict[str, Any], length: int = 13, limit: float = 1e-5) -> Model:
        """A random model of the changed config gives the definition's logits; returns it."""
        model = build_from(self.write(folder, self.random(changes), **changes))
        ids = torch.randint(0, model.config.vocab_size, (2, length), generator=torch.Generator().manual_seed(1))
        expected = plain_forward(load(folder), model.config, ids)
        assert (model.logits(ids) - expected).abs().max() <= limit * expected.abs().max()
        return model


def copy_generation_config(name: str, folder: Path) -> None:
    shutil.copyfile(Path(__file__).parent / "golden" / name / "checkpoint" / "generation_config.json", folder / "generation_config.json")
