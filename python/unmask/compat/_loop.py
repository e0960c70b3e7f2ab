"""What the compat functions share: check the authors' arguments, build the state, run the engine, give back the authors' tensor."""

from __future__ import annotations

from collections.abc import Callable

import torch

from ..decode.backend import ModuleBackend, NativeBackend
from ..decode.engine import Engine
from ..decode.policy import MAX_TEMPERATURE, Policy, integer, number
from ..decode.schedule import FixedBlocks
from ..decode.state import DecodeState, Row
from ..errors import SettingError, check_names
from ..models.model import Model, check_ids

LONGEST = 1 << 20  # positions and steps; more is a mistake, not a request
REMASKING = {"low_confidence": "confidence", "random": "random"}


def check_model(model: object) -> None:
    if not isinstance(model, torch.nn.Module):
        raise SettingError(f"model must be a model from unmask.load or a torch.nn.Module, got {type(model).__name__}")


def check_arguments(prompt, steps, gen_length, block_length, temperature, remasking, mask_id, quota: bool) -> int:
    """Checks what every function takes; returns the number of blocks."""
    if not isinstance(prompt, torch.Tensor) or prompt.dim() != 2 or prompt.dtype != torch.int64:
        what = f"{prompt.dtype} {list(prompt.shape)}" if isinstance(prompt, torch.Tensor) else type(prompt).__name__
        raise SettingError(f"prompt must be an int64 tensor [B, P], got {what}")
    integer("gen_length", gen_length, 0, LONGEST)
    integer("block_length", block_length, 1, LONGEST)
    integer("steps", steps, 1, LONGEST)
    integer("mask_id", mask_id, 0, (1 << 31) - 1)
    number("temperature", temperature, 0.0, MAX_TEMPERATURE)
    check_names("remasking", [remasking], REMASKING)
    if gen_length % block_length:
        raise SettingError(f"gen_length must be a multiple of block_length, got gen_length={gen_length}, block_length={block_length}")
    blocks = gen_length // block_length
    if quota and blocks and steps % blocks:
        raise SettingError(f"steps must be a multiple of the number of blocks, gen_length // block_length = {blocks}, got steps={steps}")
    return blocks


def run(
    model: torch.nn.Module,
    prompt: torch.Tensor,
    policy: Policy,
    *,
    steps: int,
    gen_length: int,
    block_length: int,
    mask_id: int,
    cache: str = "none",
    cfg_scale: float = 0.0,
    attention_mask: torch.Tensor | None = None,
    min_steps: Callable[[Row], int] = lambda row: 0,
) -> tuple[torch.Tensor, int]:
    """Decodes gen_length positions after each prompt. Returns (x int64 [B, P + gen_length], number of forwards)."""
    b, p = prompt.shape
    keep = _attention_mask(attention_mask, prompt)
    native = isinstance(model, Model)
    if native:
        try:
            check_ids(prompt, model.config.vocab_size, "prompt")
        except ValueError as error:
            raise SettingError(str(error)) from None
        if prompt.device != model.device:
            raise SettingError(f"the prompt must be on the model's device {model.device}, got {prompt.device}; move it: prompt.to(model.device)")
        if mask_id >= model.config.vocab_size:
            raise SettingError(
                f"mask_id must be below the model's vocabulary size {model.config.vocab_size}, got {mask_id}; this model's is {model.config.mask_id}"
            )
        # padded positions are left out: packed rows need no padding, and RoPE only sees distances
        prompts = [row[k].tolist() for row, k in zip(prompt, keep, strict=True)]
    else:
        prompts = prompt.tolist()
        if cache != "none":
            raise SettingError(
                f"the {cache} cache needs a model loaded with unmask.load; {type(model).__name__} can only be run without a cache"
            )
    canvases = [row + [mask_id] * gen_length for row in prompts]
    given = [[True] * len(row) + [False] * gen_length for row in prompts]
    # as the authors' code: one stream of random numbers, taken from torch's default generator, so torch.manual_seed decides it
    sampled = policy.temperature > 0 or policy.score == "random"
    seeds = torch.randint(0, 2**62, (b,)).tolist() if sampled else [0] * b
    quota_steps = steps if policy.rule == "quota" else None
    state = DecodeState(canvases, given, mask_id, FixedBlocks(block_length), quota_steps, seeds, prompt.device)
    if native:
        backend: NativeBackend | ModuleBackend = NativeBackend(model, state, mask_id, cfg_scale)
    else:
        full = None
        if attention_mask is not None:
            full = torch.cat([attention_mask, attention_mask.new_ones((b, gen_length))], dim=1)
        backend = ModuleBackend(model, state, mask_id, cfg_scale, full)
    forwards = sum(1 for _ in Engine(state, backend, policy, cache=cache, min_steps=min_steps).run())
    x = torch.full((b, p + gen_length), mask_id, dtype=torch.int64, device=prompt.device)
    x[:, :p] = prompt
    for i, row in enumerate(state.rows):
        x[i, p:] = state.canvas[i, row.end - gen_length : row.end]
    return x, forwards


def _attention_mask(mask: torch.Tensor | None, prompt: torch.Tensor) -> torch.Tensor:
    """bool [B, P]: which prompt positions are real. Padding must be on the left, as the authors pad."""
    if mask is None:
        return torch.ones_like(prompt, dtype=torch.bool)
    if not isinstance(mask, torch.Tensor) or mask.shape != prompt.shape:
        raise SettingError(f"attention_mask must be [B, P] = {list(prompt.shape)}, got {list(mask.shape) if isinstance(mask, torch.Tensor) else mask!r}")
    keep = mask != 0
    if bool((keep[:, :-1] & ~keep[:, 1:]).any()):
        raise SettingError("attention_mask must have its zeros on the left of each row (left padding)")
    return keep
