"""Adapters over HTTP: what is acknowledged is there, what is replaced or deleted is gone."""

from __future__ import annotations

import json
import socket
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch
from safetensors.torch import load_file, save_file

from service.api import adapters as views
from service.api.door import SMALL_BYTES, Bounds
from tests.oracle import make_adapter
from tests.service.api.conftest import PATIENCE, Running, until
from tests.service.api.test_generate import ask, stream
from tests.zoo import slowly


@pytest.fixture(scope="module")
def uploads(tmp_path_factory: pytest.TempPathFactory, base_directory: Path) -> Path:
    home = tmp_path_factory.mktemp("uploads")
    for seed, name in enumerate(("first", "second")):
        make_adapter(home / name, base_directory, "lora", rank=2, seed=100 + seed)
    return home


def push(client: httpx.Client, name: str, directory: Path, **fields: str) -> httpx.Response:
    files = {
        "config": (directory / "adapter_config.json").read_bytes(),
        "weights": (directory / "adapter_model.safetensors").read_bytes(),
    }
    return client.post("/adapters", data={"name": name, **fields}, files=files)


@pytest.fixture
def fresh(client: httpx.Client, request: pytest.FixtureRequest) -> Iterator[str]:
    """A name of this test's own (versions are never given twice), taken away again."""
    name = request.node.name.removeprefix("test_")[:60]
    yield name
    for alias in client.get(f"/adapters/{name}").json().get("aliases", {}):
        client.delete(f"/adapters/{name}/aliases/{alias}")
    client.delete(f"/adapters/{name}")


def leftovers(server: Running) -> list[Path]:
    return list(server.desk.upload_directory.iterdir())


def test_upload_is_there_at_once(
    client: httpx.Client, server: Running, uploads: Path, fresh: str
) -> None:
    reply = push(client, fresh, uploads / "first")
    assert reply.status_code == 201, reply.text
    made = views.AdapterView.model_validate(reply.json())
    assert (made.name, made.version, made.kind, made.rank) == (fresh, 1, "lora", 2)
    assert made.placement == "unmerged"
    assert made.memory_bytes == 4 * made.parameters > 0
    assert "model.layers.1.mlp.down_proj" in made.targets
    assert made.residency == []
    assert reply.headers["x-adapter-digest"] == made.digest
    assert leftovers(server) == []
    texts = {
        ask(client, adapter_id=reference, max_new_tokens=8)["generated_text"]
        for reference in (fresh, f"{fresh}@1", f"sha256:{made.digest}")
    }
    assert len(texts) == 1
    assert texts != {ask(client, max_new_tokens=8)["generated_text"]}
    shown = views.AdapterDescriptionView.model_validate(client.get(f"/adapters/{fresh}").json())
    (place,) = [one for one in shown.residency if one.tier == "slot"]
    assert place.hits == 3
    assert place.bytes > 0


def test_an_evaluation_comes_along_and_is_shown(
    client: httpx.Client, uploads: Path, fresh: str
) -> None:
    figures = {"exact_match": {"value": 0.5, "low": 0.4, "high": 0.6}}
    measured = {"evaluations": [{"data": "t.jsonl", "questions": 9, "figures": figures}]}
    reply = push(client, fresh, uploads / "first", evaluation=json.dumps(measured))
    assert reply.status_code == 201, reply.text
    assert client.get(f"/adapters/{fresh}").json()["provenance"]["evaluation"] == measured
    refused = push(client, fresh, uploads / "second", evaluation="[1]")
    assert refused.status_code == 422
    assert "evaluation" in refused.text


def test_an_evaluation_that_comes_later_is_shown_with_the_same_version(
    client: httpx.Client, uploads: Path, fresh: str
) -> None:
    told = {"config": {"seed": 3}, "data": {"train": "0" * 64}, "run": {"steps": 5}}
    first = push(client, fresh, uploads / "first", training=json.dumps(told)).json()
    provenance = client.get(f"/adapters/{fresh}").json()["provenance"]
    assert provenance.items() >= told.items()
    for measured in ({"evaluations": [{"n": 1}]}, {"evaluations": [{"n": 2}]}):
        again = push(client, fresh, uploads / "first", evaluation=json.dumps(measured)).json()
        assert (again["version"], again["digest"]) == (1, first["digest"])
        shown = client.get(f"/adapters/{fresh}").json()["provenance"]
        assert shown == {**provenance, "evaluation": measured}
    push(client, fresh, uploads / "first")  # says nothing of an evaluation, so it stays
    assert client.get(f"/adapters/{fresh}").json()["provenance"]["evaluation"] == measured
    refused = push(client, fresh, uploads / "first", training='{"base_fingerprint": 1}')
    assert refused.status_code == 422
    assert "base_fingerprint" in refused.text


