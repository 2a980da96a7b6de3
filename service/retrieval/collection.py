"""One collection: a LanceDB table whose rows are chunks, with their vectors and a text index.

Every change is one commit of the table, so a document is there as a whole or not at all, and a
replaced one is never half old. What a commit removed is still in older versions of the table;
`settle` drops those, compacts the files and builds the text index anew, so that the bytes are gone
when a delete is acknowledged. It also clears what a killed process left behind.
"""

from __future__ import annotations

import math
import re
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any, ParamSpec, TypeVar

from service.errors import ServiceError
from service.retrieval.errors import CollectionUnavailable, DocumentNotFound, installed
from service.retrieval.fields import PREFIX, FieldType, Group, expression
from service.retrieval.latch import Latch
from service.retrieval.passage import Chunk, Document, Passage, Value, key_of

if TYPE_CHECKING:  # a server that retrieves nothing starts without it
    import pyarrow as pa

    from service.retrieval.embedding import Vectors
    from service.retrieval.room import Room

P = ParamSpec("P")
T = TypeVar("T")

_SAID = re.compile(r"<Message>(.*?)</Message>")
METADATA = b"nibble"  # of the table's schema: what the collection remembers
OWN = ("key", "document", "number", "sought", "skip", "start", "stop", "heading", "tokens")
AGE = timedelta(milliseconds=1)  # of old versions; zero would drop the same, with a warning
AT_ONCE = 500  # keys in one expression
ROW_BYTES = 256  # of a chunk beside its text and vector: ids and hashes
# From so many chunks on dense search has an index; below it compares all vectors, which is exact.
VECTORS_FROM = 50_000
PROBES = 128  # of the index's partitions, of which there are as many as the root of the chunks


@dataclass(frozen=True, slots=True)
class Character:
    """What a collection is, and stays: kept in the table's schema."""

    embedder: str  # the model's identity
    dimensions: int
    chunk_tokens: int
    chunk_overlap: int
    created: str
    description: str = ""
    language: str = "English"  # of stemming and stop words
    fields: dict[str, FieldType] = field(default_factory=dict)

    @property
    def told(self) -> dict[str, Any]:
        return asdict(self)


@dataclass(frozen=True, slots=True)
class Prepared:
    """A document, cut and embedded, ready to be written."""

    document: Document
    chunks: Sequence[Chunk]
    vectors: Vectors  # [chunks, dimensions]


@dataclass(frozen=True, slots=True)
class Stored:
    """A document as the collection has it."""

    id: str
    digest: str
    chunks: int
    characters: int
    metadata: Mapping[str, Value]


def schema(character: Character, told: bytes) -> pa.Schema:
    """The table's columns; `told` is what the schema remembers."""
    import pyarrow as pa

    arrow: Mapping[FieldType, pa.DataType] = {
        "string": pa.string(),
        "integer": pa.int64(),
        "number": pa.float64(),
        "boolean": pa.bool_(),
        "date": pa.date32(),
    }
    columns = [
        pa.field("key", pa.string()),
        pa.field("document", pa.string()),
        pa.field("number", pa.int32()),
        pa.field("of", pa.int32()),  # chunks of the document
        pa.field("digest", pa.string()),  # of the document
        pa.field("sought", pa.string()),  # headings above the text, then the text
        pa.field("skip", pa.int32()),  # where the text begins in it
        pa.field("hash", pa.string()),  # of `sought`: equal ones are embedded once
        pa.field("start", pa.int32()),
        pa.field("stop", pa.int32()),
        pa.field("heading", pa.string()),
        pa.field("tokens", pa.int32()),
        pa.field("vector", pa.list_(pa.float32(), character.dimensions)),
    ]
    columns += [pa.field(PREFIX + name, arrow[kind]) for name, kind in character.fields.items()]
    return pa.schema(columns, metadata={METADATA: told})


