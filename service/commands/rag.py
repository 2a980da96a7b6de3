"""`nibble rag`: collections of documents on a running server, and questions to them."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from service.commands.output import fail, print_json, print_table
from service.commands.server import Json, Url, connect

app = typer.Typer(
    help="Collections of documents on a running server, and questions to them.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)

SUFFIXES = (".txt", ".md", ".markdown", ".html", ".htm", ".pdf", ".docx", ".csv", ".jsonl")
BATCH_FILES = 64
BATCH_BYTES = 16 << 20
SHOWN = 160  # characters of a passage in a table

Name = Annotated[str, typer.Argument(help="The collection.")]
Mode = Annotated[str, typer.Option(help="dense (meaning), lexical (words) or hybrid (both).")]
Filter = Annotated[
    str | None,
    typer.Option("--filter", help='On fields and documents, as JSON: {"year": {"gte": 2020}}.'),
]


@app.command()
def create(
    name: Name,
    field: Annotated[
        list[str] | None,
        typer.Option(help="Metadata that filters may ask for, `year=integer`; may repeat."),
    ] = None,
    description: Annotated[str, typer.Option(help="What is in it.")] = "",
    language: Annotated[str, typer.Option(help="Of stemming and stop words.")] = "English",
    chunk_tokens: Annotated[
        int | None, typer.Option(help="Longest passage, in the base's tokens.")
    ] = None,
    chunk_overlap: Annotated[int, typer.Option(help="Tokens that neighbours share.")] = 0,
    url: Url = None,
    as_json: Json = False,
) -> None:
    """Create an empty collection."""
    body: dict[str, Any] = {
        "name": name,
        "description": description,
        "language": language,
        "chunk_overlap": chunk_overlap,
        "fields": dict(_pair(one, "--field", as_json) for one in field or ()),
    }
    if chunk_tokens is not None:
        body["chunk_tokens"] = chunk_tokens
    with connect(url, as_json) as client:
        made = client.create_collection(body)
    if as_json:
        print_json(made)
    else:
        typer.echo(f"created {name}: passages of {made['chunk_tokens']} tokens, {made['embedder']}")


@app.command(name="list")
def list_collections(url: Url = None, as_json: Json = False) -> None:
    """List collections."""
    with connect(url, as_json) as client:
        found = client.collections()
    if as_json:
        print_json(found)
        return
    columns = ("collection", "documents", "passages", "embedder", "description")
    print_table(
        columns,
        (
            (c["name"], c["documents"], c["chunks"], c["embedder"], c["description"])
            for c in found["collections"]
        ),
    )


@app.command()
def add(
    name: Name,
    paths: Annotated[list[Path], typer.Argument(help="Files, or directories of files.")],
    metadata: Annotated[
        list[str] | None,
        typer.Option(help="`year=2020`, for each of the files; JSON or text; may repeat."),
    ] = None,
    url: Url = None,
    as_json: Json = False,
) -> None:
    """Add files, or replace those of the same names: txt, md, html, pdf, docx, csv, jsonl."""
    files = _files(paths, as_json)
    shared = {
        key: _value(value)
        for key, value in (_pair(m, "--metadata", as_json) for m in metadata or ())
    }
    total: dict[str, Any] = {"added": [], "unchanged": [], "refused": [], "chunks": 0}
    with connect(url, as_json) as client, _progress(as_json) as progress:
        files_task = progress.add_task("files", total=len(files))
        chunks_task = progress.add_task("passages", total=None)
        for batch in _batches(files):
            for event in client.add_files(name, batch, shared):
                _show(event, progress, chunks_task)
                _count(event, total)
            progress.advance(files_task, len(batch))
    if as_json:
        print_json(total)
    else:
        typer.echo(
            f"{len(total['added'])} added ({total['chunks']} passages), "
            f"{len(total['unchanged'])} unchanged, {len(total['refused'])} refused"
        )
        for one in total["refused"]:
            typer.echo(f"  {one['document']}: {one['error']}", err=True)
    if total["refused"]:
        raise typer.Exit(1)


@app.command()
def search(
    name: Name,
    query: Annotated[str, typer.Argument(help="What to look for.")],
    k: Annotated[int, typer.Option("-k", help="How many passages.")] = 4,
    mode: Mode = "hybrid",
    where: Filter = None,
    url: Url = None,
    as_json: Json = False,
) -> None:
    """Find the passages that answer a question best."""
    body: dict[str, Any] = {"query": query, "k": k, "mode": mode}
    if where is not None:
        body["filter"] = _json(where, as_json)
    with connect(url, as_json) as client:
        found = client.search(name, body)
    if as_json:
        print_json(found)
        return
    rows = ((f"{p['score']:.3f}", _place(p), _short(p["text"])) for p in found["passages"])
    print_table(("score", "place", "passage"), rows)


@app.command()
def ask(
    name: Name,
    question: Annotated[str, typer.Argument(help="The question.")],
    k: Annotated[int, typer.Option("-k", help="How many passages.")] = 4,
    mode: Mode = "hybrid",
    where: Filter = None,
    adapter: Annotated[str | None, typer.Option(help="An adapter to answer with.")] = None,
    max_new_tokens: Annotated[int | None, typer.Option(min=1, help="Longest answer.")] = None,
    url: Url = None,
    as_json: Json = False,
) -> None:
    """Answer a question from a collection, and say from which passages."""
    retrieval: dict[str, Any] = {"collection": name, "k": k, "mode": mode}
    if where is not None:
        retrieval["filter"] = _json(where, as_json)
    given = {"adapter_id": adapter, "max_new_tokens": max_new_tokens, "details": True}
    parameters = {key: value for key, value in given.items() if value is not None}
    messages = [{"role": "user", "content": question}]
    with connect(url, as_json) as client:
        reply = client.generate(messages, parameters, retrieval)
    if as_json:
        print_json(reply)
        return
    typer.echo(reply["generated_text"])
    told = reply["details"]["retrieval"]
    for one in told["citations"]:
        typer.echo(f"  [{one['number']}] {_place(one)}  {one['score']:.3f}")
    if told["dropped"]:
        typer.echo(f"  {len(told['dropped'])} more had no room in the prompt")


@app.command()
def remove(
    name: Name,
    document: Annotated[str | None, typer.Argument(help="One document; else all of it.")] = None,
    yes: Annotated[bool, typer.Option("--yes", help="Do not ask.")] = False,
    url: Url = None,
    as_json: Json = False,
) -> None:
    """Remove a document, or a whole collection, from the disk."""
    if document is None and not yes:
        typer.confirm(f"Remove the collection {name} with all its documents?", abort=True)
    with connect(url, as_json) as client:
        found = client.remove_documents(name, document)
    if as_json:
        print_json(found)
    else:
        typer.echo(f"removed {name}" + (f": {document}" if document else ""))


@app.command()
def evaluate(
    questions: Annotated[int, typer.Option(min=10, max=200, help="About invented people.")] = 200,
    topics: Annotated[
        int, typer.Option(min=0, max=200, help="Known-item questions to Python's documentation.")
    ] = 200,
    adapter: Annotated[str | None, typer.Option(help="Each way also with this adapter.")] = None,
    url: Url = None,
    as_json: Json = False,
) -> None:
    """Measure answers without passages, with the right one, and with those that are found."""
    from service.bench.rag_evaluation import evaluate as measure
    from service.bench.rag_evaluation import tables

    with connect(url, as_json) as client, _progress(as_json) as progress:
        found = measure(client, progress, questions, topics, adapter)
    if as_json:
        print_json(found)
    else:
        for columns, rows in tables(found):
            print_table(columns, rows)
            typer.echo()


@app.command()
def lessons(
    path: Annotated[Path, typer.Argument(help="Where to write the rows (.jsonl).")],
    count: Annotated[int, typer.Option(min=1, max=100_000, help="Rows.")] = 3000,
    as_json: Json = False,
) -> None:
    """Write rows to train an adapter that reads passages; `evaluate --adapter` measures it."""
    from service.bench.rag_evaluation import lessons as rows

    with path.open("w", encoding="utf-8") as file:
        for row in rows(count):
            file.write(json.dumps(row, ensure_ascii=False) + "\n")
    if as_json:
        print_json({"path": str(path), "rows": count})
    else:
        typer.echo(f"{count} rows in {path}")


@app.command()
def bench(
    sizes: Annotated[str, typer.Option(help="Numbers of chunks.")] = "1000,10000",
    ingest: Annotated[
        int, typer.Option(min=0, max=100_000, help="Chunks to cut, embed and write for real.")
    ] = 10_000,
    queries: Annotated[int, typer.Option(min=10, max=10_000, help="Questions for each.")] = 200,
    pairs: Annotated[
        int,
        typer.Option(
            min=0, max=40, help="On a running server: pairs of questions on the same passages."
        ),
    ] = 0,
    keep: Annotated[
        Path | None,
        typer.Option(help="A directory for the collections: a run that was stopped goes on there."),
    ] = None,
    url: Url = None,
    as_json: Json = False,
) -> None:
    """Measure ingest and queries on this machine, without a server; with --pairs also what the
    second question on the same passages costs, on a running one."""
    from service.bench.rag_bench import rows, run
    from service.bench.rag_pairs import measure, pair_rows

    try:
        wanted = [int(size) for size in sizes.split(",") if size.strip()]
    except ValueError:
        fail(f"--sizes {sizes!r}: should be numbers, 1000,10000", status=2, as_json=as_json)
    with _progress(as_json) as progress:
        asked: dict[str, Any] = {}
        if pairs:  # first, so that a server which is not there is told at once
            with connect(url, as_json) as client:
                asked["pairs"] = measure(client, pairs, progress)
        found = run(wanted, ingest, queries, progress, keep) | asked
    if as_json:
        print_json(found)
        return
    print_table(*rows(found))
    if pairs:
        print_table(*pair_rows(found["pairs"]))


# Parts --------------------------------------------------------------------------------------------


def _files(paths: list[Path], as_json: bool) -> list[tuple[str, Path]]:
    """Files by the names that their documents get: relative to the directory that was named."""
    found: list[tuple[str, Path]] = []
    for path in paths:
        if path.is_dir():
            inside = sorted(p for p in path.rglob("*") if p.suffix.lower() in SUFFIXES)
            found += [(str(p.relative_to(path)), p) for p in inside if p.is_file()]
        elif path.is_file():
            found.append((path.name, path))
        else:
            fail(f"{path} does not exist", status=2, as_json=as_json)
    if not found:
        fail(f"no files there that end with {', '.join(SUFFIXES)}", status=2, as_json=as_json)
    return found


def _batches(files: list[tuple[str, Path]]) -> Iterator[list[tuple[str, Path]]]:
    batch: list[tuple[str, Path]] = []
    size = 0
    for name, path in files:
        here = path.stat().st_size
        if batch and (len(batch) == BATCH_FILES or size + here > BATCH_BYTES):
            yield batch
            batch, size = [], 0
        batch.append((name, path))
        size += here
    yield batch


def _progress(as_json: bool) -> Progress:
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        console=Console(stderr=True),
        disable=as_json,
    )


def _show(event: dict[str, Any], progress: Progress, task: Any) -> None:
    if event.get("event") == "embedding":
        progress.update(task, completed=event["chunks"], total=event["of"])


def _count(event: dict[str, Any], total: dict[str, Any]) -> None:
    if event.get("event") == "done":
        for name in ("added", "unchanged", "refused"):
            total[name] += event["result"][name]
        total["chunks"] += event["result"]["chunks"]


def _pair(given: str, option: str, as_json: bool) -> tuple[str, str]:
    name, mark, value = given.partition("=")
    if not mark or not name:
        fail(f"{option} {given!r}: should be name=value", status=2, as_json=as_json)
    return name, value


def _value(text: str) -> Any:
    """JSON where it is that, else text: 2020 is a number, en is not."""
    try:
        return json.loads(text)
    except ValueError:
        return text


def _json(text: str, as_json: bool) -> Any:
    try:
        return json.loads(text)
    except ValueError as error:
        fail(f"--filter is not JSON: {error}", status=2, as_json=as_json)


def _place(passage: dict[str, Any]) -> str:
    heading = f" · {passage['heading']}" if passage["heading"] else ""
    return f"{passage['document']}{heading} · {passage['start']}-{passage['stop']}"


def _short(text: str) -> str:
    line = " ".join(text.split())
    return line if len(line) <= SHOWN else line[: SHOWN - 1] + "…"
