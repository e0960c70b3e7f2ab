"""SDAR's architecture in plain PyTorch, for training: Qwen3's layers (RMSNorm on q and k, no biases) under any attention mask.

Module names give SDAR's own weight names (`model.layers.0.self_attn.q_proj.weight`, ...), so a saved state dict is a
checkpoint that any SDAR loader reads. Positions and the mask are arguments: training packs a noised and a clean copy
of a row into one sequence (see block_causal.py), decoding has one copy.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .checkpoint import load_checkpoint, save_checkpoint
from .network import Network
from .pieces import RMSNorm, attend, rotary_table, split_heads


@dataclass(frozen=True)
class BlockShape:
    """Sizes of the network, in the names of SDAR's config.json."""

    vocab_size: int
    hidden_size: int = 192
    num_hidden_layers: int = 4
    num_attention_heads: int = 6
    num_key_value_heads: int = 6
    head_dim: int = 32
    intermediate_size: int = 512
    rope_theta: float = 10000.0
    rms_norm_eps: float = 1e-5
    max_position_embeddings: int = 256
    block_size: int = 4

    def config(self, mask_id: int, eos_id: int) -> dict[str, object]:
        """The config.json of the SDAR layout."""
        return {
            "model_type": "sdar",
            "architectures": ["SDARForCausalLM"],
            "attention_bias": False,
            "block_size": self.block_size,
            "eos_token_id": eos_id,
            "head_dim": self.head_dim,
            "hidden_act": "silu",
            "hidden_size": self.hidden_size,
            "intermediate_size": self.intermediate_size,
            "mask_token_id": mask_id,
            "max_position_embeddings": self.max_position_embeddings,
            "num_attention_heads": self.num_attention_heads,
            "num_hidden_layers": self.num_hidden_layers,
            "num_key_value_heads": self.num_key_value_heads,
            "pad_token_id": eos_id,
            "rms_norm_eps": self.rms_norm_eps,
            "rope_scaling": None,
            "rope_theta": self.rope_theta,
            "sliding_window": None,
            "tie_word_embeddings": False,
            "torch_dtype": "float32",
            "use_cache": True,
            "use_sliding_window": False,
            "vocab_size": self.vocab_size,
        }


class Attention(nn.Module):
    """Grouped-query attention with RMSNorm over each head of q and k before the rotation."""

    def __init__(self, shape: BlockShape) -> None:
        super().__init__()
        width, dim = shape.hidden_size, shape.head_dim
        self.head_dim = dim
        self.q_proj = nn.Linear(width, shape.num_attention_heads * dim, bias=False)
        self.k_proj = nn.Linear(width, shape.num_key_value_heads * dim, bias=False)
        self.v_proj = nn.Linear(width, shape.num_key_value_heads * dim, bias=False)
        self.o_proj = nn.Linear(shape.num_attention_heads * dim, width, bias=False)
        self.q_norm = RMSNorm(dim, shape.rms_norm_eps)
        self.k_norm = RMSNorm(dim, shape.rms_norm_eps)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, mask: Tensor) -> Tensor:
        """x [B, N, width], cos and sin [B, 1, N, D], mask bool [B, 1, N, N] (True: the column is seen) -> [B, N, width]."""
        q, k, v = (split_heads(part(x), self.head_dim) for part in (self.q_proj, self.k_proj, self.v_proj))
        return self.o_proj(attend(self.q_norm(q), self.k_norm(k), v, cos, sin, mask))


class MLP(nn.Module):
    """down_proj(silu(gate_proj x) * up_proj x)."""

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(width, hidden, bias=False)
        self.up_proj = nn.Linear(width, hidden, bias=False)
        self.down_proj = nn.Linear(hidden, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class Layer(nn.Module):
    """One SDAR layer: x + self_attn(input_layernorm x), then h + mlp(post_attention_layernorm h)."""

    def __init__(self, shape: BlockShape) -> None:
        super().__init__()
        self.input_layernorm = RMSNorm(shape.hidden_size, shape.rms_norm_eps)
        self.self_attn = Attention(shape)
        self.post_attention_layernorm = RMSNorm(shape.hidden_size, shape.rms_norm_eps)
        self.mlp = MLP(shape.hidden_size, shape.intermediate_size)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, mask: Tensor) -> Tensor:
        x = x + self.self_attn(self.input_layernorm(x), cos, sin, mask)
        return x + self.mlp(self.post_attention_layernorm(x))


