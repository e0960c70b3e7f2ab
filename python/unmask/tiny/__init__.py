"""The embedded models: what they were taught, how they were trained, and the files they are loaded from.

Nothing here imports the compiled parts of unmask, so data, training and evaluation also run from a bare checkout.
"""

from pathlib import Path

MODEL_DIR = Path(__file__).resolve().parent / "model"
"""Folder of the embedded checkpoint (config.json, model.safetensors, tokenizer.json, tokenizer_config.json)."""

BLOCK_MODEL_DIR = MODEL_DIR.with_name("model_block")
"""Folder of its block-causal sibling, the same files; the tokenizer's are equal."""

FOLDERS = {"tiny": MODEL_DIR, "tiny-block": BLOCK_MODEL_DIR}
"""Names that training and evaluation take, as `unmask.load` does."""
