"""Every op in plain PyTorch: the definition. Slow, obvious, fp32 inside; tests compare the kernels with it."""

from .block_attention import block_attention
from .commit import commit
from .decoder_layer import decoder_layer
from .elementwise import add_rms_norm, rms_norm, silu_mul
from .filtered_stats import filtered_stats
from .kl_stats import kl_stats
from .logit_stats import logit_stats
from .moe_route import moe_combine, moe_experts, moe_route
from .rope_append import rope_append
from .uniform import philox, uniform
from .verify import verify_greedy, verify_ratio

__all__ = [
    "add_rms_norm",
    "block_attention",
    "commit",
    "decoder_layer",
    "filtered_stats",
    "kl_stats",
    "logit_stats",
    "moe_combine",
    "moe_experts",
    "moe_route",
    "philox",
    "rms_norm",
    "rope_append",
    "silu_mul",
    "uniform",
    "verify_greedy",
    "verify_ratio",
]
