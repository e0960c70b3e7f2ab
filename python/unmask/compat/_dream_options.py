"""What every Dream function takes and gives back: the options of the authors' DreamGenerationConfig, checked, and their output."""

from __future__ import annotations

import dataclasses
import math
import warnings
from collections.abc import Mapping
from typing import Any

import torch

from ..decode.policy import MAX_TEMPERATURE, Policy
from ..errors import SettingError, check_names
from ..models.foreign import Foreign
from ..models.model import Model
from ..values import integer, number
from . import _loop

DEFAULTS: dict[str, Any] = dict(
    temperature=0.0, top_p=None, top_k=None, max_length=20, max_new_tokens=None, eps=1e-3, steps=512, alg="origin", alg_temp=None,
    num_return_sequences=1, return_dict_in_generate=False, output_history=False, mask_token_id=None, pad_token_id=None, bos_token_id=None,
    eos_token_id=None,
)  # fmt: skip
"""DreamGenerationConfig's fields and their defaults (HKUNLP/Dream, generation_utils.py)."""

TOP_DOWN = ("maskgit_plus", "topk_margin", "entropy")


@dataclasses.dataclass
class DreamModelOutput:
    """What the authors return with return_dict_in_generate=True; fields by name, by key or, those that are not None, by index.

    sequences: int64 [B, P + new tokens]. history: with output_history=True the sequences after every forward, else None. nfe_history,
    block_history (AdaBlock's fields): forwards and length of each block, of the one row or a list per row.
    """

    sequences: torch.Tensor
    history: list[torch.Tensor] | None = None
    nfe_history: list | None = None
    block_history: list | None = None

    def to_tuple(self) -> tuple:
        fields = (getattr(self, f.name) for f in dataclasses.fields(self))
        return tuple(value for value in fields if value is not None)

    def __getitem__(self, key: str | int) -> Any:
        if not isinstance(key, str):
            return self.to_tuple()[key]
        if key not in {f.name for f in dataclasses.fields(self)} or getattr(self, key) is None:
            raise KeyError(key)
        return getattr(self, key)


class Options:
    """The options of one call, checked. Attributes as in DEFAULTS, and:

    prompt: int64 [B * num_return_sequences, P]. attention_mask: of the same shape or None. new_tokens: positions to fill. mask_id: int.
    extra: the caller's own keywords, by name, those that were given. model: without the wrapper of unmask.wrap; shifted: whether a module's
    logits are, True where no wrapper says otherwise.
    """

    temperature: float
    top_p: float | None
    top_k: int | None
    eps: float
    steps: int
    alg: str
    alg_temp: float | None

    def __init__(
        self, model: torch.nn.Module | Foreign, inputs: torch.Tensor | None, config: object, kwargs: Mapping[str, Any], extra: tuple[str, ...],
        algs: tuple[str, ...],
    ):  # fmt: skip
        _loop.check_model(model)
        self.model, self.shifted = (model.module, model.config.shifted) if isinstance(model, Foreign) else (model, True)
        check_names("argument", kwargs, [*DEFAULTS, "attention_mask", *extra])
        self.extra = {n: kwargs[n] for n in extra if n in kwargs}
        own = {n: kwargs.get(n, _field(config, n, default)) for n, default in DEFAULTS.items()}
        _loop.check_prompt(inputs, "inputs")
        assert inputs is not None
        self.temperature = number("temperature", own["temperature"], 0.0, MAX_TEMPERATURE)
        self.top_p = None if own["top_p"] is None else number("top_p", own["top_p"], 0.0, 1.0, open_low=True)
        self.top_k = None if own["top_k"] is None else integer("top_k", own["top_k"], 1)
        self.eps = number("eps", own["eps"], 0.0, 1.0)
        self.steps = integer("steps", DEFAULTS["steps"] if own["steps"] is None else own["steps"], 1, _loop.LONGEST)
        check_names("alg", [own["alg"]], algs)
        self.alg = own["alg"]
        self.alg_temp = None if own["alg_temp"] is None else number("alg_temp", own["alg_temp"], 0.0, 1e30)
        for name in ("return_dict_in_generate", "output_history"):
            if not isinstance(own[name], bool):
                raise SettingError(f"{name} must be True or False, got {own[name]!r}")
        self.return_dict, self.output_history = own["return_dict_in_generate"], own["output_history"]
        self.mask_id = _mask_id(model, own["mask_token_id"])
        self._longest = _max_positions(model)
        self.new_tokens = self._new_tokens(own, "max_length" in kwargs, inputs.shape[1])
        copies = integer("num_return_sequences", own["num_return_sequences"], 1, _loop.LONGEST)
        mask = kwargs.get("attention_mask")
        keep = _loop.padding(mask, inputs)
        if mask is None and own["pad_token_id"] is not None and bool((inputs == own["pad_token_id"]).any()):
            warnings.warn("the inputs hold pad_token_id, and no attention_mask says which of them are padding", UserWarning, stacklevel=4)
        self.prompt = inputs.repeat_interleave(copies, 0)
        self.attention_mask = None if bool(keep.all()) else keep.repeat_interleave(copies, 0)

    def _new_tokens(self, own: dict[str, Any], explicit: bool, given: int) -> int:
        """max_new_tokens first; a max_length of the default size counts from the prompt's end, any other from its beginning."""
        if own["max_new_tokens"] is not None:
            return integer("max_new_tokens", own["max_new_tokens"], 1, _loop.LONGEST)
        longest = integer("max_length", own["max_length"], 1, _loop.LONGEST)
        if not explicit and longest == DEFAULTS["max_length"]:
            longest = min(longest + given, self._longest)
        if longest <= given:
            raise SettingError(f"max_length must be above the length of the inputs, {given}, got {longest}; or give max_new_tokens")
        return longest - given

    def policy(self, rule: str, knobs: Mapping[str, Any], **more: Any) -> Policy:
        """Dream's sampling: temperature, top-p and top-k shape the distribution that is scored too; confidence has the logits' precision."""
        return Policy(
            rule=rule, knobs=knobs, temperature=self.temperature, top_p=self.top_p, top_k=self.top_k, tempered=True, rounded=True, strict=False,
            **more,
        )  # fmt: skip

    def threshold(self) -> float:
        """The threshold in the precision of the confidences, as torch compares them (default 0.9)."""
        value = number("threshold", self.extra.get("threshold", 0.9), -math.inf, math.inf, finite=False)
        return float(torch.tensor(value, dtype=_dtype(self.model)))

    def output(self, loop: _loop.Loop) -> DreamModelOutput | torch.Tensor:
        """Runs the loop and returns what the authors return."""
        history: list[torch.Tensor] | None = [] if self.return_dict and self.output_history else None
        for _ in loop.steps():
            if history is not None:
                history.append(loop.x())
        if not self.return_dict:
            return loop.x()
        return DreamModelOutput(loop.x(), history, *loop.histories())


