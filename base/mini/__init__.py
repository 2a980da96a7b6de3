"""Mini: the embedded base model, its text, how it was trained and what it reaches.

Importing this package imports neither torch nor transformers.
"""

from __future__ import annotations

from pathlib import Path

MINI = Path(__file__).parent / "weights"
"""The directory of the shipped model: config, tokenizer, weights, card, evaluation."""
