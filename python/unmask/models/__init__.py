"""Models: everything between files on disk and named tensors, and the backbone that runs them.

Importing this package imports neither torch nor the op library; the names below are loaded on first use.

Source of a model -> `hub.resolve` -> folder -> `checkpoint.inspect` (config and headers, all checks) ->
`checkpoint.load_tensors` (one tensor at a time) -> `backbone`. Text goes through `tokenizer` and `chat`.
"""

from __future__ import annotations

from importlib import import_module

_HOME = {
    "ModelConfig": "config",
    "CheckpointInfo": "checkpoint",
    "describe": "facts",
    "inspect": "checkpoint",
    "load_tensors": "checkpoint",
    "resolve": "hub",
    "search_paths": "hub",
    "Tokenizer": "tokenizer",
    "render_chat": "chat",
}
__all__ = list(_HOME)


def __getattr__(name: str):
    if name in _HOME:
        return getattr(import_module(f"{__name__}.{_HOME[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*globals(), *_HOME])