def test_list_names_the_newest_version(client: httpx.Client, uploads: Path, fresh: str) -> None:
    push(client, fresh, uploads / "first")
    push(client, fresh, uploads / "second")
    listed = views.AdapterList.model_validate(client.get("/adapters").json())
    versions = {one.name: one.version for one in listed.adapters}
    assert versions == {"dora": 1, fresh: 2, "lora": 1}


def test_replacing_serves_the_new_weights_and_keeps_the_old(
    client: httpx.Client, uploads: Path, fresh: str
) -> None:
    push(client, fresh, uploads / "first")
    # Long enough for whole KV blocks: the next request would hit them if they were keyed by name.
    prompt = "the same long beginning " * 8
    before = ask(client, prompt, adapter_id=fresh, max_new_tokens=8, details=True)
    push(client, fresh, uploads / "second")
    after = ask(client, prompt, adapter_id=fresh, max_new_tokens=8, details=True)
    assert after["details"]["cached_tokens"] == 0
    assert after["details"]["adapter"]["version"] == 2
    assert after["generated_text"] != before["generated_text"]
    old = ask(client, prompt, adapter_id=f"{fresh}@1", max_new_tokens=8, details=True)
    assert old["generated_text"] == before["generated_text"]
    assert old["details"]["cached_tokens"] > 0


def test_same_content_is_the_same_version(client: httpx.Client, uploads: Path, fresh: str) -> None:
    one = push(client, fresh, uploads / "first").json()
    two = push(client, fresh, uploads / "first").json()
    assert (one["version"], one["digest"]) == (two["version"], two["digest"])


def test_alias_moves(client: httpx.Client, uploads: Path, fresh: str) -> None:
    one = push(client, fresh, uploads / "first").json()
    two = push(client, fresh, uploads / "second").json()
    path = f"/adapters/{fresh}/aliases/prod"
    set_to = client.put(path, json={"version": 1})
    assert set_to.status_code == 200
    views.AliasView.model_validate(set_to.json())
    reference = f"{fresh}@prod"
    assert client.get(f"/adapters/{reference}").json()["digest"] == one["digest"]
    assert client.put(path, json={"digest": "sha256:" + two["digest"]}).json()["version"] == 2
    details = ask(client, adapter_id=reference, max_new_tokens=1, details=True)["details"]
    assert details["adapter"]["digest"] == two["digest"]
    assert client.get(f"/adapters/{fresh}").json()["aliases"] == {"prod": 2}
    assert client.delete(f"/adapters/{fresh}").status_code == 409
    assert client.delete(path).json() == {"name": fresh, "alias": "prod"}
    assert client.get(f"/adapters/{reference}").status_code == 404


def test_delete_leaves_nothing(
    client: httpx.Client, server: Running, uploads: Path, fresh: str
) -> None:
    made = push(client, fresh, uploads / "first").json()
    prompt = "the same long beginning " * 8
    first = ask(client, prompt, adapter_id=fresh, max_new_tokens=4)
    gone = client.delete(f"/adapters/{fresh}")
    assert [one["digest"] for one in gone.json()["deleted"]] == [made["digest"]]
    views.Deleted.model_validate(gone.json())
    serving = server.desk.serving
    assert serving is not None
    assert made["digest"] not in {one.digest for one in serving.engine.residents()}
    body = {"inputs": "a", "parameters": {"adapter_id": fresh}}
    assert client.post("/generate", json=body).status_code == 404
    again = push(client, fresh, uploads / "first").json()
    assert (again["version"], again["digest"]) == (2, made["digest"])
    found = ask(client, prompt, adapter_id=fresh, max_new_tokens=4, details=True)
    assert found["generated_text"] == first["generated_text"]
    assert found["details"]["cached_tokens"] == 0  # its blocks went with it


def test_delete_waits_for_what_runs(
    client: httpx.Client, server: Running, uploads: Path, fresh: str
) -> None:
    push(client, fresh, uploads / "first")
    wanted = ask(client, adapter_id=fresh, max_new_tokens=300, ignore_eos=True)["generated_text"]
    given: dict[str, Any] = {"adapter_id": fresh, "max_new_tokens": 300, "ignore_eos": True}
    with ThreadPoolExecutor(2) as pool:
        with slowly(server.engine):
            running = pool.submit(stream, client, **given)
            until(lambda: server.engine.stats().running == 1)
            gone = pool.submit(client.delete, f"/adapters/{fresh}")
            until(lambda: client.get(f"/adapters/{fresh}").status_code == 404)
            assert not gone.done()
        assert gone.result().status_code == 200
        server.settle()
        assert server.engine.stats().running == 0
        assert running.result()[-1]["generated_text"] == wanted


