"""Arguments of every command. Nothing here imports torch: `--help` and mistakes answer at once.

A setting that is not given is not passed on, so its default is written once, in `unmask.settings.Settings`.
"""

from __future__ import annotations

import argparse
import difflib
import json
import math
import sys
from collections.abc import Sequence
from typing import NoReturn

from .. import __version__

SETTINGS = (
    "max_new_tokens", "block_size", "policy", "score", "threshold", "factor", "steps", "schedule", "delimiters", "temperature", "top_p", "top_k",
    "cfg_scale", "negative_prompt", "cache", "seed", "stop",
)  # fmt: skip
"""Options of `generate` that are settings of `unmask.generate`, by the same name; any other setting is given with --set."""


class Parser(argparse.ArgumentParser):
    """Reports a mistake in one line that names the nearest valid word; never guesses from an abbreviation."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, allow_abbrev=False, **kwargs)

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: {' '.join(message.split())}\n")

    def options(self) -> list[str]:
        return [
            option for action in self._actions for option in action.option_strings if option.startswith("--")
        ]

    def _check_value(self, action, value):
        if action.choices is not None and value not in action.choices:
            name = "command" if isinstance(action, argparse._SubParsersAction) else action.option_strings[-1]
            raise argparse.ArgumentError(None, f"unknown {name} {value!r}{nearest(value, action.choices)}")


def nearest(word: str, valid: Sequence[str]) -> str:
    """`; did you mean X? valid: ...` for a mistyped word."""
    close = difflib.get_close_matches(word, list(valid), n=1, cutoff=0.5)
    guess = f"; did you mean {close[0]}?" if close else ";"
    return f"{guess} valid: {', '.join(valid)}"


def read_arguments(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Parses; on a mistake prints one line and exits with code 2. The namespace's `run` is the command."""
    parser, commands = build_parser()
    args, rest = parser.parse_known_args(argv)
    command = commands.get(args.command or "")
    if command is None:
        parser.print_help()
        raise SystemExit(0)
    for word in rest:
        if word.startswith("-") and word != "-":
            command.error(
                f"unknown option {word.split('=')[0]}{nearest(word.split('=')[0], command.options())}"
            )
    if rest:
        command.error(f"unexpected argument {rest[0]!r}; put a prompt of several words in quotes")
    args.parser = command
    return args


def build_parser() -> tuple[Parser, dict[str, Parser]]:
    parser = Parser(prog="unmask", description="Fast, exact decoding for diffusion language models.")
    parser.add_argument("--version", action="version", version=f"unmask {__version__}")
    commands = parser.add_subparsers(dest="command", metavar="command", parser_class=Parser)
    return parser, {
        "generate": _generate(commands),
        "policies": _policies(commands),
        "inspect": _inspect(commands),
        "doctor": _doctor(commands),
        "bench": _bench(commands),
    }


def _generate(commands) -> Parser:
    p = commands.add_parser(
        "generate", help="text after a prompt", description="Generate text after a prompt by denoising blocks of masks.",
        epilog="Defaults of the decoding options are those of unmask.generate.",
    )  # fmt: skip
    p.add_argument("prompt", help="the prompt; - reads it from standard input")
    p.add_argument(
        "-m",
        "--model",
        default="tiny",
        help="model folder, or Hugging Face id in the local cache (default: tiny, embedded; its block-causal sibling: tiny-block)",
    )
    p.add_argument(
        "--download",
        action="store_true",
        help="fetch the model if it is not on this machine (never done otherwise)",
    )
    p.add_argument("--dtype", help="float32 or bfloat16 (default: as stored)")
    p.add_argument("--device", default="cpu", help="cpu (default), cuda or cuda:N")
    p.add_argument("--threads", type=_positive, metavar="N", help="CPU threads (default: torch's choice)")
    p.add_argument(
        "--chat",
        action=argparse.BooleanOptionalAction,
        help="apply the model's chat template to the prompt (default: only for the embedded models)",
    )
    d = p.add_argument_group("decoding")
    d.add_argument(
        "--max-new-tokens", type=_integer, metavar="N", help="positions to fill after the prompt (default 32)"
    )
    d.add_argument(
        "--block-size",
        type=_integer,
        metavar="N",
        help="positions denoised together, block by block (default 32)",
    )
    d.add_argument("--policy", metavar="NAME", help="the decoding rule: threshold (default) or one that `unmask policies` lists")
    d.add_argument("--score", metavar="NAME", help="what orders positions: confidence (default), margin, entropy, random or leftmost")
    d.add_argument(
        "--threshold",
        type=_number,
        metavar="X",
        help="policy threshold and others: commit every position that scores X (default of threshold: 0.9)",
    )
    d.add_argument("--factor", type=_number, metavar="X", help="policy factor: how bold it is (default 1.0)")
    d.add_argument(
        "--steps", type=_integer, metavar="N", help="policy quota and others: forwards in all (default: one per token)"
    )
    d.add_argument("--schedule", metavar="NAME", help="where blocks end: fixed (default), adablock or daedal")
    d.add_argument(
        "--delimiter",
        dest="delimiters",
        action="append",
        metavar="TEXT",
        help="schedule adablock: a block ends at this token (default: a line break); may be given several times",
    )
    d.add_argument(
        "--temperature",
        type=_number,
        metavar="X",
        help="0 takes the most likely token (default), above 0 samples",
    )
    d.add_argument("--top-p", type=_number, metavar="X", help="draw from the likeliest tokens that have mass X together")
    d.add_argument("--top-k", type=_integer, metavar="N", help="draw from the N likeliest tokens")
    d.add_argument(
        "--cfg-scale", type=_number, metavar="X", help="classifier-free guidance, LLaDA's convention: 0 is off (default)"
    )
    d.add_argument("--negative-prompt", metavar="TEXT", help="with --cfg-scale: what guidance leads away from")
    d.add_argument("--cache", help="none (exact), prefix or dual (approximate on bidirectional models)")
    d.add_argument("--seed", type=_integer, metavar="N", help="same seed, same text (default 0)")
    d.add_argument(
        "--stop", action="append", metavar="TEXT", help="end before this text; may be given several times"
    )
    d.add_argument(
        "--set",
        type=_assignment,
        action="append",
        default=[],
        metavar="NAME=VALUE",
        help="any other setting of unmask.generate or of the policy, VALUE as JSON or text; may be given several times",
    )
    o = p.add_argument_group("output").add_mutually_exclusive_group()
    o.add_argument("--json", action="store_true", help="print one JSON object instead of text")
    o.add_argument(
        "--live",
        action="store_true",
        help="redraw the text as it denoises (plain lines if this is no terminal)",
    )
    p.set_defaults(run=_lazily("generate"))
    return p


