"""Rules on the package's own source: nothing in it can run what a checkpoint ships."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

SOURCE = Path(__file__).resolve().parent.parent / "python"
FILES = sorted(SOURCE.rglob("*.py"))

FORBIDDEN_CALLS = {"eval", "exec", "compile", "__import__"}
"""As plain names; methods of these names (model.eval()) are other things."""
FORBIDDEN_FUNCTIONS = {
    ("torch", "load"),
    ("os", "system"),
    ("np", "load"),
    ("numpy", "load"),
    ("builtins", "eval"),
}
FORBIDDEN_MODULES = {
    "pickle",
    "cPickle",
    "_pickle",
    "dill",
    "cloudpickle",
    "marshal",
    "shelve",
    "joblib",
    "runpy",
}
FORBIDDEN_KEYWORDS = {"trust_remote_code", "weights_only", "allow_pickle"}


def test_there_is_source():
    assert len(FILES) > 10


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(SOURCE)))
def test_no_way_to_run_foreign_code(path):
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        where = f"{path}:{getattr(node, 'lineno', 0)}"
        if isinstance(node, ast.Import):
            assert not {alias.name.split(".")[0] for alias in node.names} & FORBIDDEN_MODULES, where
        if isinstance(node, ast.ImportFrom):
            module = (node.module or "").split(".")[0]
            assert module not in FORBIDDEN_MODULES, where
            assert not {(module, alias.name) for alias in node.names} & FORBIDDEN_FUNCTIONS, where
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
            assert node.func.id not in FORBIDDEN_CALLS, where
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
            assert (node.value.id, node.attr) not in FORBIDDEN_FUNCTIONS, where
        if isinstance(node, ast.keyword):
            assert node.arg not in FORBIDDEN_KEYWORDS, where
