"""Several adapters in one request, through the whole server, against PEFT on the same weights."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from service.api.generation_schema import Completion
from tests.adapters.lowering.test_composed import oracle
from tests.oracle import make_adapter
from tests.service.api.conftest import PATIENCE, Running
from tests.service.api.test_adapters import push
from tests.service.api.test_generate import PROMPT, ask, stream

WEIGHTS = {"one": 0.7, "two": 0.3}


@pytest.fixture(scope="module")
def directories(tmp_path_factory: pytest.TempPathFactory, base_directory: Path) -> dict[str, Path]:
    home = tmp_path_factory.mktemp("parts")
    made = {
        name: make_adapter(home / name, base_directory, kind, rank=rank, seed=40 + rank, **options)
        for name, kind, rank, options in (
            ("one", "lora", 3, {}),
            ("two", "rslora", 6, {"targets": ["q_proj", "up_proj"]}),
            ("scales", "ia3", 4, {}),
            ("whole", "lora", 2, {"modules_to_save": ["lm_head"]}),
            ("wide", "lora", 200, {"targets": ["q_proj"]}),
        )
    }
    return made


@pytest.fixture(scope="module", autouse=True)
def parts(server: Running, directories: dict[str, Path]) -> Iterator[None]:
    """All of them uploaded, for the tests of this module."""
    with httpx.Client(base_url=server.url, timeout=PATIENCE) as client:
        for name, directory in directories.items():
            assert push(client, name, directory).status_code == 201
        yield
        for name in directories:
            client.delete(f"/adapters/{name}")


def generate(client: httpx.Client, adapter_id: Any, **more: Any) -> httpx.Response:
    given = {"adapter_id": adapter_id, "max_new_tokens": 4, **more}
    return client.post("/generate", json={"inputs": PROMPT, "parameters": given})


def test_a_sum_says_what_peft_would(
    client: httpx.Client, server: Running, directories: dict[str, Path]
) -> None:
    serving = server.desk.serving
    assert serving is not None
    weighted = [(directories[name], weight) for name, weight in WEIGHTS.items()]
    wanted = oracle(serving.engine, weighted)  # type: ignore[arg-type]
    tokens = wanted.greedy(serving.assembly.tokenizer.encode(PROMPT), 12).tokens
    given = {"max_new_tokens": 12, "ignore_eos": True, "details": True}
    details = ask(client, adapter_id="one:0.7,two:0.3", **given)["details"]
    assert [token["id"] for token in details["tokens"]] == tokens
    events = stream(client, adapter_id="two:0.3,one:0.7", **given)
    assert [event["token"]["id"] for event in events] == tokens
    alone = ask(client, adapter_id="one", **given)["details"]
    assert [token["id"] for token in alone["tokens"]] != tokens


def test_every_way_to_write_a_sum_is_the_same_sum(client: httpx.Client) -> None:
    digests = {name: client.get(f"/adapters/{name}").json()["digest"] for name in WEIGHTS}
    ways: list[Any] = [
        "one:0.7,two:0.3",
        "two@1:0.3, one:0.7",
        f"sha256:{digests['one']}:0.7,two:0.3",
        ["one:0.7", "two"],
        [{"adapter_id": "two", "weight": 0.3}, {"adapter_id": "one", "weight": 0.7}],
        [{"adapter_id": "one", "weight": 0.7}, {"adapter_id": "two@1", "weight": 0.3}],
        "one:0.5,two:0.3,one:0.2",
    ]
    replies = [generate(client, way, details=True) for way in ways]
    found = {reply.headers["x-adapter-digest"] for n, reply in enumerate(replies) if n != 3}
    assert len(found) == 1
    assert not found & set(digests.values())
    adapter = Completion.model_validate(replies[0].json()).details.adapter  # type: ignore[union-attr]
    assert adapter is not None
    assert (adapter.version, adapter.digest) == (None, found.pop())
    assert adapter.parts is not None
    told = {(part.name, part.digest, part.weight) for part in adapter.parts}
    assert told == {(name, digests[name], weight) for name, weight in WEIGHTS.items()}
    # In a list a string is a reference: a weight stands in an object.
    assert replies[3].status_code == 404
    swapped = generate(client, "one:0.3,two:0.7")
    assert swapped.headers["x-adapter-digest"] != replies[0].headers["x-adapter-digest"]


def test_one_part_of_weight_one_is_the_adapter_itself(client: httpx.Client) -> None:
    plain, way = generate(client, "one", details=True), generate(client, ["one"], details=True)
    assert way.json()["details"]["adapter"] == plain.json()["details"]["adapter"]
    scaled = generate(client, "one:0.5")
    assert scaled.headers["x-adapter-digest"] != plain.headers["x-adapter-digest"]


def test_the_prefix_cache_keeps_sums_apart(client: httpx.Client) -> None:
    prompt = "the same long beginning " * 8
    for first, cached in (("one:0.7,two:0.3", False), ("two:0.3,one:0.7", True), ("one", False)):
        given = {"adapter_id": first, "max_new_tokens": 2, "details": True}
        assert (ask(client, prompt, **given)["details"]["cached_tokens"] > 0) is cached


def test_a_sum_is_pinned_to_digests_and_goes_with_its_parts(
    client: httpx.Client,
    server: Running,
    directories: dict[str, Path],
    base_directory: Path,
    tmp_path: Path,
) -> None:
    serving = server.desk.serving
    assert serving is not None
    # Its own versions: those of "two" are for the other tests.
    part = make_adapter(tmp_path / "part", base_directory, rank=2, seed=90)
    digest_of_part = push(client, "moving", part).json()["digest"]
    before = generate(client, "one:0.25,moving:0.75")
    digest = before.headers["x-adapter-digest"]
    assert digest in {one.digest for one in serving.engine.residents()}
    assert serving.sums.of(digest_of_part) == [digest]
    push(client, "moving", directories["one"])
    other = generate(client, "one:0.25,moving:0.75")
    assert other.headers["x-adapter-digest"] != digest, "the name means another version now"
    same = generate(client, "one:0.25,moving@1:0.75")
    assert same.headers["x-adapter-digest"] == digest
    assert same.json() == before.json()
    assert client.delete("/adapters/moving@1").status_code == 200
    assert digest not in {one.digest for one in serving.engine.residents()}
    assert generate(client, "one:0.25,moving@1:0.75").status_code == 404
    client.delete("/adapters/moving")


def test_mixed_with_others_nothing_changes(client: httpx.Client) -> None:
    """Sums, single adapters and the base in one batch: each as it is alone."""
    from concurrent.futures import ThreadPoolExecutor

    names: list[Any] = ["one:0.7,two:0.3", "one", None, "dora", "one:0.3,two:0.7"]
    given: dict[str, Any] = {"max_new_tokens": 24, "ignore_eos": True}
    alone = {str(name): ask(client, adapter_id=name, **given) for name in names}
    with ThreadPoolExecutor(10) as pool:
        order = list(itertools.islice(itertools.cycle(names), 10))
        for name, got in zip(
            order, pool.map(lambda n: ask(client, adapter_id=n, **given), order), strict=True
        ):
            assert got == alone[str(name)]


@pytest.mark.parametrize(
    ("adapter_id", "status", "says"),
    [
        ("one:0.5,dora:0.5", 422, "dora@1 cannot be part of a sum: DoRA"),
        ("one,scales", 422, "scales@1 cannot be part of a sum: ia3"),
        ("one,whole", 422, "modules_to_save replaces lm_head"),
        ("wide,one,wide:0.5,lora", 200, ""),
        ("wide,one,two,dora:-0.1", 422, "DoRA"),
        ("one:0", 422, "not 0"),
        ("one:1e9", 422, "at most 100"),
        ("one:nan", 422, "nan"),
        ("one:much", 422, "'much'"),
        ("one,,two", 422, "names no adapter"),
        ("one:0.5,one:-0.5", 422, "cancel"),
        ("one,nobody", 404, "'nobody'"),
        (["one"] * 17, 422, "at most 16"),
        ([], 422, "at least 1"),
        ([{"adapter_id": "one", "weight": "x"}], 422, "valid number"),
        ([{"adapter_id": "one", "scale": 1}], 422, "no such field"),
        ([3], 422, "should be a string or an object"),
        (7, 422, "should be a string or a list"),
    ],
)
def test_what_cannot_be_added(
    client: httpx.Client, adapter_id: Any, status: int, says: str
) -> None:
    reply = generate(client, adapter_id)
    assert reply.status_code == status, reply.text
    if status != 200:
        assert says in reply.json()["error"]
        assert status == 404 or reply.json()["field"].startswith("parameters.adapter_id")


def test_too_much_rank_is_refused_with_the_numbers(
    client: httpx.Client, directories: dict[str, Path], base_directory: Path, tmp_path: Path
) -> None:
    make_adapter(tmp_path / "more", base_directory, rank=60, targets=["q_proj"], seed=9)
    push(client, "more", tmp_path / "more")
    reply = generate(client, "wide,more")
    assert reply.status_code == 422
    assert "= 260 together, limit 256" in reply.json()["error"]
    client.delete("/adapters/more")


def test_parts_of_different_templates_take_no_chat(
    client: httpx.Client, directories: dict[str, Path]
) -> None:
    template = "{% for m in messages %}[{{ m['content'] }}]{% endfor %}>"
    push(client, "styled", directories["one"], template=template)
    given = {"adapter_id": "styled:0.5,two:0.5", "max_new_tokens": 1}
    chat = [{"role": "user", "content": "hi"}]
    reply = client.post("/generate", json={"inputs": chat, "parameters": given})
    assert reply.status_code == 422
    assert "different chat templates" in reply.json()["error"]
    assert client.post("/generate", json={"inputs": "hi", "parameters": given}).status_code == 200
    client.delete("/adapters/styled")
