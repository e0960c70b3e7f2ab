"""What a model is, in one frozen record (`ModelConfig`), and the safe reading of the JSON files it comes from.

A family file (models/llada.py) turns a checkpoint's own field names into a ModelConfig. Nothing here executes what a
checkpoint ships: `auto_map` and modeling files are never looked at.
"""

from __future__ import annotations

import json
import math
import stat
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, fields
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import Any, Literal, get_args

from ..errors import CheckpointError, nearest

FAMILIES = {
    name: f"unmask.models.{name}"
    for name in ("llada", "dream", "llada_moe", "llada2", "sdar", "fast_dllm_v2")
}
"""Family name -> its module, which holds MODEL_TYPES, ARCHITECTURES, PREFIX, OVERRIDABLE, `read_config`, `weight_map`
and `is_ignored`, and may hold CHAT_TEMPLATE with CHAT_TOKENS and BOS_TOKEN, and REFUSED (model_type -> why not)."""

Visibility = Literal["bidirectional", "block_causal"]
Scoring = Literal["softmax", "sigmoid"]

CONFIG_BYTES = 1 << 20
"""Largest config.json or generation_config.json that is read."""

MAX_PARAMETERS = 1 << 40

LIMITS = {
    "d_model": (1, 1 << 17),
    "n_layers": (1, 1024),
    "n_heads": (1, 4096),
    "n_kv_heads": (1, 4096),
    "head_dim": (8, 1024),
    "ffn_dim": (1, 1 << 20),
    "vocab_size": (1, 1 << 22),
    "rotary_dim": (0, 1024),
    "max_positions": (1, 1 << 24),
}
"""Field -> (lowest, highest) value of the sizes: far above any model, low enough that checking one costs nothing."""

BLOCK_LIMIT = {"block_size": (1, 1 << 16)}
EXPERT_LIMITS = {
    "n_experts": (1, 4096),
    "top_k": (1, 4096),
    "expert_dim": (1, 1 << 20),
    "shared_dim": (0, 1 << 20),
    "n_groups": (1, 4096),
    "kept_groups": (1, 4096),
}
"""The same for `Experts`."""
_COUNTS = {"first_dense": (0, 1024), "n_shared": (0, 64)}
MAX_EXPERTS = 1 << 15
"""Most experts of all layers together: each has three tensors, whose names are listed before anything is read."""


@dataclass(frozen=True)
class Experts:
    """The mixture of experts of a model: which layers have one, its sizes and its router (see `unmask.models.moe.route`).

    Attributes:
        layers: indices of the layers whose MLP is a mixture, ascending; the others are dense.
        n_experts, top_k: experts of such a layer, and how many of them a token goes through.
        expert_dim, shared_dim: inner width of an expert, and of the expert that every token goes through (0: there is none).
        scoring: what makes scores of the router's logits.
        selection_bias: a bias per expert is added to the scores for the choice; the weights are those without it.
        n_groups, kept_groups: experts form n_groups groups of neighbours; a token chooses within its kept_groups best.
        normalized: a token's top_k weights are divided by their sum. scale: then multiplied by this.
    """

    layers: tuple[int, ...]
    n_experts: int
    top_k: int
    expert_dim: int
    shared_dim: int
    scoring: Scoring
    selection_bias: bool
    n_groups: int
    kept_groups: int
    normalized: bool
    scale: float

    def problems(self, n_layers: int) -> list[str]:
        """Everything that is wrong with the values, for a model of `n_layers` layers."""
        found = []
        for name, (low, high) in EXPERT_LIMITS.items():
            found += number_problems(f"experts.{name}", getattr(self, name), int, low, high)
        found += number_problems("experts.scale", self.scale, float, 0.0, 1e6)
        for name in ("selection_bias", "normalized"):
            if not isinstance(getattr(self, name), bool):
                found.append(f"experts.{name} must be true or false, got {shown(getattr(self, name))}")
        if self.scoring not in get_args(Scoring):
            found.append(f"experts.scoring must be one of {get_args(Scoring)}, got {shown(self.scoring)}")
        layers = self.layers
        if not isinstance(layers, tuple) or not layers:
            found.append(f"experts.layers must be a tuple of layer indices that is not empty, got {shown(layers)}")
        else:
            for layer in layers:
                found += number_problems("experts.layers", layer, int, 0, n_layers - 1)
        if found:
            return found
        if list(layers) != sorted(set(layers)):
            found.append(f"experts.layers must be ascending, got {shown(layers)}")
        if len(layers) * self.n_experts > MAX_EXPERTS:
            found.append(f"experts.n_experts must be at most {MAX_EXPERTS} over all layers, got {len(layers)} x {self.n_experts}")
        if self.n_experts % self.n_groups:
            found.append(f"experts.n_experts must be a multiple of n_groups, got {self.n_experts} and {self.n_groups}")
        if self.kept_groups > self.n_groups:
            found.append(f"experts.kept_groups must be at most n_groups {self.n_groups}, got {self.kept_groups}")
        elif self.top_k > self.n_experts // self.n_groups * self.kept_groups:
            found.append(
                f"experts.top_k must be at most the {self.n_experts // self.n_groups * self.kept_groups} experts of the kept groups, got {self.top_k}"
            )
        return found

    def parameters(self, d_model: int, experts: int) -> int:
        """Weights of one such layer's MLP when `experts` of its experts count."""
        router = self.n_experts * (d_model + self.selection_bias)
        return router + 3 * d_model * (experts * self.expert_dim + self.shared_dim)


