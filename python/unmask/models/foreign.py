"""Any `torch.nn.Module` that returns logits, dressed as a model: `wrap` gives or detects what `unmask.generate` needs to know of it.

| fact | taken from, in this order |
|---|---|
| mask id | mask_id=; config.mask_token_id or .mask_id; generation_config.mask_token_id; tokenizer.mask_token_id; the family's released vocabulary |
| shift | shifted=; config.shifted; the family; otherwise an error that says what to pass |
| end ids | eos_ids=; generation_config.eos_token_id; config.eos_token_id; tokenizer.eos_token_id; the family's released vocabulary |
| visibility, block | visibility=, block_size=; the family, with the block length from the field that its config uses; otherwise bidirectional |

The family is known by config.model_type, config.architectures and the module's class, by the rules that checkpoints are read with.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from types import ModuleType
from typing import Any, NamedTuple

import torch

from ..errors import CheckpointError, SettingError, check_names
from ..values import as_integer
from .config import BLOCK_LIMIT, Visibility, detect_family, family_module, number_problems, shown
from .probe import shift_of
from .tokenizer import Tokenizer

UNLIMITED = 1 << 31
"""Stands for a size that a module's config does not tell."""


class Traits(NamedTuple):
    """What a family's logits and attention are, whatever the sizes."""

    shifted: bool
    visibility: Visibility


TRAITS = {
    "llada": Traits(False, "bidirectional"),
    "llada_moe": Traits(False, "bidirectional"),
    "dream": Traits(True, "bidirectional"),
    "sdar": Traits(False, "block_causal"),
    "llada2": Traits(False, "block_causal"),
    "fast_dllm_v2": Traits(True, "block_causal"),
}
"""Family -> what its file (models/<family>.py) writes into every ModelConfig; tests compare the two."""


@dataclasses.dataclass(frozen=True)
class ForeignConfig:
    """The few fields of a ModelConfig that decoding reads. family: "module" where none is known."""

    mask_id: int
    eos_ids: tuple[int, ...]
    vocab_size: int
    max_positions: int
    shifted: bool
    visibility: Visibility = "bidirectional"
    block_size: int | None = None
    family: str = "module"
    n_layers: int = 0


