"""Log-probabilities of tokens at masked positions: from a native model (packed forward, fused head) or any module that returns logits.

Both scorers answer one question: given a batch of masked sequences, the statistics of the model's distribution at some of their
positions. Models whose logits are shifted (Dream: row i of the output predicts position i + 1) are read one row earlier; position 0 has
no earlier row and keeps its own, as in the authors' code.

Memory: a forward takes at most TOKENS tokens and keeps the K/V of one layer (without a cache no layer reads another's); the head reduces
ENTRIES positions at a time, in vocabulary tiles.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import torch

from .. import ops
from ..decode.logits import logits_of
from ..errors import InvalidLogits, SettingError
from ..models.backbone import KVCache, full_forward
from ..models.foreign import UNLIMITED, Foreign, _field
from ..models.model import Model
from ..ops import LogitStats, Status
from ..ops.head_stats import head_stats
from ..values import integer, number
from .masks import LONGEST, Masks

TOKENS = 8192  # of one forward; products gain nothing from more
ENTRIES = 256  # positions that the head reduces at once


class NativeScorer:
    """A `Model`. Guidance combines hidden states, not logits, as in decoding: the head is linear, so the logits are LLaDA's
    u + (w + 1)(c - u) up to rounding (in bf16 the hidden state is rounded once where the authors round twice)."""

    def __init__(self, model: Model, mask_id: int | None, shifted: bool | None):
        config = model.config
        _check_visibility(config.visibility)
        self.model, self.name = model, model.name
        self.mask_id = config.mask_id if mask_id is None else mask_id
        self.shifted = config.shifted if shifted is None else shifted
        self.vocab_size, self.max_positions = config.vocab_size, config.max_positions
        self.device = model.device

    def stats(self, x: torch.Tensor, null: torch.Tensor | None, at: torch.Tensor, cfg_scale: float, **options) -> list[LogitStats]:
        """See `Scorer`."""
        hidden = self.model(full_forward(_both(x, null)), self._cache(x, null))
        parts = []
        for some, taken in _pieces(at, options):
            if null is None:
                parts.append(head_stats(hidden, self.model.head, some, **taken))
            else:
                guided = _guided(hidden, some, x.numel(), cfg_scale, torch.float32)
                parts.append(head_stats(guided, self.model.head, **taken))
        return parts

    def _cache(self, x: torch.Tensor, null: torch.Tensor | None) -> KVCache:
        """K/V of one layer, which every layer overwrites before it reads: a forward of whole sequences never reads an older one."""
        config = self.model.config
        rows = x.shape[0] * (1 if null is None else 2)
        cache = KVCache(dataclasses.replace(config, n_layers=1), rows, x.shape[1], self.model.dtype, self.device)
        cache.layers = cache.layers * config.n_layers
        return cache


class ModuleScorer:
    """Any `nn.Module`: `module(ids)` returning logits [B, L, V], or an object with `.logits`. It is called in the mode that it is in. One from
    `unmask.wrap` is called through its wrapper, which knows its mask token and its shift."""

    def __init__(self, module: torch.nn.Module | Foreign, mask_id: int | None, shifted: bool | None):
        self.module = module
        if isinstance(module, Foreign):
            config = module.config
            _check_visibility(config.visibility)
            self.name, self.device = module.name, module.device
            self.mask_id = config.mask_id if mask_id is None else mask_id
            self.shifted = config.shifted if shifted is None else shifted
            self.vocab_size, self.max_positions = config.vocab_size, config.max_positions
            return
        config = getattr(module, "config", None)
        self.name = type(module).__name__
        mask_id = _field(config, "mask_token_id", "mask_id") if mask_id is None else mask_id
        if mask_id is None:
            raise SettingError(f"{self.name} names no mask token (config.mask_token_id or config.mask_id); pass mask_id=")
        self.mask_id = integer("mask_id", mask_id, 0, (1 << 31) - 1)
        self.shifted = bool(_field(config, "shifted")) if shifted is None else shifted
        vocab, longest = _field(config, "vocab_size"), _field(config, "max_sequence_length", "max_position_embeddings")
        self.vocab_size = vocab if isinstance(vocab, int) else UNLIMITED
        self.max_positions = longest if isinstance(longest, int) else UNLIMITED
        self.device = next(iter(module.parameters()), torch.empty(0)).device

    def stats(self, x: torch.Tensor, null: torch.Tensor | None, at: torch.Tensor, cfg_scale: float, **options) -> list[LogitStats]:
        """See `Scorer`."""
        both = _both(x, null)
        logits = logits_of(self.module(both), self.name)
        if logits.dim() != 3 or logits.shape[:2] != both.shape:
            raise SettingError(f"the module must return logits [B, L, V] = {[*both.shape, 'any']}, got {list(logits.shape)}")
        if self.mask_id >= logits.shape[2]:
            raise SettingError(f"mask_id must be below the module's vocabulary size {logits.shape[2]}, got {self.mask_id}")
        flat = logits.reshape(-1, logits.shape[2])
        parts = []
        for some, taken in _pieces(at, options):
            if null is None:
                parts.append(ops.logit_stats(flat, some, **taken))
            else:
                parts.append(ops.logit_stats(_guided(flat, some, x.numel(), cfg_scale, flat.dtype), **taken))
        return parts


Scorer = NativeScorer | ModuleScorer
"""mask_id, shifted, vocab_size, max_positions, device, name; and

