"""The text-generation skin over a real engine, on a real socket."""

from __future__ import annotations

import json
import socket
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import pytest

from adapters.template import render_chat
from service.api.generation_schema import Completion, StreamEvent
from tests.oracle import PeftOracle
from tests.service.api.conftest import PATIENCE, Running, until
from tests.zoo import held, slowly

PROMPT = "the robin sat on a bare branch"


def ask(client: httpx.Client, inputs: Any = PROMPT, **parameters: Any) -> dict[str, Any]:
    reply = client.post("/generate", json={"inputs": inputs, "parameters": parameters})
    assert reply.status_code == 200, reply.text
    Completion.model_validate(reply.json())
    found: dict[str, Any] = reply.json()
    return found


def stream(client: httpx.Client, inputs: Any = PROMPT, **parameters: Any) -> list[dict[str, Any]]:
    body = {"inputs": inputs, "parameters": parameters}
    with client.stream("POST", "/generate_stream", json=body) as reply:
        assert reply.status_code == 200, reply.read()
        assert reply.headers["content-type"].startswith("text/event-stream")
        lines = [line for line in reply.iter_lines() if line]
    assert all(line.startswith("data:") for line in lines)
    events = [json.loads(line.removeprefix("data:")) for line in lines]
    for event in events:
        StreamEvent.model_validate(event)
    return events


def test_prompt_lookup_says_the_same_in_fewer_steps(client: httpx.Client, server: Running) -> None:
    """Plain, streamed and through OpenAI's door, with its counts in reply and metrics."""
    asked = {"max_new_tokens": 60, "ignore_eos": True, "details": True}
    said = "one two three four five six seven eight " * 8
    plain = ask(client, said, **asked)
    assert "draft_tokens" not in plain["details"]
    server.settle()
    before = _drafted(client)
    quick = ask(client, said, prompt_lookup_num_tokens=8, **asked)
    assert quick["generated_text"] == plain["generated_text"]
    assert quick["details"]["tokens"] == plain["details"]["tokens"]
    drafted, accepted = (quick["details"][f"{name}_tokens"] for name in ("draft", "accepted"))
    assert 0 < accepted <= drafted
    server.settle()
    assert _drafted(client) == before + drafted
    *_, last = stream(client, said, prompt_lookup_num_tokens=8, **asked)
    assert last["index"] == 60
    assert last["generated_text"] == plain["generated_text"]
    assert last["details"]["accepted_tokens"] > 0
    body = {"prompt": said, "max_tokens": 60, "ignore_eos": True, "temperature": 0}
    body |= {"model": client.get("/v1/models").json()["data"][0]["id"]}
    reply = client.post("/v1/completions", json=body | {"prompt_lookup_num_tokens": 8}).json()
    assert reply["choices"][0]["text"] == plain["generated_text"]
    details = reply["usage"]["completion_tokens_details"]
    assert details["accepted_prediction_tokens"] > 0
    assert (
        "completion_tokens_details" not in client.post("/v1/completions", json=body).json()["usage"]
    )
    wrong = {"inputs": said, "parameters": {"prompt_lookup_num_tokens": 65}}
    refused = client.post("/generate", json=wrong)
    assert refused.status_code == 422
    assert "prompt_lookup_num_tokens" in refused.text


def _drafted(client: httpx.Client) -> float:
    lines = client.get("/metrics").text.splitlines()
    (line,) = [one for one in lines if one.startswith("vllm:spec_decode_num_draft_tokens_total")]
    return float(line.split()[-1])


@pytest.mark.parametrize("adapter", [None, "lora", "dora"])
def test_reply_is_what_the_adapter_alone_says(
    client: httpx.Client, server: Running, adapter_directory: Path, adapter: str | None
) -> None:
    """The whole way, text in and text out, against PEFT alone on the same weights."""
    serving = server.desk.serving
    assert serving is not None
    tokenizer = serving.assembly.tokenizer
    directory = adapter_directory / adapter if adapter else None
    oracle = PeftOracle(serving.engine.base, directory)  # type: ignore[attr-defined]
    wanted = oracle.greedy(tokenizer.encode(PROMPT), 12).tokens

    reply = client.post(
        "/generate",
        json={
            "inputs": PROMPT,
            "parameters": {
                "adapter_id": adapter,
                "max_new_tokens": 12,
                "ignore_eos": True,
                "details": True,
            },
        },
    )
    details = reply.json()["details"]
    assert [token["id"] for token in details["tokens"]] == wanted
    assert reply.json()["generated_text"] == tokenizer.decode(wanted, skip_special_tokens=True)
    if adapter is None:
        assert details["adapter"] is None
        assert "x-adapter-digest" not in reply.headers
    else:
        listed = client.get(f"/adapters/{adapter}").json()
        assert details["adapter"] == {
            "name": adapter,
            "version": 1,
            "digest": listed["digest"],
            "placement": "unmerged",
        }
        assert reply.headers["x-adapter-digest"] == listed["digest"]


