"""The policy table as Markdown, made from decode/table.py. docs/policies.md holds it between two marks, and a test compares them.

    python -m unmask.decode.tabulate                      # print the table
    python -m unmask.decode.tabulate docs/policies.md     # put it where that file has it now
"""

from __future__ import annotations

import argparse
from pathlib import Path

from ..errors import SettingError
from .table import RULES, Knob, RuleSpec

BEGIN, END = "<!-- table: python -m unmask.decode.tabulate docs/policies.md -->\n", "<!-- /table -->\n"

_HEAD = """| policy | rule | source | scores | needs |
|---|---|---|---|---|"""
_NEEDS = {"model": "a model from `unmask.load`", "no cache": "`cache='none'`", "no guidance": "no guidance"}


def policy_table() -> str:
    """One row per rule, then the settings of each."""
    lines = [_HEAD]
    for spec in RULES.values():
        lines.append(_row(f"`{spec.name}`", f"{spec.title}: {spec.doc}", spec.source, scores(spec), needs(spec)))
    lines += ["", "| policy | setting | default | allowed | meaning |", "|---|---|---|---|---|"]
    for spec in RULES.values():
        lines += [_row(f"`{spec.name}`", f"`{k.name}`", default(k), k.range, k.doc) for k in spec.knobs]
    return "\n".join(lines) + "\n"


def needs(spec: RuleSpec) -> str:
    """What the rule asks of model and cache, in words."""
    return ", ".join(_NEEDS[n] for n in spec.needs) or "any model, any cache"


def scores(spec: RuleSpec) -> str:
    """Scores that a user may pick; rules that order by themselves say so."""
    own = {"dream": "`alg`", "order": "`order_logits`", "pc": "its own"}
    return ", ".join(own.get(s, s) if len(spec.scores) == 1 else s for s in spec.scores)


def default(knob: Knob) -> str:
    return "" if knob.default is None else f"`{knob.default!r}`"


def _row(*cells: str) -> str:
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"


def with_table(page: str) -> str:
    """The page with the table between its marks replaced by today's."""
    before, begin, rest = page.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not begin or not end:
        raise SettingError(f"the page must hold the lines {BEGIN.strip()!r} and {END.strip()!r} around its table")
    return before + begin + policy_table() + end + after


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m unmask.decode.tabulate", description="Print the policy table, or put it into a page.")
    parser.add_argument("page", type=Path, nargs="?", help="Markdown file whose table is replaced")
    args = parser.parse_args()
    if args.page is None:
        print(policy_table(), end="")
    else:
        args.page.write_text(with_table(args.page.read_text(encoding="utf-8")), encoding="utf-8")


if __name__ == "__main__":
    main()
