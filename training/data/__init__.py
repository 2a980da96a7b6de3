"""Data: rows of a file in, examples with a loss mask, padded or packed batches out.

source, arrow    the rows of a file, one at a time
text             raw text, cut into passages
shape            what a row asks and what the model is to say
encoding         a row as examples: token ids and which of them bear loss
corpus           examples, their tokens on disk once they are many
dataset          a run's files: bad rows counted, duplicates, held-out part
report           what was found in a file
batches          padded batches of similar length, with a cursor
packing          short examples in one row, kept apart by their positions

The last two compute with torch, which takes seconds to import, and are not offered here.
"""

from __future__ import annotations

from training.data.corpus import Corpus, length_of
from training.data.dataset import Prepared, prepare, refuse_unlearnable, survey
from training.data.encoding import Encoding, Example, encode, examples
from training.data.report import Report
from training.data.source import Row, read_rows

__all__ = [
    "Corpus",
    "Encoding",
    "Example",
    "Prepared",
    "Report",
    "Row",
    "encode",
    "examples",
    "length_of",
    "prepare",
    "read_rows",
    "refuse_unlearnable",
    "survey",
]