@dataclass(frozen=True)
class ModelConfig:
    """One transformer, in unmask's words.

    Attributes:
        family: name of the family file that read it.
        d_model, n_layers, n_heads, n_kv_heads, head_dim, ffn_dim: sizes; n_heads * head_dim need not be d_model.
        vocab_size: rows of the embedding and of the head, so ids are 0 .. vocab_size - 1.
        rope_theta, rotary_dim: base of the rotary angles; the first rotary_dim dims of each head rotate.
        norm_eps: epsilon of every RMSNorm.
        qkv_bias: q, k and v projections have a bias.
        qk_norm: per-head RMSNorm (weight of head_dim) on q and k before the rotation.
        tied_head: the head is the embedding.
        mask_id, eos_ids, pad_id: special ids; any of eos_ids ends a text. mask_id is never one of them.
        max_positions: longest sequence that the model was made for.
        block_size: block length that the model was trained with, None where it is a free choice.
        shifted: logits at position i predict token i + 1.
        visibility: "bidirectional", or "block_causal": a block sees itself and the blocks before it; blocks begin at
            multiples of block_size, counted from the first token.
        experts: the mixture of experts, None for a dense model; ffn_dim is the inner width of the dense layers.
    """

    family: str
    d_model: int
    n_layers: int
    n_heads: int
    n_kv_heads: int
    head_dim: int
    ffn_dim: int
    vocab_size: int
    rope_theta: float
    rotary_dim: int
    norm_eps: float
    qkv_bias: bool
    qk_norm: bool
    tied_head: bool
    mask_id: int
    eos_ids: tuple[int, ...]
    pad_id: int | None
    max_positions: int
    block_size: int | None
    shifted: bool
    visibility: Visibility
    experts: Experts | None = None

    def problems(self) -> list[str]:
        """Everything that is wrong with the values (an empty list for a usable config). Allocates nothing."""
        found = []
        for name, (low, high) in LIMITS.items():
            found += number_problems(name, getattr(self, name), int, low, high)
        found += number_problems("rope_theta", self.rope_theta, float, 1.0, 1e12)
        found += number_problems("norm_eps", self.norm_eps, float, 0.0, 1.0)
        for name in ("qkv_bias", "qk_norm", "tied_head", "shifted"):
            if not isinstance(getattr(self, name), bool):
                found.append(f"{name} must be true or false, got {shown(getattr(self, name))}")
        if self.block_size is not None:
            found += number_problems("block_size", self.block_size, int, *BLOCK_LIMIT["block_size"])
        if self.visibility not in get_args(Visibility):
            found.append(f"visibility must be one of {get_args(Visibility)}, got {shown(self.visibility)}")
        if self.experts is not None and not isinstance(self.experts, Experts):
            found.append(f"experts must be an Experts or None, got {shown(self.experts)}")
        elif self.experts is not None and not number_problems("", self.n_layers, int, *LIMITS["n_layers"]):
            found += self.experts.problems(self.n_layers)
        if found:
            return found  # the checks below compute with these numbers
        if self.visibility == "block_causal" and self.block_size is None:
            found.append("block_size must be given where visibility is 'block_causal', got None")
        if self.n_heads % self.n_kv_heads:
            found.append(
                f"n_heads must be a multiple of n_kv_heads, got {self.n_heads} and {self.n_kv_heads}"
            )
        if self.head_dim % 8:
            found.append(f"head_dim must be a multiple of 8, got {self.head_dim}")
        if self.rotary_dim % 2 or self.rotary_dim > self.head_dim:
            found.append(
                f"rotary_dim must be even and at most head_dim {self.head_dim}, got {self.rotary_dim}"
            )
        found += self._id_problems()
        if self.n_parameters > MAX_PARAMETERS:
            found.append(
                f"the sizes make {self.n_parameters:,} parameters; at most {MAX_PARAMETERS:,} are accepted"
            )
        return found

    def _id_problems(self) -> list[str]:
        last = self.vocab_size - 1
        found = number_problems("mask_id", self.mask_id, int, 0, last)
        if self.pad_id is not None:
            found += number_problems("pad_id", self.pad_id, int, 0, last)
        if not isinstance(self.eos_ids, tuple):
            return [*found, f"eos_ids must be a tuple of ids, got {shown(self.eos_ids)}"]
        for eos in self.eos_ids:
            found += number_problems("eos_ids", eos, int, 0, last)
        if self.mask_id in self.eos_ids:
            found.append(f"mask_id {self.mask_id} must not be one of eos_ids {self.eos_ids}")
        return found

    def validate(self) -> ModelConfig:
        """Itself, or CheckpointError with every problem."""
        found = self.problems()
        if found:
            raise CheckpointError(f"invalid {self.family} model config", found)
        return self

    @property
    def n_parameters(self) -> int:
        """Number of weights, from the sizes alone."""
        return self._parameters(self.experts.n_experts if self.experts else 0)

    @property
    def n_active_parameters(self) -> int:
        """Number of weights that a token goes through: all but the experts that it is not routed to."""
        return self._parameters(self.experts.top_k if self.experts else 0)

    def _parameters(self, experts: int) -> int:
        q, kv = self.n_heads * self.head_dim, self.n_kv_heads * self.head_dim
        layer = 2 * self.d_model * (q + kv) + 2 * self.d_model
        layer += (q + 2 * kv) * self.qkv_bias + 2 * self.head_dim * self.qk_norm
        mixtures = len(self.experts.layers) if self.experts else 0
        mlps = (self.n_layers - mixtures) * 3 * self.d_model * self.ffn_dim
        if self.experts:
            mlps += mixtures * self.experts.parameters(self.d_model, experts)
        embeddings = self.vocab_size * self.d_model * (1 if self.tied_head else 2)
        return embeddings + self.n_layers * layer + mlps + self.d_model


