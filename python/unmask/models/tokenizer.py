"""Text <-> ids through the `tokenizers` library, checked against the model it is for."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import CheckpointError, SettingError
from .checkpoint import confined
from .config import ModelConfig, family_module, read_json, read_text, shown

if TYPE_CHECKING:
    from tokenizers import Tokenizer as RustTokenizer

TOKENIZER_FILE, TOKENIZER_CONFIG_FILE, TEMPLATE_FILE = (
    "tokenizer.json",
    "tokenizer_config.json",
    "chat_template.jinja",
)
TOKENIZER_BYTES = 200 << 20
TOKENIZER_CONFIG_BYTES = 16 << 20
TEMPLATE_BYTES = 1 << 20

_SPECIAL = ("bos_token", "eos_token", "pad_token", "unk_token", "mask_token", "cls_token", "sep_token")


class Tokenizer:
    """A model's tokenizer and chat template.

    Without a tokenizer.json the object exists (`available` is False): ids still work, text raises CheckpointError.

    Attributes:
        folder: where it was read from.
        mask_id, eos_ids: the model's.
        chat_template: Jinja text, or None.
        special: special token names to texts, e.g. {"bos_token": "<|startoftext|>"}.
    """

    def __init__(
        self,
        folder: Path,
        config: ModelConfig,
        rust: RustTokenizer | None,
        chat_template: str | None,
        special: Mapping[str, str],
    ):
        self.folder, self.mask_id, self.eos_ids = folder, config.mask_id, config.eos_ids
        self.chat_template, self.special = chat_template, dict(special)
        self._rust = rust

    @classmethod
    def load(cls, folder: str | Path, config: ModelConfig) -> Tokenizer:
        """Read tokenizer.json, tokenizer_config.json and chat_template.jinja (each may be missing) of a model folder.

        Raises:
            CheckpointError: with every problem: unreadable files, ids beyond the model's vocabulary (both sizes are
                named), no token for the mask id, contradicting ids of added tokens.
        """
        folder = Path(folder).resolve()
        problems: list[str] = []
        settings = (
            _optional(folder, TOKENIZER_CONFIG_FILE, problems, lambda p: read_json(p, TOKENIZER_CONFIG_BYTES))
            or {}
        )
        text = _optional(folder, TOKENIZER_FILE, problems, lambda p: read_text(p, TOKENIZER_BYTES))
        rust = _parse(text, problems) if text is not None else None
        template = _optional(folder, TEMPLATE_FILE, problems, lambda p: read_text(p, TEMPLATE_BYTES))
        if template is None:
            template = _template(settings.get("chat_template"), problems)
        special = _special_tokens(settings, problems)
        if rust is not None:
            _add_tokens(rust, settings.get("added_tokens_decoder"), problems)
            _check_vocabulary(rust, config, problems)
        if problems:
            raise CheckpointError(f"cannot use the tokenizer in {folder}", problems)
        family = family_module(config.family)
        default = getattr(family, "CHAT_TEMPLATE", None)
        if template is None and rust is not None and default:
            if all(rust.token_to_id(token) is not None for token in family.CHAT_TOKENS):
                template = default
                if hasattr(family, "BOS_TOKEN"):
                    special.setdefault("bos_token", family.BOS_TOKEN)
        return cls(folder, config, rust, template, special)

    @property
    def available(self) -> bool:
        """Whether there is a tokenizer.json, so that text can be encoded and decoded."""
        return self._rust is not None

    @property
    def vocab_size(self) -> int:
        """Number of tokens, added ones included; the model's vocabulary may be larger (padding)."""
        return self._need().get_vocab_size(with_added_tokens=True)

    def encode(self, text: str, add_special: bool = True) -> list[int]:
        """Ids of a text; special tokens written in it become their ids. Never truncates or pads.

        Args:
            text: any str that is valid Unicode.
            add_special: add the tokens that the tokenizer puts around a text (some add a BOS token); a rendered
                chat brings its own.
        """
        if not isinstance(text, str):
            raise SettingError(f"text must be a str, got {type(text).__name__}")
        rust = self._need()
        try:
            return rust.encode(text, add_special_tokens=add_special).ids
        except (UnicodeEncodeError, TypeError):
            raise SettingError("text must be valid Unicode, got lone surrogates") from None
        except Exception as error:  # the library has no class of its own for its errors
            raise CheckpointError(f"the tokenizer in {self.folder} cannot encode this text", shown(str(error), 200)) from None

    def decode(self, ids: Iterable[int], skip_special: bool = True) -> str:
        """Text of ids (a sequence or an integer tensor). Ids without a token (padding of the vocabulary) give nothing."""
        rust = self._need()
        values = ids.tolist() if hasattr(ids, "tolist") else list(ids)
        for value in values:
            if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value < 1 << 32:
                raise SettingError(f"ids must be integers >= 0, got {shown(value)}")
        return rust.decode(values, skip_special_tokens=skip_special)

    def chat(
        self, messages: Sequence[Mapping[str, Any]], add_generation_prompt: bool = True, **variables: Any
    ) -> str:
        """The prompt text of a conversation; encode it with add_special=False. Errors as `render_chat`."""
        if self.chat_template is None:
            raise SettingError(f"the model in {self.folder} has no chat template; pass a plain prompt")
        from .chat import render_chat  # imports Jinja2

        return render_chat(
            messages,
            self.chat_template,
            add_generation_prompt=add_generation_prompt,
            **{**self.special, **variables},
        )

    def token_to_id(self, token: str) -> int | None:
        """Id of a token, None if there is none."""
        return self._need().token_to_id(token)

    def id_to_token(self, id: int) -> str | None:
        """Token of an id, None if there is none."""
        if isinstance(id, bool) or not isinstance(id, int) or not 0 <= id < 1 << 32:
            raise SettingError(f"an id must be an integer >= 0, got {shown(id)}")
        return self._need().id_to_token(id)

    def _need(self) -> RustTokenizer:
        if self._rust is None:
            raise CheckpointError(
                f"no text for the model in {self.folder}", f"it has no {TOKENIZER_FILE}; pass ids instead"
            )
        return self._rust


