"""POST /adapters/{name}/compose: a new version, by the road of every upload."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from service.api.adapters import AdapterDescriptionView, AdapterView
from tests.oracle import make_adapter
from tests.service.api.conftest import PATIENCE, Running
from tests.service.api.test_adapters import leftovers, push
from tests.service.api.test_generate import ask


@pytest.fixture(scope="module", autouse=True)
def parts(
    server: Running, base_directory: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[None]:
    home = tmp_path_factory.mktemp("compose")
    with httpx.Client(base_url=server.url, timeout=PATIENCE) as client:
        for seed, name in enumerate(("left", "right")):
            directory = make_adapter(home / name, base_directory, rank=3, seed=60 + seed)
            assert push(client, name, directory).status_code == 201
        yield
        for name in ("left", "right", "blend"):
            client.delete(f"/adapters/{name}")


def body(method: str = "concatenate", **more: Any) -> dict[str, Any]:
    shares = [{"adapter": "left", "weight": 0.7}, {"adapter": "right@1", "weight": 0.3}]
    return {"parts": shares, "method": method, **more}


def test_the_stored_sum_says_what_the_sum_says(client: httpx.Client, server: Running) -> None:
    made = client.post("/adapters/blend/compose", json=body())
    assert made.status_code == 201, made.text
    view = AdapterView.model_validate(made.json())
    assert (view.kind, view.rank) == ("lora", 6)
    given = {"max_new_tokens": 12, "ignore_eos": True}
    stored = ask(client, adapter_id="blend", **given)
    assert stored == ask(client, adapter_id="left:0.7,right:0.3", **given)
    again = client.post("/adapters/blend/compose", json=body()).json()
    assert (again["version"], again["digest"]) == (view.version, view.digest)
    assert leftovers(server) == []


def test_provenance_says_how_to_make_it_again(client: httpx.Client) -> None:
    made = client.post("/adapters/blend/compose", json=body("dare_ties", density=0.5)).json()
    shown = AdapterDescriptionView.model_validate(client.get("/adapters/blend").json())
    told = shown.provenance["composed"]
    assert told["method"] == "dare_ties"
    assert [(one["name"], one["version"], one["weight"]) for one in told["parts"]] == [
        ("left", 1, 0.7),
        ("right", 1, 0.3),
    ]
    assert told["parts"][0]["digest"] == client.get("/adapters/left").json()["digest"]
    again = body("dare_ties", density=told["density"], seed=told["seed"])
    assert client.post("/adapters/blend/compose", json=again).json()["digest"] == made["digest"]
    other = body("dare_ties", density=0.5, seed=told["seed"] + 1)
    assert client.post("/adapters/blend/compose", json=other).json()["digest"] != made["digest"]


@pytest.mark.parametrize(
    ("given", "status", "field", "says"),
    [
        (body("ties"), 422, "density", "such as 0.5"),
        (body("linear", density=0.5), 422, "density", "has no density"),
        (body("svd", seed=1), 422, "seed", "has no seed"),
        (body("concatenate", rank=2), 422, "rank", "has no rank"),
        (body("svd", rank=300), 201, None, ""),
        (body("ties", density=0), 422, "density", "greater than 0"),
        (body("average"), 422, "method", "concatenate"),
        ({"parts": []}, 422, "parts", "at least 1"),
        ({"parts": [{"adapter": "left", "weight": 0}]}, 422, "parts", "not 0"),
        ({"parts": [{"adapter": "dora"}]}, 422, "parts", "use_dora=false"),
        ({"parts": [{"adapter": "nobody"}]}, 404, None, "'nobody'"),
        ({"parts": [{"adapter": "left"}] * 17}, 422, "parts", "at most 16"),
    ],
)
def test_refusals(
    client: httpx.Client,
    server: Running,
    given: dict[str, Any],
    status: int,
    field: str | None,
    says: str,
) -> None:
    reply = client.post("/adapters/blend/compose", json=given)
    assert reply.status_code == status, reply.text
    if status != 201:
        assert says in reply.json()["error"]
        assert reply.json().get("field") == field
    assert leftovers(server) == []


def test_a_name_that_is_none(client: httpx.Client) -> None:
    assert client.post("/adapters/Blend/compose", json=body()).status_code == 422
