"""Typed wrappers and fake kernels of the ops in `torch.ops.unmask`, one file per op.

Importing this package loads the op library. `unmask.reference` has the same functions in plain PyTorch: the definition that tests
compare with. Errors: `<op>: <tensor> must be <expected>, got <actual>` (RuntimeError from the op), for shape, dtype, device and range.
Contents that a CUDA kernel cannot report without a sync (ids, slots, lengths) set bits in an int32 status; see `Status`.
"""

from .. import _library as _library  # noqa: F401  (loads _C)
from .block_attention import block_attention
from .commit import CommitResult, Rule, commit
from .decoder_layer import decoder_layer
from .elementwise import add_rms_norm, rms_norm, silu_mul
from .filtered_stats import filtered_stats
from .info import Status, cuda_archs, isa, raise_on_status
from .kl_stats import kl_stats
from .logit_stats import LogitStats, logit_stats, new_state, stats_finish, stats_tile
from .moe_route import Routes, moe_combine, moe_experts, moe_route
from .rope_append import rope_append
from .uniform import uniform
from .verify import GreedyResult, RatioResult, verify_greedy, verify_ratio

__all__ = [
    "CommitResult",
    "GreedyResult",
    "LogitStats",
    "RatioResult",
    "Routes",
    "Rule",
    "Status",
    "add_rms_norm",
    "block_attention",
    "commit",
    "cuda_archs",
    "decoder_layer",
    "filtered_stats",
    "isa",
    "kl_stats",
    "logit_stats",
    "moe_combine",
    "moe_experts",
    "moe_route",
    "new_state",
    "raise_on_status",
    "rms_norm",
    "rope_append",
    "silu_mul",
    "stats_finish",
    "stats_tile",
    "uniform",
    "verify_greedy",
    "verify_ratio",
]
