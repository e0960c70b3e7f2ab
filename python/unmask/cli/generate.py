"""`unmask generate`."""

from __future__ import annotations

import argparse
import json
import sys
import time
from typing import TYPE_CHECKING, Any

from . import INTERRUPTED
from .options import fail, given_settings
from .show import MASK, Pieces, canvas_text, id_pieces, visible

if TYPE_CHECKING:
    from ..models.model import Model
    from ..result import Commit, Result


def run(args: argparse.Namespace) -> int:
    prompt = sys.stdin.read().rstrip("\n") if args.prompt == "-" else args.prompt
    import torch

    import unmask

    from ..errors import UnmaskError
    from ..models.hub import EMBEDDED
    from ..settings import Settings

    given = given_settings(args)
    given["chat"] = args.chat if args.chat is not None else args.model in EMBEDDED
    if args.threads:
        torch.set_num_threads(args.threads)
    try:
        settings = Settings.from_kwargs(given)  # before the model is loaded: mistakes answer first
        model = unmask.load(args.model, dtype=args.dtype, device=args.device, download=args.download)
        events = unmask.stream(model, prompt, **given)
    except UnmaskError as e:
        return fail(args, e)
    pieces = Pieces(model.tokenizer.decode) if _has_text(model) else id_pieces()
    seen = _Seen(model, settings)
    try:
        result = _follow(args, events, model, settings, pieces, seen)
    except KeyboardInterrupt:
        _report_interrupted(args, seen, pieces)
        return INTERRUPTED
    except ModuleNotFoundError as e:
        if e.name != "rich":
            raise
        return fail(args, "--live on a terminal needs rich; install it with: pip install 'unmask[cli]'")
    except UnmaskError as e:
        print(f"{args.parser.prog}: {e}", file=sys.stderr)
        return 1
    _report(args, result)
    return 0


def _has_text(model: Model) -> bool:
    return model.tokenizer is not None and model.tokenizer.available


class _Seen:
    """What has been seen of a run, for Ctrl-C."""

    def __init__(self, model: Model, settings: Any):
        self.mask_id, self.n = model.config.mask_id, settings.max_new_tokens
        self.settings = settings.resolved(model)
        self.commit: Commit | None = None
        self.forwards = 0
        self.began = time.perf_counter()

    @property
    def start(self) -> int:
        return len(self.commit.canvas) - self.n if self.commit is not None else 0


def _follow(
    args: argparse.Namespace, events, model: Model, settings: Any, pieces: Pieces, seen: _Seen
) -> Result:
    """Runs to the end, showing progress: the live view, or a bar on standard error if that is a terminal."""
    from tqdm import tqdm

    view = None
    bar = tqdm(total=settings.max_new_tokens, unit="tok", leave=False, disable=True if args.live else None)
    try:
        for event in events:
            if event.kind == "done":
                return event.result
            if event.kind == "step":
                seen.forwards += 1
                continue
            seen.commit = event
            bar.update(len(event.positions))
            if args.live:
                if view is None:
                    from .live import open_view

                    view = open_view(pieces, seen.start, model.config.mask_id).__enter__()
                view.update(event, seen.forwards)
    finally:
        bar.close()
        if view is not None:
            view.__exit__(None, None, None)
    raise AssertionError("stream ended without a result")


def _report(args: argparse.Namespace, result: Result) -> None:
    if args.json:
        fields = ("text", "ids", "nfe", "tokens_per_forward", "seconds", "finish_reason", "settings")
        print(json.dumps({name: getattr(result, name) for name in fields}, ensure_ascii=False))
        return
    text = result.text if result.text is not None else " ".join(map(str, result.ids))
    print(visible(text) if sys.stdout.isatty() else text)
    print(summary(result))


def summary(result: Result) -> str:
    """The line under the text."""
    rate = len(result.ids) / result.seconds if result.seconds > 0 else 0.0
    words = [
        f"{len(result.ids)} tokens", f"{rate:.1f} tokens/s", f"{result.nfe} NFE", f"{result.tokens_per_forward:.2f} tokens per forward",
        f"ended by {result.finish_reason}",
    ]  # fmt: skip
    if not result.exact:
        words.append(f"{result.settings['cache']} cache (approximate)")
    return "[" + ", ".join(words) + "]"


def _report_interrupted(args: argparse.Namespace, seen: _Seen, pieces: Pieces) -> None:
    """What was settled when Ctrl-C came: undecided positions are MASK in text and null in ids."""
    canvas = seen.commit.canvas if seen.commit is not None else []
    nfe = seen.forwards
    made = canvas[seen.start :]
    settled = sum(token != seen.mask_id for token in made)
    text = canvas_text(canvas, seen.start, seen.mask_id, pieces)
    if args.json:
        fields = {
            "text": text, "ids": [None if t == seen.mask_id else t for t in made], "nfe": nfe,
            "tokens_per_forward": settled / nfe if nfe else 0.0, "seconds": time.perf_counter() - seen.began,
            "finish_reason": "interrupted", "settings": seen.settings,
        }  # fmt: skip
        print(json.dumps(fields, ensure_ascii=False))
        return
    print(visible(text) if sys.stdout.isatty() else text)
    print(
        f"[interrupted: {settled} of {seen.n} tokens settled in {nfe} forwards; {MASK} is undecided]",
        file=sys.stderr,
    )