stats(x, null, at, cfg_scale, **options): one forward. x: int64 [B, L], masked sequences. null: the same with the prompt masked too, or None
without guidance. at: int64 [n], rows of the flattened output [B * L] to reduce. options: of `ops.logit_stats`; `ids` is int64 [n, J].
Returns LogitStats that together cover the n entries in order."""


def scorer_of(model: object, mask_id: object = None, shifted: object = None) -> Scorer:
    """The scorer of a model. mask_id, shifted: None = what the model's config or wrapper says. Errors: SettingError."""
    if not isinstance(model, (torch.nn.Module, Foreign)):
        raise SettingError(f"model must be a model from unmask.load or a torch.nn.Module, bare or from unmask.wrap, got {type(model).__name__}")
    if shifted is not None and not isinstance(shifted, bool):
        raise SettingError(f"shifted must be True, False or None, got {shifted!r}")
    if mask_id is not None:
        mask_id = integer("mask_id", mask_id, 0, (1 << 31) - 1)
    scorer = NativeScorer(model, mask_id, shifted) if isinstance(model, Model) else ModuleScorer(model, mask_id, shifted)
    if scorer.mask_id >= scorer.vocab_size:
        own = f"; this model's is {model.config.mask_id}" if isinstance(model, (Model, Foreign)) else ""
        raise SettingError(f"mask_id must be below the model's vocabulary size {scorer.vocab_size}, got {scorer.mask_id}{own}")
    return scorer


def _check_visibility(visibility: str) -> None:
    if visibility != "bidirectional":
        raise SettingError(f"the model's visibility must be 'bidirectional' for these likelihoods, got {visibility!r}")


def source_rows(scorer: Scorer, row: torch.Tensor, pos: torch.Tensor, length: int) -> torch.Tensor:
    """int64 [n]: where the flattened output [B * length] predicts position `pos` of sequence `row`."""
    return row * length + ((pos - 1).clamp(min=0) if scorer.shifted else pos)


