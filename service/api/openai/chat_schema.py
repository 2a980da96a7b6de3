"""The body of a chat completion: messages, tools, and what may be done with them."""

from __future__ import annotations

import json
from typing import Annotated, Any, Literal

from pydantic import ConfigDict, Discriminator, Field, Tag

from service.api.openai.schema import MAX_TOP, Count, Generating, Lenient
from service.api.retrieval import Retrieval
from service.api.templating import TemplateUse
from service.errors import InvalidRequest

Json = dict[str, Any]
MAX_TOOLS = 128
Name = Annotated[str, Field(min_length=1, max_length=256)]


class TextPart(Lenient):
    type: Literal["text", "refusal"]
    text: str = ""


class CalledFunction(Lenient):
    name: Name
    arguments: str = "{}"


class ToolCall(Lenient):
    id: str = Field(default="", max_length=256)
    type: Literal["function"] = "function"
    function: CalledFunction


def _content(value: Any) -> str | None:
    if isinstance(value, str):
        return "text"
    return "several parts" if isinstance(value, list) else None


Content = Annotated[
    Annotated[str, Tag("text")]
    | Annotated[list[TextPart], Field(max_length=1024), Tag("several parts")],
    Discriminator(
        _content, custom_error_type="content", custom_error_message="should be text or text parts"
    ),
]


class ChatMessage(Lenient):
    """One turn. `developer` is another name of system; null as content counts as empty."""

    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: Content = ""
    name: str | None = Field(default=None, max_length=256)
    tool_calls: list[ToolCall] = Field(default_factory=list, max_length=MAX_TOOLS)
    tool_call_id: str | None = Field(default=None, max_length=256)

    @property
    def plain(self) -> Json:
        """As the chat template gets it."""
        text = self.content
        content = text if isinstance(text, str) else "".join(part.text for part in text)
        role = "system" if self.role == "developer" else self.role
        found: Json = {"role": role, "content": content}
        if self.tool_calls:
            found["tool_calls"] = [_called(call) for call in self.tool_calls]
        if self.tool_call_id:
            found["tool_call_id"] = self.tool_call_id
        return found


def _called(call: ToolCall) -> Json:
    """Templates write the arguments themselves, so they get the object where it is one."""
    try:
        arguments = json.loads(call.function.arguments)
    except (ValueError, RecursionError):
        arguments = call.function.arguments
    return {
        "id": call.id,
        "type": "function",
        "function": {"name": call.function.name, "arguments": arguments},
    }


class Function(Lenient):
    name: Name
    description: str | None = Field(default=None, max_length=16384)
    parameters: dict[str, Any] | None = None


class Tool(Lenient):
    type: Literal["function"]
    function: Function

    @property
    def plain(self) -> Json:
        function: Json = {"name": self.function.name}
        if self.function.description:
            function["description"] = self.function.description
        function["parameters"] = self.function.parameters or {"type": "object", "properties": {}}
        return {"type": "function", "function": function}


class NamedFunction(Lenient):
    name: Name


class NamedTool(Lenient):
    type: Literal["function"]
    function: NamedFunction


def _choice(value: Any) -> str | None:
    if isinstance(value, str):
        return "text"
    return "object" if isinstance(value, dict | NamedTool) else None


ToolChoice = Annotated[
    Annotated[Literal["none", "auto", "required"], Tag("text")]
    | Annotated[NamedTool, Tag("object")],
    Discriminator(
        _choice,
        custom_error_type="tool_choice",
        custom_error_message="should be none, auto, required, or one function",
    ),
]


class ChatBody(Generating):
    """A chat and how to continue it. Unknown fields are ignored."""

    model_config = ConfigDict(
        json_schema_extra={
            "examples": [
                {
                    "model": "mini",
                    "messages": [{"role": "user", "content": "Name the first three letters."}],
                    "max_completion_tokens": 24,
                    "temperature": 0,
                },
                {
                    "model": "mini",
                    "messages": [{"role": "user", "content": "Is the sky blue?"}],
                    "response_format": {
                        "type": "json_schema",
                        "json_schema": {
                            "name": "answer",
                            "schema": {
                                "type": "object",
                                "properties": {"yes": {"type": "boolean"}},
                                "required": ["yes"],
                                "additionalProperties": False,
                            },
                        },
                    },
                },
            ]
        }
    )

    messages: list[ChatMessage] = Field(
        default_factory=list,
        max_length=1024,
        description="At least one, but where a template takes no input.",
    )
    max_completion_tokens: Count | None = Field(
        default=None, description="At most; all that fits when left out."
    )
    max_tokens: Count | None = Field(default=None, description="The older name of it.")
    logprobs: bool = False
    top_logprobs: int = Field(default=0, ge=0, le=MAX_TOP)
    tools: list[Tool] = Field(default_factory=list, max_length=MAX_TOOLS)
    tool_choice: ToolChoice | None = None
    retrieval: Retrieval | None = Field(
        default=None, description="Passages of a collection, before the question (extra_body)."
    )
    template: TemplateUse | None = Field(
        default=None,
        description="A prompt template of this server, around the last message (extra_body).",
    )

    @property
    def offered(self) -> list[Json]:
        """The tools that may be called."""
        if self.tool_choice == "none":
            return []
        if not isinstance(self.tool_choice, NamedTool):
            return [tool.plain for tool in self.tools]
        name = self.tool_choice.function.name
        found = [tool.plain for tool in self.tools if tool.function.name == name]
        if not found:
            raise InvalidRequest(
                f"tool_choice names {name!r}, which is no tool here", "tool_choice"
            )
        return found

    @property
    def speaks_of_tools(self) -> bool:
        found = bool(self.tools) or self.must_call
        return found or any(m.tool_calls or m.role == "tool" for m in self.messages)

    @property
    def must_call(self) -> bool:
        if self.tool_choice == "required" and not self.tools:
            raise InvalidRequest("tool_choice is required, but there are no tools", "tool_choice")
        return self.tool_choice == "required" or isinstance(self.tool_choice, NamedTool)