class Foreign:
    """A module with what decoding needs to know of it; `wrap` makes one and documents the arguments.

    config: ForeignConfig. tokenizer: `available` is False without one: then prompts and results are token ids. Called with ids int64 [B, L] it
    returns the module's logits [B, L, V], checked.
    """

    format = "module"

    def __init__(
        self,
        module: torch.nn.Module,
        mask_id: int | None = None,
        shifted: bool | str | None = None,
        eos_ids: int | Sequence[int] | None = None,
        tokenizer: Any = None,
        visibility: str | None = None,
        block_size: int | None = None,
        probe: Any = None,
    ):
        if not isinstance(module, torch.nn.Module):
            raise SettingError(f"module must be a torch.nn.Module that returns logits, got {type(module).__name__}")
        own = _unwrapped(module)
        self.module, self.name = module, type(own).__name__
        weight = next(iter(module.parameters()), torch.empty(0))
        self.dtype, self.device = weight.dtype, weight.device
        if self.device.type != "cpu":
            raise SettingError(f"the module must be on the CPU in this release (CUDA kernels of the whole loop are not finished), got {self.device}")
        config, generation = getattr(own, "config", None), getattr(own, "generation_config", None)
        family = _family(config, own)
        facts = None if family is None else family_module(family)
        sizes = [n for n in (_field(config, "vocab_size"), _field(config, "embedding_size")) if _is_id(n)]
        vocab = max(sizes, default=UNLIMITED)
        given = _id("mask_id", mask_id, vocab)
        mask = _first_id(given, _field(config, "mask_token_id", "mask_id"), _field(generation, "mask_token_id"), _field(tokenizer, "mask_token_id", "mask_id"))
        if mask is None and facts is not None and facts.MASK_ID < vocab < UNLIMITED:
            mask = facts.MASK_ID
        if mask is None:
            raise SettingError(
                f"{self.name} names no mask token (config.mask_token_id or config.mask_id); pass it: unmask.wrap(module, mask_id=...)"
            )
        _id("mask_id", mask, vocab)
        ends = _end_ids(eos_ids, (_field(generation, "eos_token_id"), _field(config, "eos_token_id"), _field(tokenizer, "eos_token_id")), facts, vocab)
        if mask in ends:
            raise SettingError(f"mask_id {mask} must not be one of eos_ids {list(ends)}")
        seen, block = _attention(visibility, block_size, family, facts, config)
        self.tokenizer = _tokenizer(tokenizer, self.name, mask, ends)
        longest = _field(config, "max_sequence_length", "max_position_embeddings")
        longest = longest if _is_id(longest) else UNLIMITED
        self.config = ForeignConfig(mask, ends, vocab, longest, False, seen, block, family or "module")
        self.config = dataclasses.replace(self.config, shifted=self._shift(shifted, probe, config, family))

    def __call__(self, ids: torch.Tensor) -> torch.Tensor:
        """ids: int64 [B, L]. Returns logits [B, L, V] as the module gives them. Errors: SettingError for anything else than logits."""
        if self.module.training and any(isinstance(m, _DROPOUTS) and m.training and m.p > 0 for m in self.module.modules()):
            raise SettingError(f"{self.name} is in training mode and drops units at random; call module.eval() first")
        out = self.module(ids)
        logits = out if isinstance(out, torch.Tensor) else getattr(out, "logits", None)
        if not isinstance(logits, torch.Tensor):
            raise SettingError(f"{self.name} must return logits [B, L, V] or an object with .logits, got {type(out).__name__}")
        if logits.dtype not in (torch.float32, torch.bfloat16, torch.float16):
            raise SettingError(f"the logits of {self.name} must be float32, bfloat16 or float16, got {logits.dtype}")
        if logits.dim() != 3 or logits.shape[:2] != ids.shape:
            raise SettingError(f"{self.name} must return logits [B, L, V] = [{ids.shape[0]}, {ids.shape[1]}, any] for ids of that shape, got {list(logits.shape)}")
        if logits.device != ids.device:
            raise SettingError(f"the logits of {self.name} must be on {ids.device}, where the ids are, got {logits.device}")
        if logits.shape[2] <= self.config.mask_id:
            raise SettingError(f"mask_id must be below the module's vocabulary size {logits.shape[2]}, got {self.config.mask_id}")
        return logits

    def _shift(self, shifted: bool | str | None, probe: Any, config: object, family: str | None) -> bool:
        if shifted is not None and not isinstance(shifted, bool) and shifted != "detect":
            raise SettingError(f"shifted must be True, False, 'detect' or None, got {shifted!r}")
        if (shifted == "detect") != (probe is not None):
            raise SettingError("shifted='detect' and probe= go together: probe is a text, or its ids, that the model should find easy")
        if shifted == "detect":
            return shift_of(self, self._probe_ids(probe), self.config.mask_id, self.config.block_size)
        said = _field(config, "shifted")
        if shifted is None and isinstance(said, bool):
            shifted = said
        if shifted is None and family is not None:
            shifted = TRAITS[family].shifted
        if shifted is None:
            raise SettingError(
                f"{self.name} does not say whether its logits are shifted, and its family is not known. Pass unmask.wrap(module, shifted=False) "
                "if row i of the logits predicts token i (LLaDA and most models that were trained as diffusion models), shifted=True if it "
                "predicts token i + 1 (Dream and most that were made from an autoregressive model), or shifted='detect' with probe=, a text to "
                "try on; config.shifted says it too"
            )
        return shifted

    def _probe_ids(self, probe: Any) -> list[int]:
        if isinstance(probe, str):
            if not self.tokenizer.available:
                raise SettingError("a probe as text needs a tokenizer: pass tokenizer=, or the probe's token ids")
            return self.tokenizer.encode(probe)
        ids = probe.tolist() if isinstance(probe, torch.Tensor) else list(probe) if isinstance(probe, (list, tuple)) else None
        if ids is None:
            raise SettingError(f"probe must be a text or a list of token ids, got {type(probe).__name__}")
        return [_id(f"probe[{i}]", t, self.config.vocab_size) for i, t in enumerate(ids)]  # type: ignore[misc]


