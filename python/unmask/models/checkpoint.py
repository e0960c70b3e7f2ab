"""A model folder -> checked headers -> tensors, one at a time.

`inspect` reads config.json and the safetensors headers only, and raises one CheckpointError with every problem, before
anything is allocated. `load_tensors` then streams the tensors, so that a caller who builds the model while iterating
needs about one model's memory. Files are read by the `safetensors` library alone: no pickle, no code from the folder.
"""

from __future__ import annotations

import ctypes
import math
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import CheckpointError, SettingError, check_names, nearest
from .config import (
    CONFIG_FIELDS,
    FAMILIES,
    ModelConfig,
    WeightSpec,
    detect_family,
    family_module,
    read_json,
    shown,
)

if TYPE_CHECKING:
    import torch

CONFIG_FILE, GENERATION_FILE = "config.json", "generation_config.json"
WEIGHTS_FILE, INDEX_FILE = "model.safetensors", "model.safetensors.index.json"
INDEX_BYTES = 64 << 20
MAX_SHARDS = 4096

DTYPES = {"F32": "float32", "BF16": "bfloat16", "F16": "float16"}
"""Stored type -> torch's name for it; other types are refused."""
_ITEM_BYTES = {"F32": 4, "BF16": 2, "F16": 2}
_SHORT = {"fp32": "float32", "bf16": "bfloat16", "fp16": "float16", "half": "float16", "float": "float32"}

FP32_NAMES = ("router", "router_bias")
"""Tensors of a layer that are loaded in float32 whatever the model's dtype: routing is computed in it, and a rounded bias would
choose other experts."""