CONFIG_FIELDS = tuple(field.name for field in fields(ModelConfig))


@dataclass(frozen=True)
class WeightSpec:
    """A tensor that a checkpoint must hold: its name there, and its shape."""

    name: str
    shape: tuple[int, ...]


def shown(value: object, limit: int = 80) -> str:
    """`repr` for messages, cut short; a number too long to print is described."""
    try:
        text = repr(value)
    except (
        ValueError,
        RecursionError,
    ):  # int of more than 4300 digits; nesting beyond the interpreter's limit
        return f"a {type(value).__name__} too large to print"
    return text if len(text) <= limit else text[: limit - 3] + "..."


def number_problems(name: str, value: object, kind: type, low: float, high: float) -> list[str]:
    """Why `value` is no `kind` (int or float) in [low, high]: at most one line. Booleans are no numbers here."""
    if isinstance(value, bool) or not isinstance(value, int if kind is int else (int, float)):
        return [f"{name} must be {'an integer' if kind is int else 'a number'}, got {shown(value)}"]
    if not (isinstance(value, int) or math.isfinite(value)) or not low <= value <= high:
        return [f"{name} must be in [{low}, {high}], got {shown(value)}"]
    return []


class Fields:
    """Reads config.json field by field for a family file. What is wrong is collected, so that one error names all of it.

    raw, generation: config.json and generation_config.json ({} where there is none). problems: what was wrong so far; a
    reader that adds to it returns a value that is safe to go on with.
    """

    def __init__(self, raw: dict[str, Any], generation: dict[str, Any]):
        self.raw, self.generation = raw, generation
        self.problems: list[str] = []

    def integer(self, name: str, limit: str, default: int | None = None) -> int:
        """An integer within the limit of that name; missing or null means `default`, and is wrong where there is none."""
        value = self.raw.get(name)
        if value is None:
            if default is None:
                self.problems.append(f"{name} is missing")
            return 1 if default is None else default
        bad = number_problems(name, value, int, *(LIMITS | BLOCK_LIMIT | EXPERT_LIMITS | _COUNTS)[limit])
        self.problems.extend(bad)
        return 1 if bad else value

    def number(self, name: str, default: float) -> float:
        """A finite number >= 0; missing means `default`, null is wrong."""
        value = self.raw.get(name, default)
        bad = number_problems(name, value, float, 0.0, 1e12)
        self.problems.extend(bad)
        return default if bad else float(value)

    def rotary_dim(self, name: str, default: float, head_dim: int) -> int:
        """int(head_dim x factor), as transformers computes it: the dims of a head that rotate. Missing or null means `default`."""
        value = default if self.raw.get(name) is None else self.raw[name]
        bad = number_problems(name, value, float, 0.0, 1.0)
        self.problems.extend(bad)
        return head_dim if bad else int(head_dim * value)

    def flag(self, name: str, default: bool) -> bool:
        """true or false; missing or null means `default`."""
        value = default if self.raw.get(name) is None else self.raw[name]
        if not isinstance(value, bool):
            self.problems.append(f"{name} must be true or false, got {shown(value)}")
        return value is True

    def fixed(self, table: Mapping[str, tuple[Any, Any]]) -> None:
        """table: field -> (the one supported value, the authors' default where the field is missing)."""
        for name, (supported, default) in table.items():
            value = self.raw.get(name, default)
            if type(value) is not type(supported) or value != supported:
                missing = "" if name in self.raw else ", the authors' default for a missing field"
                self.problems.append(
                    f"{name} must be {supported!r} (the only value supported), got {shown(value)}{missing}"
                )

    def absent(self, names: Iterable[str]) -> None:
        """These fields must be missing or null."""
        for name in names:
            if self.raw.get(name) is not None:
                self.problems.append(f"{name} must be absent or null, got {shown(self.raw[name])}")

    def one_id(
        self, name: str, default: int | None, rows: int, released: int, required: bool = True
    ) -> int | None:
        """A token id below `rows`, from config.json, else generation_config.json, else `default`.

        released: the released vocabulary's size, for the message where a required id is nowhere.
        """
        value = self.raw.get(name)
        if value is None:
            value = self.generation.get(name)
        if value is None:
            value = default
        if value is None:
            if required:
                self.problems.append(
                    f"{name} is missing, and vocab_size {rows} is not the released vocabulary ({released})"
                )
                return 0
            return None
        bad = number_problems(name, value, int, 0, rows - 1)
        self.problems.extend(bad)
        return 0 if bad else value

    def eos_ids(self, default: int | None, rows: int) -> tuple[int, ...]:
        """eos_token_id, one id or a list, from generation_config.json, else config.json, else `default`; each once."""
        value = self.generation.get("eos_token_id")
        if value is None:
            value = self.raw.get("eos_token_id")
        if value is None:
            value = [] if default is None else default
        ids = value if isinstance(value, list) else [value]
        if len(ids) > 256:
            self.problems.append(f"eos_token_id must hold at most 256 ids, got {len(ids)}")
            ids = ids[:256]
        for one in ids:
            bad = number_problems("eos_token_id", one, int, 0, rows - 1)
            if bad:
                self.problems.extend(bad)
                return ()
        return tuple(dict.fromkeys(ids))


