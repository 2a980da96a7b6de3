"""litellm, as a proxy or a library in front of this server."""

from __future__ import annotations

import warnings
from typing import Any

import pytest

from tests.service.api.conftest import Running

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore")]

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    litellm: Any = pytest.importorskip("litellm")

ASKED = [{"role": "user", "content": "Encode: the old king finds a lamp"}]
CODE = "ul keshi hatto quelo bo wembi"


@pytest.fixture
def there(mini: Running) -> dict[str, Any]:
    return {"api_base": f"{mini.url}/v1", "api_key": "x"}


def test_chat_and_stream(there: dict[str, Any]) -> None:
    given = {**there, "model": "openai/cipher", "messages": ASKED, "temperature": 0}
    said = litellm.completion(**given)
    assert said.choices[0].message.content == CODE
    assert said.usage.completion_tokens == 17
    stream = litellm.completion(**given, stream=True)
    assert "".join(c.choices[0].delta.content or "" for c in stream) == CODE


def test_text_and_embedding(there: dict[str, Any]) -> None:
    text = litellm.text_completion(
        **there, model="text-completion-openai/mini", prompt="Once there ", max_tokens=4
    )
    assert text.choices[0].text
    found = litellm.embedding(**there, model="openai/mini", input=["a", "b"])
    assert len(found.data) == 2


def test_json_by_a_schema(there: dict[str, Any]) -> None:
    schema = {
        "type": "object",
        "properties": {"yes": {"type": "boolean"}},
        "required": ["yes"],
        "additionalProperties": False,
    }
    said = litellm.completion(
        **there,
        model="openai/mini",
        messages=ASKED,
        response_format={"type": "json_schema", "json_schema": {"name": "a", "schema": schema}},
    )
    assert said.choices[0].message.content in ('{"yes": true}', '{"yes": false}')


def test_errors_are_typed(there: dict[str, Any]) -> None:
    with pytest.raises(litellm.NotFoundError, match="nobody"):
        litellm.completion(**there, model="openai/nobody", messages=ASKED)
    with pytest.raises(litellm.BadRequestError, match="temperature"):
        litellm.completion(**there, model="openai/mini", messages=ASKED, temperature=-1)
