"""The OpenAI skin against a real server, by OpenAI's own client: each field does what it says."""

from __future__ import annotations

import base64
import json
import math
import struct
from collections.abc import Iterator
from typing import Any

import httpx
import pytest
from openai import BadRequestError, NotFoundError, OpenAI

from service.api.openai.replies import ChatChunk, ChatCompletion, EmbeddingList, TextCompletion
from tests.service.api.conftest import PATIENCE, Running

PROMPT = "two boats left the harbour"
CHAT: list[Any] = [{"role": "user", "content": PROMPT}]
WEATHER: dict[str, Any] = {
    "type": "function",
    "function": {
        "name": "weather",
        "description": "of a town",
        "parameters": {
            "type": "object",
            "properties": {"town": {"enum": ["Kesh", "Tovan"]}, "days": {"type": "integer"}},
            "required": ["town"],
        },
    },
}


@pytest.fixture(scope="module")
def openai(server: Running) -> Iterator[OpenAI]:
    with OpenAI(base_url=f"{server.url}/v1", api_key="x", timeout=PATIENCE, max_retries=0) as found:
        yield found


def test_models_are_the_base_and_its_adapters(openai: OpenAI, server: Running) -> None:
    assert server.desk.serving is not None
    spec = server.desk.serving.spec
    found = {model.id: model.model_extra for model in openai.models.list()}
    assert {spec.id, "lora", "dora"} <= set(found)
    assert found[spec.id]["parent"] is None  # type: ignore[index]
    assert found["lora"]["parent"] == spec.id  # type: ignore[index]
    one = openai.models.retrieve("lora")
    assert one.model_extra is not None
    by_root = openai.chat.completions.create(
        model=one.model_extra["root"], messages=CHAT, temperature=0, max_tokens=4
    )
    by_name = openai.chat.completions.create(
        model="lora", messages=CHAT, temperature=0, max_tokens=4
    )
    assert by_root.choices[0].message == by_name.choices[0].message


@pytest.mark.parametrize("model", ["nobody", "nobody@2", "lora@nothing", "gpt:4o", "a b"])
def test_a_model_that_is_not_there(openai: OpenAI, model: str) -> None:
    with pytest.raises(NotFoundError) as refused:
        openai.chat.completions.create(model=model, messages=CHAT)
    assert (refused.value.code, refused.value.param) == ("model_not_found", "model")
    with pytest.raises(NotFoundError):
        openai.completions.create(model=model, prompt="x")
    with pytest.raises(NotFoundError):
        openai.embeddings.create(model=model, input="x")
    with pytest.raises(NotFoundError):
        openai.models.retrieve(model)


def test_an_adapter_is_deleted_as_a_model(openai: OpenAI, client: httpx.Client) -> None:
    body = {"parts": [{"adapter": "lora", "weight": 0.5}]}
    assert client.post("/adapters/brief/compose", json=body).status_code == 201
    assert openai.models.delete("brief").deleted
    with pytest.raises(NotFoundError):
        openai.models.delete("brief")
    with pytest.raises(BadRequestError, match="the base cannot be deleted"):
        openai.models.delete("tgi")


def test_the_same_answer_as_the_other_skin(openai: OpenAI, client: httpx.Client) -> None:
    for model, adapter in (("tgi", None), ("lora", "lora"), ("lora@1", "lora@1")):
        given = {"adapter_id": adapter, "max_new_tokens": 8}
        plain = client.post("/generate", json={"inputs": PROMPT, "parameters": given}).json()
        text = openai.completions.create(model=model, prompt=PROMPT, max_tokens=8, temperature=0)
        assert text.choices[0].text == plain["generated_text"]
        chat = client.post("/generate", json={"inputs": CHAT, "parameters": given}).json()
        said = openai.chat.completions.create(
            model=model, messages=CHAT, max_completion_tokens=8, temperature=0
        )
        assert said.choices[0].message.content == chat["generated_text"]
        assert said.usage is not None
        assert said.usage.completion_tokens == 8


def test_a_sum_is_a_model(openai: OpenAI, client: httpx.Client) -> None:
    client.put("/adapters/lora/aliases/prod", json={"version": 1})
    text = openai.completions.create(
        model="lora@prod:0.5", prompt=PROMPT, max_tokens=8, temperature=0
    )
    given = {"adapter_id": "lora:0.5", "max_new_tokens": 8}
    plain = client.post("/generate", json={"inputs": PROMPT, "parameters": given}).json()
    assert text.choices[0].text == plain["generated_text"]
    client.delete("/adapters/lora/aliases/prod")


