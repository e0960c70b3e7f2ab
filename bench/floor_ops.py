"""Builds floor_ops.cpp (a few seconds) and loads it: `torch.ops.unmask_floor`, ops with the schemas of unmask's own that do nothing."""

from __future__ import annotations

import subprocess
import tempfile
from pathlib import Path

import torch

_library = None  # torch.library.Library, alive as long as its ops


def load(names: list[str]) -> None:
    """Defines `torch.ops.unmask_floor.<name>` for each op name of `torch.ops.unmask`. Needs g++ and a source checkout."""
    global _library
    _library = torch.library.Library("unmask_floor", "DEF")
    for name in names:
        schema = str(getattr(torch.ops.unmask, name).default._schema)
        _library.define(schema.removeprefix("unmask::"))
    root = Path(__file__).resolve().parent.parent
    torch_folder = Path(torch.__file__).resolve().parent
    with tempfile.TemporaryDirectory(prefix="unmask-floor-") as folder:
        binary = Path(folder) / "floor_ops.so"
        subprocess.run(
            ["g++", "-std=c++20", "-O2", "-fPIC", "-shared", "-DTORCH_TARGET_VERSION=((2ULL<<56)|(10ULL<<48))", f"-I{root / 'csrc'}",
             "-isystem", str(torch_folder / "include"), str(root / "bench/floor_ops.cpp"), "-o", str(binary),
             "-Wl,--no-as-needed", str(torch_folder / "lib/libtorch.so")],
            check=True,
        )  # fmt: skip
        torch.ops.load_library(str(binary))