class BlockNetwork(nn.Module):
    """The whole model. `hidden` stops before the head, so that training projects masked positions only."""

    def __init__(self, shape: BlockShape) -> None:
        super().__init__()
        self.shape = shape
        self.model = nn.ModuleDict(
            {
                "embed_tokens": nn.Embedding(shape.vocab_size, shape.hidden_size),
                "layers": nn.ModuleList(Layer(shape) for _ in range(shape.num_hidden_layers)),
                "norm": RMSNorm(shape.hidden_size, shape.rms_norm_eps),
            }
        )
        self.lm_head = nn.Linear(shape.hidden_size, shape.vocab_size, bias=False)

    def hidden(self, ids: Tensor, positions: Tensor, mask: Tensor) -> Tensor:
        """ids and positions int64 [B, N], mask bool [B, N, N] (True: row sees column) -> final normed states [B, N, width]."""
        cos, sin = rotary_table(
            self.shape.max_position_embeddings, self.shape.head_dim, self.shape.rope_theta, ids.device
        )
        cos, sin, mask = cos[positions][:, None], sin[positions][:, None], mask[:, None]
        x = self.model["embed_tokens"](ids)
        for layer in self.model["layers"]:
            x = layer(x, cos, sin, mask)
        return self.model["norm"](x)

    def head(self, states: Tensor) -> Tensor:
        """states [..., width] -> logits [..., vocab]."""
        return self.lm_head(states)

    def forward(self, ids: Tensor, block_size: int | None = None) -> Tensor:
        """ids [B, L] -> logits [B, L, vocab]; a position sees all up to the end of its block (default: the model's block size)."""
        size = self.shape.block_size if block_size is None else block_size
        positions = torch.arange(ids.shape[1], device=ids.device)
        block = positions // size
        mask = (block[:, None] >= block[None]).expand(ids.shape[0], -1, -1)
        return self.head(self.hidden(ids, positions.expand_as(ids), mask))


def save_block_model(
    folder: Path, shape: BlockShape, weights: dict[str, Tensor], mask_id: int, eos_id: int
) -> None:
    """Write config.json and model.safetensors (fp32); each file appears whole or not at all."""
    save_checkpoint(folder, shape.config(mask_id, eos_id), weights)


def load_block_model(folder: Path) -> tuple[BlockNetwork, dict[str, object]]:
    """Read a folder written by `save_block_model`: the network in fp32 on the CPU, and its config."""
    return load_checkpoint(folder, BlockNetwork, BlockShape)


_LAYER_NAMES = {
    "attn_norm": "input_layernorm",
    "q_proj": "self_attn.q_proj",
    "k_proj": "self_attn.k_proj",
    "v_proj": "self_attn.v_proj",
    "attn_out": "self_attn.o_proj",
    "ff_norm": "post_attention_layernorm",
    "ff_proj": "mlp.gate_proj",
    "up_proj": "mlp.up_proj",
    "ff_out": "mlp.down_proj",
}
"""A LLaDA layer's weights -> the SDAR layer's weights that do the same."""


@torch.no_grad()
def from_llada(source: Network, sample: Tensor) -> BlockNetwork:
    """The SDAR network nearest to a LLaDA one: every weight is kept, and the two norms that LLaDA has not are fitted.

    RMSNorm divides each head of q and k by its own size, which LLaDA's attention does not. The norms' weights put the mean
    size over heads and positions of `sample` (int64 [B, L], ids as the source was trained on) back, so that attention
    logits keep their scale; what is lost is how the size differs from head to head and from token to token.
    """
    theirs = source.shape
    shape = BlockShape(
        vocab_size=theirs.vocab_size,
        hidden_size=theirs.d_model,
        num_hidden_layers=theirs.n_layers,
        num_attention_heads=theirs.n_heads,
        num_key_value_heads=theirs.n_heads,
        head_dim=theirs.d_model // theirs.n_heads,
        intermediate_size=theirs.mlp_hidden_size,
        rope_theta=theirs.rope_theta,
        rms_norm_eps=theirs.rms_norm_eps,
        max_position_embeddings=theirs.max_sequence_length,
    )
    network = BlockNetwork(shape)
    weights = {"model.embed_tokens.weight": source.model["transformer"]["wte"].weight}
    weights["model.norm.weight"] = source.model["transformer"]["ln_f"].weight
    weights["lm_head.weight"] = source.model["transformer"]["ff_out"].weight
    for i, block in enumerate(source.model["transformer"]["blocks"]):
        for name, ours in _LAYER_NAMES.items():
            weights[f"model.layers.{i}.{ours}.weight"] = getattr(block, name).weight
    for (i, part), size in _mean_head_sizes(source, sample).items():
        weights[f"model.layers.{i}.self_attn.{part}_norm.weight"] = torch.full((shape.head_dim,), size)
    network.load_state_dict(weights)
    return network


def _mean_head_sizes(source: Network, sample: Tensor) -> dict[tuple[int, str], float]:
    """(layer, "q" or "k") -> root mean square of that projection's outputs, averaged over heads and positions."""
    sizes: dict[tuple[int, str], float] = {}
    hooks = []
    for i, block in enumerate(source.model["transformer"]["blocks"]):
        for part in "qk":

            def note(module: nn.Module, inputs: tuple[Tensor], out: Tensor, key=(i, part)) -> None:
                heads = out.unflatten(-1, (source.shape.n_heads, -1))
                sizes[key] = float(heads.square().mean(-1).sqrt().mean())

            hooks.append(getattr(block, f"{part}_proj").register_forward_hook(note))
    try:
        source.hidden(sample)
    finally:
        for hook in hooks:
            hook.remove()
    return sizes