def _policies(commands) -> Parser:
    p = commands.add_parser(
        "policies",
        help="the decoding rules and their settings",
        description="List the decoding rules with their sources, or one of them with its settings.",
    )
    p.add_argument("name", nargs="?", help="a policy: print what it does and its settings")
    p.set_defaults(run=_lazily("policies"))
    return p


def _inspect(commands) -> Parser:
    p = commands.add_parser(
        "inspect",
        help="what a model is and needs",
        description="Family, sizes, memory, caches, what would run where, and whether this machine's memory suffices. Reads no weights.",
    )
    p.add_argument("model", help="model folder, Hugging Face id in the local cache, or tiny or tiny-block (embedded)")
    p.add_argument("--dtype", help="dtype to load in on the CPU: float32 or bfloat16 (default: as stored)")
    p.add_argument(
        "--override",
        type=_assignment,
        action="append",
        default=[],
        metavar="NAME=VALUE",
        help="a field of the config to replace, as overrides of unmask.load does, e.g. mask_id=126336; may be given several times",
    )
    p.add_argument("--json", action="store_true", help="print one JSON object instead of text")
    p.set_defaults(run=_lazily("inspect"))
    return p


def _doctor(commands) -> Parser:
    p = commands.add_parser(
        "doctor",
        help="check this installation",
        description="Versions, instruction set, kernels, a self-test, where models are looked for.",
    )
    p.add_argument("--json", action="store_true", help="print one JSON object instead of text")
    p.set_defaults(run=_lazily("doctor"))
    return p


def _bench(commands) -> Parser:
    p = commands.add_parser(
        "bench", help="time the kernels on this machine",
        description="Time each op at a production shape beside the plain PyTorch it replaces (about half a minute).",
    )  # fmt: skip
    p.add_argument(
        "--dtype", nargs="+", choices=("fp32", "bf16"), default=["fp32", "bf16"], help="default: both"
    )
    p.add_argument("--threads", type=_positive, metavar="N", help="CPU threads (default: torch's choice)")
    p.add_argument("--rounds", type=_positive, default=3, metavar="N", help="interleaved rounds (default 3)")
    p.add_argument("--json", action="store_true", help="print one JSON object instead of a table")
    p.set_defaults(run=_lazily("bench"))
    return p


def _lazily(name: str):
    def run(args: argparse.Namespace) -> int:
        from importlib import import_module

        return import_module(f".{name}", __package__).run(args)

    return run


def _integer(text: str) -> int:
    try:
        return int(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"must be an integer, got {text!r}") from None


def _positive(text: str) -> int:
    value = _integer(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1, got {value}")
    return value


def _number(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if math.isnan(value):
        raise argparse.ArgumentTypeError(f"must be a number, got {text!r}")
    return value


def _assignment(text: str) -> tuple[str, object]:
    """NAME=VALUE: the value as JSON if it is that, else the text itself. Whether there is such a setting is checked with all the others."""
    name, equals, value = text.partition("=")
    if not equals or not name.strip():
        raise argparse.ArgumentTypeError(f"must be NAME=VALUE, got {text!r}")
    try:
        return name.strip().replace("-", "_"), json.loads(value)
    except ValueError:
        return name.strip().replace("-", "_"), value


def given_settings(args: argparse.Namespace) -> dict[str, object]:
    """The settings that the command line names, each once; a mistake exits as one of the parser's does."""
    found = {name: getattr(args, name) for name in SETTINGS if getattr(args, name) is not None}
    options = {name: f"--{'delimiter' if name == 'delimiters' else name.replace('_', '-')}" for name in SETTINGS}
    for name, value in args.set:
        if name in found:
            args.parser.error(f"{name} is given twice: --set {name} and {options.get(name, '--set ' + name)}; give it once")
        if name == "chat":
            args.parser.error("chat is set with --chat or --no-chat")
        found[name] = value
    return found


def fail(args: argparse.Namespace, message: object) -> int:
    """Prints a mistake found after parsing, in one line as the parser does, and returns exit code 2."""
    print(f"{args.parser.prog}: {message}", file=sys.stderr)
    return 2
