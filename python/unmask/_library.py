"""Loads the op library once.

`_C.so` holds every torch op (stable ABI, no Python symbols), so it is loaded with `torch.ops.load_library` from one fixed place, beside
this file. `UNMASK_C_LIBRARY` names another build of it (a sanitizer build, or one carried to a machine with a GPU).
"""

from __future__ import annotations

import os
from pathlib import Path

import torch

_PACKAGE = Path(__file__).resolve().parent


def library_path() -> Path:
    """The op library that this process uses."""
    override = os.environ.get("UNMASK_C_LIBRARY")
    if override:
        path = Path(override)
        if not path.is_file():
            raise ImportError(f"UNMASK_C_LIBRARY must name the op library, got {override!r}, which is no file; unset it to use the installed one")
        return path
    for folder in (_PACKAGE, *_editable_folders()):
        path = folder / "_C.so"
        if path.is_file():
            return path
    raise ImportError(
        f"unmask's op library _C.so is not in {_PACKAGE}. Build it from the repository's root with: pip install --no-build-isolation ."
    )


def _editable_folders() -> list[Path]:
    """Where scikit-build-core puts binaries of an editable install: beside the installed `_host` module."""
    try:
        from unmask import _host
    except ImportError:
        return []
    return [Path(_host.__file__).resolve().parent]


LIBRARY_PATH = library_path()
torch.ops.load_library(str(LIBRARY_PATH))
