"""What the compat functions share: check the authors' arguments, build the state, run the engine, give back the authors' tensor."""

from __future__ import annotations

import dataclasses
import functools
import inspect
from collections.abc import Callable, Iterator
from typing import ParamSpec, TypeVar

import torch

from ..decode.backend import Guidance, NativeBackend
from ..decode.engine import Engine
from ..decode.module_backend import ModuleBackend
from ..decode.module_cache import CachedModule, LLaDACalls, check_cacheable
from ..decode.policy import MAX_TEMPERATURE, Policy
from ..decode.schedule import FixedBlocks
from ..decode.state import DecodeState, Row
from ..errors import SettingError, check_names
from ..models.foreign import Foreign
from ..models.model import Model, check_ids
from ..values import integer, number

LONGEST = 1 << 20  # positions and steps; more is a mistake, not a request
P, R = ParamSpec("P"), TypeVar("R")
REMASKING = {"low_confidence": "confidence", "random": "random"}


def check_model(model: object) -> None:
    """A model from unmask.load, a module, or one from unmask.wrap, whose attention these loops can serve."""
    if not isinstance(model, (torch.nn.Module, Foreign)):
        raise SettingError(f"model must be a model from unmask.load or a torch.nn.Module, bare or from unmask.wrap, got {type(model).__name__}")
    if isinstance(model, Foreign) and isinstance(model.module, Model):
        raise SettingError("model must not be one from unmask.load inside unmask.wrap; pass the model itself, it knows its mask token and its shift")
    if isinstance(model, Foreign) and model.config.visibility != "bidirectional":
        raise SettingError(
            f"model must be bidirectional, got {model.name} wrapped as {model.config.visibility.replace('_', '-')}: these loops call a module with "
            "whole canvases; use unmask.generate, which calls it up to the end of its block"
        )


def wrapped_mask(sampler: Callable[P, R]) -> Callable[P, R]:
    """The sampler, with the wrapper's mask_id for a module from unmask.wrap where the caller gives none: its default is LLaDA-8B's, and only
    here shows whether it was given."""
    names = list(inspect.signature(sampler).parameters)
    place = names.index("mask_id")

    @functools.wraps(sampler)
    def call(*args: P.args, **kwargs: P.kwargs) -> R:
        model = args[0] if args else kwargs.get(names[0])
        if isinstance(model, Foreign) and "mask_id" not in kwargs and len(args) <= place:
            kwargs["mask_id"] = model.config.mask_id
        return sampler(*args, **kwargs)

    return call


def check_prompt(prompt: object, name: str = "prompt") -> None:
    if not isinstance(prompt, torch.Tensor) or prompt.dim() != 2 or prompt.dtype != torch.int64:
        what = f"{prompt.dtype} {list(prompt.shape)}" if isinstance(prompt, torch.Tensor) else type(prompt).__name__
        raise SettingError(f"{name} must be an int64 tensor [B, P], got {what}")


def check_arguments(prompt, steps, gen_length, block_length, temperature, remasking, mask_id, quota: bool) -> int:
    """Checks what every LLaDA function takes; returns the number of blocks."""
    check_prompt(prompt)
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


class History(DecodeState):
    """A DecodeState that notes what its rows' blocks took: per row (block length, forwards), block after block."""

    def __init__(self, *args, **kwargs):
        self.blocks: dict[int, list[tuple[int, int]]] = {}
        super().__init__(*args, **kwargs)

    def next_block(self, row: Row) -> None:
        if row.block >= 0:
            done = self.blocks.setdefault(row.index, [])
            done.append((row.block_end - row.block_start, row.nfe - sum(n for _, n in done)))
        super().next_block(row)