class Collection:
    """One table, shared by all threads of this process. One of them writes at a time."""

    def __init__(
        self, table: Any, character: Character, *, local: bool, room: Room | None = None
    ) -> None:
        """`local`: the files are on this disk, and this process alone writes them. `room`: where
        its tenant's bytes are counted."""
        self._table = table
        self.character = character
        self._local = local
        self._room = room
        self._write = threading.Lock()
        self._latch = Latch()
        self._removed = False  # something that older versions and the text index still hold
        self._columns = [*OWN, *(PREFIX + name for name in character.fields)]

    # Reading ----------------------------------------------------------------------------------

    def count(self) -> tuple[int, int]:
        """Documents and chunks."""
        return (
            int(self._read(self._table.count_rows, "number = 0")),
            int(self._read(self._table.count_rows)),
        )

    def nbytes(self) -> int:
        """What its documents, vectors and indexes take where it is kept."""
        return int(self._read(self._table.stats)["total_bytes"])

    def dense(self, vector: Vectors, limit: int, where: Group | None) -> list[Found]:
        """The nearest chunks by cosine, best first; `vector` is [dimensions]."""

        def ask() -> pa.Table:
            query = self._table.search(vector, vector_column_name="vector").distance_type("cosine")
            # What a filter leaves may lie in partitions that are not probed: then all are compared.
            query = query.nprobes(PROBES) if where is None else query.bypass_vector_index()
            return self._narrowed(query, where, ["_distance", "vector"]).limit(limit).to_arrow()

        return self._found(self._read(ask), lambda row: 1.0 - row["_distance"])

    def lexical(self, question: str, limit: int, where: Group | None) -> list[Found]:
        """The best chunks by BM25; the question's words, any of them."""
        match = installed("lancedb.query").MatchQuery(question, "sought")

        def ask() -> pa.Table:
            query = self._table.search(match, query_type="fts")
            return self._narrowed(query, where, ["_score", "vector"]).limit(limit).to_arrow()

        return self._found(self._read(ask), lambda row: row["_score"])

    def stored(self, ids: Sequence[str] | None = None) -> dict[str, Stored]:
        """Documents by id: those named, or all, in the order of their ids."""
        expr = installed("lancedb.expr")
        first = expr.col("number") == expr.lit(0)
        wanted = ["document", "digest", "of", *(PREFIX + name for name in self.character.fields)]
        rows: list[dict[str, Any]] = []
        for some in self._keys(ids) if ids is not None else [first]:
            where = some & first if ids is not None else some
            rows += self._rows(where, wanted)
        stops = self._stops(ids)
        return {
            row["document"]: Stored(
                row["document"],
                row["digest"],
                row["of"],
                stops[row["document"]],
                _metadata(row),
            )
            for row in sorted(rows, key=lambda row: str(row["document"]))
        }

    def passages(self, document: str) -> list[Passage]:
        """All chunks of one document, in order. Raises DocumentNotFound."""
        (where,) = self._keys([document])
        rows = sorted(self._rows(where, self._columns), key=lambda row: int(row["number"]))
        if not rows:
            raise DocumentNotFound(f"document {document[:80]!r} does not exist here")
        return [_passage(row, 0.0) for row in rows]

    def known(self, hashes: Iterable[str]) -> dict[str, Vectors]:
        """The vectors of texts that are here already, by the texts' hashes."""
        import numpy as np

        expr = installed("lancedb.expr")
        found: dict[str, Vectors] = {}
        wanted = sorted(set(hashes))
        for start in range(0, len(wanted), AT_ONCE):
            some = [expr.lit(one) for one in wanted[start : start + AT_ONCE]]
            rows = self._rows(expr.col("hash").isin(some), ["hash", "vector"])
            found |= {row["hash"]: np.array(row["vector"], dtype=np.float32) for row in rows}
        return found

    # Writing ----------------------------------------------------------------------------------

    @contextmanager
    def reserved(self, chunks: Iterable[Chunk]) -> Iterator[None]:
        """Have room for these, to put them inside. Raises QuotaReached."""
        if self._room is None:
            yield
            return
        vector = 4 * self.character.dimensions
        nbytes = sum(len(chunk.sought.encode()) + vector + ROW_BYTES for chunk in chunks)
        with self._room.reserved(nbytes, self.nbytes):
            yield

    def measure(self) -> None:
        """Bring what is counted of it up to date."""
        if self._room is not None:
            self._room.settle(self.nbytes)

    def put(self, prepared: Sequence[Prepared]) -> None:
        """Add documents, or replace those of the same ids: one commit, durable when it returns."""
        import pyarrow as pa

        keys = [one.document.key for one in prepared]
        assert len(set(keys)) == len(keys), "one document twice in one commit"
        rows = pa.concat_tables([self._arrow(one) for one in prepared])
        expr = installed("lancedb.expr")
        mine = expr.col("key").isin([expr.lit(key) for key in keys])
        with self._write, _faults():
            if not self._rows(mine, ["number"]):
                self._table.add(rows)  # a merge would read the whole table, vectors too
                return
            merge = self._table.merge_insert(["key", "number"])
            merge = merge.when_matched_update_all().when_not_matched_insert_all()
            done = merge.when_not_matched_by_source_delete(mine).execute(rows)
            self._removed |= bool(done.num_updated_rows or done.num_deleted_rows)

    def remove(self, ids: Sequence[str]) -> int:
        """Remove documents, and their bytes from the disk; how many there were."""
        present = len(self.stored(ids))
        if present:
            with self._write, _faults():
                for where in self._keys(ids):
                    self._table.delete(where)
                self._removed = True
            self.settle()
        return present

    def settle(self, *, sweep: bool = False) -> None:
        """Index what is new and let go of what was removed; `sweep`: whatever has happened."""
        with self._write, self._latch.alone(), _faults():
            if self._removed or (sweep and self._holes()):
                # A removed row stays in its file, behind a mask, until a tenth of the file is gone.
                self._table.update(values_sql={"skip": "skip"})  # every row to a new file
                self._removed = True
            if self._removed or not self._indexed():
                self._index()  # built anew, it has no words of removed texts
                self._index_vectors(anew=True)  # nor their vectors
                self._removed = False
                sweep = True
            self._index_vectors(anew=False)
            self._tidy()
            if sweep:  # once more: the files that compaction replaced belong to an old version now
                self._tidy()
        self.measure()

    def _holes(self) -> bool:
        """Whether a killed process has left removed rows in files on this disk."""
        return self._local and any(Path(self._table.uri, "_deletions").glob("*"))

    def _tidy(self) -> None:
        """Compact, bring new rows into the text index, and drop every version but the last."""
        time.sleep(2 * AGE.total_seconds())
        # Files that no version names are dropped where nobody else can be writing them.
        self._table.optimize(cleanup_older_than=AGE, delete_unverified=self._local)

    def _indexed(self) -> bool:
        return any("sought" in one.columns for one in self._table.list_indices())

    def _index(self) -> None:
        fts = installed("lancedb.index").FTS(language=self.character.language)
        self._table.create_index("sought", config=fts, replace=True)

    def _index_vectors(self, *, anew: bool) -> None:
        """Where there are many. Later rows are compared one by one until they join the index."""
        names = [one.name for one in self._table.list_indices() if "vector" in one.columns]
        rows = int(self._table.count_rows())
        if rows < VECTORS_FROM:
            for name in names if anew else ():
                self._table.drop_index(name)
        elif anew or not names:
            ivf = installed("lancedb.index").IvfFlat(
                distance_type="cosine", num_partitions=math.isqrt(rows), max_iterations=20
            )
            self._table.create_index("vector", config=ivf, replace=True)

    # Rows ---------------------------------------------------------------------------------------

    def _arrow(self, one: Prepared) -> pa.Table:
        import numpy as np
        import pyarrow as pa

        document, chunks = one.document, one.chunks
        size = len(chunks)
        sought = [chunk.sought for chunk in chunks]
        columns: dict[str, Any] = {
            "key": [document.key] * size,
            "document": [document.id] * size,
            "number": range(size),
            "of": [size] * size,
            "digest": [document.digest] * size,
            "sought": sought,
            "skip": [len(s) - len(c.text) for s, c in zip(sought, chunks, strict=True)],
            "hash": [key_of(text) for text in sought],
            "start": [chunk.start for chunk in chunks],
            "stop": [chunk.stop for chunk in chunks],
            "heading": [chunk.heading for chunk in chunks],
            "tokens": [chunk.tokens for chunk in chunks],
        }
        flat = pa.array(np.ascontiguousarray(one.vectors, dtype=np.float32).ravel())
        columns["vector"] = pa.FixedSizeListArray.from_arrays(flat, self.character.dimensions)
        for name in self.character.fields:
            columns[PREFIX + name] = [document.metadata.get(name)] * size
        return pa.table(columns, schema=schema(self.character, b""))

    def _found(self, table: pa.Table, score: Callable[[dict[str, Any]], float]) -> list[Found]:
        import numpy as np

        rows = table.to_pylist()
        found = [
            Found(_passage(row, float(score(row))), np.array(row["vector"], dtype=np.float32))
            for row in rows
        ]
        # Ties by place: the same question finds the same passages in the same order.
        return sorted(found, key=lambda one: (-one.passage.score, one.passage.place))

    def _narrowed(self, query: Any, where: Group | None, more: list[str]) -> Any:
        if where is not None:
            query = query.where(expression(where))
        return query.select([*self._columns, *more])

    def _rows(self, where: Any, columns: list[str]) -> list[dict[str, Any]]:
        def ask() -> pa.Table:
            return self._table.search().where(where).select(columns).limit(None).to_arrow()

        return list(self._read(ask).to_pylist())

    def _stops(self, ids: Sequence[str] | None) -> dict[str, int]:
        """Where the last chunk of each document ends."""
        expr = installed("lancedb.expr")
        last = (expr.col("of") - expr.lit(1)) == expr.col("number")
        rows: list[dict[str, Any]] = []
        for some in self._keys(ids) if ids is not None else [last]:
            where = some & last if ids is not None else some
            rows += self._rows(where, ["document", "stop"])
        return {row["document"]: row["stop"] for row in rows}

    def _keys(self, ids: Sequence[str]) -> list[Any]:
        expr = installed("lancedb.expr")
        keys = [expr.lit(key_of(one)) for one in ids]
        return [expr.col("key").isin(keys[i : i + AT_ONCE]) for i in range(0, len(keys), AT_ONCE)]

    def _read(self, work: Callable[P, T], *arguments: P.args, **named: P.kwargs) -> T:
        with self._latch.shared(), _faults():
            return work(*arguments, **named)


