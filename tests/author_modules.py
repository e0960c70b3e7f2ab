"""Plain torch models of the golden checkpoints with the calling convention of the authors' classes (Fast-dLLM's LLaDA and Dream).

Both cache K before RoPE. A cached call appends its K and V to past_key_values or, with replace_position, writes them in place over the
marked positions of past_key_values; queries then stand at the end of the keys, or at the end of the marked positions.
"""

from __future__ import annotations

import json
import types
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import load_file

GOLDEN = Path(__file__).parent / "golden"


def rms_norm(x, weight, eps):
    return weight * (x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + eps))


def rotate(x, theta, position):
    """x [B, H, T, d] at positions [T]: halves of the head are the two components."""
    half = x.shape[-1] // 2
    angle = position[:, None].float() / theta ** (torch.arange(half, device=x.device).float() * 2 / x.shape[-1])
    cos, sin = angle.cos(), angle.sin()
    a, b = x[..., :half], x[..., half:]
    return torch.cat([a * cos - b * sin, b * cos + a * sin], -1)


class Author(torch.nn.Module):
    """What the two share. calls: (first argument's shape, names given) of every call."""

    def __init__(self, family: str):
        super().__init__()
        folder = GOLDEN / family / "checkpoint"
        self.config = types.SimpleNamespace(**json.loads((folder / "config.json").read_text()))
        for name, tensor in load_file(folder / "model.safetensors").items():
            self.register_buffer(name.replace(".", "/"), tensor)
        self.calls: list[tuple[tuple[int, ...], list[str]]] = []

    def w(self, name):
        return getattr(self, name.replace(".", "/"))

    def layer(self, x, names, past, replace, mask, keep, heads, kv_heads, theta, eps, split):
        """One pre-norm layer. split: K and V are kept as [B, H, L, d], else as [B, L, H d]."""
        b, t, d = x.shape
        h = rms_norm(x, self.w(names["norm"]), eps)
        q, k, v = (F.linear(h, self.w(names[n] + ".weight"), self._buffers.get((names[n] + ".bias").replace(".", "/"))) for n in "qkv")

        def divide(y, n):
            return y.view(b, -1, n, d // heads).transpose(1, 2)

        if split:
            k, v = divide(k, kv_heads), divide(v, kv_heads)
        end = None
        if past is not None:
            if replace is None:
                k, v = torch.cat([past[0], k], -2), torch.cat([past[1], v], -2)
            else:
                end = int(replace.nonzero()[:, 1].max()) + 1
                for old, new in ((past[0], k), (past[1], v)):
                    for i in range(b):
                        place = replace[i].nonzero()[:, 0]
                        if split:
                            old[i, :, place] = new[i]
                        else:
                            old[i, place] = new[i]
                k, v = past
        kept = (k, v) if keep else None
        q, keys, values = divide(q, heads), k if split else divide(k, kv_heads), v if split else divide(v, kv_heads)
        size = keys.shape[2]
        end = size if end is None else end
        q = rotate(q, theta, torch.arange(end - t, end, device=x.device))
        keys = rotate(keys, theta, torch.arange(size, device=x.device))
        keys, values = (y.repeat_interleave(heads // kv_heads, 1) for y in (keys, values))
        att = F.scaled_dot_product_attention(q, keys, values, attn_mask=mask).transpose(1, 2).reshape(b, t, d)
        x = x + F.linear(att, self.w(names["o"] + ".weight"))
        h = rms_norm(x, self.w(names["norm2"]), eps)
        gate, up = F.linear(h, self.w(names["gate"] + ".weight")), F.linear(h, self.w(names["up"] + ".weight"))
        return x + F.linear(F.silu(gate) * up, self.w(names["down"] + ".weight")), kept


class LLaDA(Author):
    """Fast-dLLM's LLaDAModelLM: K and V as [B, H, L, d]; attention_mask is taken and not read."""

    def __init__(self):
        super().__init__("llada")

    def forward(self, input_ids, attention_mask=None, past_key_values=None, use_cache=False, replace_position=None):
        given = [n for n, v in (("past_key_values", past_key_values), ("replace_position", replace_position)) if v is not None]
        self.calls.append((tuple(input_ids.shape), given))
        c, root = self.config, "model.transformer."
        x, kept = F.embedding(input_ids, self.w(root + "wte.weight")), []
        for i in range(c.n_layers):
            block = f"{root}blocks.{i}."
            names = dict(
                norm=block + "attn_norm.weight", q=block + "q_proj", k=block + "k_proj", v=block + "v_proj", o=block + "attn_out",
                norm2=block + "ff_norm.weight", gate=block + "ff_proj", up=block + "up_proj", down=block + "ff_out",
            )  # fmt: skip
            past = None if past_key_values is None else past_key_values[i]
            x, kv = self.layer(x, names, past, replace_position, None, use_cache, c.n_heads, c.n_kv_heads, c.rope_theta, c.rms_norm_eps, True)
            kept.append(kv)
        x = rms_norm(x, self.w(root + "ln_f.weight"), c.rms_norm_eps)
        return types.SimpleNamespace(logits=F.linear(x, self.w(root + "ff_out.weight")), past_key_values=kept if use_cache else None)


class Dream(Author):
    """Fast-dLLM's DreamModel: K and V as [B, L, H d]; attention_mask "full" or bool [B, 1, T, L]; position_ids are not read."""

    def __init__(self):
        super().__init__("dream")

    def forward(
        self, input_ids, attention_mask=None, position_ids=None, past_key_values=None, use_cache=None, dual_cache=False, replace_position=None
    ):
        given = [n for n, v in (("past_key_values", past_key_values), ("replace_position", replace_position)) if v is not None]
        self.calls.append((tuple(input_ids.shape), given))
        assert dual_cache == (replace_position is not None)
        assert isinstance(attention_mask, torch.Tensor) or attention_mask == "full"
        mask = attention_mask if isinstance(attention_mask, torch.Tensor) else None
        c = self.config
        x, kept = F.embedding(input_ids, self.w("model.embed_tokens.weight")), []
        for i in range(c.num_hidden_layers):
            block = f"model.layers.{i}."
            names = dict(
                norm=block + "input_layernorm.weight", norm2=block + "post_attention_layernorm.weight",
                **{n: f"{block}self_attn.{n}_proj" for n in "qkvo"}, **{n: f"{block}mlp.{n}_proj" for n in ("gate", "up", "down")},
            )  # fmt: skip
            past = None if past_key_values is None else past_key_values[i]
            x, kv = self.layer(
                x, names, past, replace_position, mask, use_cache, c.num_attention_heads, c.num_key_value_heads, c.rope_theta, c.rms_norm_eps, False
            )
            kept.append(kv)
        x = rms_norm(x, self.w("model.norm.weight"), c.rms_norm_eps)
        return types.SimpleNamespace(logits=F.linear(x, self.w("lm_head.weight")), past_key_values=kept if use_cache else None)