@dataclasses.dataclass
class Loop:
    """One generation, ready to run."""

    state: History
    engine: Engine
    prompt: torch.Tensor
    gen_length: int
    mask_id: int

    def steps(self) -> Iterator[int]:
        """Yields the number of forwards so far, after each one."""
        for done, _ in enumerate(self.engine.run(), 1):
            yield getattr(self.engine.backend, "forwards", done)

    def run(self) -> tuple[torch.Tensor, int]:
        """Decodes to the end: (x int64 [B, P + gen_length], number of forwards)."""
        forwards = [0, *self.steps()][-1]
        return self.x(), forwards

    def x(self) -> torch.Tensor:
        """int64 [B, P + gen_length] as it stands, padding included."""
        b, p = self.prompt.shape
        x = torch.full((b, p + self.gen_length), self.mask_id, dtype=torch.int64, device=self.prompt.device)
        x[:, :p] = self.prompt
        for i, row in enumerate(self.state.rows):  # packed rows begin behind their padding
            x[i, p + self.gen_length - row.end :] = self.state.canvas[i, : row.end]
        return x

    def histories(self) -> tuple[list, list]:
        """(forwards, lengths) of the blocks: of the one row, or a list per row."""
        rows = [self.state.blocks.get(r.index, []) for r in self.state.rows]
        forwards, lengths = [[n for _, n in blocks] for blocks in rows], [[size for size, _ in blocks] for blocks in rows]
        return (forwards[0], lengths[0]) if len(rows) == 1 else (forwards, lengths)


def prepare(
    model: torch.nn.Module | Foreign,
    prompt: torch.Tensor,
    policy: Policy,
    *,
    gen_length: int,
    mask_id: int,
    schedule: FixedBlocks,
    steps: int | None = None,
    cache: str = "none",
    cfg_scale: float = 0.0,
    attention_mask: torch.Tensor | None = None,
    calls: LLaDACalls | None = None,
    shifted: bool = False,
    start: tuple[torch.Tensor, torch.Tensor] | None = None,
    **engine,
) -> Loop:
    """Checks the model against the arguments and builds the loop that decodes gen_length positions after each prompt.

    calls: how a module that is not ours is called where `module(ids, attention_mask=...)` is not it; shifted: whether its logits are. One from
    unmask.wrap is taken out of its wrapper, which says the latter.
    start: canvases int64 [B, P + gen_length] and which positions are undecided, bool, for a module (default: prompts and masks).
    engine: more arguments of Engine.
    """
    if isinstance(model, Foreign):
        model, shifted = model.module, model.config.shifted
    b = prompt.shape[0]
    keep = padding(attention_mask, prompt)
    native = isinstance(model, Model) and calls is None
    if isinstance(model, Model):
        _check_native(model, prompt, mask_id)
    if native:
        # padded positions are left out: packed rows need no padding, and RoPE only sees distances
        prompts = [row[k].tolist() for row, k in zip(prompt, keep, strict=True)]
    else:
        prompts = prompt.tolist()
        if cache != "none":
            calls = calls or LLaDACalls()
            check_cacheable(model, cache, calls.needed(cache))
    if start is None:
        canvases = [row + [mask_id] * gen_length for row in prompts]
        given = [[True] * len(row) + [False] * gen_length for row in prompts]
    else:
        canvases, given = start[0].tolist(), (~start[1]).tolist()
    # as the authors' code: one stream of random numbers, taken from torch's default generator, so torch.manual_seed decides it
    seeds = torch.randint(0, 2**62, (b,)).tolist() if policy.sampled else [0] * b
    guidance = Guidance(cfg_scale + 1.0) if cfg_scale else None
    state = History(canvases, given, mask_id, schedule, steps, seeds, prompt.device)
    backend: NativeBackend | ModuleBackend
    if native:
        backend = NativeBackend(model, state, mask_id, guidance)
    elif calls is not None:
        backend = CachedModule(model, state, mask_id, cache, calls, shifted)
    else:
        full = None
        if attention_mask is not None:
            full = torch.cat([attention_mask, attention_mask.new_ones((b, gen_length))], dim=1)
        backend = ModuleBackend(model, state, mask_id, guidance, full, shifted)
    return Loop(state, Engine(state, backend, policy, cache=cache, **engine), prompt, gen_length, mask_id)


def _check_native(model: Model, prompt: torch.Tensor, mask_id: int) -> None:
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


def padding(mask: torch.Tensor | None, prompt: torch.Tensor) -> torch.Tensor:
    """bool [B, P]: which prompt positions are real. Padding must be on the left, as the authors pad."""
    if mask is None:
        return torch.ones_like(prompt, dtype=torch.bool)
    if not isinstance(mask, torch.Tensor) or mask.shape != prompt.shape:
        raise SettingError(f"attention_mask must be [B, P] = {list(prompt.shape)}, got {list(mask.shape) if isinstance(mask, torch.Tensor) else mask!r}")
    keep = mask != 0
    if bool((keep[:, :-1] & ~keep[:, 1:]).any()):
        raise SettingError("attention_mask must have its zeros on the left of each row (left padding)")
    return keep