def test_a_digest_with_two_names_survives_one(
    client: httpx.Client, uploads: Path, fresh: str
) -> None:
    push(client, fresh, uploads / "first")
    push(client, "twin", uploads / "first")
    text = ask(client, adapter_id="twin", max_new_tokens=4)["generated_text"]
    assert client.delete("/adapters/twin").status_code == 200
    assert ask(client, adapter_id=fresh, max_new_tokens=4)["generated_text"] == text


def test_load_pin_unpin(client: httpx.Client, uploads: Path, fresh: str) -> None:
    push(client, fresh, uploads / "first", placement="merged", merged_dtype="nf4")
    report = views.LoadView.model_validate(client.post(f"/adapters/{fresh}/load").json())
    assert report.placement == "merged"
    assert report.bytes > 0
    assert report.requantisation_error is not None
    assert 0 < report.requantisation_error < 0.5
    for verb, wanted in (("pin", True), ("unpin", False), ("unpin", False)):
        reply = client.post(f"/adapters/{fresh}/{verb}")
        views.PinView.model_validate(reply.json())
        assert reply.json()["pinned"] is wanted
        (place,) = client.get(f"/adapters/{fresh}").json()["residency"]
        assert (place["placement"], place["pinned"]) == ("merged", wanted)


def test_an_adapter_that_computes_nan_is_refused_before_anybody_sees_it(
    client: httpx.Client, server: Running, uploads: Path, tmp_path: Path
) -> None:
    """Every number in the file is finite and allowed; only a forward pass shows the overflow."""
    tensors = load_file(uploads / "first" / "adapter_model.safetensors")
    huge = {name: torch.full_like(one, 9e5) for name, one in tensors.items()}
    for name in huge:
        if "lora_B" in name:
            huge[name][::2] *= -1  # so that some gates open, whatever the sign of their input
    config = json.loads((uploads / "first" / "adapter_config.json").read_text())
    (tmp_path / "adapter_config.json").write_text(json.dumps({**config, "lora_alpha": 20000}))
    save_file(huge, tmp_path / "adapter_model.safetensors")
    reply = push(client, "huge", tmp_path)
    assert reply.status_code == 422, reply.text
    assert reply.json()["error_type"] == "invalid_adapter"
    assert "finite" in reply.json()["error"]
    assert client.get("/adapters/huge").status_code == 404
    assert leftovers(server) == []


def test_two_roundings_of_one_adapter_are_two_adapters(
    client: httpx.Client, uploads: Path, fresh: str
) -> None:
    push(client, fresh, uploads / "first", placement="merged", merged_dtype="float32")
    push(client, fresh, uploads / "first", placement="merged", merged_dtype="nf4")
    errors = [
        client.post(f"/adapters/{fresh}@{version}/load").json()["requantisation_error"] or 0
        for version in (1, 2)
    ]
    assert errors[0] < 1e-4 < errors[1]
    shown = client.get(f"/adapters/{fresh}").json()["residency"]
    assert {one["merged_dtype"] for one in shown if one["tier"] == "slot"} == {"float32", "nf4"}


def test_own_template(client: httpx.Client, uploads: Path, fresh: str) -> None:
    template = "{% for m in messages %}[{{ m['content'] }}]{% endfor %}>"
    assert push(client, fresh, uploads / "first", template=template).json()["template"] is True
    chat = [{"role": "user", "content": "hi"}]
    details = ask(client, chat, adapter_id=fresh, max_new_tokens=1, decoder_input_details=True)[
        "details"
    ]
    assert "".join(token["text"] for token in details["prefill"]) == "[hi]>"


def test_uploads_change_no_token_of_sixteen_streams(
    client: httpx.Client, server: Running, uploads: Path, fresh: str
) -> None:
    names = [None, "lora", "dora", "lora"] * 4
    given: dict[str, Any] = {"max_new_tokens": 300, "ignore_eos": True}
    alone = [stream(client, adapter_id=name, **given) for name in names[:4]]
    with ThreadPoolExecutor(16) as pool:
        with slowly(server.engine, 0.1):
            running = [pool.submit(stream, client, adapter_id=name, **given) for name in names]
            until(lambda: server.desk.admission.inside == 16)
            for which in ("first", "second"):
                made = push(client, fresh, uploads / which)
                assert made.status_code == 201
                assert ask(client, adapter_id=fresh, max_new_tokens=1)
            assert server.desk.admission.inside == 16, "streams ended before the uploads"
        for number, one in enumerate(running):
            wanted = [event["token"]["id"] for event in alone[number % 4]]
            assert [event["token"]["id"] for event in one.result()] == wanted


