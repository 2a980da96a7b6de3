"""Mini: the embedded base model, its text, how it was trained and what it reaches.

Importing this package imports neither torch nor transformers.
"""

from __future__ import annotations

from pathlib import Path

MINI = Path(__file__).parent / "weights"
"""The directory of the shipped model: config, tokenizer, weights, card, evaluation."""

DOUBLE_QUANT = False
"""Are its scales quantised too, where nobody asks? They are plain: so it was measured, and so the
adapters that ship with it were trained."""
