"""Dream's `diffusion_generate` (HKUNLP/Dream, generation_utils.py; arXiv 2508.15487) and Fast-dLLM's versions of it (NVlabs/Fast-dLLM,
dream/model/generation_utils.py and generation_utils_block.py; arXiv 2505.22618) on unmask's ops.

A function of the model, or, bound as the authors bind theirs, a method:

    model.diffusion_generate = types.MethodType(unmask.compat.dream.diffusion_generate, model)

The authors choose a version by the file that they bind; here the keywords choose:

| keywords | version |
|---|---|
| none of these | Dream's own sampler: alg origin, maskgit_plus, topk_margin or entropy, `steps` forwards over the whole canvas |
| alg="confidence_threshold" | Fast-dLLM's threshold on the whole canvas: a quota per step, what falls short carries over; may take more forwards than steps |
| block_length or dual_cache | Fast-dLLM's blocks with a prefix (dual_cache=False) or dual cache; every block's first, full forward commits its first position and nothing else, and at least one cached forward follows; any other alg than confidence_threshold is Dream's schedule over negative entropy |

AdaBlock's versions are `unmask.compat.adablock.dream_generate` and `dream_generate_parallel`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from ..decode.logits import logits_of
from ..decode.module_cache import DreamCalls, LLaDACalls
from ..decode.rules.base import StepView
from ..decode.schedule import FixedBlocks
from ..errors import SettingError
from ..models.foreign import Foreign
from ..models.model import Model
from . import _loop
from ._dream_options import TOP_DOWN, DreamModelOutput, Options, block_size, flag
from ._dream_rules import CarryOver, OwnRule

__all__ = ["DreamModelOutput", "diffusion_generate"]

ALGS = ("origin", *TOP_DOWN, "confidence_threshold")
_HOOKS = ("generation_tokens_hook_func", "generation_logits_hook_func")
_BLOCKS = ("block_length", "dual_cache")


def diffusion_generate(
    model: torch.nn.Module | Foreign, inputs: torch.Tensor | None = None, generation_config: object = None, **kwargs: Any
) -> DreamModelOutput | torch.Tensor:
    """Fills masks behind the prompts; returns int64 [B, P + new tokens], or with return_dict_in_generate=True a DreamModelOutput.

    model: from `unmask.load`, or a module called as the authors call theirs: forward(ids, attention_mask, position_ids), attention_mask being
    "full" or bool [B, 1, L, L]; or plain forward(ids) where nothing is padded. Cached versions: a module that also takes past_key_values,
    use_cache and, for dual_cache=True, dual_cache and replace_position. Its logits are shifted: those at i are for position i + 1, unless it is
    from `unmask.wrap` and the wrapper says otherwise (mask_token_id is then the wrapper's by default).
    inputs: int64 [B, P]. generation_config: an object or dict with the options below; keywords come first.

    attention_mask: [B, P], zeros on the left for padding. max_new_tokens; or max_length, with the prompt (default: 20 new tokens). steps 512,
    eps 1e-3, alg "origin", alg_temp None (else positions are drawn from softmax(score / alg_temp)), temperature 0, top_p, top_k None.
    mask_token_id: default, the model's. num_return_sequences. threshold 0.9: of alg="confidence_threshold", unused by the others.
    output_history: keep the sequences after every forward (cached versions too, where the authors return an empty list).
    generation_tokens_hook_func(step, x, logits) -> x, also called with (None, x, None) before the first forward, and
    generation_logits_hook_func(step, x, logits) -> logits: as the authors', x int64 [B, L], logits [B, L, V] already shifted. They need
    whole logits, so a model from `unmask.load` then runs without packing and its fused head, and without padding. Not in cached versions.
    block_length (default 32; None = one block), dual_cache (False): see the module.

    Ours: uniforms, of alg="origin": per step the draws of the masked positions, row by row, instead of random ones, for replaying a run.
    leave_masked=True: where steps equals the number of blocks, all but the first position of each stays masked, as in the authors' block
    loop; by default its second forward commits the rest.
    Differences: each row counts its own masks (their mean over the batch lets short rows be overwritten by masks, at positions that their
    topk leaves open); thresholds and batches go together; the mask token is never predicted; masks in the prompt stay; samples come from a
    counter-based generator seeded from torch's default one. Raises SettingError (a ValueError) for bad arguments.
    """
    blocks = any(n in kwargs for n in _BLOCKS)
    options = Options(model, inputs, generation_config, kwargs, (*_HOOKS, *_BLOCKS, "threshold", "uniforms", "leave_masked"), ALGS)
    return options.output(_block_loop(options) if blocks else _whole_loop(options))


def _whole_loop(options: Options) -> _loop.Loop:
    """Dream's own sampler, or Fast-dLLM's threshold, on the whole canvas."""
    if "leave_masked" in options.extra:
        raise SettingError("leave_masked is for the block version: give block_length or dual_cache")
    hooks = _Hooks(options)
    steps, settings = options.steps, dict(min_steps=lambda row: options.steps, max_steps=lambda row: options.steps)
    if options.alg == "confidence_threshold":
        if options.prompt.shape[0] > 1 and hooks.given:
            raise SettingError("hooks with alg='confidence_threshold' need one prompt per call: rows may take different numbers of forwards")
        threshold = options.threshold()
        make = lambda run: CarryOver(run, steps, threshold)  # noqa: E731
        policy = OwnRule(
            knobs=dict(threshold=threshold), temperature=options.temperature, top_p=options.top_p, top_k=options.top_k, tempered=True,
            rounded=True, strict=False, make=make,
        )  # fmt: skip
        masks = options.new_tokens if hooks.start is None else int(hooks.start[1].sum())
        if masks % steps:
            raise SettingError(f"alg='confidence_threshold' needs a number of masks that is a multiple of steps={steps}, got {masks}")
        settings = {}
    else:
        policy = options.policy("dream", dict(alg=options.alg, steps=steps, eps=options.eps, alg_temp=options.alg_temp))
    uniforms = _Uniforms(options) if options.extra.get("uniforms") is not None else None
    loop = _prepare(
        options, policy, calls=hooks.calls, shifted=hooks.calls is None and options.shifted, start=hooks.start, schedule=FixedBlocks(_loop.LONGEST),
        after_commit=hooks.after if hooks.tokens else None, **settings,
    )  # fmt: skip
    hooks.loop = loop
    if uniforms is not None:
        loop.engine.rule.uniforms = uniforms
    return loop


def _block_loop(options: Options) -> _loop.Loop:
    """Fast-dLLM's blocks with a cache."""
    for name in (*_HOOKS, "uniforms"):
        if options.extra.get(name) is not None:
            raise SettingError(f"{name} is for the version on the whole canvas: leave block_length and dual_cache out")
    size = block_size(options, 32, divide=True)
    per_block = options.steps * size // options.new_tokens
    cache = "dual" if flag(options, "dual_cache") else "prefix"
    left = flag(options, "leave_masked") and per_block == 1 and options.alg != "confidence_threshold"
    if options.alg == "confidence_threshold":
        policy = options.policy("threshold", dict(threshold=options.threshold()), forced_first=True)
    else:
        knobs = dict(alg="entropy", steps=per_block, eps=options.eps, alg_temp=options.alg_temp)
        policy = options.policy("dream", knobs, forced_first=True)
    loop = _prepare(
        options, policy, schedule=FixedBlocks(size), cache=cache, shifted_window="block", min_steps=lambda row: 2,
        max_steps=lambda row: 2 if left else None,
    )  # fmt: skip
    if left:
        loop.engine.rule.leave_masked = True
    return loop


def _prepare(options: Options, policy, *, calls: LLaDACalls | None = None, shifted: bool | None = None, **more: Any) -> _loop.Loop:
    """The loop; a module that is not ours is called as the authors call theirs. shifted: of what `calls` returns, None = the options'."""
    if calls is None and not isinstance(options.model, Model):
        calls = _calls(options)
    return _loop.prepare(
        options.model, options.prompt, policy, gen_length=options.new_tokens, mask_id=options.mask_id, attention_mask=options.attention_mask,
        calls=calls, shifted=options.shifted if shifted is None else shifted, **more,
    )  # fmt: skip


def _calls(options: Options) -> DreamCalls:
    mask = options.attention_mask
    if mask is not None:
        mask = torch.cat([mask, mask.new_ones(mask.shape[0], options.new_tokens)], 1)
    return DreamCalls(options.model, mask)


class _Uniforms:
    """Recorded draws of alg="origin": per step float [M], row by row over the M positions that are masked then."""

    def __init__(self, options: Options):
        if options.alg != "origin":
            raise SettingError(f"uniforms is for alg='origin', got alg={options.alg!r}")
        values = options.extra["uniforms"]
        try:
            self.values = [torch.as_tensor(v, dtype=torch.float32).flatten() for v in values]
        except (TypeError, ValueError, RuntimeError) as error:
            raise SettingError(f"uniforms must hold the draws of each step, numbers or tensors, got {type(values).__name__}: {error}") from None
        if len(self.values) != options.steps:
            raise SettingError(f"uniforms must hold the draws of each step, {options.steps} here, got {len(self.values)}")

    def __call__(self, step: StepView) -> torch.Tensor:
        i = step.rows[0].step
        masks, draws = int(step.masked.sum()), self.values[i]
        if draws.shape[0] != masks:
            raise SettingError(f"uniforms[{i}] must hold one number per masked position, {masks} here, got {draws.shape[0]}")
        out = torch.ones(step.pos.shape[0], device=step.device)
        out[step.masked] = draws.to(step.device)
        return out


class _Hooks(LLaDACalls):
    """The user's hooks: whole logits go through them between the module's forward and the ops, and the canvases after every commit."""

    def __init__(self, options: Options):
        found = [options.extra.get(n) for n in _HOOKS]
        for name, hook in zip(_HOOKS, found, strict=True):
            if hook is not None and not callable(hook):
                raise SettingError(f"{name} must be a function, got {type(hook).__name__}")
        self.tokens: Callable | None = found[0]
        self.edit: Callable | None = found[1]
        self.given = self.tokens is not None or self.edit is not None
        self.calls: LLaDACalls | None = None
        self.start: tuple[torch.Tensor, torch.Tensor] | None = None
        self.loop: _loop.Loop | None = None
        if not self.given:
            return
        native = isinstance(options.model, Model)
        if native and options.attention_mask is not None:
            raise SettingError(
                "hooks need whole logits [B, L, V], which a model from unmask.load gives without padding only: give prompts of one length, "
                "or call once per prompt"
            )
        self.calls, self.step = self, 0
        self.inner = LLaDACalls() if native else _calls(options)
        self.shifts = options.model.config.shifted if native else options.shifted
        self.mask_id = options.mask_id
        self.literal = torch.nn.functional.pad(options.prompt == self.mask_id, (0, options.new_tokens))  # masks that are part of a prompt
        x = torch.nn.functional.pad(options.prompt, (0, options.new_tokens), value=self.mask_id)
        if self.tokens is not None:
            x = self._checked(self.tokens(None, x.clone(), None), x)
        self.start = x, self._undecided(x)

    def _undecided(self, x: torch.Tensor) -> torch.Tensor:
        return (x == self.mask_id) & ~self.literal

    def _checked(self, new: object, x: torch.Tensor) -> torch.Tensor:
        if not isinstance(new, torch.Tensor) or new.shape != x.shape or new.dtype != torch.int64:
            got = f"{new.dtype} {list(new.shape)}" if isinstance(new, torch.Tensor) else type(new).__name__
            raise SettingError(f"generation_tokens_hook_func must return x, int64 {list(x.shape)}, got {got}")
        return new

    def whole(self, module, x, rows, keep):
        logits = logits_of(self.inner.whole(module, x, rows, keep), type(module).__name__)
        if self.shifts:
            logits = torch.cat([logits[:, :1], logits[:, :-1]], 1)
        shape = logits.shape
        if self.edit is not None:
            logits = self.edit(self.step, x, logits)
        if not isinstance(logits, torch.Tensor) or logits.shape != shape:
            got = list(logits.shape) if isinstance(logits, torch.Tensor) else type(logits).__name__
            raise SettingError(f"generation_logits_hook_func must return logits {list(shape)}, got {got}")
        self.logits, self.step = logits, self.step + 1
        return logits

    def after(self, step: StepView) -> None:
        """Called once a forward's tokens are written: the hook may decide, change or mask positions of the region."""
        assert self.tokens is not None and self.loop is not None
        state = self.loop.state
        x = self._checked(self.tokens(self.step - 1, state.canvas.clone(), self.logits), state.canvas)
        undecided = self._undecided(x)
        first = torch.tensor([r.start for r in state.rows], device=x.device)
        if bool((undecided & (torch.arange(x.shape[1], device=x.device) < first[:, None])).any()):
            raise SettingError("generation_tokens_hook_func may not mask positions before a row's first mask at the start")
        state.canvas.copy_(x)
        state.masked.copy_(undecided)