@dataclass(frozen=True, slots=True)
class Found:
    """A passage and the vector that stands for it."""

    passage: Passage
    vector: Vectors  # [dimensions]


class _faults:
    """What the store raises when the disk or the bucket fails, as our error."""

    kinds: tuple[type[Exception], ...] = (OSError, RuntimeError)

    def __enter__(self) -> None: ...

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        if isinstance(error, self.kinds) and not isinstance(error, ServiceError):
            said = _SAID.search(str(error))  # by a bucket, in XML
            reason = said[1] if said else str(error).partition("\n")[0]
            raise CollectionUnavailable(f"the collection's files: {reason[:300]}") from error


class opening(_faults):
    """The same where the store itself is asked: of a bucket it raises ValueError too."""

    kinds = (OSError, RuntimeError, ValueError)


def _metadata(row: Mapping[str, Any]) -> dict[str, Value]:
    given = {k.removeprefix(PREFIX): v for k, v in row.items() if k.startswith(PREFIX)}
    return {name: value for name, value in given.items() if value is not None}


def _passage(row: Mapping[str, Any], score: float) -> Passage:
    return Passage(
        document=row["document"],
        number=row["number"],
        heading=row["heading"],
        text=row["sought"][row["skip"] :],
        start=row["start"],
        stop=row["stop"],
        tokens=row["tokens"],
        score=score,
        metadata=_metadata(row),
    )
