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
"""

from __future__ import annotations

from training.data.batches import IGNORED, Batches, TrainBatch, collate, collate_packed, pad_id
from training.data.corpus import Corpus, length_of
from training.data.dataset import Prepared, prepare, survey
from training.data.encoding import Encoding, Example, encode, examples
from training.data.packing import refuse_if_mixed
from training.data.report import Report
from training.data.source import Row, read_rows

__all__ = [
    "IGNORED",
    "Batches",
    "Corpus",
    "Encoding",
    "Example",
    "Prepared",
    "Report",
    "Row",
    "TrainBatch",
    "collate",
    "collate_packed",
    "encode",
    "examples",
    "length_of",
    "pad_id",
    "prepare",
    "read_rows",
    "refuse_if_mixed",
    "survey",
]