def masked_log_probs(
    scorer: Scorer, ids: torch.Tensor, masks: Masks, *, prompt_length: int, cfg_scale: float, batch_size: int
) -> tuple[torch.Tensor, int]:
    """Log-probabilities of ids at the scored positions of every sample.

    ids: int64 [L] or [N, L] on the scorer's device. masks: over L positions, N samples. Returns (float32 [N, L], 0 where nothing is scored;
    number of forwards). Equal masks of one sequence are scored once: an answer of n tokens has 2^n - 1 at most.
    Errors: InvalidLogits (NaN, or nothing but -inf), SettingError (an id beyond the module's vocabulary).
    """
    n, length = masks.masked.shape
    masked, scored, inverse = masks.masked, masks.scored, None
    if ids.dim() == 1 and scored is None:
        masked, inverse = torch.unique(masked, dim=0, return_inverse=True)
    scored = masked if scored is None else scored
    ids = ids.expand(masked.shape[0], length)
    out = torch.zeros(masked.shape, dtype=torch.float32, device=ids.device)
    copies = 2 if cfg_scale else 1
    rows, forwards = max(1, min(batch_size, TOKENS // (copies * length))), 0
    for begin in range(0, masked.shape[0], rows):
        some = slice(begin, begin + rows)
        row, pos = scored[some].nonzero(as_tuple=True)
        if not row.numel():
            continue
        x = torch.where(masked[some], scorer.mask_id, ids[some])
        targets = ids[some][row, pos]
        parts = scorer.stats(
            x, null_input(scorer, x, prompt_length, cfg_scale), source_rows(scorer, row, pos, length), cfg_scale, ids=targets[:, None]
        )
        raise_on_invalid(parts, pos, lambda e, first=begin, row=row: f"sample {_sample(first + int(row[e]), inverse)}")
        out[some][row, pos] = torch.cat([part.at_ids[:, 0, 0] for part in parts])
        forwards += 1
    return (out if inverse is None else out.index_select(0, inverse)), forwards


def null_input(scorer: Scorer, x: torch.Tensor, prompt_length: int, cfg_scale: float) -> torch.Tensor | None:
    """x with the prompt masked, the unconditional input of guidance; None without guidance (LLaDA, arXiv 2502.09992)."""
    if not cfg_scale:
        return None
    null = x.clone()
    null[:, :prompt_length] = scorer.mask_id
    return null


def raise_on_invalid(parts: list[LogitStats], pos: torch.Tensor, sample: Callable[[int], str]) -> None:
    """Raises for the first entry whose logits say nothing: InvalidLogits, or SettingError for a token outside the vocabulary."""
    status = torch.cat([part.status for part in parts])
    bad = torch.nonzero(status)
    if not bad.numel():
        return
    entry = int(bad[0, 0])
    flags = Status(int(status[entry]))
    where = f"{sample(entry)}, position {int(pos[entry])}: {flags.describe()}"
    if flags & Status.BAD_ID:
        raise SettingError(f"token ids must be inside the model's vocabulary; {where}")
    raise InvalidLogits(where)


def read_ids(name: str, value: object, scorer: Scorer, *, low: int = 0) -> torch.Tensor:
    """Token ids as int64 [n] on the scorer's device, n >= low; from a list or a one-dimensional integer tensor. Errors: SettingError."""
    try:
        ids = torch.as_tensor(value)
    except (TypeError, ValueError, RuntimeError):
        raise SettingError(f"{name} must be a list of token ids or an int64 tensor [n], got {type(value).__name__}") from None
    if ids.numel() == 0:
        ids = ids.long()
    if ids.dim() != 1 or ids.is_floating_point() or ids.is_complex() or ids.dtype is torch.bool:
        raise SettingError(f"{name} must be a list of token ids or an int64 tensor [n], got {ids.dtype} {list(ids.shape)}")
    if ids.numel() < low:
        raise SettingError(f"{name} must hold at least one token, got none")
    check_range(name, ids, scorer)
    return ids.to(scorer.device, torch.int64)


def check_range(name: str, ids: torch.Tensor, scorer: Scorer) -> None:
    bad = torch.nonzero((ids < 0) | (ids >= scorer.vocab_size))
    if bad.numel():
        index = bad[0].tolist()
        raise SettingError(f"{name}: token id at {index} must be in 0..{scorer.vocab_size - 1}, got {int(ids[tuple(index)])}")


def check_sequence(scorer: Scorer, prompt: torch.Tensor, answer: torch.Tensor) -> None:
    """Raises SettingError for a sequence that is too long, or an answer that holds the mask token, which reads as undecided."""
    length = prompt.shape[0] + answer.shape[0]
    longest = min(scorer.max_positions, LONGEST)
    if length > longest:
        raise SettingError(
            f"{prompt.shape[0]} prompt tokens + {answer.shape[0]} answer tokens = {length} positions, but {scorer.name} takes at most {longest}; shorten one of them"
        )
    if bool((answer == scorer.mask_id).any()):
        raise SettingError(f"the answer must not hold the mask token {scorer.mask_id}: no text has it, and the model would read it as undecided")


def check_cfg(cfg_scale: object) -> float:
    return number("cfg_scale", cfg_scale, 0.0, 1e30)


def _sample(index: int, inverse: torch.Tensor | None) -> int:
    """The first sample with the index-th distinct mask."""
    return index if inverse is None else int((inverse == index).nonzero()[0, 0])


def _both(x: torch.Tensor, null: torch.Tensor | None) -> torch.Tensor:
    return x if null is None else torch.cat([x, null])


def _pieces(at: torch.Tensor, options: dict) -> list[tuple[torch.Tensor, dict]]:
    """`at` in pieces of ENTRIES, each with its part of the per-entry option `ids`."""
    pieces = []
    for begin in range(0, at.shape[0], ENTRIES):
        some = slice(begin, begin + ENTRIES)
        pieces.append((at[some], {k: v[some] if k == "ids" else v for k, v in options.items()}))
    return pieces


def _guided(output: torch.Tensor, at: torch.Tensor, offset: int, cfg_scale: float, dtype: torch.dtype) -> torch.Tensor:
    """u + (w + 1)(c - u) for rows `at` of the output; the unconditional rows lie `offset` further down. Computed in `dtype`."""
    c, u = output.index_select(0, at).to(dtype), output.index_select(0, at + offset).to(dtype)
    return (u + (cfg_scale + 1.0) * (c - u)).to(output.dtype)