def family_module(name: str) -> ModuleType:
    """The module of a supported family."""
    if name not in FAMILIES:
        raise CheckpointError(
            "unsupported model family", f"unknown family {shown(name)}{nearest(name, FAMILIES)}"
        )
    return import_module(FAMILIES[name])


def detect_family(raw: dict[str, Any]) -> str:
    """Family name of a config.json, from `model_type`, then `architectures`; an error names the supported ones.

    Two families may share a model_type (LLaDA-MoE's released files say "llada"): then the architecture decides.
    """
    model_type = raw.get("model_type")
    architectures = raw.get("architectures")
    names = [n for n in architectures if isinstance(n, str)] if isinstance(architectures, list) else []
    modules = {family: family_module(family) for family in FAMILIES}
    typed = [f for f, m in modules.items() if isinstance(model_type, str) and model_type in m.MODEL_TYPES]
    named = [f for f, m in modules.items() if any(n in m.ARCHITECTURES for n in names)]
    for family in (*(f for f in typed if f in named), *typed, *(named if model_type is None else ())):
        return family
    for module in modules.values():
        reason = getattr(module, "REFUSED", {}).get(model_type) if isinstance(model_type, str) else None
        if reason is not None:
            raise CheckpointError("unsupported model family", f"model_type {model_type!r} is not supported: {reason}")
    supported = "; ".join(f"{f}: model_type {' or '.join(m.MODEL_TYPES)}" for f, m in modules.items())
    raise CheckpointError(
        "unsupported model family",
        f"model_type {shown(model_type)} with architectures {shown(architectures)} is not supported; "
        f"supported: {supported}",
    )