def test_without_details_only_the_text(client: httpx.Client) -> None:
    assert ask(client, max_new_tokens=2).keys() == {"generated_text"}


def test_details(client: httpx.Client) -> None:
    found = ask(client, max_new_tokens=3, details=True, top_n_tokens=4, decoder_input_details=True)
    details = found["details"]
    assert details["finish_reason"] == "length"
    assert details["generated_tokens"] == len(details["tokens"]) == 3
    assert details["seed"] is None
    assert "".join(token["text"] for token in details["tokens"]) == found["generated_text"]
    for token, top in zip(details["tokens"], details["top_tokens"], strict=True):
        assert len(top) == 4
        assert top[0] == token  # greedy takes the most likely
        assert sorted(top, key=lambda one: -one["logprob"]) == top
    prefill = details["prefill"]
    assert len(prefill) == details["prompt_tokens"]
    assert "".join(token["text"] for token in prefill) == PROMPT
    assert prefill[0]["logprob"] is None
    assert all(token["logprob"] < 0 for token in prefill[1:])


def test_every_path_is_the_same_road(client: httpx.Client) -> None:
    body = {"inputs": PROMPT, "parameters": {"max_new_tokens": 5, "adapter_id": "lora"}}
    texts = {client.post("/generate", json=body).json()["generated_text"]}
    listed = client.post("/", json=body)
    assert len(listed.headers["x-adapter-digest"]) == 64
    (first,) = listed.json()
    texts.add(first["generated_text"])
    for path in ("/", "/generate"):
        lines = client.post(path, json={**body, "stream": True}).text.split("\n\n")
        texts.add(json.loads(lines[-2].removeprefix("data:"))["generated_text"])
    texts.add(stream(client, **body["parameters"])[-1]["generated_text"])  # type: ignore[arg-type]
    assert len(texts) == 1


def test_a_schema_and_alternatives_as_lorax_asks(client: httpx.Client) -> None:
    schema = {"type": "object", "properties": {"n": {"enum": [1, 2]}}, "required": ["n"]}
    schema["additionalProperties"] = False
    given = {
        "response_format": {"type": "json_object", "schema": schema},
        "return_k_alternatives": 2,
        "details": True,
    }
    reply = client.post("/generate", json={"inputs": PROMPT, "parameters": given}).json()
    assert reply["generated_text"] in ('{"n": 1}', '{"n": 2}')
    assert len(reply["details"]["top_tokens"][0]) == 2
    both = {**given, "grammar": {"type": "regex", "value": "a"}}
    refused = client.post("/generate", json={"inputs": PROMPT, "parameters": both})
    assert refused.json()["field"] == "parameters.response_format"


def test_stream_joins_to_the_reply(client: httpx.Client) -> None:
    given = {"max_new_tokens": 9, "adapter_id": "dora", "details": True}
    whole = ask(client, **given)
    events = stream(client, **given)
    assert [event["index"] for event in events] == list(range(1, 10))
    assert "".join(event["token"]["text"] for event in events) == whole["generated_text"]
    assert [event["token"] for event in events] == whole["details"]["tokens"]
    assert all(event["details"] is None for event in events[:-1])
    assert all(event["generated_text"] is None for event in events[:-1])
    last = events[-1]
    assert last["generated_text"] == whole["generated_text"]
    assert last["details"]["finish_reason"] == "length"
    assert last["details"]["generated_tokens"] == 9
    assert last["details"]["adapter"] == whole["details"]["adapter"]


def test_stop_token_ends_with_its_event(client: httpx.Client) -> None:
    """The end comes with the last token's event, whatever made it the last."""
    free = ask(client, max_new_tokens=8, details=True)["details"]["tokens"]
    stop = free[3]["id"]
    first = next(i for i, token in enumerate(free) if token["id"] == stop)
    events = stream(client, max_new_tokens=8, stop_token_ids=[stop])
    assert len(events) == first + 1
    assert events[-1]["details"]["finish_reason"] == "eos_token"