def test_replies_have_the_shape_that_openapi_says(client: httpx.Client) -> None:
    body = {"model": "lora", "messages": CHAT, "max_tokens": 3, "logprobs": True, "top_logprobs": 2}
    ChatCompletion.model_validate(client.post("/v1/chat/completions", json=body).json())
    text = {"model": "lora", "prompt": ["a b", "c"], "max_tokens": 3, "echo": True, "logprobs": 2}
    TextCompletion.model_validate(client.post("/v1/completions", json=text).json())
    embedded = client.post("/v1/embeddings", json={"model": "lora", "input": "a b"})
    EmbeddingList.model_validate(embedded.json())
    assert len(embedded.headers["x-adapter-digest"]) == 64
    for path, sent in (("/v1/chat/completions", body), ("/v1/completions", text)):
        sent = {**sent, "stream": True, "stream_options": {"include_usage": True}, "n": 2}
        lines = client.post(path, json=sent).text.split("\n\n")
        assert lines[-2:] == ["data: [DONE]", ""]
        for line in lines[:-2]:
            event = json.loads(line.removeprefix("data: "))
            (ChatChunk if "chat" in path else TextCompletion).model_validate(event)


def test_stream_joins_to_the_whole(openai: OpenAI) -> None:
    given: dict[str, Any] = {"model": "dora", "messages": CHAT, "max_tokens": 9, "temperature": 0}
    whole = openai.chat.completions.create(**given, logprobs=True, n=2)
    texts, reasons, scored, usage = ["", ""], [None, None], [0, 0], None
    stream = openai.chat.completions.create(
        **given, logprobs=True, n=2, stream=True, stream_options={"include_usage": True}
    )
    for chunk in stream:
        usage = chunk.usage or usage
        for choice in chunk.choices:
            texts[choice.index] += choice.delta.content or ""
            reasons[choice.index] = choice.finish_reason or reasons[choice.index]  # type: ignore[call-overload]
            scored[choice.index] += len((choice.logprobs and choice.logprobs.content) or [])
    assert texts == [choice.message.content for choice in whole.choices]
    assert reasons == ["length", "length"]
    assert scored == [9, 9]
    assert usage is not None
    assert whole.usage is not None
    assert (usage.prompt_tokens, usage.completion_tokens) == (whole.usage.prompt_tokens, 18)


def test_seed_stop_and_bias(openai: OpenAI) -> None:
    given: dict[str, Any] = {"model": "tgi", "prompt": PROMPT, "max_tokens": 12}
    one, two = (openai.completions.create(**given, seed=seed, n=2).choices for seed in (-7, 7))
    assert [c.text for c in one] == [c.text for c in two], "the sign of a seed is nothing"
    greedy = openai.completions.create(**given, temperature=0, logprobs=0).choices[0]
    stop = greedy.text[4:6]
    stopped = openai.completions.create(**given, temperature=0, stop=stop).choices[0]
    assert stopped.finish_reason == "stop"
    assert stopped.text == greedy.text[: greedy.text.index(stop)]
    forced = openai.completions.create(**given, temperature=0, logit_bias={"7": 100}, logprobs=0)
    assert forced.choices[0].logprobs is not None
    assert len(set(forced.choices[0].logprobs.tokens or [])) == 1


def test_likelihoods_of_a_prompt(openai: OpenAI) -> None:
    """What an evaluation harness asks: ids, echoed, with the likeliest token at each place."""
    ids = [5, 9, 11, 30, 31]
    given: dict[str, Any] = {"model": "lora", "prompt": ids, "echo": True, "logprobs": 1}
    scored = openai.completions.create(**given, max_tokens=0, temperature=0)
    longer = openai.completions.create(**given, max_tokens=2, temperature=0)
    found, other = scored.choices[0].logprobs, longer.choices[0].logprobs
    assert found is not None
    assert other is not None
    assert found.token_logprobs is not None
    assert other.token_logprobs is not None
    assert found.top_logprobs is not None
    assert len(found.token_logprobs) == 5
    assert found.token_logprobs == other.token_logprobs[:5]
    assert found.token_logprobs[0] is None
    for value, top in zip(found.token_logprobs[1:], found.top_logprobs[1:], strict=True):
        assert value <= max(top.values())
    assert scored.usage is not None
    assert scored.usage.completion_tokens == 0
    assert longer.choices[0].text.startswith(scored.choices[0].text)
    offsets = other.text_offset or []
    assert offsets == sorted(offsets)


def test_best_of_keeps_the_likeliest(openai: OpenAI) -> None:
    given: dict[str, Any] = {"model": "tgi", "prompt": PROMPT, "max_tokens": 6, "seed": 3}
    every = openai.completions.create(**given, n=4, logprobs=0).choices
    best = openai.completions.create(**given, n=1, best_of=4).choices
    means = [sum(c.logprobs.token_logprobs or []) for c in every if c.logprobs]  # type: ignore[arg-type]
    assert [c.text for c in best] == [every[means.index(max(means))].text]


