"""From what users pass to canvases: token ids with a map of what is given."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from .errors import SettingError
from .models.foreign import Foreign
from .models.model import Model, check_ids
from .settings import Settings
from .templates import Scaffold, end_fields, parse_template
from .values import as_integer

if TYPE_CHECKING:
    from .decode.state import DecodeState


@dataclasses.dataclass(frozen=True)
class Prompts:
    """canvases: ids per row (any id at holes); given: True where a position must stay; single: one prompt was passed, not a list. surplus:
    positions at each canvas's end that are decoded only to fill a block, and cut from the result."""

    canvases: list[list[int]]
    given: list[list[bool]]
    prompt_ids: list[list[int]]
    single: bool
    surplus: tuple[int, ...] = ()

    def filled_up(self, size: int, mask_id: int) -> Prompts:
        """The same with canvases that end at a multiple of `size`: block-causal models are trained on whole blocks."""
        more = tuple(-len(c) % size if False in g else 0 for c, g in zip(self.canvases, self.given, strict=True))
        canvases = [c + [mask_id] * n for c, n in zip(self.canvases, more, strict=True)]
        given = [g + [False] * n for g, n in zip(self.given, more, strict=True)]
        return dataclasses.replace(self, canvases=canvases, given=given, surplus=more)


def read_prompts(prompt: Any, model: Model | Foreign, settings: Settings) -> Prompts:
    """Strings, ids, tensors or chat messages, one or many, followed by max_new_tokens holes."""
    rows, single = _rows(prompt, settings.chat)
    n = settings.max_new_tokens
    ids = [_ids(row, model, settings.chat, i) for i, row in enumerate(rows)]
    for i, row in enumerate(ids):
        _check_length(model, len(row) + n, f"prompt {i}: {len(row)} prompt tokens + max_new_tokens {n}")
    mask = model.config.mask_id
    return Prompts([row + [mask] * n for row in ids], [[True] * len(row) + [False] * n for row in ids], ids, single)


def read_negative(negative: Any, model: Model | Foreign, settings: Settings, rows: int) -> list[list[int]] | None:
    """Negative prompts, one per row: a single one (text, ids or messages) serves all."""
    if negative is None:
        return None
    given, single = _rows(negative, settings.chat)
    ids = [_ids(row, model, settings.chat, i) for i, row in enumerate(given)]
    if single:
        ids = ids * rows
    if len(ids) != rows:
        raise SettingError(f"negative_prompt must be one prompt or one per row, {rows} here, got {len(ids)}")
    return ids


@dataclasses.dataclass(frozen=True)
class Fields:
    """Fields of scaffolds: positions of a row with one number end together. field: per row, one number a position, -1 = none."""

    field: list[list[int]]
    end_ids: tuple[Any, ...]
    fill_id: int

    def bind(self, state: DecodeState) -> Callable[[Any], None]:
        """What the decode loop calls after each commit: ends the fields whose null is decided."""
        longest = state.canvas.shape[1]
        field = torch.full((len(self.field), longest), -1, dtype=torch.int64)
        for i, row in enumerate(self.field):
            field[i, : len(row)] = torch.tensor(row, dtype=torch.int64)
        field = field.to(state.canvas.device)
        return lambda _: end_fields(state.canvas, state.masked, field, self.end_ids, self.fill_id)


def read_templates(canvas: Any, prompt: Any, model: Model | Foreign, settings: Settings) -> tuple[Prompts, Fields | None]:
    """Canvases as ids with None for holes, as template text or as scaffolds, one or many, each behind its prompt."""
    single = _is_one_canvas(canvas)
    items = [canvas] if single else list(canvas)
    rows = [_template(item, model) for item in items]
    before: list[list[int]] = [[] for _ in rows]
    if prompt is not None:
        given, one = _rows(prompt, settings.chat)
        before = [_ids(p, model, settings.chat, i) for i, p in enumerate(given)]
        before = before * len(rows) if one else before
        if len(before) != len(rows):
            raise SettingError(f"prompt must be one prompt or one per canvas, {len(rows)} here, got {len(before)}")
    full = [b + r for b, r in zip(before, rows, strict=True)]
    found = [item for item in items if isinstance(item, Scaffold)]
    fields = None
    if found:
        if any((s.end_ids, s.fill_id) != (found[0].end_ids, found[0].fill_id) for s in found):
            raise SettingError("scaffolds of one batch must have the same null and end tokens; run them apart")
        numbers = [
            item.field_map(len(row), offset=len(b)).tolist() if isinstance(item, Scaffold) else [-1] * len(row)
            for item, row, b in zip(items, full, before, strict=True)
        ]
        fields = Fields(numbers, found[0].end_ids, found[0].fill_id)
    return read_canvases(full[0] if single else full, model), fields


