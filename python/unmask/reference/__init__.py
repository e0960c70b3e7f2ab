"""Every op in plain PyTorch: the definition. Slow, obvious, fp32 inside; tests compare the kernels with it."""

from .block_attention import block_attention
from .commit import commit
from .elementwise import add_rms_norm, rms_norm, silu_mul
from .filtered_stats import filtered_stats
from .kl_stats import kl_stats
from .logit_stats import logit_stats
from .rope_append import rope_append
from .uniform import philox, uniform

__all__ = [
    "add_rms_norm",
    "block_attention",
    "commit",
    "filtered_stats",
    "kl_stats",
    "logit_stats",
    "philox",
    "rms_norm",
    "rope_append",
    "silu_mul",
    "uniform",
]
