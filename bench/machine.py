"""What a result file says about where it came from: the machine, the versions, the commit and the command."""

from __future__ import annotations

import datetime
import subprocess
import sys
from pathlib import Path

from unmask._machine import cpu_model, cpu_slug, facts

__all__ = ["commit", "cpu_model", "cpu_slug", "origin"]

_ROOT = Path(__file__).resolve().parent.parent


def commit() -> str:
    """Short hash of the checkout, with `+` when tracked files differ from it; `unknown` outside git."""
    try:
        short = _git("rev-parse", "--short", "HEAD")
        return short + (
            "+" if _git("status", "--porcelain", "--untracked-files=no", "--", ".", ":!bench/results") else ""
        )
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def _git(*words: str) -> str:
    return subprocess.run(
        ["git", "-C", str(_ROOT), *words], check=True, capture_output=True, text=True
    ).stdout.strip()


def command() -> str:
    """The command that reproduces this run, from the repository's root."""
    script = Path(sys.argv[0]).resolve()
    name = str(script.relative_to(_ROOT)) if script.is_relative_to(_ROOT) else script.name
    return " ".join(["python", name, *sys.argv[1:]])


def origin() -> dict[str, object]:
    """facts() of the package plus commit, command and date."""
    return facts() | {"commit": commit(), "command": command(), "date": datetime.date.today().isoformat()}