def block_size(options: Options, default: int, divide: bool) -> int:
    """block_length of the call (None: one block). divide: new tokens and steps must be multiples, as the authors assert."""
    size = options.extra.get("block_length", default)
    size = options.new_tokens if size is None else integer("block_length", size, 1, _loop.LONGEST)
    if divide and options.new_tokens % size:
        raise SettingError(f"the number of new tokens must be a multiple of block_length={size}, got {options.new_tokens}")
    blocks = -(-options.new_tokens // size)
    if divide and options.steps % blocks:
        raise SettingError(f"steps must be a multiple of the number of blocks, new tokens / block_length = {blocks}, got steps={options.steps}")
    return size


def flag(options: Options, name: str) -> bool:
    """A True or False among the caller's own keywords, False by default."""
    value = options.extra.get(name, False)
    if not isinstance(value, bool):
        raise SettingError(f"{name} must be True or False, got {value!r}")
    return value


def _field(config: object, name: str, default: Any) -> Any:
    if config is None:
        return default
    return config.get(name, default) if isinstance(config, Mapping) else getattr(config, name, default)


def _mask_id(model: torch.nn.Module | Foreign, given: object) -> int:
    if given is None and isinstance(model, (Model, Foreign)):
        given = model.config.mask_id
    for source in ("generation_config", "config"):
        if given is None:
            given = getattr(getattr(model, source, None), "mask_token_id", None)
    if given is None:
        raise SettingError("mask_token_id must be given: neither the generation config nor the model's config names one")
    return integer("mask_token_id", given, 0, (1 << 31) - 1)


def _max_positions(model: torch.nn.Module | Foreign) -> int:
    config = getattr(model, "config", None)
    longest = getattr(config, "max_positions" if isinstance(model, (Model, Foreign)) else "max_position_embeddings", None)
    return longest if isinstance(longest, int) else _loop.LONGEST


def _dtype(model: torch.nn.Module) -> torch.dtype:
    """The dtype that the logits will have."""
    if isinstance(model, Model):
        return model.dtype
    return next((p.dtype for p in model.parameters() if p.dtype in (torch.bfloat16, torch.float16)), torch.float32)