def _optional(folder: Path, name: str, problems: list[str], read):
    """What `read` makes of a file of the folder, None where it is missing or unusable (then a problem is added)."""
    try:
        path = confined(folder, name)
        return None if path is None else read(path)
    except CheckpointError as error:
        problems.extend(f"{name}: {problem}" for problem in error.problems)
        return None


def _parse(text: str, problems: list[str]) -> RustTokenizer | None:
    from tokenizers import Tokenizer as RustTokenizer

    try:
        rust = RustTokenizer.from_str(text)
        rust.no_truncation()  # tokenizer.json may hold the settings of some training run
        rust.no_padding()
        rust.encode("a \u00e9 1")  # some faults, like an unknown-token that is not in the vocabulary, show here first
        return rust
    except BaseException as error:
        # The library reports a bad file as plain Exception, and a Rust panic as PanicException, a BaseException.
        if isinstance(error, (KeyboardInterrupt, SystemExit, MemoryError)):
            raise
        problems.append(f"{TOKENIZER_FILE} cannot be used: {shown(str(error), 200)}")
        return None


def _template(value: object, problems: list[str]) -> str | None:
    """chat_template of tokenizer_config.json: a text, or a list of named ones, of which "default" counts."""
    if isinstance(value, list):
        named = {
            t.get("name"): t.get("template")
            for t in value
            if isinstance(t, dict) and isinstance(t.get("name"), str)
        }
        value = named.get("default")
    if value is not None and not isinstance(value, str):
        problems.append(f"{TOKENIZER_CONFIG_FILE}: chat_template must be a text, got {shown(value)}")
        return None
    return value


def _special_tokens(settings: dict[str, Any], problems: list[str]) -> dict[str, str]:
    special = {}
    for name in _SPECIAL:
        value = settings.get(name)
        if isinstance(value, dict):  # an AddedToken written out
            value = value.get("content")
        if isinstance(value, str):
            special[name] = value
        elif value is not None:
            problems.append(f"{TOKENIZER_CONFIG_FILE}: {name} must be a text, got {shown(value)}")
    return special


def _add_tokens(rust: RustTokenizer, added: object, problems: list[str]) -> None:
    """Add tokens that only tokenizer_config.json lists, in id order as transformers does; each must get the id listed."""
    from tokenizers import AddedToken

    if added is None:
        return
    entries = {}
    if isinstance(added, dict):
        entries = {key: e.get("content") if isinstance(e, dict) else None for key, e in added.items()}
    usable = isinstance(added, dict) and len(entries) <= 1 << 16
    if not usable or not all(
        isinstance(c, str) and k.isascii() and k.isdigit() and len(k) < 10 for k, c in entries.items()
    ):
        problems.append(
            f"{TOKENIZER_CONFIG_FILE}: added_tokens_decoder must map ids to tokens, got {shown(added)}"
        )
        return
    for key, content in sorted(entries.items(), key=lambda item: int(item[0])):
        if rust.token_to_id(content) is None:
            flags = {
                f: added[key].get(f) is True
                for f in ("single_word", "lstrip", "rstrip", "normalized", "special")
            }
            token = AddedToken(content, **flags)
            (rust.add_special_tokens if flags["special"] else rust.add_tokens)([token])
        if rust.token_to_id(content) != int(key):
            problems.append(
                f"token {shown(content)} has id {rust.token_to_id(content)} in {TOKENIZER_FILE}, "
                f"{key} in {TOKENIZER_CONFIG_FILE}"
            )


def _check_vocabulary(rust: RustTokenizer, config: ModelConfig, problems: list[str]) -> None:
    vocabulary = rust.get_vocab(with_added_tokens=True)
    largest = max(vocabulary.values(), default=-1)
    if largest >= config.vocab_size:
        problems.append(
            f"the tokenizer has ids up to {largest} ({len(vocabulary)} tokens), but the model's vocabulary is "
            f"{config.vocab_size}"
        )
    if rust.id_to_token(config.mask_id) is None:
        problems.append(
            f"the tokenizer ({len(vocabulary)} tokens) has no token for the mask id {config.mask_id}"
        )
