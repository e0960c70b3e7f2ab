"""The house's rule: imports point down. ops and reference know nothing of models; models nothing of decode; decode nothing of the API."""

from __future__ import annotations

import ast
from pathlib import Path

import unmask

ROOT = Path(unmask.__file__).parent
LEVEL = {"_library": 0, "errors": 0, "values": 0, "reference": 1, "ops": 1, "models": 2, "decode": 3, "speculate": 4, "caches": 4, "settings": 4, "prompts": 4, "result": 4, "api": 5, "compat": 5, "_machine": 6, "_timing": 6, "tiny": 6, "cli": 7}


def test_imports_point_down():
    wrong = []
    for path in ROOT.rglob("*.py"):
        parts = path.relative_to(ROOT).parts
        own = parts[0].removesuffix(".py")
        if own not in LEVEL:
            continue
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ImportFrom) and node.level and not _typing_only(path, node):
                base = list(parts[: len(parts) - node.level])
                names = base + (node.module or "").split(".") if node.module else base
                targets = [names[0]] if names else [a.name for a in node.names]
                for target in targets:
                    if target in LEVEL and LEVEL[target] > LEVEL[own]:
                        wrong.append(f"{path.relative_to(ROOT)} imports {target}")
    assert not wrong


def _typing_only(path: Path, node: ast.ImportFrom) -> bool:
    """True for imports under `if TYPE_CHECKING:`."""
    for outer in ast.walk(ast.parse(path.read_text())):
        if isinstance(outer, ast.If) and isinstance(outer.test, ast.Name) and outer.test.id == "TYPE_CHECKING":
            if any(getattr(inner, "lineno", -1) == node.lineno for inner in ast.walk(outer)):
                return True
    return False
