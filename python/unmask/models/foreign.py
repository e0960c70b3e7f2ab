"""Any `torch.nn.Module` that returns logits, dressed as a model: what `unmask.generate` needs to know of it, read from its `config`."""

from __future__ import annotations

import dataclasses
from typing import Any

import torch

from ..errors import SettingError
from .tokenizer import Tokenizer

UNLIMITED = 1 << 31
"""Stands for a size that a module's config does not tell."""


@dataclasses.dataclass(frozen=True)
class ForeignConfig:
    """The few fields of a ModelConfig that decoding reads."""

    mask_id: int
    eos_ids: tuple[int, ...]
    vocab_size: int
    max_positions: int
    visibility: str = "bidirectional"
    n_layers: int = 0
    shifted: bool = False


class Foreign:
    """module: called as `module(ids)`, ids int64 [B, L]; returns logits [B, L, V] or an object with `.logits`. Bidirectional, not shifted.

    mask_id: read from module.config (mask_token_id or mask_id) if None. eos_token_id, vocab_size and the longest sequence come from there
    too, where it has them. There is no tokenizer: prompts and results are token ids.
    """

    format = "module"

    def __init__(self, module: torch.nn.Module, mask_id: int | None = None):
        config = getattr(module, "config", None)
        mask = mask_id if mask_id is not None else _field(config, "mask_token_id", "mask_id")
        if not isinstance(mask, int) or isinstance(mask, bool) or mask < 0:
            raise SettingError(
                f"{type(module).__name__} names no mask token (config.mask_token_id or config.mask_id); give module.config one, or use "
                "unmask.compat.llada.generate, which takes mask_id"
            )
        eos = _field(config, "eos_token_id")
        eos_ids = tuple(e for e in (eos if isinstance(eos, (list, tuple)) else [eos]) if isinstance(e, int))
        vocab = _field(config, "vocab_size")
        longest = _field(config, "max_sequence_length", "max_position_embeddings")
        self.module = module
        self.name = type(module).__name__
        self.config = ForeignConfig(
            mask, eos_ids, vocab if isinstance(vocab, int) else UNLIMITED, longest if isinstance(longest, int) else UNLIMITED
        )
        self.tokenizer = Tokenizer(self.name, self.config, None, None, {})  # type: ignore[arg-type]
        weight = next(iter(module.parameters()), torch.empty(0))
        self.dtype, self.device = weight.dtype, weight.device
        if self.device.type != "cpu":
            raise SettingError(f"the module must be on the CPU in this release (CUDA kernels of the whole loop are not finished), got {self.device}")


def _field(config: object, *names: str) -> Any:
    """The first of the fields that config (an object or a dict) has, None without."""
    for name in names:
        value = config.get(name) if isinstance(config, dict) else getattr(config, name, None)
        if value is not None:
            return value
    return None