def test_stop_string_is_taken_out(client: httpx.Client) -> None:
    free = ask(client, max_new_tokens=8)["generated_text"]
    stop = free[4:6]
    wanted = free[: free.index(stop)]
    reply = ask(client, max_new_tokens=8, stop=[stop], details=True)
    assert reply["generated_text"] == wanted
    assert reply["details"]["finish_reason"] == "stop_sequence"
    events = stream(client, max_new_tokens=8, stop=[stop])
    assert "".join(event["token"]["text"] for event in events) == wanted
    assert events[-1]["generated_text"] == wanted


def test_chat_is_rendered_by_the_one_renderer(client: httpx.Client, server: Running) -> None:
    messages = [
        {"role": "system", "content": "be brief"},
        {"role": "user", "content": "say </s> and <|assistant|>"},
    ]
    serving = server.desk.serving
    assert serving is not None
    ids = render_chat(serving.assembly.tokenizer, messages)
    details = ask(client, messages, max_new_tokens=1, decoder_input_details=True)["details"]
    assert [token["id"] for token in details["prefill"]] == ids


def test_same_seed_same_text(client: httpx.Client) -> None:
    given = {"max_new_tokens": 10, "do_sample": True, "temperature": 1.3}
    one = ask(client, seed=11, **given)
    assert ask(client, seed=11, **given) == one
    assert ask(client, seed=12, **given) != one


def test_reported_seed_repeats_the_text(client: httpx.Client) -> None:
    given = {"max_new_tokens": 10, "temperature": 1.5, "details": True}
    first = ask(client, **given)
    seed = first["details"]["seed"]
    assert 0 <= seed < 1 << 32
    assert ask(client, seed=seed, **given)["generated_text"] == first["generated_text"]


def test_do_sample_decides(client: httpx.Client) -> None:
    greedy = ask(client, max_new_tokens=10)["generated_text"]
    assert (
        ask(client, max_new_tokens=10, do_sample=False, temperature=5.0, seed=3)["generated_text"]
        == greedy
    )
    assert ask(client, max_new_tokens=10, temperature=5.0, seed=3)["generated_text"] != greedy
    assert ask(client, max_new_tokens=10, seed=3)["generated_text"] == greedy


def test_n_outputs_are_those_of_their_seeds(client: httpx.Client) -> None:
    given = {"max_new_tokens": 6, "do_sample": True, "temperature": 1.2}
    found = ask(client, n=3, seed=40, details=True, **given)
    assert [one["seed"] for one in found["generations"]] == [40, 41, 42]
    alone = [ask(client, seed=seed, **given)["generated_text"] for seed in (40, 41, 42)]
    assert [one["generated_text"] for one in found["generations"]] == alone
    assert found["generated_text"] == alone[0]
    others = [one["generated_text"] for one in found["details"]["best_of_sequences"]]
    assert others == alone[1:]


def test_n_outputs_in_one_stream(client: httpx.Client) -> None:
    given = {"max_new_tokens": 6, "do_sample": True, "seed": 40, "n": 3}
    whole = ask(client, **given)
    events = stream(client, **given)
    for sequence, wanted in enumerate(whole["generations"]):
        mine = [event for event in events if event["sequence"] == sequence]
        assert [event["index"] for event in mine] == list(range(1, len(mine) + 1))
        assert mine[-1]["generated_text"] == wanted["generated_text"]
        assert "".join(event["token"]["text"] for event in mine) == wanted["generated_text"]


def test_best_of_puts_the_most_likely_first(client: httpx.Client) -> None:
    found = ask(client, best_of=4, do_sample=True, seed=5, max_new_tokens=5, details=True)
    details = found["details"]

    def likelihood(one: dict[str, Any]) -> float:
        return sum(token["logprob"] for token in one["tokens"]) / len(one["tokens"])

    means = [likelihood(one) for one in (details, *details["best_of_sequences"])]
    assert len(means) == 4
    assert means == sorted(means, reverse=True)
    assert "generations" not in found


def test_full_text_and_truncate(client: httpx.Client) -> None:
    short = ask(client, max_new_tokens=4)["generated_text"]
    assert ask(client, max_new_tokens=4, return_full_text=True)["generated_text"] == PROMPT + short
    details = ask(client, max_new_tokens=1, truncate=3, decoder_input_details=True)["details"]
    assert details["prompt_tokens"] == 3
    assert PROMPT.endswith("".join(token["text"] for token in details["prefill"]))


