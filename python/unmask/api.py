"""The public functions: load, generate, infill, stream. The one file a newcomer reads first; the loop itself is decode/engine.py."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from . import ops
from .decode.backend import NativeBackend
from .decode.engine import Commit as EngineCommit
from .decode.engine import Engine, StepRecord
from .decode.state import DecodeState, Row
from .errors import SettingError, check_names
from .models import checkpoint, hub
from .models.config import ModelConfig
from .models.model import Model, build
from .models.tokenizer import Tokenizer
from .prompts import Prompts, read_canvases, read_prompts
from .result import Commit, Done, Result, Step
from .settings import Settings


def load(
    source: str | Path = "tiny",
    *,
    dtype: torch.dtype | str | None = None,
    device: torch.device | str = "cpu",
    download: bool = False,
    revision: str = "main",
    family: str | None = None,
    overrides: Mapping[str, Any] | None = None,
) -> Model:
    """Loads a checkpoint: a folder, a Hugging Face id or cache path that is already on disk, or "tiny", the embedded model.

    source: looked for in that order (folder, Hugging Face cache, embedded); nothing is ever downloaded unless download=True.
    dtype: torch.float32 or torch.bfloat16 (or their names); default: as stored. device: "cpu" (CUDA comes with the next release).
    revision: which snapshot of a Hugging Face id. family, overrides: read the config as this family, replace fields of it, for example
    overrides={"mask_id": 126336}, where a checkpoint's own config lacks them.
    Raises ModelNotFound (naming the folders searched), CheckpointError (listing every problem of the files; nothing is partly loaded)
    or SettingError. Only safetensors weights are read; no code of the checkpoint is run.
    """
    kind = _dtype(dtype)
    target = _device(device)
    folder = hub.resolve(source, revision=revision, download=download)
    info = checkpoint.inspect(folder, family, overrides)
    tokenizer = Tokenizer.load(folder, info.config)
    return build(info, tokenizer, str(source), kind, target)


def generate(model: Model | str | Path, prompt: Any, **settings: Any) -> Result | list[Result]:
    """Generates text after a prompt by denoising blocks of masks.

    model: what `load` returned, or anything `load` takes. prompt: a string, token ids (list or 1-D tensor) or, with chat=True, a list of
    {"role", "content"} messages: returns one Result; a list of those (or a 2-D tensor): returns a list, decoded as one batch with one
    forward per step; rows may differ in length and every row gets the tokens it gets alone. Settings: see `Settings`.
    Raises SettingError for unknown or out-of-range settings (naming the nearest valid one) and InvalidLogits for NaN logits.
    """
    result = None
    for event in stream(model, prompt, _quiet=True, **settings):
        result = event.result if isinstance(event, Done) else result
    assert result is not None
    return result


def stream(model: Model | str | Path, prompt: Any, *, _quiet: bool = False, **settings: Any) -> Iterator[Step | Commit | Done]:
    """`generate`, as it happens: after every forward a Step and, for each row that settled something, a Commit; at the end one Done.

    Arguments and errors as in `generate`. Arguments are checked at the call, before the first event.
    """
    chosen = Settings.from_kwargs(settings)
    loaded = model if isinstance(model, Model) else load(model)
    prompts = read_prompts(prompt, loaded, chosen)
    return _events(loaded, prompts, chosen, _quiet)


def infill(model: Model | str | Path, canvas: Any, **settings: Any) -> Result | list[Result]:
    """Fills the holes of a canvas; every given token stays as it is.

    canvas: token ids with None for each hole (a list), or a list of such lists for a batch. Settings and errors as in `generate`, except
    that max_new_tokens and chat do not apply and eos_stop defaults to False. Result.ids holds the tokens put into the holes, in order.
    """
    chosen = Settings.from_kwargs({"eos_stop": False, **settings}, forbidden=("max_new_tokens", "chat"))
    loaded = model if isinstance(model, Model) else load(model)
    prompts = read_canvases(canvas, loaded)
    result = None
    for event in _events(loaded, prompts, chosen, True):
        result = event.result if isinstance(event, Done) else result
    assert result is not None
    return result


def _events(model: Model, prompts: Prompts, settings: Settings, quiet: bool) -> Iterator[Step | Commit | Done]:
    began = time.perf_counter()
    config = model.config
    resolved = settings.resolved(model)
    seeds = settings.row_seeds(len(prompts.canvases))
    state = DecodeState(
        prompts.canvases, prompts.given, config.mask_id, settings.schedule(), settings.steps_for_quota(prompts), seeds, model.device
    )
    eos_ids = config.eos_ids if settings.eos_stop else ()
    stop = _StopStrings(state, model.tokenizer, settings.stop, eos_ids) if settings.stop else None
    engine = Engine(
        state,
        NativeBackend(model, state, config.mask_id, settings.cfg_scale),
        settings.policy_for(config),
        cache=settings.cache,
        eos_ids=eos_ids,
        on_invalid=settings.on_invalid,
        settled=stop,
        record=settings.trace or not quiet,
    )
    ended = {row.index: 0.0 for row in state.rows}
    traces: dict[int, list[dict[str, Any]]] = {row.index: [] for row in state.rows}
    running = {row.index for row in state.active}
    for record in engine.run():
        now = time.perf_counter() - began
        for row in state.rows:
            if row.index in running and not row.active:
                running.discard(row.index)
                ended[row.index] = now
        if settings.trace:
            for commit in record.commits:
                traces[commit.row].append(_trace_record(commit, record))
        if not quiet:
            yield Step(record.forward, record.seconds, {c.row: c.masks_left for c in record.commits})
            for c in record.commits:
                yield Commit(c.row, c.block, c.step, c.nfe, c.positions, c.ids, c.scores, c.masks_left, _canvas(state, c.row))
    results = [
        _result(model, state, row, prompts, settings, resolved, ended[row.index], traces[row.index] if settings.trace else None, stop)
        for row in state.rows
    ]
    yield Done(results[0] if prompts.single else results)


def _result(
    model: Model, state: DecodeState, row: Row, prompts: Prompts, settings: Settings, resolved: dict[str, Any], seconds: float, trace, stop
) -> Result:
    config = model.config
    canvas = _canvas(state, row.index)
    masked = state.masked[row.index, : row.end].tolist()
    given = prompts.given[row.index]
    made = [i for i in range(row.end) if not given[i]]
    first_eos = next((i for i in made if canvas[i] in config.eos_ids and not masked[i]), None)
    decided = [i for i in made if not masked[i]]
    if settings.eos_stop and first_eos is not None and row.finish_reason != "invalid":
        # what lies behind the end of the sequence is of no interest: it reads as end of sequence, decided or not
        for i in made:
            if i > first_eos:
                canvas[i] = canvas[first_eos]
    before_eos = [canvas[i] for i in decided if first_eos is None or i < first_eos]
    ids = before_eos if settings.eos_stop else [canvas[i] for i in decided]
    text = None
    if model.tokenizer.available:
        text = model.tokenizer.decode(ids)
        if stop is not None:
            ids, text = stop.cut(ids, text)
    return Result(
        text=text,
        ids=ids,
        canvas=canvas,
        prompt_ids=prompts.prompt_ids[row.index],
        nfe=row.nfe,
        tokens_per_forward=len(before_eos) / row.nfe if row.nfe else 0.0,
        seconds=seconds,
        finish_reason=row.finish_reason or "length",
        exact=resolved["exact"],
        settings=resolved,
        trace=trace,
    )


def _canvas(state: DecodeState, index: int) -> list[int]:
    return state.canvas[index, : state.rows[index].end].tolist()


def _trace_record(commit: EngineCommit, record: StepRecord) -> dict[str, Any]:
    committed = [list(t) for t in zip(commit.positions, commit.ids, commit.scores, strict=True)]
    return {
        "row": commit.row, "block": commit.block, "step": commit.step, "nfe": commit.nfe, "committed": committed, "edited": [],
        "masks_left": commit.masks_left, "ms": record.seconds * 1e3,
    }  # fmt: skip


class _StopStrings:
    """Ends a row when its settled text (no undecided position before it) holds a stop string."""

    def __init__(self, state: DecodeState, tokenizer: Tokenizer, stop: Sequence[str], eos_ids: tuple[int, ...]):
        if not tokenizer.available:
            raise SettingError("stop needs a tokenizer, and this model's folder has no tokenizer.json; stop on token ids is eos_stop")
        self.state, self.tokenizer, self.stop, self.eos_ids = state, tokenizer, tuple(stop), eos_ids
        self._seen: dict[int, int] = {}

    def __call__(self, row: Row) -> str | None:
        masked = self.state.masked[row.index, row.start : row.end]
        holes = torch.nonzero(masked)
        settled = int(holes[0]) if holes.numel() else row.end - row.start
        if settled == self._seen.get(row.index):
            return None
        self._seen[row.index] = settled
        given = self.state.given[row.index, row.start : row.start + settled]
        ids = self.state.canvas[row.index, row.start : row.start + settled][~given].tolist()
        end = next((i for i, t in enumerate(ids) if t in self.eos_ids), len(ids))
        text = self.tokenizer.decode(ids[:end])
        return "stop" if any(s in text for s in self.stop) else None

    def cut(self, ids: list[int], text: str) -> tuple[list[int], str]:
        """The text before the first stop string, and the fewest tokens that spell it."""
        at = min((text.find(s) for s in self.stop if s in text), default=-1)
        if at < 0:
            return ids, text
        kept = text[:at]
        for n in range(len(ids) + 1):
            if len(self.tokenizer.decode(ids[:n])) >= len(kept):
                return ids[:n], kept
        return ids, kept


def _dtype(dtype: torch.dtype | str | None) -> torch.dtype | None:
    names = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
    if dtype is None or dtype in names.values():
        return dtype  # type: ignore[return-value]
    aliases = {"fp32": "float32", "bf16": "bfloat16", "fp16": "float16"}
    if isinstance(dtype, str) and aliases.get(dtype, dtype) in names:
        return names[aliases.get(dtype, dtype)]
    check_names("dtype", [dtype], names)
    raise AssertionError("check_names has raised")


def _device(device: torch.device | str) -> torch.device:
    try:
        target = torch.device(device)
    except (RuntimeError, TypeError) as e:
        raise SettingError(f"device must be 'cpu', got {device!r}") from e
    if target.type != "cpu":
        raise SettingError(f"device must be 'cpu' in this release (CUDA kernels for the whole model are not finished), got {device!r}")
    return target


__all__ = ["Commit", "Done", "Model", "ModelConfig", "Result", "Step", "generate", "infill", "load", "ops", "stream"]
