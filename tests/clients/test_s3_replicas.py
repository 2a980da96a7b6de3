"""Two servers over one PostgreSQL and one bucket of moto's server."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

from tests import s3
from tests.service import replicas
from tests.service.replicas import CIPHER, SEEN, TICKETS, ask, until, upload

boto3 = pytest.importorskip("boto3", reason="make clients")
pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]
BUCKET = "adapters"


@pytest.fixture
def bucket() -> Iterator[str]:
    with s3.running(BUCKET) as url:
        yield url


@pytest.fixture
def pair(bucket: str, postgresql_database: str, tmp_path: Path) -> Iterator[list[httpx.Client]]:
    with replicas.running(tmp_path, postgresql_database, f"s3://{BUCKET}/prefix") as found:
        yield found


def _objects(url: str) -> dict[str, int]:
    client = boto3.client("s3", endpoint_url=url, region_name=s3.REGION)
    found = client.list_objects_v2(Bucket=BUCKET).get("Contents", [])
    return {one["Key"].rpartition("/")[2]: one["Size"] for one in found}


def test_an_upload_to_one_serves_on_the_other(
    bucket: str, pair: list[httpx.Client], tmp_path: Path
) -> None:
    one, other = pair
    took = []
    for name, sample in (("letters", CIPHER), ("desk", TICKETS)):
        uploaded = upload(one, name, sample)
        begun = time.monotonic()
        served = ask(other, name)
        took.append(time.monotonic() - begun)
        assert served.status_code == 200, served.text
        assert served.headers["x-adapter-digest"] == uploaded["digest"]
        assert ask(one, name).json() == served.json()
    assert max(took) < SEEN, f"first tokens after {took} s"
    kept = _objects(bucket)
    assert len(kept) == 2
    copies = {path.name for path in (tmp_path / "home-1/cache/blobs").glob("*/*")}
    assert copies == set(kept), "the other has copies of both"

    # Deleted here: found on neither, gone from the bucket; the other's copy goes when it starts.
    assert one.delete("/adapters/letters").status_code == 200
    assert ask(other, "letters").status_code == 404
    assert len(_objects(bucket)) == 1


def test_a_blob_that_was_changed_in_the_bucket_is_not_served(
    bucket: str, pair: list[httpx.Client]
) -> None:
    one, other = pair
    upload(one, "letters", CIPHER)
    client = boto3.client("s3", endpoint_url=bucket, region_name=s3.REGION)
    (key,) = (row["Key"] for row in client.list_objects_v2(Bucket=BUCKET)["Contents"])
    content = bytearray(client.get_object(Bucket=BUCKET, Key=key)["Body"].read())
    content[-1] ^= 1
    client.put_object(Bucket=BUCKET, Key=key, Body=bytes(content))
    refused = ask(other, "letters")
    assert refused.status_code == 503, refused.text
    assert "came back with sha-256" in refused.text
    assert ask(one, "letters").status_code == 200, "it has its own copy"
    again = upload(one, "again", CIPHER)  # the same bytes: the bucket has them right again
    assert again["version"] == 1
    until(lambda: ask(other, "letters").status_code == 200, 30)