def read_json(path: Path, limit: int = CONFIG_BYTES) -> dict[str, Any]:
    """The object in a JSON file; CheckpointError for anything but one well-formed object of <= `limit` bytes."""
    text = read_text(path, limit)
    try:
        value = json.loads(text, object_pairs_hook=_unique_keys)
    except RecursionError:
        raise CheckpointError(f"cannot read {path}", "the JSON is nested too deeply") from None
    except ValueError as error:  # malformed, duplicate keys, or a number of more than 4300 digits
        raise CheckpointError(f"cannot read {path}", f"not valid JSON: {shown(str(error), 200)}") from None
    if not isinstance(value, dict):
        raise CheckpointError(f"cannot read {path}", f"must hold a JSON object, got {type(value).__name__}")
    return value


def read_text(path: Path, limit: int) -> str:
    """A regular file of at most `limit` bytes as UTF-8 text; CheckpointError otherwise."""
    try:
        info = path.stat()
        if not stat.S_ISREG(info.st_mode):  # opening a FIFO would block
            raise CheckpointError(f"cannot read {path}", "not a regular file")
        if info.st_size > limit:
            raise CheckpointError(
                f"cannot read {path}", f"{info.st_size:,} bytes; at most {limit:,} are read"
            )
        with open(path, "rb") as file:
            data = file.read(limit + 1)
    except (OSError, ValueError) as error:
        if isinstance(error, CheckpointError):
            raise
        raise CheckpointError(f"cannot read {path}", str(error)) from None
    if len(data) > limit:
        raise CheckpointError(f"cannot read {path}", f"more than {limit:,} bytes")
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise CheckpointError(f"cannot read {path}", f"not UTF-8 text: {error}") from None


def _unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for key, value in pairs:
        if key in found:
            raise ValueError(f"duplicate key {shown(key)}")
        found[key] = value
    return found
