"""docs/policies.md: its table is the one made from decode/table.py, its examples run, and the README names it."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

import unmask
from unmask.decode import tabulate
from unmask.decode.table import RULES, SCORES
from unmask.settings import SCHEDULES

ROOT = Path(__file__).resolve().parent.parent
PAGE = ROOT / "docs" / "policies.md"
TEXT = PAGE.read_text(encoding="utf-8")


def test_the_table_is_the_one_made_from_the_code():
    made = tabulate.with_table(TEXT)
    assert made == TEXT, "docs/policies.md is out of date: python -m unmask.decode.tabulate docs/policies.md"
    for spec in RULES.values():
        assert f"| `{spec.name}` | {spec.title}: " in made
        for knob in spec.knobs:
            assert f"| `{spec.name}` | `{knob.name}` |" in made


def test_every_row_has_the_columns_of_its_head():
    """A bar in a cell would split it."""
    columns = None
    for line in TEXT.splitlines():
        if not line.startswith("|"):
            columns = None
            continue
        cells = len(re.findall(r"(?<!\\)\|", line)) - 1
        columns = columns or cells
        assert cells == columns, line


@pytest.mark.parametrize("name", [*(s for s in SCORES if s != "pc"), *SCHEDULES])
def test_scores_and_schedules_are_listed(name):
    assert f"| `{name}`" in TEXT


def test_the_readme_names_it():
    assert "docs/policies.md" in (ROOT / "README.md").read_text(encoding="utf-8")


def test_the_module_prints_the_table_and_rewrites_a_page(tmp_path):
    words = [sys.executable, "-m", "unmask.decode.tabulate"]
    printed = subprocess.run(words, capture_output=True, text=True, check=True)
    assert printed.stdout == tabulate.policy_table() == unmask.policies() and not printed.stderr
    page = tmp_path / "page.md"
    page.write_text(f"before\n{tabulate.BEGIN}old\n{tabulate.END}after\n", encoding="utf-8")
    subprocess.run([*words, str(page)], check=True)
    assert page.read_text(encoding="utf-8") == f"before\n{tabulate.BEGIN}{tabulate.policy_table()}{tabulate.END}after\n"
    with pytest.raises(unmask.SettingError, match="around its table"):
        tabulate.with_table("a page without marks")


def test_the_examples_run(tmp_path, monkeypatch, capsys):
    """One after the other in one namespace, as a reader would type them."""
    monkeypatch.chdir(tmp_path)
    examples = re.findall(r"^```python\n(.*?)^```$", TEXT, flags=re.M | re.S)
    assert len(examples) >= 8
    names: dict[str, object] = {}
    for example in examples:
        exec(compile(example, str(PAGE), "exec"), names)
    out = capsys.readouterr().out
    assert "threshold is for policy=" in out and out.count("a b c d") >= 5
