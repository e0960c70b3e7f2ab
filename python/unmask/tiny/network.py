"""LLaDA's architecture in plain PyTorch, for training: bidirectional, pre-norm, RoPE, SwiGLU, untied head, no biases.

Module names give LLaDA's own weight names (`model.transformer.blocks.0.q_proj.weight`, ...), so a saved state dict
is a checkpoint that any LLaDA loader reads.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .checkpoint import load_checkpoint, save_checkpoint
from .pieces import RMSNorm, attend, rotary_table, split_heads


@dataclass(frozen=True)
class Shape:
    """Sizes of the network, in the names of LLaDA's config.json."""

    vocab_size: int
    d_model: int = 192
    n_layers: int = 4
    n_heads: int = 6
    mlp_hidden_size: int = 512
    rope_theta: float = 10000.0
    rms_norm_eps: float = 1e-5
    max_sequence_length: int = 256

    def config(self, mask_id: int, eos_id: int) -> dict[str, object]:
        """The config.json of the LLaDA layout."""
        return {
            "model_type": "llada",
            "architectures": ["LLaDAModelLM"],
            "activation_type": "silu",
            "alibi": False,
            "attention_layer_norm": False,
            "bias_for_layer_norm": False,
            "block_type": "llama",
            "d_model": self.d_model,
            "embedding_size": self.vocab_size,
            "eos_token_id": eos_id,
            "include_bias": False,
            "include_qkv_bias": False,
            "input_emb_norm": False,
            "layer_norm_type": "rms",
            "layer_norm_with_affine": True,
            "mask_token_id": mask_id,
            "max_sequence_length": self.max_sequence_length,
            "mlp_hidden_size": self.mlp_hidden_size,
            "mlp_ratio": 4,
            "multi_query_attention": None,
            "n_heads": self.n_heads,
            "n_kv_heads": self.n_heads,
            "n_layers": self.n_layers,
            "pad_token_id": eos_id,
            "rms_norm_eps": self.rms_norm_eps,
            "rope": True,
            "rope_full_precision": True,
            "rope_theta": self.rope_theta,
            "scale_logits": False,
            "torch_dtype": "float32",
            "use_cache": False,
            "vocab_size": self.vocab_size,
            "weight_tying": False,
        }


class Block(nn.Module):
    """One LLaDA layer: x + attn_out(attention(attn_norm x)), then x + ff_out(silu(ff_proj h) * up_proj h)."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        width, hidden = shape.d_model, shape.mlp_hidden_size
        self.head_dim = width // shape.n_heads
        self.attn_norm = RMSNorm(width, shape.rms_norm_eps)
        self.ff_norm = RMSNorm(width, shape.rms_norm_eps)
        self.q_proj = nn.Linear(width, width, bias=False)
        self.k_proj = nn.Linear(width, width, bias=False)
        self.v_proj = nn.Linear(width, width, bias=False)
        self.attn_out = nn.Linear(width, width, bias=False)
        self.ff_proj = nn.Linear(width, hidden, bias=False)
        self.up_proj = nn.Linear(width, hidden, bias=False)
        self.ff_out = nn.Linear(hidden, width, bias=False)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """x [B, L, width] -> [B, L, width]; cos, sin [L, D]."""
        h = self.attn_norm(x)
        q, k, v = (split_heads(part(h), self.head_dim) for part in (self.q_proj, self.k_proj, self.v_proj))
        x = x + self.attn_out(attend(q, k, v, cos, sin))
        h = self.ff_norm(x)
        return x + self.ff_out(F.silu(self.ff_proj(h)) * self.up_proj(h))


class Network(nn.Module):
    """The whole model. `hidden` stops before the head, so that training projects masked positions only."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.shape = shape
        self.model = nn.ModuleDict(
            {
                "transformer": nn.ModuleDict(
                    {
                        "wte": nn.Embedding(shape.vocab_size, shape.d_model),
                        "blocks": nn.ModuleList(Block(shape) for _ in range(shape.n_layers)),
                        "ln_f": RMSNorm(shape.d_model, shape.rms_norm_eps),
                        "ff_out": nn.Linear(shape.d_model, shape.vocab_size, bias=False),
                    }
                )
            }
        )

    def initialise(self, generator: torch.Generator) -> None:
        """Normal(0, 0.02) weights drawn on the CPU, residual outputs scaled down by depth; norms stay at one."""
        for name, weight in self.named_parameters():
            if weight.dim() == 2:
                residual = name.endswith(("attn_out.weight", "ff_out.weight")) and ".blocks." in name
                std = 0.02 / (2 * self.shape.n_layers) ** 0.5 if residual else 0.02
                with torch.no_grad():
                    weight.copy_(torch.randn(weight.shape, generator=generator) * std)

    def hidden(self, ids: Tensor) -> Tensor:
        """ids [B, L] -> final normed states [B, L, width]."""
        parts = self.model["transformer"]
        x = parts["wte"](ids)
        head_dim = self.shape.d_model // self.shape.n_heads
        cos, sin = rotary_table(ids.shape[1], head_dim, self.shape.rope_theta, ids.device)
        for block in parts["blocks"]:
            x = block(x, cos, sin)
        return parts["ln_f"](x)

    def head(self, states: Tensor) -> Tensor:
        """states [..., width] -> logits [..., vocab]."""
        return self.model["transformer"]["ff_out"](states)

    def forward(self, ids: Tensor) -> Tensor:
        """ids [B, L] -> logits [B, L, vocab]."""
        return self.head(self.hidden(ids))


def save_model(folder: Path, shape: Shape, weights: dict[str, Tensor], mask_id: int, eos_id: int) -> None:
    """Write a checkpoint in LLaDA's layout."""
    save_checkpoint(folder, shape.config(mask_id, eos_id), weights)


def load_model(folder: Path) -> tuple[Network, dict[str, object]]:
    """Read a folder written by `save_model`: the network in fp32 on the CPU, and its config."""
    return load_checkpoint(folder, Network, Shape)
