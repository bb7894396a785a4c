"""The sample model that ships with the package: a small Llama trained by `samples/train.py`, and a text it has not seen."""

from __future__ import annotations

from pathlib import Path


def sample_path() -> Path:
    """Directory of the sample model; `heldout.txt` in it is for calibration and evaluation."""
    return Path(__file__).parent
