"""The baseline: LLaDA in plain PyTorch and the decoding loops that people run today, with the work they do at every step.

Written for this benchmark from a description of the public code (ML-GSAI/LLaDA generate.py; NVlabs/Fast-dLLM v1 llada/generate.py and
its LLaDA class, snapshot 24cc59e). What a step of those loops pays for, and this file therefore does too:

- the head on every forwarded position, then argmax, a float64 softmax over the whole [L, V] (LLaDA's own loop: the logits' dtype) and a
  gather of one column;
- separate q/k/v/gate/up projections, RMSNorm in fp32;
- K cached before RoPE: RoPE in fp32 on the whole K, cached part included, in every layer of every step;
- prefix cache: `torch.cat` of past and new K and V per layer; argmax over the logits computed twice;
- dual cache: `nonzero` per layer for the write positions, an indexed write, and `.item()` reads of the block's end for RoPE;
- with a cache: a causal fp32 bias that is sliced and cast per layer and then not used (attention is full);
- `topk(k=tensor)` per row and, with a threshold, a Python loop that compares one element at a time.

tests/test_bench_baseline.py holds its tokens and forward counts against the recorded runs of the authors' code. Batch 1, like theirs.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F

_LAYER = "model.transformer.blocks.{}.{}.weight"


class Llada:
    """LLaDA forward (bidirectional, full-dimension RoPE, SwiGLU, untied head) over a state dict with the public tensor names."""

    def __init__(self, config: dict, weights: dict[str, torch.Tensor], dtype: torch.dtype = torch.float32):
        self.layers = config["n_layers"]
        self.heads = config["n_heads"]
        self.head_dim = config["d_model"] // self.heads
        self.theta = config["rope_theta"]
        self.eps = config["rms_norm_eps"]
        self.weights = {name: tensor.to(dtype) for name, tensor in weights.items()}
        self.names = (
            "attn_norm",
            "q_proj",
            "k_proj",
            "v_proj",
            "attn_out",
            "ff_norm",
            "ff_proj",
            "up_proj",
            "ff_out",
        )
        self.blocks = [
            [self.weights[_LAYER.format(i, name)] for name in self.names] for i in range(self.layers)
        ]
        self.embedding = self.weights["model.transformer.wte.weight"]
        self.final_norm = self.weights["model.transformer.ln_f.weight"]
        self.head = self.weights["model.transformer.ff_out.weight"]
        self.calls = 0
        self._sin = self._cos = torch.empty(1, 1, 0, self.head_dim)
        self._bias = torch.empty(1, 1, 0, 0)

    def __call__(self, ids, past=None, use_cache=False, replace_position=None):
        """ids [1, T] -> (logits [1, T, V], per-layer (k, v) before RoPE or None).

        past: per-layer (k, v) [1, heads, S, head_dim]; replace_position: bool [1, S], the slots of `past` that these T tokens overwrite
        (written in place); without it they are appended after the S past ones.
        """
        self.calls += 1
        x = F.embedding(ids, self.embedding)
        past_length = past[0][0].shape[-2] if past is not None else 0
        bias = None
        if past is not None:
            length = past_length + ids.shape[1]
            bias = self._causal_bias(length)[:, :, :length, :length].to(torch.float)
        presents = [] if use_cache else None
        for i, block in enumerate(self.blocks):
            x, present = self._block(
                block, x, bias, past[i] if past is not None else None, use_cache, replace_position
            )
            if presents is not None:
                presents.append(present)
        return F.linear(self._norm(x, self.final_norm), self.head), presents

    def _block(self, block, x, bias, past, use_cache, replace_position):
        attn_norm, q_proj, k_proj, v_proj, attn_out, ff_norm, ff_proj, up_proj, ff_out = block
        h = self._norm(x, attn_norm)
        q, k, v = (self._split(F.linear(h, w)) for w in (q_proj, k_proj, v_proj))
        if past is not None:
            past_k, past_v = past
            if replace_position is None:
                k, v = torch.cat((past_k, k), dim=-2), torch.cat((past_v, v), dim=-2)
            else:
                slots = replace_position.nonzero(as_tuple=True)[1]
                past_k[:, :, slots] = k
                past_v[:, :, slots] = v
                k, v = past_k, past_v
        present = (k, v) if use_cache else None
        if replace_position is None:
            q, k = self._rope(q, k)
        else:
            q, k = self._rope(q, k, replace_position.nonzero(as_tuple=True)[1].max() + 1)
        if bias is not None:
            bias[:, :, k.shape[-2] - q.shape[-2] : k.shape[-2], : k.shape[-2]].to(x.dtype)
        attended = F.scaled_dot_product_attention(q, k, v, attn_mask=None, is_causal=False)
        attended = attended.transpose(1, 2).contiguous().view(x.shape)
        x = x + F.linear(attended, attn_out)
        h = self._norm(x, ff_norm)
        gate, up = F.linear(h, ff_proj), F.linear(h, up_proj)
        return x + F.linear(F.silu(gate) * up, ff_out), present

    def _split(self, x):
        return x.view(x.shape[0], x.shape[1], self.heads, self.head_dim).transpose(1, 2)

    def _norm(self, x, weight):
        wide = x.to(torch.float32)
        wide = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + self.eps)
        return weight * wide.to(x.dtype)

    def _rope(self, q, k, block_end=None):
        """RoPE in fp32 on all of k and on q, whose last token sits at the end of k or at `block_end` (a tensor) - 1."""
        wide_q, wide_k = q.float(), k.float()
        length, queries = k.shape[-2], q.shape[-2]
        sin, cos = self._tables(length)
        if block_end is None:
            q_sin, q_cos = sin[:, :, length - queries : length], cos[:, :, length - queries : length]
        else:
            q_sin = sin[:, :, block_end.item() - queries : block_end.item()]
            q_cos = cos[:, :, block_end.item() - queries : block_end.item()]
        wide_q = wide_q * q_cos + self._rotate_half(wide_q) * q_sin
        wide_k = wide_k * cos + self._rotate_half(wide_k) * sin
        return wide_q.type_as(q), wide_k.type_as(k)

    @staticmethod
    def _rotate_half(x):
        first, second = x.chunk(2, dim=-1)
        return torch.cat((-second, first), dim=-1)

    def _tables(self, length):
        if self._sin.shape[-2] < length:
            inv_freq = 1.0 / (
                self.theta ** (torch.arange(0, self.head_dim, 2, dtype=torch.float) / self.head_dim)
            )
            angle = torch.outer(torch.arange(length, dtype=torch.float), inv_freq)
            angle = torch.cat((angle, angle), dim=-1)[None, None]
            self._sin, self._cos = angle.sin(), angle.cos()
        return self._sin[:, :, :length], self._cos[:, :, :length]

    def _causal_bias(self, length):
        if self._bias.shape[-1] < length:
            self._bias = torch.full((length, length), -math.inf).triu(1)[None, None]
        return self._bias


def quotas(masks: torch.Tensor, steps: int) -> torch.Tensor:
    """How many of each row's masks [B] commit at each step: [B, steps], the surplus at the earliest steps."""
    return masks[:, None] // steps + (torch.arange(steps) < masks[:, None] % steps)