_PICKLE = (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle")
_CHUNK_BYTES = 64 << 20
"""Larger tensors are read in pieces: else pages of the mapped file would add a second copy to the memory in use."""


@dataclass(frozen=True)
class StoredTensor:
    """A tensor in a file: its name there, shape and stored type ("F32", "BF16" or "F16")."""

    name: str
    file: Path
    shape: tuple[int, ...]
    dtype: str

    @property
    def n_bytes(self) -> int:
        return math.prod(self.shape) * _ITEM_BYTES[self.dtype]


@dataclass(frozen=True)
class CheckpointInfo:
    """A checkpoint that passed every check.

    Attributes:
        folder: where it is (links resolved).
        config: the model.
        files: weight files, in name order.
        tensors: canonical name -> stored tensor, in the order of the family's weight map: embed,
            layers.{i}.{attn_norm,q,k,v,o,mlp_norm,gate,up,down} (+ {q,k,v}_bias, {q,k}_norm), final_norm, head. `qkv` stands for
            q, k and v where they are one tensor. A mixture has router (+ router_bias), experts.{e}.{gate,up,down} and
            shared_{gate,up,down} in place of gate, up and down.
        stored_dtype: "float32", "bfloat16" or "float16": the one that holds most bytes.
    """

    folder: Path
    config: ModelConfig
    files: tuple[Path, ...]
    tensors: Mapping[str, StoredTensor]
    stored_dtype: str

    @property
    def n_parameters(self) -> int:
        return sum(math.prod(t.shape) for t in self.tensors.values())

    @property
    def n_bytes(self) -> int:
        """Bytes of the tensors as stored."""
        return sum(t.n_bytes for t in self.tensors.values())


def inspect(
    folder: str | Path, family: str | None = None, overrides: Mapping[str, Any] | None = None
) -> CheckpointInfo:
    """Check a model folder from its JSON files and safetensors headers.

    Args:
        folder: holds config.json and model.safetensors, or shards with model.safetensors.index.json.
        family: skip the detection and read it as this family (see `config.FAMILIES`).
        overrides: ModelConfig fields to replace, e.g. {"mask_id": 5, "eos_ids": (2,)}, checked like the rest.
    Raises:
        CheckpointError: with all problems of config, files and tensors.
        SettingError: unknown family or override.
    """
    if family is not None and family not in FAMILIES:
        raise SettingError(f"unknown family {family!r}{nearest(family, FAMILIES)}")
    if overrides is not None and not isinstance(overrides, Mapping):
        raise SettingError(f"overrides must be a dict of ModelConfig fields, got {type(overrides).__name__}")
    overrides = dict(overrides or {})
    check_names("config override", overrides, set(CONFIG_FIELDS) - {"family"})
    folder = Path(folder).resolve()
    if not folder.is_dir():
        raise CheckpointError(f"cannot use {folder}", "not a folder")
    problems: list[str] = []
    config = _read_config(folder, family, overrides, problems)
    files, index = _weight_files(folder, problems)
    stored = _read_headers(files, index, problems)
    tensors = _match(config, stored, problems) if config and stored is not None else {}
    if config is None or problems:
        raise CheckpointError(f"cannot load the checkpoint in {folder}", problems)
    by_dtype: dict[str, int] = {}
    for tensor in tensors.values():
        by_dtype[tensor.dtype] = by_dtype.get(tensor.dtype, 0) + tensor.n_bytes
    main = max(by_dtype, key=lambda d: (by_dtype[d], d))
    return CheckpointInfo(folder, config, tuple(dict.fromkeys(files.values())), tensors, DTYPES[main])


def load_tensors(
    info: CheckpointInfo, dtype: torch.dtype | str | None = None, device: torch.device | str = "cpu"
) -> Iterator[tuple[str, torch.Tensor]]:
    """Yield (canonical name, tensor), each contiguous, owned by the caller, of `dtype` (FP32_NAMES: float32) and on `device`.

    Tensors come file by file. Beyond what the caller keeps, at most one tensor and 64 MB of mapped file are alive.

    Args:
        info: from `inspect`.
        dtype: float32, bfloat16 or float16 (torch dtype or name); default: as stored.
        device: where to put them.
    Raises:
        SettingError: unsupported dtype, or float16 on the CPU.
        CheckpointError: a file changed since `inspect`, or a value is out of range in float16.
    """
    import torch

    device = torch.device(device)
    target = resolve_dtype(info, dtype, device)
    return _stream(info, target, device)


def resolve_dtype(
    info: CheckpointInfo, dtype: torch.dtype | str | None, device: torch.device | str
) -> torch.dtype:
    """The dtype that `load_tensors` gives: `dtype`, or the stored one; SettingError if it cannot be used on `device`."""
    import torch

    name = info.stored_dtype if dtype is None else str(dtype).removeprefix("torch.")
    name = _SHORT.get(name, name)
    if name not in DTYPES.values():
        raise SettingError(f"unknown dtype {shown(dtype)}{nearest(name, DTYPES.values())}")
    if name == "float16" and torch.device(device).type == "cpu":
        origin = "stored in" if dtype is None else "asked for in"
        raise SettingError(
            f"the model is {origin} float16, whose matrix products are about 1000x slower on the CPU; "
            "use dtype=torch.bfloat16"
        )
    return getattr(torch, name)


def confined(folder: Path, name: str) -> Path | None:
    """Path of file `name` of a model folder (links resolved), None where there is none.

    CheckpointError if it leads out of the folder. In the Hugging Face cache, where snapshots/<commit>/x links to
    ../../blobs/y, it may lead anywhere inside that model's cache folder.
    """
    path = folder / name
    if name in ("", ".", "..") or "/" in name or "\\" in name or "\0" in name:
        raise CheckpointError(
            f"cannot use {folder}", f"file name {shown(name)} must be a plain name inside the folder"
        )
    try:
        real = path.resolve(strict=True)
    except FileNotFoundError:
        if path.is_symlink():
            raise CheckpointError(
                f"cannot use {folder}", f"{name} is a broken link (incomplete download?)"
            ) from None
        return None
    except (OSError, RuntimeError) as error:  # a loop of links, no permission, a name too long
        raise CheckpointError(f"cannot use {folder}", f"{shown(name)}: {error}") from None
    folder = folder.resolve()
    in_cache = folder.parent.name == "snapshots" and folder.parent.parent.name.startswith("models--")
    root = folder.parent.parent if in_cache else folder
    if not real.is_relative_to(root):
        raise CheckpointError(f"cannot use {folder}", f"{name} links to {real}, outside of {root}")
    return real


def _read_config(
    folder: Path, family: str | None, overrides: dict[str, Any], problems: list[str]
) -> ModelConfig | None:
    """The config with the overrides in it, or None and the reasons; its problems come first in the list."""
    if isinstance(overrides.get("eos_ids"), list):
        overrides["eos_ids"] = tuple(overrides["eos_ids"])
    raw = _read_object(folder, CONFIG_FILE, problems)
    generation = _read_object(folder, GENERATION_FILE, problems)
    if raw is None or generation is None:
        return None
    if not raw:
        problems.append(f"{CONFIG_FILE} is missing or empty")
        return None
    try:
        module = family_module(family or detect_family(raw))
        for theirs, passing in (module.OVERRIDABLE[n] for n in overrides if n in module.OVERRIDABLE):
            raw[theirs] = passing
            generation.pop(theirs, None)
        config = module.read_config(raw, generation)
        return replace(config, **overrides).validate()
    except CheckpointError as error:
        problems.extend(f"{CONFIG_FILE}: {problem}" for problem in error.problems)
        return None


def _read_object(folder: Path, name: str, problems: list[str]) -> dict[str, Any] | None:
    """The object in a JSON file of the folder, {} where there is no such file, None (and a problem) if it is unusable."""
    try:
        path = confined(folder, name)
        return read_json(path) if path else {}
    except CheckpointError as error:
        problems.extend(f"{name}: {problem}" for problem in error.problems)
        return None


def _weight_files(folder: Path, problems: list[str]) -> tuple[dict[str, Path], dict[str, str] | None]:
    """File name -> weight file, and the index (tensor name -> file name) where there is one."""
    names = sorted(p.name for p in folder.iterdir())
    index = None
    if INDEX_FILE in names:
        if WEIGHTS_FILE in names:
            problems.append(
                f"both {WEIGHTS_FILE} and {INDEX_FILE} are present: remove the one that is not meant"
            )
            return {}, None
        index = _read_index(folder, problems)
        wanted = sorted(set(index.values()))
    else:
        wanted = [name for name in names if name.endswith(".safetensors")]
        if WEIGHTS_FILE in wanted:
            wanted = [WEIGHTS_FILE]
        elif len(wanted) > 1:
            problems.append(
                f"{len(wanted)} .safetensors files but no {INDEX_FILE} that says what is in which"
            )
            return {}, None
        elif pickles := [name for name in names if name.endswith(_PICKLE) and not wanted]:
            problems.append(
                f"no safetensors, only {', '.join(pickles[:5])}: pickle files can run code when they are opened and are "
                "never read; convert them where you trust them: safetensors.torch.save_file(weights, 'model.safetensors')"
            )
        elif not wanted:
            problems.append(f"no weights: neither {WEIGHTS_FILE} nor {INDEX_FILE}")
    files = {}
    for name in wanted:
        try:
            path = confined(folder, name)
        except CheckpointError as error:
            problems.extend(error.problems)
            continue
        if path is None:
            problems.append(f"shard {shown(name)} is missing")
        elif not path.is_file():
            problems.append(f"{shown(name)} is not a regular file")
        else:
            files[name] = path
    return files, index


def _read_index(folder: Path, problems: list[str]) -> dict[str, str]:
    """Tensor name -> file name; what cannot be used is left out and added to the problems."""
    try:
        path = confined(folder, INDEX_FILE)
        weight_map = read_json(path, INDEX_BYTES).get("weight_map") if path else None
    except CheckpointError as error:
        problems.extend(f"{INDEX_FILE}: {problem}" for problem in error.problems)
        return {}
    if not isinstance(weight_map, dict) or not weight_map:
        problems.append(
            f"{INDEX_FILE}: weight_map must be an object that is not empty, got {shown(weight_map)}"
        )
        return {}
    usable = {n: f for n, f in weight_map.items() if isinstance(f, str) and f.endswith(".safetensors")}
    for name in weight_map.keys() - usable.keys():
        problems.append(
            f"{INDEX_FILE}: {shown(name)} is in {shown(weight_map[name])}, which is no .safetensors file"
        )
    if len(set(usable.values())) > MAX_SHARDS:
        problems.append(f"{INDEX_FILE}: more than {MAX_SHARDS} shards")
        return {}
    return usable


def _read_headers(
    files: dict[str, Path], index: dict[str, str] | None, problems: list[str]
) -> dict[str, StoredTensor] | None:
    """Every tensor of every file, by its name there; None if no file can be read.

    The reader checks that header and file size agree.
    """
    from safetensors import SafetensorError, safe_open

    found: dict[str, StoredTensor] = {}
    readable = set()
    for label, path in files.items():
        try:
            with safe_open(path, framework="np") as file:
                for name in file.keys():
                    view = file.get_slice(name)
                    tensor = StoredTensor(name, path, tuple(view.get_shape()), view.get_dtype())
                    if name in found:
                        problems.append(
                            f"tensor {shown(name)} is in more than one file; one of them is {label}"
                        )
                    elif index is not None and name not in index:
                        problems.append(f"tensor {shown(name)} of {label} is not in {INDEX_FILE}")
                    elif index is not None and index[name] != label:
                        problems.append(
                            f"tensor {shown(name)} is in {label}, but {INDEX_FILE} says {index[name]}"
                        )
                    found.setdefault(name, tensor)
            readable.add(label)
        except (SafetensorError, OSError, ValueError) as error:
            problems.append(f"{label} is truncated or corrupt: {shown(str(error), 200)}")
    for name, label in (index or {}).items():
        if label in readable and name not in found:
            problems.append(f"tensor {shown(name)} is not in {label}, where {INDEX_FILE} says it is")
    return found if readable else None


def _match(
    config: ModelConfig, stored: dict[str, StoredTensor], problems: list[str]
) -> dict[str, StoredTensor]:
    """Canonical name -> stored tensor; adds missing, extra and misshapen tensors and wrong types to the problems."""
    module = family_module(config.family)
    specs: dict[str, WeightSpec] = module.weight_map(config)
    prefix = module.PREFIX
    if not any(name.startswith(prefix) for name in stored):
        specs = {c: replace(spec, name=spec.name.removeprefix(prefix)) for c, spec in specs.items()}
    described, held = config.n_parameters, sum(math.prod(t.shape) for t in stored.values())
    if described > held:
        problems.append(f"the config describes {described:,} parameters, the files hold {held:,}")
    matched = {}
    for canonical, spec in specs.items():
        tensor = stored.get(spec.name)
        if tensor is None:
            problems.append(f"missing tensor {spec.name} of shape {list(spec.shape)}")
            continue
        if tensor.shape != spec.shape:
            problems.append(
                f"tensor {spec.name} must have shape {list(spec.shape)} by the config, got {list(tensor.shape)}"
            )
        if tensor.dtype not in DTYPES:
            problems.append(
                f"tensor {spec.name} must be stored as one of {', '.join(DTYPES)}, got {tensor.dtype}"
            )
        matched[canonical] = tensor
    used = {spec.name for spec in specs.values()}
    head = module.weight_map(replace(config, tied_head=False))["head"].name
    for name in stored:
        if name not in used and not module.is_ignored(name):
            tied = (
                " (the config ties the head to the embedding)"
                if config.tied_head and name in (head, head.removeprefix(prefix))
                else ""
            )
            problems.append(f"unexpected tensor {shown(name, 200)} of shape {list(stored[name].shape)}{tied}")
    return matched


def _stream(
    info: CheckpointInfo, dtype: torch.dtype, device: torch.device
) -> Iterator[tuple[str, torch.Tensor]]:
    import torch

    for file in info.files:
        mapped = _Mapped(file)
        try:
            for canonical, tensor in info.tensors.items():
                if tensor.file == file:
                    kept = torch.float32 if canonical.rpartition(".")[2] in FP32_NAMES else dtype
                    yield canonical, _read(mapped, tensor, kept, device)
        finally:
            mapped.close()


class _Mapped:
    """An open weight file. It is opened anew after _CHUNK_BYTES: closing it drops its mapped pages from the memory in use, and reading its
    header for every tensor would take minutes for a file of thousands of experts. A file that has changed since is opened anew at once.
    """

    def __init__(self, file: Path):
        self.file = file
        self._opened: Any = None
        self._stamp: tuple[int, ...] = ()
        self._bytes = 0

    def open(self, n_bytes: int) -> Any:
        """The file, for reading `n_bytes` of it."""
        from safetensors import safe_open

        found = self.file.stat()
        stamp = (found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns)
        if self._opened is None or stamp != self._stamp or self._bytes + n_bytes > _CHUNK_BYTES:
            self.close()
            self._opened = safe_open(self.file, framework="pt").__enter__()
            self._stamp, self._bytes = stamp, 0
        self._bytes += n_bytes
        return self._opened

    def close(self) -> None:
        if self._opened is not None:
            self._opened.__exit__(None, None, None)
            self._opened = None
            _trim()


def _trim() -> None:
    """Gives freed memory back to the system (glibc; elsewhere nothing): between the packed weights of thousands of experts lie the holes
    that their unpacked tensors left, a quarter of the model, and malloc keeps those until it is asked.
    """
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None) if sys.platform == "linux" else None
    if trim is not None:
        trim(0)


