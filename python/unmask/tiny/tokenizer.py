"""Word-level tokenizer of the embedded model (at most 256 tokens), built with the `tokenizers` library.

A leading space belongs to the word that follows it, written as a bar below: `sort d a` is `▁sort ▁d ▁a`. So typed
text comes back as typed (lower-cased, runs of spaces joined), and an answer decodes to readable text. Quotes and
commas of a JSON record are joined into one token per gap (`": "`), which keeps canvases short.
"""

from __future__ import annotations

import json
from pathlib import Path

from tokenizers import AddedToken, Regex, Tokenizer, decoders, normalizers, pre_tokenizers
from tokenizers.models import WordLevel

from . import words

MASK, EOS, UNK = "<|mask|>", "<|eos|>", "<|unk|>"
SPECIALS = (MASK, EOS, UNK)
BAR = "\u2581"
MARK = "=>"
"""Ends every prompt; the chat template appends it when the typed text lacks it."""

JSON_GLUE = ('{"', '":' + BAR + '"', '":', '",' + BAR + '"', "," + BAR + '"', '"}')
PIECE = "|".join(
    [
        '":' + BAR + '"', '",' + BAR + '"', "," + BAR + '"', '":', r'"\}', r'\{"', r"\):",
        BAR + r"?(?:=>|==)", BAR + r"?[a-z]+", BAR + r"?[0-9]", BAR + r"?[-+*/<>]",
        BAR + r"(?=[(\[{])", r".",
    ]
)  # fmt: skip

CHAT_TEMPLATE = (
    "{% set text = messages[-1]['content'] | trim %}"
    "{{ text }}{% if not text.endswith('" + MARK + "') %} " + MARK + "{% endif %}"
)


def vocabulary() -> list[str]:
    """All tokens in id order: specials, marks, then words; `▁w` follows a space, `w` follows anything else."""
    after_space = [
        *words.COMMANDS, *words.FILLERS, *words.CODE_WORDS, *words.OPERATORS, *words.LETTERS, *words.DIGITS,
        *words.NAMES, *words.CITIES, *words.JOBS, *words.FUNCTION_NAMES,
    ]  # fmt: skip
    bare = [*words.LETTERS, *words.DIGITS, *words.NAMES, *words.CITIES, *words.JOBS, *words.KEYS]
    tokens = [
        *SPECIALS, BAR + MARK, BAR, *words.OPENERS, *words.CLOSERS, "):", ",", *JSON_GLUE,
        *(BAR + word for word in after_space), *bare,
    ]  # fmt: skip
    unique = list(dict.fromkeys(tokens))
    if len(unique) > 256:
        raise ValueError(f"vocabulary has {len(unique)} tokens; the embedded model allows 256")
    return unique


def build_tokenizer() -> Tokenizer:
    """The tokenizer object; its ids are the positions in `vocabulary()`."""
    tokenizer = Tokenizer(WordLevel({token: i for i, token in enumerate(vocabulary())}, unk_token=UNK))
    tokenizer.normalizer = normalizers.Sequence(
        [
            normalizers.Lowercase(),
            normalizers.Replace(Regex(r"\s+"), " "),
            normalizers.Strip(left=False, right=True),
        ]
    )
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Metaspace(replacement=BAR, prepend_scheme="first", split=False),
            pre_tokenizers.Split(Regex(PIECE), "isolated"),
        ]
    )
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace(BAR, " "), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in SPECIALS])
    return tokenizer


def write_tokenizer(folder: Path) -> None:
    """Write tokenizer.json and tokenizer_config.json (with the chat template) into `folder`."""
    build_tokenizer().save(str(folder / "tokenizer.json"))
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "mask_token": MASK,
        "eos_token": EOS,
        "pad_token": EOS,
        "unk_token": UNK,
        "add_bos_token": False,
        "clean_up_tokenization_spaces": False,
        "model_max_length": 256,
        "chat_template": CHAT_TEMPLATE,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