def wrap(
    module: torch.nn.Module,
    *,
    mask_id: int | None = None,
    shifted: bool | str | None = None,
    eos_ids: int | Sequence[int] | None = None,
    tokenizer: Any = None,
    visibility: str | None = None,
    block_size: int | None = None,
    probe: Any = None,
) -> Foreign:
    """A module of yours as a model for `generate`, `stream` and `infill`; `generate(module, ...)` is `generate(wrap(module), ...)`. Bidirectional
    ones also for `unmask.likelihood` and, in `unmask.compat`, for the functions of LLaDA, Fast-dLLM, AdaBlock and Dream.

    module: on the CPU, called as `module(ids)`, ids int64 [B, L] without padding; returns logits [B, L, V] (float32, bfloat16 or float16) or an
    object with `.logits`. It runs without a cache, on rows of one length. What is not given is read from it (see the table of this file).
    mask_id: id of the mask token. shifted: True if row i of the logits predicts token i + 1; "detect" finds out on `probe`, a text (with a
    tokenizer) or token ids of 16 to 4096 tokens that the model should find easy, by up to 64 forwards of it with one mask each; it raises
    where the answer is not clear. eos_ids: one id or a list, [] for none. tokenizer: of transformers, of tokenizers or of this package; with
    one, prompts and results may be text.
    visibility: "bidirectional", or "block_causal" with block_size: a block is decoded without what follows it, so the module is called with the
    canvas up to the block's end. The attention mask inside that is the module's own: a block-causal model must apply its own.
    Raises SettingError for what is missing, wrong or contradictory; wrong logits raise when they come.
    """
    return Foreign(module, mask_id, shifted, eos_ids, tokenizer, visibility, block_size, probe)


class ForeignTokenizer:
    """A tokenizer of transformers or tokenizers, under the names that this package uses."""

    available = True

    def __init__(self, theirs: Any, mask_id: int, eos_ids: tuple[int, ...]):
        self.theirs, self.mask_id, self.eos_ids = theirs, mask_id, eos_ids

    def encode(self, text: str, add_special: bool = True) -> list[int]:
        """Ids of a text. add_special: with the tokens that the tokenizer puts around a text."""
        if not isinstance(text, str):
            raise SettingError(f"text must be a str, got {type(text).__name__}")
        found = self.theirs.encode(text, add_special_tokens=add_special)
        return [int(i) for i in getattr(found, "ids", found)]

    def decode(self, ids: Any, skip_special: bool = True) -> str:
        """Text of ids (a sequence or an integer tensor)."""
        return self.theirs.decode([int(i) for i in ids], skip_special_tokens=skip_special)

    def chat(self, messages: Sequence[Mapping[str, Any]]) -> str:
        """The prompt text of a conversation."""
        template = getattr(self.theirs, "apply_chat_template", None)
        if template is None:
            raise SettingError(f"chat=True needs a tokenizer with apply_chat_template, and {type(self.theirs).__name__} has none; pass a plain prompt")
        return template([dict(m) for m in messages], tokenize=False, add_generation_prompt=True)

    def token_to_id(self, token: str) -> int | None:
        """Id of a token, None if there is none."""
        if hasattr(self.theirs, "token_to_id"):
            return self.theirs.token_to_id(token)
        return self.theirs.get_vocab().get(token)


_DROPOUTS = (torch.nn.Dropout, torch.nn.Dropout1d, torch.nn.Dropout2d, torch.nn.Dropout3d, torch.nn.AlphaDropout, torch.nn.FeatureAlphaDropout)


def _field(config: object, *names: str) -> Any:
    """The first of the fields that config (an object or a dict) has, None without."""
    for name in names:
        value = config.get(name) if isinstance(config, dict) else getattr(config, name, None)
        if value is not None:
            return value
    return None


def _unwrapped(module: torch.nn.Module) -> torch.nn.Module:
    """The module inside torch.compile's and DataParallel's wrappers."""
    while True:
        if isinstance(module, (torch.nn.DataParallel, torch.nn.parallel.DistributedDataParallel)):
            module = module.module
        elif isinstance(inner := getattr(module, "_orig_mod", None), torch.nn.Module):
            module = inner
        else:
            return module


