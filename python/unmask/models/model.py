"""`Model`: a checkpoint ready to decode: config, backbone, LM head in tiles, tokenizer."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

import torch

from ..errors import SettingError
from ..ops.head_stats import Head
from ..ops.linear import Format, choose_format
from . import checkpoint
from .backbone import Backbone, Forward, KVCache, Layer, full_forward
from .config import ModelConfig
from .tokenizer import Tokenizer


class Logits(NamedTuple):
    """What `model(ids)` returns: logits [B, L, V], under the name that the authors' loops read."""

    logits: torch.Tensor


class Model(torch.nn.Module):
    """A diffusion LM. Every call runs one forward, and forward hooks count those calls.

    The decoder calls it with a packed `Forward` and a K/V cache, and gets hidden states [T, d_model]. Called with token ids [B, L], as
    the authors' own loops call theirs (`attention_mask=` may be given and must be all ones), it returns an object with `.logits` [B, L, V].

    config: ModelConfig. tokenizer: Tokenizer (`available` is False without a tokenizer.json: then only ids can be given). name: where it came from. format: how the
    linear weights are kept (see unmask.ops.linear).
    """

    def __init__(self, config: ModelConfig, backbone: Backbone, head: Head, tokenizer: Tokenizer, name: str, format: Format):
        super().__init__()
        self.config, self.backbone, self.head = config, backbone, head
        self.tokenizer, self.name, self.format = tokenizer, name, format

    @property
    def device(self) -> torch.device:
        return self.backbone.embed.device

    @property
    def dtype(self) -> torch.dtype:
        return self.backbone.embed.dtype

    def new_cache(self, rows: int, slots: int) -> KVCache:
        return KVCache(self.config, rows, slots, self.dtype, self.device)

    def forward(
        self, f: Forward | torch.Tensor | None = None, cache: KVCache | None = None, *, input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None, **others: object,
    ) -> torch.Tensor | Logits:  # fmt: skip
        f = input_ids if f is None else f
        if others:
            raise SettingError(
                f"a model from unmask.load takes ids and attention_mask, got {sorted(others)}; for cached decoding use unmask.generate or unmask.compat"
            )
        if attention_mask is not None and not bool((attention_mask != 0).all()):
            raise SettingError("attention_mask must be all ones here; unmask.compat.llada.generate takes padded prompts")
        if isinstance(f, torch.Tensor):
            return Logits(self._logits(f))
        if not isinstance(f, Forward):
            raise SettingError(f"a model is called with token ids int64 [B, L], got {type(f).__name__}")
        assert cache is not None, "a packed Forward needs a KVCache"
        return self.backbone(f, cache)

    def _apply(self, fn, recurse=True):
        """What .to(), .half(), .cuda() and their like call: packed weights cannot be converted, and a silent no-op would lie."""
        probe = fn(torch.empty(0, dtype=self.dtype, device=self.device))
        if probe.dtype != self.dtype or probe.device != self.device:
            raise SettingError(
                f"a loaded model keeps its dtype and device, {self.dtype} on {self.device}; load it again: unmask.load(..., dtype=..., device=...)"
            )
        return self

    def logits(self, ids: torch.Tensor) -> torch.Tensor:
        """Logits of whole sequences: ids int64 [B, L] -> [B, L, V] in the model's dtype, bidirectional, no cache, never shifted.

        It materialises [B, L, V]; decoding does not go through here.
        """
        return self(ids).logits

    @torch.inference_mode()
    def _logits(self, ids: torch.Tensor) -> torch.Tensor:
        if ids.dim() != 2 or ids.dtype != torch.int64:
            raise ValueError(f"logits: ids must be int64 [B, L], got {ids.dtype} {list(ids.shape)}")
        b, length = ids.shape
        if ids.numel() == 0:
            return torch.empty((b, length, self.config.vocab_size), dtype=self.dtype, device=self.device)
        check_ids(ids, self.config.vocab_size, "logits")
        hidden = self.backbone(full_forward(ids), self.new_cache(b, length))
        return self.head.logits(hidden)[: b * length].view(b, length, -1)

    def extra_repr(self) -> str:
        return f"{self.name}, {self.config.family}, {self.dtype}, linear weights {self.format}"