def _read(mapped: _Mapped, tensor: StoredTensor, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """One tensor; one beyond _CHUNK_BYTES in pieces."""
    import torch
    from safetensors import SafetensorError

    out = torch.empty(tensor.shape, dtype=dtype, device=device)
    rows = tensor.shape[0]
    step = max(1, rows * _CHUNK_BYTES // tensor.n_bytes)
    try:
        for start in range(0, rows, step):
            stop = min(rows, start + step)
            file = mapped.open(tensor.n_bytes * (stop - start) // rows)
            view = file.get_slice(tensor.name)
            if tuple(view.get_shape()) != tensor.shape or view.get_dtype() != tensor.dtype:
                raise CheckpointError(
                    f"cannot load {tensor.file}", f"tensor {tensor.name} changed while loading"
                )
            if step >= rows:
                out.copy_(file.get_tensor(tensor.name))
            else:
                out[start:stop].copy_(view[start:stop])
    except (SafetensorError, OSError) as error:
        raise CheckpointError(
            f"cannot load {tensor.file}", f"the file changed while loading: {error}"
        ) from None
    if dtype == torch.float16 and tensor.dtype != "F16" and out.isinf().any():
        raise CheckpointError(
            f"cannot load {tensor.file}", f"tensor {tensor.name} has values beyond float16's range"
        )
    return out
