"""The built-in tiny chat model: where its files are."""

from pathlib import Path

__all__ = ["model_path"]


def model_path() -> Path:
    """Return the folder that `from_pretrained` loads: config, weights and tokenizer."""
    return Path(__file__).resolve().parent / "model"
