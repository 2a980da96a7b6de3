"""langchain-tests' own suite for chat models, over ChatOpenAI pointed at this server."""

from __future__ import annotations

import warnings
from typing import Any

import pytest

from tests.service.api.conftest import Running

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore")]

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    suite: Any = pytest.importorskip("langchain_tests.integration_tests")
    openai: Any = pytest.importorskip("langchain_openai")

ADDRESS: dict[str, str] = {}


@pytest.fixture(autouse=True, scope="module")
def address(mini: Running) -> None:
    ADDRESS["base_url"] = f"{mini.url}/v1"


class TestChat(suite.ChatModelIntegrationTests):  # type: ignore[misc]
    """What a model of a few million parameters cannot know is marked; the form is all there."""

    @property
    def chat_model_class(self) -> Any:
        return openai.ChatOpenAI

    @property
    def chat_model_params(self) -> dict[str, Any]:
        return {
            "model": "mini",
            "api_key": "x",
            "temperature": 0,
            "max_tokens": 64,
            "stream_usage": True,
            **ADDRESS,
        }

    @property
    def has_tool_calling(self) -> bool:
        return True

    @property
    def has_tool_choice(self) -> bool:
        return True

    @property
    def supports_json_mode(self) -> bool:
        return True

    @property
    def supports_image_inputs(self) -> bool:
        return False
