"""Runs an op on the GPU with arguments made on the CPU: same values and strides there, results and in-place writes brought back."""

from __future__ import annotations

import torch

from native import native


def to_cuda(x):
    """Tensors keep their strides (an expanded dimension too); anything else passes."""
    if not isinstance(x, torch.Tensor):
        return x
    if x.numel() == 0:
        return x.cuda()
    span = 1 + sum((n - 1) * s for n, s in zip(x.shape, x.stride(), strict=True))
    dense = torch.as_strided(x, (span,), (1,))  # the memory under x, gaps included
    return torch.as_strided(dense.cuda(), x.shape, x.stride())


def op_on_gpu(name: str, written: tuple[int, ...] = ()):
    """The op as a function of CPU tensors. written: which arguments it writes in place; the CPU tensors then get the GPU's values."""

    def call(*args):
        moved = [to_cuda(a) for a in args]
        out = native(name, "CUDA")(*moved)
        for i in written:
            if args[i] is not None:
                args[i].copy_(moved[i])
        return tuple(t.cpu() for t in out) if isinstance(out, (tuple, list)) else out.cpu()

    return call
