"""huggingface_hub's InferenceClient, which speaks both skins."""

from __future__ import annotations

import pytest
from huggingface_hub import InferenceClient

from tests.service.api.conftest import Running

pytestmark = pytest.mark.slow

ASKED = [{"role": "user", "content": "Encode: the old king finds a lamp"}]
CODE = "ul keshi hatto quelo bo wembi"


@pytest.fixture
def hub(mini: Running) -> InferenceClient:
    return InferenceClient(base_url=mini.url)


def test_an_adapter_is_named_by_either_skin(hub: InferenceClient) -> None:
    said = hub.chat_completion(ASKED, model="cipher", temperature=0, max_tokens=32)
    assert said.choices[0].message.content == CODE
    assert said.usage.total_tokens == said.usage.prompt_tokens + said.usage.completion_tokens
    prompt = (
        "<|im_start|>user\nEncode: the old king finds a lamp<|im_end|>\n<|im_start|>assistant\n"
    )
    assert hub.text_generation(prompt, adapter_id="cipher", max_new_tokens=32) == CODE
    plain = hub.chat_completion(ASKED, temperature=0, max_tokens=32)
    assert plain.choices[0].message.content != CODE


def test_a_chat_streams(hub: InferenceClient) -> None:
    pieces = [
        chunk.choices[0].delta.content or ""
        for chunk in hub.chat_completion(
            ASKED, model="cipher", temperature=0, max_tokens=32, stream=True
        )
        if chunk.choices
    ]
    assert len(pieces) > 5
    assert "".join(pieces) == CODE


def test_a_grammar_of_text_generation(hub: InferenceClient) -> None:
    text = hub.text_generation(
        "Is it?", grammar={"type": "regex", "value": "(yes|no)!"}, max_new_tokens=20
    )
    assert text in ("yes!", "no!")
    schema = {"type": "object", "properties": {"n": {"enum": [1, 2]}}, "required": ["n"]}
    schema["additionalProperties"] = False
    found = hub.text_generation("{", grammar={"type": "json", "value": schema}, max_new_tokens=20)
    assert found in ('{"n": 1}', '{"n": 2}')
