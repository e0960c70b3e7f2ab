"""Every op in plain PyTorch: the definition. Slow, obvious, fp32 inside; tests compare the kernels with it."""

from .uniform import philox, uniform

__all__ = ["philox", "uniform"]
