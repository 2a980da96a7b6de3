"""Chats to token ids: the one renderer, for training and for serving. No torch here.

A template is somebody's program: it runs in `adapters.sandbox`. And what a user wrote must stay
text: `<|im_end|>` inside a message must not become the token that ends the message.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from itertools import pairwise
from typing import Any, NamedTuple

import jinja2

from adapters.errors import InvalidAdapter, InvalidChat, TooLarge
from adapters.limits import Limits
from adapters.sandbox import FAILURES, begin, run

ROLES = ("system", "user", "assistant", "tool")

SAMPLE_CHATS = tuple(
    [{"role": role, "content": f"This is the {role}'s text."} for role in roles]
    for roles in (("user",), ("system", "user"), ("user", "assistant", "user"))
)


class RenderedChat(NamedTuple):
    text: str
    ids: list[int]


# A message: role and content; of a tool's use also tool_calls, tool_call_id, name.
Message = Mapping[str, Any]
_OPTIONAL = frozenset({"tool_calls", "tool_call_id", "name"})


def render_chat(
    tokenizer: Any,
    messages: Sequence[Message],
    template: str | None = None,
    *,
    tools: Sequence[Mapping[str, Any]] | None = None,
    add_generation_prompt: bool = True,
    answer: str = "",
) -> list[int]:
    """Token ids of a chat; see `render`."""
    return render(
        tokenizer,
        messages,
        template,
        tools=tools,
        add_generation_prompt=add_generation_prompt,
        answer=answer,
    ).ids


def render(
    tokenizer: Any,
    messages: Sequence[Message],
    template: str | None = None,
    *,
    tools: Sequence[Mapping[str, Any]] | None = None,
    add_generation_prompt: bool = True,
    answer: str = "",
) -> RenderedChat:
    """Text and token ids of a chat by a template: the adapter's own, or (None) the base's.

    Every control token in the result comes from the template. Where a message spells one, the
    ids spell it too, in ordinary tokens. Without such a message the ids are those of
    `tokenizer.apply_chat_template`. Thread-safe as far as `tokenizer.encode` is.

    `tools` are functions by OpenAI's schema, for a template that shows them. They, and calls of
    them in messages, may spell no control token: a template may write them in any way.
    `answer` is how the assistant's turn begins, after the chat: a text, whatever it spells.

    Raises InvalidChat: bad messages, no template, a template that fails or works too long.
    """
    _check_messages(messages)
    source = template if template is not None else own_template(tokenizer)
    control = _control_tokens(tokenizer)
    _refuse_control(tools, "a tool", control.values())
    facts = dict(tokenizer.special_tokens_map)

    def fill(contents: Iterable[str]) -> str:
        filled = [{**m, "content": c} for m, c in zip(messages, contents, strict=True)]
        return _run(source, filled, add_generation_prompt, facts, tools)

    for number, message in enumerate(messages):
        rest = {name: value for name, value in message.items() if name != "content"}
        _refuse_control(rest, f"message {number}", control.values())
    contents = [message["content"] for message in messages]
    mark = _unused_character([source, *contents])
    marked = fill(_break_apart(content, control.values(), mark) for content in contents)
    ids = _encode(tokenizer, marked.split(mark))
    # The same chat with harmless contents: the template's control tokens, and nobody else's.
    frame = fill("x" if content.strip() else content for content in contents)
    if _only(ids, control) != _only(_encode(tokenizer, [frame]), control):
        raise InvalidChat("a message's text would become control tokens of the chat template")
    begun = text_ids(tokenizer, answer) if answer else []
    return RenderedChat(marked.replace(mark, "") + answer, [*ids, *begun])


def text_ids(tokenizer: Any, text: str) -> list[int]:
    """Token ids of a text that is nobody's command: a control token that it spells is spelled out.

    Raises InvalidChat where a tokenizer makes control tokens of other words, too.
    """
    control = _control_tokens(tokenizer)
    mark = _unused_character([text])
    ids = _encode(tokenizer, _break_apart(text, control.values(), mark).split(mark))
    if _only(ids, control):
        raise InvalidChat("the text would become control tokens of the base")
    return ids


def check_template(template: str, limits: Limits) -> None:
    """Compile an uploaded template and render sample chats with it.

    To be called where time and memory are bounded (`validate_in_child`).

    Raises InvalidAdapter or TooLarge.
    """
    if len(template.encode()) > limits.max_template_bytes:
        raise TooLarge(f"more than {limits.max_template_bytes} bytes", "template")
    special = {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>", "unk_token": "<unk>"}
    shown = False
    for chat in SAMPLE_CHATS:
        try:
            text = _run(template, chat, True, special)
        except InvalidChat as error:
            if len(chat) == 1:  # a template may refuse a system message, but never a lone user's
                raise InvalidAdapter(str(error), "template") from error
        else:
            shown |= chat[-1]["content"] in text
    if not shown:
        raise InvalidAdapter("the rendered chat does not contain the user's text", "template")


def own_template(tokenizer: Any) -> str:
    """The base's chat template. Raises InvalidChat when there is none."""
    template = tokenizer.chat_template
    if isinstance(template, dict):
        template = template.get("default")
    if not template:
        raise InvalidChat("the base has no chat template: send a plain prompt, or a template")
    return str(template)