def _is_one_canvas(canvas: Any) -> bool:
    if isinstance(canvas, (str, Scaffold)):
        return True
    if not isinstance(canvas, (list, tuple)):
        raise SettingError(
            f"canvas must be a list of token ids with None for holes, template text, a Scaffold, or a list of such, got {type(canvas).__name__}"
        )
    return not canvas or not isinstance(canvas[0], (list, tuple, str, Scaffold))


def _template(item: Any, model: Model | Foreign) -> list[Any]:
    if isinstance(item, Scaffold):
        return list(item.canvas)
    if isinstance(item, str):
        if not model.tokenizer.available:
            raise SettingError("a template as text needs a tokenizer, and this model has none; give ids with None for holes")
        return list(parse_template(item, model.tokenizer))
    if not isinstance(item, (list, tuple)):
        raise SettingError(f"each canvas must be a list of token ids with None for holes, template text or a Scaffold, got {type(item).__name__}")
    return list(item)


def read_canvases(canvas: Any, model: Model | Foreign) -> Prompts:
    """Lists of ids with None for holes, one or many."""
    if not isinstance(canvas, (list, tuple)):
        raise SettingError(f"canvas must be a list of token ids with None for holes, or a list of such lists, got {type(canvas).__name__}")
    single = not canvas or not isinstance(canvas[0], (list, tuple))
    rows = [canvas] if single else canvas
    mask = model.config.mask_id
    canvases, given = [], []
    for i, row in enumerate(rows):
        if not isinstance(row, (list, tuple)):
            raise SettingError(f"canvas {i} must be a list of token ids with None for holes, got {type(row).__name__}")
        _check_length(model, len(row), f"canvas {i}: {len(row)} positions")
        keep = [x is not None for x in row]
        ids = _int_list([x if x is not None else mask for x in row], f"canvas {i}")
        _check_range(ids, model, f"canvas {i}")
        canvases.append(ids)
        given.append(keep)
    fixed = [[t for t, k in zip(c, g, strict=True) if k] for c, g in zip(canvases, given, strict=True)]
    return Prompts(canvases, given, fixed, single)


def _rows(prompt: Any, chat: bool) -> tuple[list[Any], bool]:
    if isinstance(prompt, np.ndarray):
        prompt = prompt.tolist()
    if isinstance(prompt, torch.Tensor):
        if prompt.dim() == 1:
            return [prompt], True
        if prompt.dim() == 2:
            return list(prompt), False
        raise SettingError(f"a prompt tensor must be [P] or [B, P], got {list(prompt.shape)}")
    if isinstance(prompt, str):
        return [prompt], True
    if not isinstance(prompt, (list, tuple)):
        raise SettingError(f"prompt must be a string, token ids, or a list of those, got {type(prompt).__name__}")
    if not prompt:
        return ([], False)
    first = prompt[0]
    if isinstance(first, dict):
        if not chat:
            raise SettingError("a list of messages needs chat=True")
        return [prompt], True
    if as_integer(first) is not None:
        return [prompt], True
    return list(prompt), False


def _ids(row: Any, model: Model | Foreign, chat: bool, index: int) -> list[int]:
    where = f"prompt {index}"
    if isinstance(row, np.ndarray):
        row = row.tolist()
    if isinstance(row, torch.Tensor):
        if row.dtype.is_floating_point or row.dtype is torch.bool or row.dim() != 1:
            raise SettingError(f"{where} must be int64 [P], got {row.dtype} {list(row.shape)}")
        ids = row.tolist()
    elif isinstance(row, str) or (chat and isinstance(row, (list, tuple)) and row and isinstance(row[0], dict)):
        if chat:
            messages = [{"role": "user", "content": row}] if isinstance(row, str) else list(row)
            ids = model.tokenizer.encode(model.tokenizer.chat(messages), add_special=False)
        else:
            ids = model.tokenizer.encode(row)
    elif isinstance(row, (list, tuple)):
        ids = _int_list(row, where)
    else:
        raise SettingError(f"{where} must be a string or token ids, got {type(row).__name__}")
    _check_range(ids, model, where)
    return ids


def _int_list(row: Sequence[Any], where: str) -> list[int]:
    ids = [as_integer(x) for x in row]
    for j, x in enumerate(ids):
        if x is None:
            raise SettingError(f"{where}: token id {j} must be an integer, got {row[j]!r}")
    return ids  # type: ignore[return-value]


def _check_range(ids: list[int], model: Model | Foreign, where: str) -> None:
    if any(x < 0 or x >= 1 << 62 for x in ids):
        bad = next(x for x in ids if x < 0 or x >= 1 << 62)
        raise SettingError(f"{where}: token ids must be in 0..{model.config.vocab_size - 1}, got {bad}")
    try:
        check_ids(torch.tensor(ids, dtype=torch.int64), model.config.vocab_size, where)
    except ValueError as e:
        raise SettingError(str(e)) from e


def _check_length(model: Model | Foreign, length: int, what: str) -> None:
    if length > model.config.max_positions:
        raise SettingError(f"{what} = {length} positions, but the model takes at most {model.config.max_positions}; shorten one of them")
