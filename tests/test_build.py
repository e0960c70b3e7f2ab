"""What the build promises: one library for every machine, a quiet import, and clear words when something is missing."""

from __future__ import annotations

import os
import re
import struct
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from unmask import _library
from unmask.ops import cuda_archs

ROOT = Path(__file__).resolve().parent.parent


def run_python(code: str, **env: str) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env={**os.environ, **env})


def test_import_starts_no_thread_and_no_cuda():
    code = """
import os, torch
before = len(os.listdir("/proc/self/task"))
import unmask.ops
assert len(os.listdir("/proc/self/task")) == before, "a thread was started"
maps = open("/proc/self/maps").read()
assert "_C.so" in maps
assert "libcuda.so" not in maps and "libcudart" not in maps, "CUDA was loaded"
assert not torch.cuda.is_initialized()
"""
    done = run_python(code)
    assert done.returncode == 0, done.stderr


def test_cpu_ops_run_in_a_library_with_cuda_kernels():
    one = torch.ones(3, dtype=torch.int64)
    assert torch.ops.unmask.uniform(one, one, one).shape == (3,)
    assert torch._C._dispatch_has_kernel_for_dispatch_key("unmask::logit_stats", "CUDA") == bool(cuda_archs())


def fatbin_archs(path: Path) -> set[int]:
    """Architectures of the machine code in a library, from its .nv_fatbin section: containers of (header, entries)."""
    text = subprocess.run(["readelf", "-SW", str(path)], check=True, capture_output=True, text=True).stdout
    found = re.search(r"\.nv_fatbin\s+PROGBITS\s+\w+\s+(\w+)\s+(\w+)", text)
    if found is None:
        return set()
    offset, size = (int(x, 16) for x in found.groups())
    data, archs, at = path.read_bytes()[offset : offset + size], set(), 0
    while at + 16 <= size:
        magic, _, header, length = struct.unpack_from("<IHHQ", data, at)
        if magic != 0xBA55ED50:
            at += 8
            continue
        at += header
        end = at + length
        while at < end:
            kind, _, header, length = struct.unpack_from("<HHIQ", data, at)
            if kind == 2:  # machine code; 1 is PTX
                archs.add(struct.unpack_from("<I", data, at + 28)[0])
            at += header + length
    return archs


def test_the_architectures_it_names_are_inside():
    assert fatbin_archs(_library.LIBRARY_PATH) == set(cuda_archs())


def test_build_info_agrees_with_the_library():
    from unmask import _host

    info = _host.build_info()
    assert set(info) == {"version", "torch_built", "compiler", "build_type", "cuda_compiler", "cuda_archs"}
    if "UNMASK_C_LIBRARY" not in os.environ:
        assert [int(re.match(r"\d+", a)[0]) for a in info["cuda_archs"].split()] == cuda_archs()
        assert (info["cuda_compiler"] == "none") == (not cuda_archs())


def test_a_wrong_library_path_is_named():
    done = run_python("import unmask.ops", UNMASK_C_LIBRARY="/no/such/_C.so")
    assert done.returncode != 0 and "/no/such/_C.so" in done.stderr and "unset it" in done.stderr


# ---- CMake --------------------------------------------------------------------------------------------------------
def configure(build: Path, *options: str) -> str:
    """The words of a configuration that must fail."""
    env = {**os.environ, "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"}  # cmake may be in the venv only
    done = subprocess.run(["cmake", "-S", str(ROOT), "-B", str(build), *options], capture_output=True, text=True, env=env)
    assert done.returncode != 0, done.stdout
    return " ".join((done.stdout + done.stderr).split())


def test_without_torch_cmake_stops_with_the_two_commands(tmp_path):
    venv = tmp_path / "venv"
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(venv)], check=True)
    text = configure(tmp_path / "build", f"-DPython_EXECUTABLE={venv / 'bin/python'}")
    assert "torch was not found" in text
    assert "pip install 'torch>=2.10' scikit-build-core pybind11 cmake ninja" in text
    assert "pip install --no-build-isolation ." in text


@pytest.mark.parametrize(
    ("option", "words"),
    [
        ("-DUNMASK_CUDA=YES", "UNMASK_CUDA must be AUTO, ON or OFF, got YES"),
        ("-DUNMASK_CUDA_ARCHS=80;75", "must list architectures from 80 up, such as 80;89;90a;100;120, got 75"),
        ("-DUNMASK_CUDA=ON -DCMAKE_CUDA_COMPILER=NOTFOUND", "no nvcc was found; put nvcc on PATH"),
        ("-DUNMASK_ONLY_ISA=sse", "UNMASK_ONLY_ISA must be one of portable"),
    ],
)
def test_wrong_options_are_named(tmp_path, option, words):
    assert words in configure(tmp_path, f"-DPython_EXECUTABLE={sys.executable}", *option.split(" "))


# ---- registration -------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(("argument", "compiles"), [("double", True), ("float", False), ("int", False)])
def test_a_float_or_int_parameter_does_not_compile(tmp_path, argument, compiles):
    """The stable ABI would hand such a kernel garbage, silently."""
    source = tmp_path / "op.cpp"
    source.write_text(f'#include "common/register.h"\nstatic unmask::Tensor f(const unmask::Tensor& t, {argument} x) {{ (void)x; return t; }}\nUNMASK_IMPL(CPU, f, &f)\n')
    include = Path(torch.__file__).parent / "include"
    command = ["g++", "-std=c++20", "-fsyntax-only", "-DTORCH_TARGET_VERSION=((2ULL<<56)|(10ULL<<48))", f"-I{ROOT / 'csrc'}", f"-isystem{include}"]
    done = subprocess.run([*command, str(source)], capture_output=True, text=True)
    assert (done.returncode == 0) == compiles, done.stderr
    assert compiles or "cross the stable ABI" in done.stderr
