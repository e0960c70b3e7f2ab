"""The op library's binary interface: stable ABI symbols only, loadable with and without CUDA. docs/abi.md explains why."""

from __future__ import annotations

import re
import subprocess

import pytest
import torch

from unmask import _library
from unmask.ops import cuda_archs

STREAM = "aoti_torch_get_current_cuda_stream"
PACKED = "aoti_torch_cpu__linear_pointwise"  # a torch without oneDNN lacks it


@pytest.fixture(scope="module")
def undefined() -> dict[str, str]:
    """Undefined dynamic symbols, demangled, and their kind: U or w (weak)."""
    text = subprocess.run(["nm", "-D", "-C", "--undefined-only", str(_library.LIBRARY_PATH)], check=True, capture_output=True, text=True)
    found = {}
    for line in text.stdout.splitlines():
        kind, name = line.split(maxsplit=1)
        found[name] = kind
    return found


@pytest.fixture(scope="module")
def dynamic() -> str:
    return subprocess.run(["readelf", "-dW", str(_library.LIBRARY_PATH)], check=True, capture_output=True, text=True).stdout


def test_no_cpp_symbols_of_torch(undefined):
    bad = [name for name in undefined if re.search(r"\b(at|c10|torch|caffe2)::", name)]
    assert not bad


def test_only_c_shims_of_torch_and_no_python_or_cuda(undefined):
    """What is not a shim comes from libc, libm, libgcc or libstdc++, which carry a version in the dynamic symbol table."""
    system = re.compile(r"@(GLIBC|GCC|CXXABI|GLIBCXX)|^(__gmon_start__|_ITM_\w+|__cxa_\w+|__tls_get_addr|__(a|ub|t|l)san_\w+)")
    rest = [name for name in undefined if not system.search(name)]
    assert not [name for name in rest if not re.match(r"(aoti_torch|torch)_\w+$", name)]
    assert not [name for name in undefined if re.match(r"_?Py|cu[A-Z]|cuda[A-Z]|__cuda", name)]


def test_symbols_that_a_torch_may_lack_are_weak(undefined):
    assert undefined.get(STREAM, "absent") == ("w" if cuda_archs() else "absent")
    assert undefined[PACKED] == "w"
    weak = {name for name, kind in undefined.items() if kind.lower() in "wv" and name.startswith(("aoti_", "torch_"))}
    assert weak <= {STREAM, PACKED}


def test_dependencies(dynamic):
    needed = re.findall(r"\(NEEDED\).*\[(.*)\]", dynamic)
    assert "libtorch.so" in needed
    assert not [name for name in needed if name.startswith(("libcuda", "libcudart", "libpython", "libtorch_python", "libc10"))]
    assert "RPATH" not in dynamic and "RUNPATH" not in dynamic


def test_abi_target_is_torch_2_10():
    assert torch.ops.unmask.info(0) == (2 << 56) | (10 << 48)
