"""unmask: fast, exact decoding for diffusion language models.

    import unmask
    model = unmask.load("tiny")
    print(unmask.generate(model, "reverse a b c =>").text)

Importing this package loads nothing heavy; torch and the op library come with the first use of a name below.
"""

from __future__ import annotations

import importlib

__version__ = "0.1.0"

_NAMES = {
    "load": "api", "generate": "api", "stream": "api", "infill": "api", "policies": "api", "wrap": "models.foreign", "Result": "result", "Step": "result", "Commit": "result",
    "Done": "result", "Model": "models.model", "ModelConfig": "models.config", "Settings": "settings", "Policy": "decode.policy", "SoftMasks": "decode.soft",
    "UnmaskError": "errors", "CheckpointError": "errors", "ModelNotFound": "errors", "InvalidLogits": "errors", "SettingError": "errors",
}  # fmt: skip
_MODULES = ("caches", "ops", "reference", "models", "decode", "compat", "tiny", "errors", "likelihood", "analysis", "templates")

__all__ = [*_NAMES, *_MODULES, "__version__"]


def __getattr__(name: str):
    if name in _NAMES:
        return getattr(importlib.import_module(f".{_NAMES[name]}", __name__), name)
    if name in _MODULES:
        return importlib.import_module(f".{name}", __name__)
    raise AttributeError(f"module 'unmask' has no attribute {name!r}")


def __dir__():
    return sorted(__all__)