def _family(config: object, module: torch.nn.Module) -> str | None:
    """The family that the config or the module's class names, None for another one."""
    names = _field(config, "architectures")
    names = [*names] if isinstance(names, (list, tuple)) else []
    try:
        return detect_family({"model_type": _field(config, "model_type"), "architectures": [*names, type(module).__name__]})
    except CheckpointError:
        return None


def _is_id(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


def _id(name: str, value: Any, vocab: int) -> int | None:
    """A token id that was given, checked; None stays None."""
    if value is None:
        return None
    found = as_integer(value)
    if found is None or found < 0:
        raise SettingError(f"{name} must be a token id, an integer >= 0, got {value!r}")
    if found >= vocab:
        raise SettingError(f"{name} must be below the vocabulary size of the module's config, {vocab}, got {found}")
    return found


def _first_id(*values: Any) -> int | None:
    return next((v for v in values if _is_id(v)), None)


def _end_ids(given: int | Sequence[int] | None, found: Sequence[Any], facts: ModuleType | None, vocab: int) -> tuple[int, ...]:
    """The ids that end a text: those given, or the first that some config names, with those of the family's released vocabulary."""
    if given is not None:
        ids = [given] if as_integer(given) is not None else given
        if not isinstance(ids, (list, tuple)):
            raise SettingError(f"eos_ids must be a token id or a list of them, got {type(given).__name__}")
        return tuple(dict.fromkeys(_id(f"eos_ids[{i}]", t, vocab) for i, t in enumerate(ids)))  # type: ignore[arg-type]
    lists = [v if isinstance(v, (list, tuple)) else [v] for v in found if v is not None]
    ends = next((tuple(dict.fromkeys(t for t in ids if _is_id(t) and t < vocab)) for ids in lists), ())
    if facts is None or vocab == UNLIMITED:
        return ends
    first, more = getattr(facts, "EOS_ID", None), [getattr(facts, name, None) for name in ("EOT_ID", "STOP_ID")]
    if not ends:
        ends = tuple(t for t in (first,) if t is not None and t < vocab)
    if vocab in getattr(facts, "VOCAB_SIZES", (facts.VOCAB_SIZE,)) and (first is None or first in ends):
        ends += tuple(t for t in more if t is not None and t not in ends)
    return ends


def _attention(visibility: str | None, block_size: int | None, family: str | None, facts: ModuleType | None, config: object) -> tuple[Visibility, int | None]:
    """(visibility, block length of a block-causal module)."""
    if visibility is not None:
        check_names("visibility", [visibility], ("bidirectional", "block_causal"))
    own = TRAITS[family].visibility if family is not None else "bidirectional"
    seen: Visibility = own if visibility is None else visibility  # type: ignore[assignment]
    if seen == "bidirectional":
        if block_size is not None:
            raise SettingError("block_size is for visibility='block_causal' here; of a bidirectional module it is a setting of generate")
        return seen, None
    if block_size is None and own == "block_causal" and facts is not None:
        named = _field(config, facts.OVERRIDABLE["block_size"][0])
        block_size = facts.BLOCK_SIZE if named is None else named
    if block_size is None:
        raise SettingError("visibility='block_causal' needs block_size, the length of the blocks that the module was trained with")
    if problems := number_problems("block_size", block_size, int, *BLOCK_LIMIT["block_size"]):
        raise SettingError(problems[0])
    return seen, block_size


def _tokenizer(given: Any, name: str, mask_id: int, eos_ids: tuple[int, ...]) -> Any:
    """A tokenizer with encode, decode, chat and `available`."""
    if given is None:
        return _NoTokenizer(name)
    if isinstance(given, Tokenizer):
        return given
    if not callable(getattr(given, "encode", None)) or not callable(getattr(given, "decode", None)):
        raise SettingError(f"tokenizer must have encode(text, add_special_tokens=) and decode(ids, skip_special_tokens=), got {shown(given)}")
    return ForeignTokenizer(given, mask_id, eos_ids)


class _NoTokenizer:
    """Ids in and out."""

    available = False

    def __init__(self, name: str):
        self._name = name

    def _refuse(self, *args: Any, **options: Any) -> Any:
        raise SettingError(f"{self._name} has no tokenizer; pass ids instead, or unmask.wrap(module, tokenizer=...)")

    encode = decode = chat = token_to_id = _refuse