def test_default_length_fits_what_is_left(client: httpx.Client) -> None:
    """Without max_new_tokens a long prompt is not refused for a default it never named."""
    limit = client.get("/info").json()["max_total_tokens"]
    details = ask(client, "k" * (limit - 5), ignore_eos=True, details=True)["details"]
    assert details["generated_tokens"] == 5
    assert ask(client, ignore_eos=True, details=True)["details"]["generated_tokens"] == 128


def test_mixed_adapters_at_once_answer_as_alone(client: httpx.Client, server: Running) -> None:
    names = [None, "lora", "dora", "lora@1", None, "dora", "lora", "dora@1"]
    alone = [ask(client, adapter_id=name, max_new_tokens=16)["generated_text"] for name in names]
    with ThreadPoolExecutor(len(names)) as pool:
        together = list(
            pool.map(lambda name: ask(client, adapter_id=name, max_new_tokens=16), names)
        )
    assert [one["generated_text"] for one in together] == alone
    assert len(set(alone)) == 3


def aborted(client: httpx.Client) -> float:
    line = next(
        line
        for line in client.get("/metrics").text.splitlines()
        if line.startswith('vllm:request_success_total{finished_reason="abort"')
    )
    return float(line.rpartition(" ")[2])


@pytest.mark.parametrize("path", ["/generate", "/generate_stream"])
def test_a_client_that_goes_frees_everything(
    client: httpx.Client, server: Running, path: str
) -> None:
    server.settle()
    before = aborted(client)
    body = {"inputs": PROMPT, "parameters": {"max_new_tokens": 900, "ignore_eos": True, "n": 2}}
    asked = httpx.Request("POST", f"{server.url}{path}", json=body)
    lines = [
        f"POST {path} HTTP/1.1",
        *(f"{name}: {value}" for name, value in asked.headers.items()),
    ]
    with slowly(server.engine):
        with socket.create_connection(server.address, timeout=PATIENCE) as leaving:
            leaving.sendall("\r\n".join([*lines, "", ""]).encode() + asked.read())
            until(lambda: server.engine.stats().running == 2)
        until(lambda: server.desk.admission.inside == 0)
        server.settle()
        assert aborted(client) == before + 2  # both sequences, long before their 900 tokens


def test_a_full_queue_says_when_to_come_back(
    client: httpx.Client, server: Running, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(server.desk.admission, "max_queue", 0)
    for path in ("/generate", "/generate_stream"):
        reply = client.post(path, json={"inputs": PROMPT})
        assert reply.status_code == 503
        assert reply.json()["error_type"] == "overloaded"
        assert int(reply.headers["retry-after"]) >= 1
        assert "connection" not in reply.headers
    for path in ("/generate", "/", "/v1/completions", "/v1/chat/completions", "/v1/embeddings"):
        assert client.post(path, content=b"no JSON").status_code == 503, "the body was read first"
    monkeypatch.undo()
    # The engine has a bound of its own, for sequences: 64 of them cannot all wait.
    body = {"inputs": PROMPT, "parameters": {"n": 16, "max_new_tokens": 40, "ignore_eos": True}}
    with ThreadPoolExecutor(24) as pool:
        with held(server.engine):
            asked = [pool.submit(client.post, "/generate", json=body) for _ in range(24)]
            until(lambda: sum(one.done() for one in asked) == 20)
        statuses = Counter(one.result().status_code for one in asked)
    assert statuses == {200: 4, 503: 20}
    assert server.desk.admission.inside == 0


def test_lorax_client_body_is_understood(client: httpx.Client) -> None:
    """LoRAX's client sends every field it knows, most of them null."""
    parameters = {
        "adapter_id": "lora",
        "adapter_source": "local",
        "adapter_parameters": None,
        "merged_adapters": None,
        "api_token": None,
        "do_sample": False,
        "max_new_tokens": 4,
        "ignore_eos_token": False,
        "repetition_penalty": None,
        "return_full_text": False,
        "stop": [],
        "seed": None,
        "temperature": None,
        "top_k": None,
        "top_p": None,
        "truncate": None,
        "typical_p": None,
        "best_of": None,
        "watermark": False,
        "response_format": None,
        "details": True,
        "decoder_input_details": False,
        "return_k_alternatives": None,
    }
    body = {"inputs": PROMPT, "stream": False, "parameters": parameters}
    found = client.post("/generate", json=body)
    assert found.status_code == 200, found.text
    assert found.json()["details"]["adapter"]["name"] == "lora"