@pytest.mark.parametrize(
    "extra",
    [
        {"guided_regex": "[ab]{3}"},
        {"structured_outputs": {"regex": "[ab]{3}"}},
        {"guided_grammar": 'start: ("a" | "b") start | ("a" | "b")', "max_tokens": 1},
        {"guided_choice": ["aba", "bab"]},
        {"structured_outputs": {"choice": ["aba", "bab"]}},
    ],
)
def test_guided_texts(openai: OpenAI, extra: dict[str, Any]) -> None:
    said = openai.chat.completions.create(model="lora", messages=CHAT, extra_body=extra, n=2)
    for choice in said.choices:
        assert choice.message.content is not None
        assert set(choice.message.content) <= {"a", "b"}
        assert len(choice.message.content) <= 3


def test_json_by_response_format(openai: OpenAI) -> None:
    schema = {
        "type": "object",
        "properties": {"n": {"enum": [1, 22]}, "ok": {"type": "boolean"}},
        "required": ["n", "ok"],
        "additionalProperties": False,
    }
    said = openai.chat.completions.create(
        model="dora",
        messages=CHAT,
        response_format={"type": "json_schema", "json_schema": {"name": "x", "schema": schema}},
    )
    found = json.loads(said.choices[0].message.content or "")
    assert set(found) == {"n", "ok"}
    free = openai.chat.completions.create(
        model="dora", messages=CHAT, response_format={"type": "json_object"}, max_tokens=6
    )
    assert (free.choices[0].message.content or "").startswith("{")


@pytest.mark.parametrize(
    "choice", ["required", {"type": "function", "function": {"name": "weather"}}]
)
def test_a_required_call_follows_its_schema(openai: OpenAI, choice: Any) -> None:
    given: dict[str, Any] = {"model": "tgi", "messages": CHAT, "tools": [WEATHER]}
    given |= {"tool_choice": choice, "temperature": 0, "max_tokens": 200}
    given |= {"extra_body": {"logit_bias": {}}}
    said = openai.chat.completions.create(**given).choices[0]
    if said.finish_reason == "length":  # digits without end
        pytest.skip("the random base never ends the number")
    assert said.finish_reason == "tool_calls"
    assert said.message.tool_calls is not None
    call = said.message.tool_calls[0]
    assert call.type == "function"
    assert call.function.name == "weather"
    assert json.loads(call.function.arguments)["town"] in ("Kesh", "Tovan")
    deltas = [
        called
        for chunk in openai.chat.completions.create(**given, stream=True)
        for option in chunk.choices
        for called in option.delta.tool_calls or []
    ]
    assert [d.function.arguments for d in deltas if d.function] == [call.function.arguments]


def test_tools_without_a_template_for_them_are_in_the_prompt(openai: OpenAI) -> None:
    plain = openai.chat.completions.create(model="tgi", messages=CHAT, max_tokens=1)
    given = [
        *CHAT,
        {
            "role": "assistant",
            "content": None,
            "tool_calls": [
                {"id": "1", "type": "function", "function": {"name": "weather", "arguments": "{}"}}
            ],
        },
        {"role": "tool", "tool_call_id": "1", "content": "rain"},
    ]
    shown = openai.chat.completions.create(
        model="tgi",
        messages=given,
        tools=[WEATHER],
        max_tokens=1,  # type: ignore[list-item]
    )
    assert plain.usage is not None
    assert shown.usage is not None
    assert shown.usage.prompt_tokens > plain.usage.prompt_tokens + 50
    assert isinstance(shown.choices[0].message.content, str)


def test_embeddings(openai: OpenAI, client: httpx.Client) -> None:
    texts = ["two boats", "one harbour", "two boats"]
    found = openai.embeddings.create(model="lora", input=texts)
    first, other, again = (one.embedding for one in found.data)
    assert first == again != other
    assert math.isclose(sum(x * x for x in first), 1, rel_tol=1e-5)
    base = openai.embeddings.create(model="tgi", input=texts[0]).data[0].embedding
    assert base != first
    body = {"model": "lora", "input": texts[0]}
    packed = client.post("/v1/embeddings", json=body).json()["data"][0]["embedding"]
    assert struct.unpack(f"<{len(first)}f", base64.b64decode(packed)) == pytest.approx(first)
    short = openai.embeddings.create(model="lora", input=texts[0], dimensions=2).data[0].embedding
    assert math.isclose(sum(x * x for x in short), 1, rel_tol=1e-5)
    ids = openai.embeddings.create(model="lora", input=[[4, 5], [6]])
    assert len(ids.data) == 2
    assert ids.usage.prompt_tokens == 3