def check_ids(ids: torch.Tensor, vocab_size: int, where: str) -> None:
    """Raises ValueError naming the first token id outside [0, vocab_size)."""
    bad = torch.nonzero((ids < 0) | (ids >= vocab_size))
    if bad.numel():
        index = bad[0].tolist()
        raise ValueError(f"{where}: token id at {index} must be in 0..{vocab_size - 1}, got {int(ids[tuple(index)])}")


def build(info: checkpoint.CheckpointInfo, tokenizer: Tokenizer, name: str, dtype: torch.dtype | None, device: torch.device) -> Model:
    """Streams the tensors of a checked checkpoint into a Model: a layer's linears are packed as soon as its tensors are there."""
    config = info.config
    collected: dict[str, torch.Tensor] = {}
    layers: dict[int, Layer] = {}
    parts: dict[str, torch.Tensor] = {}
    head: Head | None = None
    format: Format | None = None
    need: dict[int, list[str]] = {i: [] for i in range(config.n_layers)}
    for tensor_name in info.tensors:
        if tensor_name.startswith("layers."):
            _, index, short = tensor_name.split(".")
            need[int(index)].append(short)
    for key, tensor in checkpoint.load_tensors(info, dtype, device):
        if format is None:
            format = choose_format(tensor.dtype, device, info.n_parameters)
        if key == "head":
            head = Head(tensor, format)
        elif key in ("embed", "final_norm"):
            parts[key] = tensor
        else:
            collected[key] = tensor
            index = int(key.split(".")[1])
            prefix = f"layers.{index}."
            if all(prefix + n in collected for n in need[index]):
                layers[index] = Layer(config, {n: collected.pop(prefix + n) for n in need[index]}, format)
    if head is None:  # tied: the head reads the embedding
        head = Head(parts["embed"], format)
    backbone = Backbone(config, parts["embed"], [layers[i] for i in range(config.n_layers)], parts["final_norm"])
    return Model(config, backbone, head, tokenizer, name, format).eval()


def random_model(config: ModelConfig, *, dtype: torch.dtype = torch.float32, seed: int = 0, std: float = 0.02, name: str = "random") -> Model:
    """A model of any shape with normal random weights, made in memory: for benches and tests of layouts that nobody has on disk.

    config: see ModelConfig. std: standard deviation of the linear weights and the embedding; norms are 1. Deterministic in seed.
    """
    generator = torch.Generator().manual_seed(seed)
    config = config.validate()
    format = choose_format(dtype, torch.device("cpu"), config.n_parameters)

    def normal(*shape: int) -> torch.Tensor:
        return (torch.randn(shape, generator=generator) * std).to(dtype)

    ones = torch.ones(config.d_model, dtype=dtype)
    q, kv = config.n_heads * config.head_dim, config.n_kv_heads * config.head_dim
    d, f = config.d_model, config.ffn_dim
    embed = normal(config.vocab_size, d)
    layers = []
    for _ in range(config.n_layers):
        w = dict(q=normal(q, d), k=normal(kv, d), v=normal(kv, d), o=normal(d, q), gate=normal(f, d), up=normal(f, d), down=normal(d, f))
        w.update(attn_norm=ones, mlp_norm=ones)
        if config.qkv_bias:
            w.update(q_bias=normal(q), k_bias=normal(kv), v_bias=normal(kv))
        if config.qk_norm:
            w.update(q_norm=torch.ones(config.head_dim, dtype=dtype), k_norm=torch.ones(config.head_dim, dtype=dtype))
        layers.append(Layer(config, w, format))
    head = Head(embed if config.tied_head else normal(config.vocab_size, d), format)
    tokenizer = Tokenizer(Path(name), config, None, None, {})
    return Model(config, Backbone(config, embed, layers, ones), head, tokenizer, name, format).eval()
