"""The clients that others wrote, against a real socket."""

from __future__ import annotations

import asyncio

import httpx
import pytest
from huggingface_hub import AsyncInferenceClient, InferenceClient
from huggingface_hub.errors import ValidationError

from tests.service.api.conftest import PATIENCE, Running

PROMPT = "two boats left the harbour"


@pytest.fixture
def hub(server: Running) -> InferenceClient:
    return InferenceClient(model=server.url)


def test_text(hub: InferenceClient) -> None:
    one = hub.text_generation(PROMPT, adapter_id="lora", max_new_tokens=6)
    other = hub.text_generation(PROMPT, adapter_id="dora", max_new_tokens=6)
    assert isinstance(one, str)
    assert one
    assert one != other


def test_details(hub: InferenceClient) -> None:
    found = hub.text_generation(
        PROMPT,
        adapter_id="lora",
        max_new_tokens=6,
        details=True,
        decoder_input_details=True,
        top_n_tokens=3,
        do_sample=True,
        temperature=0.9,
        top_p=0.95,
        top_k=50,
        repetition_penalty=1.1,
        frequency_penalty=0.1,
        seed=3,
        stop=["zzzz"],
        best_of=2,
        return_full_text=True,
    )
    assert found.generated_text.startswith(PROMPT)
    assert found.details is not None
    assert found.details.finish_reason in ("length", "eos_token")
    assert found.details.generated_tokens == len(found.details.tokens)
    assert "".join(token.text for token in found.details.prefill) == PROMPT
    assert found.details.seed in (3, 4)
    assert found.details.best_of_sequences is not None
    assert len(found.details.best_of_sequences) == 1
    assert found.details.top_tokens is not None
    assert [len(top) for top in found.details.top_tokens] == [3] * found.details.generated_tokens


def test_stream_of_text(hub: InferenceClient) -> None:
    whole = hub.text_generation(PROMPT, adapter_id="lora", max_new_tokens=6)
    pieces = list(hub.text_generation(PROMPT, adapter_id="lora", max_new_tokens=6, stream=True))
    assert len(pieces) == 6
    assert "".join(pieces) == whole


def test_stream_of_details(hub: InferenceClient) -> None:
    events = list(
        hub.text_generation(PROMPT, max_new_tokens=6, stream=True, details=True, top_n_tokens=2)
    )
    assert [event.index for event in events] == [1, 2, 3, 4, 5, 6]
    *before, last = events
    assert all(event.details is None and event.generated_text is None for event in before)
    assert last.generated_text == "".join(event.token.text for event in events)
    assert last.details is not None
    assert (last.details.finish_reason, last.details.generated_tokens) == ("length", 6)
    assert last.details.input_length > 0


def test_chat_by_model(server: Running) -> None:
    hub = InferenceClient(base_url=server.url)
    asked = [{"role": "user", "content": PROMPT}]
    given = {"inputs": asked, "parameters": {"adapter_id": "lora", "max_new_tokens": 6}}
    plain = httpx.post(f"{server.url}/generate", json=given, timeout=PATIENCE).json()
    said = hub.chat_completion(asked, model="lora", max_tokens=6, temperature=0)
    assert said.choices[0].message.content == plain["generated_text"]
    pieces = hub.chat_completion(asked, model="lora", max_tokens=6, temperature=0, stream=True)
    assert "".join(p.choices[0].delta.content or "" for p in pieces) == plain["generated_text"]
    assert hub.chat_completion(asked, max_tokens=1).model == "dummy"


def test_refusal_is_the_client_s_own_exception(hub: InferenceClient) -> None:
    with pytest.raises(ValidationError, match=r"temperature: should be .* 0.01.*got 0"):
        hub.text_generation(PROMPT, temperature=0.0)


def test_many_streams_at_once(server: Running) -> None:
    async def collect(client: AsyncInferenceClient, adapter: str | None) -> str:
        stream = await client.text_generation(
            PROMPT, adapter_id=adapter, max_new_tokens=12, stream=True
        )
        return "".join([piece async for piece in stream])

    async def everybody() -> list[str]:
        async with AsyncInferenceClient(model=server.url) as client:
            adapters = [None, "lora", "dora"] * 5
            return await asyncio.gather(*(collect(client, adapter) for adapter in adapters))

    texts = asyncio.run(everybody())
    assert texts == texts[:3] * 5
    assert len(set(texts)) == 3