def test_passages_ride_in_extra_body(openai: OpenAI, client: httpx.Client) -> None:
    pytest.importorskip("lancedb", reason="needs the extra rag")
    assert client.post("/collections", json={"name": "towns"}).status_code == 201
    documents = [{"id": "merla", "text": "Merla lives in Tovan and bakes bread."}]
    added = client.post("/collections/towns/documents", json={"documents": documents})
    assert added.status_code == 200, added.text
    asked: list[Any] = [{"role": "user", "content": "Where does Merla live?"}]
    extra = {"retrieval": {"collection": "towns"}}
    given: dict[str, Any] = {"model": "tgi", "messages": asked, "max_tokens": 2}
    plain = openai.chat.completions.create(**given)
    said = openai.chat.completions.create(**given, extra_body=extra)
    ChatCompletion.model_validate(said.model_dump(exclude_unset=True))
    assert said.model_extra is not None
    assert said.model_extra["retrieval"]["citations"][0]["document"] == "merla"
    assert said.usage is not None
    assert plain.usage is not None
    assert said.usage.prompt_tokens > plain.usage.prompt_tokens
    first, *_ = openai.chat.completions.create(**given, extra_body=extra, stream=True)
    assert first.model_extra is not None
    assert first.model_extra["retrieval"]["citations"]
    client.delete("/collections/towns")


def test_unknown_fields_are_ignored_and_known_ones_are_read(openai: OpenAI) -> None:
    openai.chat.completions.create(
        model="tgi",
        messages=CHAT,
        max_tokens=1,
        user="ada",
        store=True,
        metadata={"a": "b"},
        parallel_tool_calls=True,
        service_tier="auto",
        extra_body={"colour": "red"},
    )


REFUSED = [
    ({"messages": []}, "messages"),
    ({"messages": [{"role": "judge", "content": "x"}]}, "messages.0.role"),
    ({"temperature": -1}, "temperature"),
    ({"temperature": 1e300}, "temperature"),
    ({"n": 0}, "n"),
    ({"n": 10**9}, "n"),
    ({"top_logprobs": 21, "logprobs": True}, "top_logprobs"),
    ({"max_tokens": 0}, "max_tokens"),
    ({"max_tokens": 10**6}, "max_tokens"),
    ({"max_completion_tokens": 10**6}, "max_completion_tokens"),
    ({"logit_bias": {"a": 1}}, "logit_bias.a"),
    ({"logit_bias": {"7": 101}}, "logit_bias.7"),
    ({"logit_bias": {"9999999": 1}}, "logit_bias"),
    ({"stop": ["x"] * 17}, "stop"),
    ({"seed": 2**70}, "seed"),
    ({"guided_regex": "[a"}, "guided_regex"),
    ({"guided_regex": "a", "guided_choice": ["a"]}, "guided_choice"),
    ({"response_format": {"type": "json_schema"}}, "response_format.json_schema"),
    ({"response_format": {"type": "xml"}}, "response_format.type"),
    ({"tool_choice": "required"}, "tool_choice"),
    ({"messages": [{"role": "user", "content": "a" * 9000}]}, "messages"),
    ({"stream_options": {"include_usage": True}}, None),
]


@pytest.mark.parametrize(("wrong", "param"), REFUSED)
def test_refusals_name_the_field(client: httpx.Client, wrong: Any, param: str | None) -> None:
    body = {"model": "tgi", "messages": CHAT, **wrong}
    reply = client.post("/v1/chat/completions", json=body)
    error = reply.json()["error"]
    assert (reply.status_code, error["type"]) == (400, "invalid_request_error"), error
    assert (error["param"] or "").startswith(param or ""), error


def test_refusals_of_completions(openai: OpenAI) -> None:
    wrong: list[tuple[dict[str, Any], str]] = [
        ({"prompt": []}, "prompt"),
        ({"prompt": [[]]}, "prompt"),
        ({"prompt": ["a", [1]]}, "prompt"),
        ({"prompt": [99999999]}, "prompt"),
        ({"prompt": [600]}, "prompt"),
        ({"prompt": ["a"] * 200, "n": 2}, "prompt"),
        ({"best_of": 1, "n": 2}, "best_of"),
        ({"best_of": 2, "temperature": 0}, "best_of"),
        ({"best_of": 2, "stream": True}, "best_of"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"logprobs": 21}, "logprobs"),
        ({"suffix": "x"}, "suffix"),
    ]
    for fields, param in wrong:
        with pytest.raises(BadRequestError) as refused:
            openai.completions.create(**{"model": "tgi", "prompt": "x", **fields})
        assert str(refused.value.param).startswith(param), (fields, refused.value)