def _refuse_control(value: Any, where: str, control: Iterable[str]) -> None:
    """Raise InvalidChat when a text anywhere in `value` spells a control token."""
    spelled = json.dumps(value, ensure_ascii=False) if value else ""
    found = next((token for token in control if json.dumps(token)[1:-1] in spelled), None)
    if found is not None:
        raise InvalidChat(f"{where} spells the control token {found!r} of the chat template")


def _check_messages(messages: Sequence[Message]) -> None:
    if not messages:
        raise InvalidChat("the chat has no messages")
    for number, message in enumerate(messages):
        if set(message) - _OPTIONAL != {"role", "content"}:
            found = ", ".join(sorted(map(str, message)))
            raise InvalidChat(f"message {number} has {found or 'nothing'}, expected role, content")
        if message["role"] not in ROLES:
            raise InvalidChat(
                f"message {number} has role {str(message['role'])[:40]!r}, "
                f"expected one of {', '.join(ROLES)}"
            )
        if not isinstance(message["content"], str):
            raise InvalidChat(f"message {number}: the content must be text")


def _control_tokens(tokenizer: Any) -> dict[int, str]:
    """The special tokens by id. Not the unknown token: ordinary text may contain that one."""
    special = {
        token: added.content
        for token, added in tokenizer.added_tokens_decoder.items()
        if added.special
    }
    special.pop(tokenizer.unk_token_id, None)
    return special


def _unused_character(texts: Sequence[str]) -> str:
    """A private-use character that occurs in none of the texts."""
    taken = set().union(*texts)
    return next(c for c in map(chr, range(0xF0000, 0xFFFFE)) if c not in taken)


def _break_apart(content: str, special: Iterable[str], mark: str) -> str:
    """The content with the mark inside every special token that it spells.

    Pieces between marks hold no whole one: whatever they held, the content held at that place.
    """
    cuts: set[int] = set()
    for token in special:
        at = content.find(token)
        while at >= 0:
            cuts.add(at + 1)
            at = content.find(token, at + 1)
    bounds = [0, *sorted(cuts), len(content)]
    return mark.join(content[a:b] for a, b in pairwise(bounds))


def _encode(tokenizer: Any, pieces: Iterable[str]) -> list[int]:
    # Not `split_special_tokens`: it is a switch inside the tokenizer that all threads share.
    return [
        int(token)
        for piece in pieces
        if piece
        for token in tokenizer.encode(piece, add_special_tokens=False)
    ]


def _only(ids: Iterable[int], control: Mapping[int, str]) -> list[int]:
    return [token for token in ids if token in control]


def _run(
    source: str,
    messages: Sequence[Message],
    add_generation_prompt: bool,
    facts: Mapping[str, Any],
    tools: Sequence[Mapping[str, Any]] | None = None,
) -> str:
    values = {
        "messages": messages,
        "add_generation_prompt": add_generation_prompt,
        "tools": list(tools) if tools else None,
        "documents": None,
        **{name: str(value) for name, value in facts.items() if isinstance(value, str)},
    }
    begin()
    try:
        return run(source, values)
    except jinja2.TemplateError as error:
        raise InvalidChat(f"the chat template says: {str(error)[:500]}") from error
    except FAILURES as error:
        what = f"{type(error).__name__}: {str(error)[:200]}"
        raise InvalidChat(f"the chat template failed: {what}") from error
