"""Every exception unmask raises on purpose.

Each also is the built-in kind (ValueError, FileNotFoundError) that plain callers expect.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Sequence

_SHOWN = 40
"""Problems printed in one message; the exception always carries all of them."""


class UnmaskError(Exception):
    """Base of all of them."""


class CheckpointError(UnmaskError, ValueError):
    """A model folder that must not be used, with every problem that was found.

    Attributes:
        headline: what was being read.
        problems: one string per problem, all of them (the message prints the first 40).
    """

    def __init__(self, headline: str, problems: Sequence[str] | str):
        self.headline = headline
        self.problems = [problems] if isinstance(problems, str) else list(problems)
        lines = [f"  - {problem}" for problem in self.problems[:_SHOWN]]
        if len(self.problems) > _SHOWN:
            lines.append(f"  ... and {len(self.problems) - _SHOWN} more (all in .problems)")
        count = "1 problem" if len(self.problems) == 1 else f"{len(self.problems)} problems"
        super().__init__("\n".join([f"{headline} ({count}):", *lines]))

    def __reduce__(self):
        return type(self), (self.headline, self.problems)


class ModelNotFound(UnmaskError, FileNotFoundError):
    """No such model on this machine; the message names the folders searched and the command that fetches it."""


class InvalidLogits(UnmaskError, ValueError):
    """A model gave NaN, or nothing but -inf, where a token had to be chosen."""


class SettingError(UnmaskError, ValueError):
    """An argument that is unknown, of the wrong kind or out of range."""


def nearest(name: object, valid: Iterable[str]) -> str:
    """The tail of an error about an unknown name: `; did you mean 'threshold'? valid: ...`.

    Without a close match only the valid names are listed. Names are compared without case.
    """
    names = sorted(valid)
    lowered = {v.lower(): v for v in names}
    close = difflib.get_close_matches(str(name)[:100].lower(), list(lowered), n=1)
    guess = f"; did you mean {lowered[close[0]]!r}?" if close else ";"
    return f"{guess} valid: {', '.join(names)}"


def check_names(what: str, given: Iterable[object], valid: Iterable[str]) -> None:
    """Raise SettingError for the first of `given` not in `valid`: `unknown <what> 'tresh'; did you mean ...`."""
    known = set(valid)
    for name in given:
        if not isinstance(name, str) or name not in known:
            raise SettingError(f"unknown {what} {name!r}{nearest(name, known)}")
