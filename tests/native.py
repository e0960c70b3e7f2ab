"""The C++ kernels themselves: tests call `native("commit")(...)`, never a wrapper that could answer from the reference."""

from __future__ import annotations

import torch

import unmask.ops  # noqa: F401  (loads the op library)


def native(name: str, key: str = "CPU"):
    """`torch.ops.unmask.<name>`, after asserting that a compiled kernel, not Python, is registered for the dispatch key."""
    assert torch._C._dispatch_has_kernel_for_dispatch_key(f"unmask::{name}", key), f"no {key} kernel for unmask::{name}"
    lines = [line for line in torch._C._dispatch_dump(f"unmask::{name}").splitlines() if line.startswith(f"{key}:")]
    assert lines and not any(".py" in line for line in lines), f"unmask::{name} is answered from Python: {lines}"
    return getattr(torch.ops.unmask, name)