def test_bad_upload_leaves_nothing(client: httpx.Client, server: Running, uploads: Path) -> None:
    files = {
        "config": (uploads / "first" / "adapter_config.json").read_bytes(),
        "weights": b"PK\x03\x04 not safetensors",
    }
    reply = client.post("/adapters", data={"name": "bad"}, files=files)
    assert reply.status_code in (415, 422)
    assert client.get("/adapters/bad").status_code == 404
    assert leftovers(server) == []


def _send(server: Running, head: str, pieces: Iterator[bytes]) -> tuple[bytes, int]:
    """Speak HTTP by hand; the reply, and how many bytes of body it took to get one."""
    sent = 0
    with socket.create_connection(server.address, timeout=60) as connection:
        connection.sendall(head.replace("\n", "\r\n").encode())
        try:
            for piece in pieces:
                connection.sendall(piece)
                sent += len(piece)
        except (BrokenPipeError, ConnectionResetError):
            pass
        received = b""
        try:
            while chunk := connection.recv(65536):
                received += chunk
        except ConnectionResetError:
            pass
    return received, sent


def _endless() -> Iterator[bytes]:
    part = b'--b\r\nContent-Disposition: form-data; name="weights"; filename="w"\r\n\r\n'
    yield b"%x\r\n%s\r\n" % (len(part), part)
    for _ in range(1024):
        yield b"10000\r\n" + b"w" * 65536 + b"\r\n"


def test_endless_upload_is_cut_off_at_the_cap(server: Running) -> None:
    head = (
        "POST /adapters HTTP/1.1\nHost: 127.0.0.1\nContent-Type: multipart/form-data; boundary=b\n"
        "Transfer-Encoding: chunked\n\n"
    )
    received, sent = _send(server, head, _endless())
    assert received.startswith(b"HTTP/1.1 413 ")
    assert b"connection: close" in received
    body = json.loads(received.partition(b"\r\n\r\n")[2])
    assert body["error_type"] == "too_large"
    assert sent < 32 << 20, "the whole body was read"
    assert leftovers(server) == []


def test_too_long_a_length_is_refused_before_the_body(server: Running) -> None:
    head = (
        "POST /adapters HTTP/1.1\nHost: 127.0.0.1\nContent-Type: multipart/form-data; boundary=b\n"
        f"Content-Length: {1 << 40}\nExpect: 100-continue\n\n"
    )
    received, _ = _send(server, head, iter(()))
    assert received.startswith(b"HTTP/1.1 413 ")
    assert str(1 << 40).encode() in received


def test_a_client_that_goes_in_mid_upload_leaves_nothing(server: Running) -> None:
    head = (
        "POST /adapters HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Length: 1000000\r\n"
        "Content-Type: multipart/form-data; boundary=b\r\n\r\n"
        '--b\r\nContent-Disposition: form-data; name="weights"; filename="w"\r\n\r\n'
        + "w"
        * SMALL_BYTES
    )
    with socket.create_connection(server.address, timeout=60) as connection:
        connection.sendall(head.encode())
        until(lambda: len(leftovers(server)) == 1)
    until(lambda: leftovers(server) == [])


def test_slow_uploads_hold_up_no_fast_one(
    client: httpx.Client, server: Running, uploads: Path, fresh: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    """Far more of them than have a place at a time; each has sent a part, and may take long."""
    monkeypatch.setattr(Bounds, "left", lambda *_: PATIENCE)
    with ExitStack() as slow:
        for path, part in 6 * [("/adapters", "weights"), ("/v1/files", "file")]:
            head = (
                f"POST {path} HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Length: 1000000\r\n"
                "Content-Type: multipart/form-data; boundary=b\r\n\r\n--b\r\n"
                f'Content-Disposition: form-data; name="{part}"; filename="a.jsonl"\r\n\r\n'
                + "w"
                * SMALL_BYTES
            )
            one = slow.enter_context(socket.create_connection(server.address, timeout=60))
            one.sendall(head.encode())
        until(lambda: len(leftovers(server)) == 12)
        assert push(client, fresh, uploads / "first").status_code == 201
        file = ("rows.jsonl", b'{"prompt": "a", "completion": "b"}\n')
        sent = client.post("/v1/files", files={"file": file}, data={"purpose": "fine-tune"})
        assert sent.status_code == 200, sent.text
        assert len(leftovers(server)) == 12
    until(lambda: leftovers(server) == [])
    client.delete(f"/v1/files/{sent.json()['id']}")
