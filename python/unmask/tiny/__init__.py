"""The embedded model: what it was taught, how it was trained, and the files it is loaded from.

Nothing here imports the compiled parts of unmask, so data, training and evaluation also run from a bare checkout.
"""

from pathlib import Path

MODEL_DIR = Path(__file__).resolve().parent / "model"
"""Folder of the embedded checkpoint (config.json, model.safetensors, tokenizer.json, tokenizer_config.json)."""
