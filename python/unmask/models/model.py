"""`Model`: a checkpoint ready to decode: config, backbone, LM head in tiles, tokenizer."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import torch

from ..errors import SettingError
from ..ops.head_stats import TILE, Head
from ..ops.linear import Format, choose_format
from . import checkpoint
from .backbone import Backbone, Forward, KVCache, Layer, LayerRunner, full_forward
from .config import ModelConfig
from .layer_weights import LayerWeights
from .tokenizer import Tokenizer

_DRAWN_AT_ONCE = 1 << 24
"""Random numbers that `random_model` draws at once, 64 MB of fp32."""


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
        attention_mask: torch.Tensor | None = None, runner: LayerRunner | None = None, **others: object,
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
        return self.backbone(f, cache, runner)

    def _apply(self, fn, recurse=True):
        """What .to(), .half(), .cuda() and their like call: packed weights cannot be converted, and a silent no-op would lie."""
        probe = fn(torch.empty(0, dtype=self.dtype, device=self.device))
        if probe.dtype != self.dtype or probe.device != self.device:
            raise SettingError(
                f"a loaded model keeps its dtype and device, {self.dtype} on {self.device}; load it again: unmask.load(..., dtype=..., device=...)"
            )
        return self

    def logits(self, ids: torch.Tensor) -> torch.Tensor:
        """Logits of whole sequences: ids int64 [B, L] -> [B, L, V] in the model's dtype, no cache, never shifted.

        Every position sees what the family's does: the whole row, or (block-causal) everything up to the end of its own block, blocks
        being counted from the first token. It materialises [B, L, V]; decoding does not go through here.
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
        block = self.config.block_size if self.config.visibility == "block_causal" else None
        hidden = self.backbone(full_forward(ids, block), self.new_cache(b, length))
        return self.head.logits(hidden)[: b * length].view(b, length, -1)

    def extra_repr(self) -> str:
        return f"{self.name}, {self.config.family}, {self.dtype}, linear weights {self.format}"


def check_ids(ids: torch.Tensor, vocab_size: int, where: str) -> None:
    """Raises ValueError naming the first token id outside [0, vocab_size)."""
    bad = torch.nonzero((ids < 0) | (ids >= vocab_size))
    if bad.numel():
        index = bad[0].tolist()
        raise ValueError(f"{where}: token id at {index} must be in 0..{vocab_size - 1}, got {int(ids[tuple(index)])}")


def build(
    info: checkpoint.CheckpointInfo, tokenizer: Tokenizer, name: str, dtype: torch.dtype | None, device: torch.device, format: Format | None = None
) -> Model:
    """Streams the tensors of a checked checkpoint into a Model: each product is packed as soon as its tensors are there. format: of the
    linear weights, by default the fastest one that keeps their values."""
    config = info.config
    kind = checkpoint.resolve_dtype(info, dtype, device)
    format = choose_format(kind, device, info.n_parameters) if format is None else format
    names: dict[int, list[str]] = {i: [] for i in range(config.n_layers)}
    for tensor_name in info.tensors:
        if tensor_name.startswith("layers."):
            _, index, short = tensor_name.split(".", 2)
            names[int(index)].append(short)
    layers = {i: LayerWeights(config, format, names[i]) for i in names}
    parts: dict[str, torch.Tensor] = {}
    head: Head | None = None
    for key, tensor in checkpoint.load_tensors(info, dtype, device):
        if key == "head":
            head = Head(tensor, format)
        elif key in ("embed", "final_norm"):
            parts[key] = tensor
        else:
            _, index, short = key.split(".", 2)
            layers[int(index)].add(short, tensor)
        del tensor
    if head is None:  # tied: the head reads the embedding
        head = Head(parts["embed"], format)
    made = [Layer(config, layers.pop(i), format) for i in range(config.n_layers)]
    backbone = Backbone(config, parts["embed"], made, parts["final_norm"])
    return Model(config, backbone, head, tokenizer, name, format).eval()


def random_model(
    config: ModelConfig, *, dtype: torch.dtype = torch.float32, seed: int = 0, std: float = 0.02, name: str = "random", format: Format | None = None
) -> Model:
    """A model of any shape with normal random weights, made in memory: for benches and tests of layouts that nobody has on disk.

    Weights are packed as they are drawn, so the memory is the model's once plus one product. config: see ModelConfig. std: standard deviation
    of the linear weights and the embedding; norms are 1. Deterministic in seed. format: of the linear weights, as in `build`.
    """
    generator = torch.Generator().manual_seed(seed)
    config = config.validate()
    format = choose_format(dtype, torch.device("cpu"), config.n_parameters) if format is None else format

    def normal(*shape: int) -> torch.Tensor:
        """Drawn in fp32 in pieces: neither the draw nor its rounding is ever there for a whole large weight."""
        out = torch.empty(shape, dtype=dtype)
        flat = out.view(-1)
        for piece in flat.split(_DRAWN_AT_ONCE):
            piece.copy_(torch.randn(piece.shape, generator=generator).mul_(std))
        return out

    def head_tiles() -> Iterator[torch.Tensor]:
        for i in range(0, config.vocab_size, TILE):
            yield normal(min(TILE, config.vocab_size - i), d)

    ones = torch.ones(config.d_model, dtype=dtype)
    q, kv = config.n_heads * config.head_dim, config.n_kv_heads * config.head_dim
    d, f = config.d_model, config.ffn_dim
    embed = normal(config.vocab_size, d)
    layers = []
    for i in range(config.n_layers):
        # every tensor goes to its layer as soon as it is drawn, and every product is packed with its last one
        drawn = dict(q=(q, d), k=(kv, d), v=(kv, d), o=(d, q))
        if config.experts is None or i not in config.experts.layers:
            drawn.update(gate=(f, d), up=(f, d), down=(d, f))
        if config.qkv_bias:
            drawn.update(q_bias=(q,), k_bias=(kv,), v_bias=(kv,))
        drawn.update(_expert_shapes(config, i))
        norms = dict(attn_norm=ones, mlp_norm=ones)
        if config.qk_norm:
            norms.update(q_norm=torch.ones(config.head_dim, dtype=dtype), k_norm=torch.ones(config.head_dim, dtype=dtype))
        layer = LayerWeights(config, format, [*drawn, *norms])
        for part, tensor in norms.items():
            layer.add(part, tensor)
        for part, shape in drawn.items():
            layer.add(part, normal(*shape).float() if part in checkpoint.FP32_NAMES else normal(*shape))
        layers.append(Layer(config, layer, format))
    head = Head(embed, format) if config.tied_head else Head.of_tiles(head_tiles(), format)
    tokenizer = Tokenizer(Path(name), config, None, None, {})
    return Model(config, Backbone(config, embed, layers, ones), head, tokenizer, name, format).eval()


def _expert_shapes(config: ModelConfig, layer: int) -> dict[str, tuple[int, ...]]:
    """Canonical name -> shape of the tensors of a layer's mixture; {} for a dense layer."""
    c, d = config.experts, config.d_model
    if c is None or layer not in c.layers:
        return {}
    shapes: dict[str, tuple[int, ...]] = {"router": (c.n_experts, d)}
    if c.selection_bias:
        shapes["router_bias"] = (c.n_experts,)
    for e in range(c.n_experts):
        shapes |= {f"experts.{e}.gate": (c.expert_dim, d), f"experts.{e}.up": (c.expert_dim, d), f"experts.{e}.down": (d, c.expert_dim)}
    if c.shared_dim:
        shapes |= {"shared_gate": (c.shared_dim, d), "shared_up": (c.shared_dim, d), "shared_down": (d, c.shared_dim)}
    return shapes
