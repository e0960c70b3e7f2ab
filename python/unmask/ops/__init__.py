"""Typed wrappers and fake kernels of the ops in `torch.ops.unmask`, one file per op.

Importing this package loads the op library. `unmask.reference` has the same functions in plain PyTorch: the definition that tests
compare with. Errors: `<op>: <tensor> must be <expected>, got <actual>` (RuntimeError from the op), for shape, dtype, device and range.
Contents that a CUDA kernel cannot report without a sync (ids, slots, lengths) set bits in an int32 status; see `Status`.
"""

from .. import _library as _library  # noqa: F401  (loads _C)
from .info import Status, cuda_archs, isa, raise_on_status
from .uniform import uniform

__all__ = ["Status", "cuda_archs", "isa", "raise_on_status", "uniform"]
