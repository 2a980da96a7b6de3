"""Collections in a bucket: LanceDB's own S3 against moto's server, and a second server on it."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

from service.app import create_app
from service.config import Settings
from service.retrieval.errors import CollectionUnavailable
from service.retrieval.library import Library
from service.retrieval.passage import Document
from tests import s3
from tests.service.api.conftest import Running, until
from tests.service.retrieval.conftest import WordEmbedder, add, make_chunker

boto3 = pytest.importorskip("boto3", reason="make clients")
pytest.importorskip("lancedb", reason="needs the extra rag")
pytestmark = pytest.mark.slow

BUCKET = "documents"
FACTS = {f"d{n}": f"Number {n} lives in the town of Kesh{n}." for n in range(40)}


@pytest.fixture(scope="module")
def endpoint() -> Iterator[str]:
    with s3.running(BUCKET) as url:
        yield url


@pytest.fixture
def running(endpoint: str, tmp_path: Path) -> Iterator[list[Running]]:
    found: list[Running] = []
    yield found
    for one in found:
        one.stop()


def started(running: list[Running], home: Path) -> httpx.Client:
    settings = Settings(
        home=home, adapters=None, port=0, kv_cache_bytes=16 << 20, precision="exact",
        collections=f"s3://{BUCKET}/prefix",
    )  # fmt: skip
    one = Running(create_app(settings))
    running.append(one)
    until(lambda: one.desk.admission.state in ("ready", "failed"))
    assert one.desk.failure is None
    return httpx.Client(base_url=one.url, timeout=120)


def keys(endpoint: str, prefix: str = "") -> dict[str, bytes]:
    client = boto3.client("s3", endpoint_url=endpoint, region_name=s3.REGION)
    found = client.list_objects_v2(Bucket=BUCKET, Prefix=prefix).get("Contents", [])
    return {
        one["Key"]: client.get_object(Bucket=BUCKET, Key=one["Key"])["Body"].read() for one in found
    }


def test_from_an_empty_bucket_to_a_second_server(
    endpoint: str, running: list[Running], tmp_path: Path
) -> None:
    client = started(running, tmp_path / "one")
    body = {"name": "towns", "fields": {"year": "integer"}}
    assert client.post("/collections", json=body).status_code == 201
    documents = [
        {"id": name, "text": text, "metadata": {"year": 2000 + place}}
        for place, (name, text) in enumerate(FACTS.items())
    ]
    path = "/collections/towns"
    reply = client.post(f"{path}/documents", json={"documents": documents})
    assert reply.json()["added"] == list(FACTS), reply.text
    kept = keys(endpoint, "prefix/default/towns.lance/")
    assert kept, "everything is in the bucket"
    assert not list((tmp_path / "one").rglob("*.lance"))
    for mode in ("dense", "lexical", "hybrid"):
        asked = {"query": "Who lives in Kesh17?", "k": 3, "mode": mode}
        found = client.post(f"{path}/search", json=asked).json()["passages"]
        assert "d17" in [one["document"] for one in found], mode
    assert client.delete(f"{path}/documents/d17").status_code == 200
    running.pop().stop()

    client = started(running, tmp_path / "two")
    (shown,) = client.get("/collections").json()["collections"]
    assert (shown["name"], shown["documents"]) == ("towns", len(FACTS) - 1)
    asked = {"query": "Who lives in Kesh17?", "k": 40, "mode": "hybrid"}
    found = client.post(f"{path}/search", json=asked).json()["passages"]
    assert len(found) == len(FACTS) - 1
    assert "d17" not in [one["document"] for one in found]
    where = {"query": "Kesh", "mode": "dense", "filter": {"year": {"lt": 2002}}}
    found = client.post(f"{path}/search", json=where).json()["passages"]
    assert {one["document"] for one in found} == {"d0", "d1"}
    reply = client.post(f"{path}/documents", json={"documents": documents})
    assert (reply.json()["added"], len(reply.json()["unchanged"])) == (["d17"], len(FACTS) - 1)
    assert client.delete(path).status_code == 200
    assert client.get("/collections").json() == {"collections": [], "has_more": False}
    assert not keys(endpoint, "prefix/default/towns.lance/"), "no object is left"


def test_a_removed_word_is_in_no_object(endpoint: str, tmp_path: Path) -> None:
    library = Library(f"s3://{BUCKET}/words", WordEmbedder(), make_chunker())
    collection = library.shelf("default").create("docs")
    add(library, "docs", Document("a", "the word zyzzyva"), Document("b", "another one"))
    add(library, "docs", Document("b", "the word quokka"))
    assert any(b"zyzzyva" in one for one in keys(endpoint, "words/").values())
    collection.remove(["a"])
    for key, content in keys(endpoint, "words/").items():
        assert b"zyzzyva" not in content, key
    assert [one.passage.document for one in collection.lexical("quokka", 3, None)] == ["b"]


def test_a_bucket_that_is_not_there_says_so(endpoint: str) -> None:
    library = Library("s3://nowhere-at-all/x", WordEmbedder(), make_chunker())
    with pytest.raises(CollectionUnavailable, match="specified bucket does not exist"):
        library.shelf("default").create("docs")