def select(logits, mask_index, x, quota, threshold, softmax_dtype):
    """The proposals and which of them commit: (tokens [1, L], bool [1, L])."""
    proposal = torch.argmax(logits, dim=-1)
    p = F.softmax(logits.to(softmax_dtype), dim=-1)
    confidence = torch.gather(p, -1, proposal.unsqueeze(-1)).squeeze(-1)
    proposal = torch.where(mask_index, proposal, x)
    confidence = torch.where(mask_index, confidence, -math.inf)
    transfer = torch.zeros_like(proposal, dtype=torch.bool)
    if threshold is not None:
        quota = mask_index.sum(dim=1, keepdim=True)
    for row in range(confidence.shape[0]):
        _, chosen = torch.topk(confidence[row], k=quota[row])
        transfer[row, chosen] = True
        if threshold is not None:
            for rank in range(1, int(quota[row])):
                if confidence[row, chosen[rank]] < threshold:
                    transfer[row, chosen[rank]] = False
    return proposal, transfer


def _canvas(prompt, steps, gen_length, block_length, mask_id):
    if gen_length % block_length or steps % (gen_length // block_length):
        raise ValueError(
            f"expected block_length | gen_length and blocks | steps, got {gen_length}, {block_length}, {steps}"
        )
    x = torch.full((prompt.shape[0], prompt.shape[1] + gen_length), mask_id, dtype=torch.long)
    x[:, : prompt.shape[1]] = prompt
    starts = range(prompt.shape[1], x.shape[1], block_length)
    return x, [(start, start + block_length) for start in starts], steps // len(starts)


@torch.no_grad()
def llada_generate(model, prompt, steps, gen_length, block_length, mask_id, only_blocks=None):
    """LLaDA's own loop (low-confidence remasking, temperature 0, no CFG): a full forward per step -> (canvas [1, L], forwards).

    only_blocks: end after so many blocks (for timing: every block of this loop costs the same).
    """
    x, blocks, steps = _canvas(prompt, steps, gen_length, block_length, mask_id)
    before = model.calls
    for start, end in blocks[:only_blocks]:
        quota = quotas((x[:, start:end] == mask_id).sum(1), steps)
        for i in range(steps):
            mask_index = x == mask_id
            logits, _ = model(x)
            mask_index[:, end:] = False
            proposal, transfer = select(logits, mask_index, x, quota[:, i], None, logits.dtype)
            x[transfer] = proposal[transfer]
    return x, model.calls - before


@torch.no_grad()
def generate(model, prompt, steps, gen_length, block_length, mask_id, threshold=None, only_blocks=None):
    """Fast-dLLM without a cache: a full forward per step, a block ends when it has no masks -> (canvas [1, L], forwards)."""
    x, blocks, steps = _canvas(prompt, steps, gen_length, block_length, mask_id)
    before = model.calls
    for start, end in blocks[:only_blocks]:
        quota = quotas((x[:, start:end] == mask_id).sum(1), steps)
        i = 0
        while True:
            mask_index = x == mask_id
            logits, _ = model(x)
            mask_index[:, end:] = False
            proposal, transfer = select(
                logits, mask_index, x, None if threshold else quota[:, i], threshold, torch.float64
            )
            x[transfer] = proposal[transfer]
            i += 1
            if (x[:, start:end] == mask_id).sum() == 0:
                break
    return x, model.calls - before


@torch.no_grad()
def generate_with_prefix_cache(model, prompt, steps, gen_length, block_length, mask_id, threshold=None):
    """Fast-dLLM's prefix cache: per block one full forward, then the block and all masks after it -> (canvas [1, L], forwards)."""
    x, blocks, steps = _canvas(prompt, steps, gen_length, block_length, mask_id)
    before = model.calls
    for start, end in blocks:
        quota, past = _open_block(model, x, start, end, steps, mask_id, threshold)
        past = [(k[:, :, :start], v[:, :, :start]) for k, v in past]
        i = 1
        while True:
            mask_index = x[:, start:] == mask_id
            mask_index[:, end - start :] = False
            logits, _ = model(x[:, start:], past=past, use_cache=True)
            torch.argmax(logits, dim=-1)
            proposal, transfer = select(
                logits, mask_index, x[:, start:], None if threshold else quota[:, i], threshold, torch.float64
            )
            x[:, start:][transfer] = proposal[transfer]
            if (x[:, start:end] == mask_id).sum() == 0:
                break
            i += 1
    return x, model.calls - before


@torch.no_grad()
def generate_with_dual_cache(model, prompt, steps, gen_length, block_length, mask_id, threshold=None):
    """Fast-dLLM's dual cache: per block one full forward, then the block alone, patched in place -> (canvas [1, L], forwards)."""
    x, blocks, steps = _canvas(prompt, steps, gen_length, block_length, mask_id)
    before = model.calls
    for start, end in blocks:
        quota, past = _open_block(model, x, start, end, steps, mask_id, threshold)
        replace_position = torch.zeros_like(x, dtype=torch.bool)
        replace_position[:, start:end] = True
        i = 1
        while True:
            mask_index = x[:, start:end] == mask_id
            logits, _ = model(x[:, start:end], past=past, use_cache=True, replace_position=replace_position)
            proposal, transfer = select(
                logits,
                mask_index,
                x[:, start:end],
                None if threshold else quota[:, i],
                threshold,
                torch.float64,
            )
            x[:, start:end][transfer] = proposal[transfer]
            if (x[:, start:end] == mask_id).sum() == 0:
                break
            i += 1
    return x, model.calls - before


def _open_block(model, x, start, end, steps, mask_id, threshold):
    """The full forward at a block's start, which commits too: (quota [B, steps], past K/V of the whole canvas)."""
    quota = quotas((x[:, start:end] == mask_id).sum(1), steps)
    logits, past = model(x, use_cache=True)
    mask_index = x == mask_id
    mask_index[:, end:] = False
    proposal, transfer = select(
        logits, mask_index, x, None if threshold else quota[:, 0], threshold, torch.float64
    )
    x[transfer] = proposal[transfer]
    return quota, past


LOOPS = {"none": generate, "prefix": generate_with_prefix_cache, "dual": generate_with_dual_cache}


def bench_config(**changes) -> dict:
    """config.json of the end-to-end bench: LLaDA's layout at d 512, 8 layers, 8 heads, ffn 1536, LLaDA's vocabulary."""
    size = dict(
        d_model=512,
        n_layers=8,
        n_heads=8,
        n_kv_heads=8,
        mlp_hidden_size=1536,
        vocab_size=126464,
        embedding_size=126464,
    )
    ids = dict(mask_token_id=126336, eos_token_id=126081, pad_token_id=126081)
    kind = dict(
        model_type="llada",
        architectures=["LLaDAModelLM"],
        block_type="llama",
        layer_norm_type="rms",
        activation_type="silu",
    )
    flags = dict(
        rope=True,
        rope_full_precision=True,
        include_bias=False,
        include_qkv_bias=False,
        weight_tying=False,
        alibi=False,
    )
    rest = dict(
        rope_theta=500000.0,
        rms_norm_eps=1e-5,
        max_sequence_length=4096,
        attention_layer_norm=False,
        scale_logits=False,
    )
    return kind | size | ids | flags | rest | changes


def random_weights(config: dict, seed: int = 0) -> dict[str, torch.Tensor]:
    """Random fp32 tensors by their public names, scaled so that positions differ and confidences spread (no accidental ties)."""
    generator = torch.Generator().manual_seed(seed)
    d, ffn, vocab = config["d_model"], config["mlp_hidden_size"], config["vocab_size"]

    def normal(rows, columns, gain=1.0):
        return torch.randn(rows, columns, generator=generator).mul_(gain / math.sqrt(columns))

    def scale():
        return 1 + 0.1 * torch.randn(d, generator=generator)

    weights = {
        "model.transformer.wte.weight": normal(vocab, d, math.sqrt(d)),
        "model.transformer.ln_f.weight": scale(),
        "model.transformer.ff_out.weight": normal(vocab, d, 3.0),
    }
    weights["model.transformer.ff_out.weight"][config["mask_token_id"]] = (
        0.0  # the mask token is never predicted
    )
    for i in range(config["n_layers"]):
        shapes = dict(q_proj=(d, d, 2.0), k_proj=(d, d, 2.0), v_proj=(d, d), attn_out=(d, d))
        shapes |= dict(ff_proj=(ffn, d), up_proj=(ffn, d), ff_out=(d, ffn))
        weights |= {_LAYER.format(i, name): normal(*shape) for name, shape in shapes.items()}
        weights |= {_LAYER.format(i, name): scale() for name in ("attn_norm", "ff_norm")}
    return weights
