"""Chats to token ids: the one renderer, for training and for serving. No torch here.

Two dangers live here. A template is somebody's program: it runs in jinja's sandbox with a budget
of work, on top. And what a user wrote must stay text: `<|im_end|>` inside a message must not
become the token that ends the message.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextvars import ContextVar
from datetime import datetime
from functools import lru_cache
from itertools import islice, pairwise
from typing import Any, NamedTuple, NoReturn

import jinja2
from jinja2 import nodes
from jinja2.exceptions import SecurityError
from jinja2.ext import Extension, loopcontrols
from jinja2.meta import find_undeclared_variables
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

from adapters.errors import InvalidAdapter, InvalidChat, InvalidTemplate, TooLarge
from adapters.limits import KIB, MIB, Limits

ROLES = ("system", "user", "assistant", "tool")
MAX_TEXT = 4 * MIB  # characters of one rendered chat
MAX_RANGE = 10_000
MAX_BITS = 4096  # of a whole number
STEPS = 200_000  # one per loop turn and call, and one per KiB of text that is made

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


# Contents stay text -----------------------------------------------------------------------------


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


# Templates work within a budget -----------------------------------------------------------------


def _run(
    source: str,
    messages: Sequence[Message],
    add_generation_prompt: bool,
    facts: Mapping[str, Any],
    tools: Sequence[Mapping[str, Any]] | None = None,
) -> str:
    _budget.set(Budget())
    try:
        template = _compile(source)
        pieces = template.generate(
            messages=messages,
            add_generation_prompt=add_generation_prompt,
            tools=list(tools) if tools else None,
            documents=None,
            **{name: str(value) for name, value in facts.items() if isinstance(value, str)},
        )
        return "".join(_bounded(pieces))
    except jinja2.TemplateError as error:
        raise InvalidChat(f"the chat template says: {str(error)[:500]}") from error
    except FAILURES as error:
        what = f"{type(error).__name__}: {str(error)[:200]}"
        raise InvalidChat(f"the chat template failed: {what}") from error


def fill_texts(sources: Mapping[str, str], values: Mapping[str, Any]) -> dict[str, str]:
    """Each template of `sources` with the values, all within one budget.

    Raises InvalidTemplate, whose `where` is the key of the one that failed.
    """
    _budget.set(Budget())
    found: dict[str, str] = {}
    for place, source in sources.items():
        try:
            found[place] = "".join(_bounded(_compile(source).generate(values)))
        except jinja2.TemplateSyntaxError as error:
            reason = f"line {error.lineno}: {str(error.message)[:300]}"
            raise InvalidTemplate(reason, place) from error
        except jinja2.TemplateError as error:
            raise InvalidTemplate(str(error)[:300], place) from error
        except FAILURES as error:
            what = f"{type(error).__name__}: {str(error)[:200]}"
            raise InvalidTemplate(f"failed: {what}", place) from error
    return found


@lru_cache(maxsize=1024)
def names_in(source: str) -> frozenset[str]:
    """What a template takes from outside, the clock among it. Raises InvalidTemplate."""
    try:
        tree = ENVIRONMENT.parse(source)
    except jinja2.TemplateError as error:
        line = getattr(error, "lineno", None)
        raise InvalidTemplate(f"line {line}: {str(error)[:300]}" if line else str(error)) from error
    except RecursionError as error:
        raise InvalidTemplate("is nested too deeply") from error
    used = {name.name for name in tree.find_all(nodes.Name)}
    return frozenset(find_undeclared_variables(tree) | (used & {"strftime_now"}))


# What a program in the sandbox can run into; anything else would be our own bug.
FAILURES = (
    ArithmeticError,
    AttributeError,
    LookupError,
    MemoryError,
    RecursionError,
    TypeError,
    ValueError,
)


def _bounded(pieces: Iterable[str]) -> Iterator[str]:
    length = 0
    for piece in pieces:
        length += len(piece)
        if length > MAX_TEXT:
            raise jinja2.TemplateRuntimeError(f"more than {MAX_TEXT} characters of output")
        yield piece


class Budget:
    """The work that one rendering may do."""

    def __init__(self) -> None:
        self.left = STEPS

    def spend(self, size: int = 0) -> None:
        self.left -= 1 + size // KIB
        if self.left < 0 or size > MAX_TEXT:
            raise jinja2.TemplateRuntimeError("too much work for a chat template")


_budget: ContextVar[Budget] = ContextVar("_budget")


class BoundedEnvironment(ImmutableSandboxedEnvironment):
    """Jinja's sandbox, where loops, calls and growing texts draw on the budget of the rendering.

    The sandbox alone lets a template loop for hours or fill the memory.
    """

    intercepted_binops = frozenset({"+", "*", "**", "%"})

    def _parse(self, source: str, name: str | None, filename: str | None) -> nodes.Template:
        tree = super()._parse(source, name, filename)
        for loop in list(tree.find_all(nodes.For)):
            if loop.recursive:
                raise jinja2.TemplateSyntaxError("recursive loops are not allowed", loop.lineno)
            loop.iter = nodes.Filter(loop.iter, "_counted", [], [], None, None, lineno=loop.lineno)
        for text in list(tree.find_all(nodes.Concat)):
            text.nodes = [
                nodes.Filter(node, "_plain", [], [], None, None, lineno=text.lineno)
                for node in text.nodes
            ]
        return tree

    def call(__self, __context: Any, __obj: Any, *args: Any, **kwargs: Any) -> Any:
        owner = getattr(__obj, "__self__", None)
        if isinstance(owner, str):
            _budget.get().spend(_growth(__obj.__name__, owner, args))
        result = super().call(__context, __obj, *args, **kwargs)
        _budget.get().spend(len(result) if isinstance(result, str) else 0)
        return result

    def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
        if isinstance(left, int) and isinstance(right, int) and operator in ("*", "**"):
            other = right.bit_length() if operator == "*" else max(1, right)
            if left.bit_length() * other > MAX_BITS:
                raise jinja2.TemplateRuntimeError(f"a number of more than {MAX_BITS} bits")
        if operator == "%" and isinstance(left, str):
            raise jinja2.TemplateRuntimeError("formatting with % is not allowed")
        sizes = [len(side) for side in (left, right) if isinstance(side, (str, list, tuple))]
        if operator == "*" and sizes:
            times = right if isinstance(left, (str, list, tuple)) else left
            _budget.get().spend(sizes[0] * max(0, int(times)))
        else:
            _budget.get().spend(sum(sizes))
        return super().call_binop(context, operator, left, right)

    def wrap_str_format(self, value: Any) -> Any:
        if super().wrap_str_format(value) is not None:
            raise SecurityError("str.format is not allowed: it can pad without end")
        return None

    def is_safe_attribute(self, obj: Any, attr: str, value: Any) -> bool:
        if isinstance(obj, str) and attr not in STR_METHODS:
            return False
        return super().is_safe_attribute(obj, attr, value)


# fmt: off
STR_METHODS = frozenset((
    "capitalize", "count", "endswith", "find", "index", "isalnum", "isalpha", "isdigit", "islower",
    "isspace", "isupper", "join", "lower", "lstrip", "partition", "removeprefix", "removesuffix",
    "replace", "rfind", "rpartition", "rsplit", "rstrip", "split", "splitlines", "startswith",
    "strip", "title", "upper",
))
# fmt: on


def _growth(method: str, owner: str, args: Sequence[Any]) -> int:
    """How long the result of a method of `owner` can be."""
    if method == "replace" and len(args) > 1:
        return (owner.count(str(args[0])) + 1) * len(str(args[1])) + len(owner)
    if method == "join" and args and isinstance(args[0], (list, tuple)):
        return sum(len(item) + len(owner) for item in args[0] if isinstance(item, str))
    return len(owner)


class Generation(Extension):
    """`{% generation %}` marks what the assistant says; it changes nothing in the text."""

    tags = {"generation"}  # noqa: RUF012

    def parse(self, parser: Parser) -> nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return nodes.If(nodes.Const(True), body, [], [], lineno=line)


def _counted(items: Any) -> Iterator[Any]:
    for item in items:
        _budget.get().spend()
        yield item


def _plain(value: Any) -> Any:
    """Only short-to-print values: a nested list may print as more than the memory holds."""
    if isinstance(value, str):
        _budget.get().spend(len(value))
    elif value is not None and not isinstance(value, (int, float, jinja2.Undefined)):
        raise jinja2.TemplateRuntimeError(
            f"cannot print a {type(value).__name__}: use tojson or join"
        )
    return value


def _tojson(
    value: Any, ensure_ascii: bool = False, indent: int | None = None, sort_keys: bool = False
) -> str:
    encoder = json.JSONEncoder(
        ensure_ascii=ensure_ascii,
        indent=None if indent is None else min(int(indent), 8),
        sort_keys=sort_keys,
    )
    pieces = []
    for piece in encoder.iterencode(value):
        _budget.get().spend(len(piece))
        pieces.append(piece)
    return "".join(pieces)


def _join(items: Iterable[Any], separator: str = "", attribute: str | None = None) -> str:
    if attribute is not None:
        items = [item[attribute] for item in items]
    texts = [str(_plain(item)) for item in islice(items, MAX_RANGE)]
    _budget.get().spend(sum(map(len, texts)) + len(separator) * len(texts))
    return separator.join(texts)


def _replace(text: str, old: str, new: str) -> str:
    _budget.get().spend(_growth("replace", text, (old, new)))
    return text.replace(str(old), str(new))


def _string(value: Any) -> str:
    return str(_plain(value))


def _range(*bounds: int) -> range:
    numbers = range(*bounds)
    if len(numbers) > MAX_RANGE:
        raise jinja2.TemplateRuntimeError(f"range of more than {MAX_RANGE} numbers")
    return numbers


def _dict(**items: Any) -> dict[str, Any]:
    return items


def _raise(message: str) -> NoReturn:
    raise jinja2.TemplateError(str(message))


def _now(form: str) -> str:
    return datetime.now().strftime(str(form)[:100])


# fmt: off
KEPT_FILTERS = (
    "abs", "capitalize", "count", "d", "default", "dictsort", "first", "float", "int", "items",
    "last", "length", "list", "lower", "map", "max", "min", "reject", "rejectattr", "reverse",
    "round", "safe", "select", "selectattr", "sort", "sum", "title", "trim", "unique", "upper",
)
# fmt: on


def _environment() -> BoundedEnvironment:
    """As transformers sets jinja up, so that a template means the same here, within bounds."""
    environment = BoundedEnvironment(
        trim_blocks=True,
        lstrip_blocks=True,
        extensions=[Generation, loopcontrols],
        finalize=_plain,
        cache_size=0,
    )
    environment.filters = {name: environment.filters[name] for name in KEPT_FILTERS} | {
        "_counted": _counted,
        "_plain": _plain,
        "join": _join,
        "replace": _replace,
        "string": _string,
        "tojson": _tojson,
    }
    environment.globals = {
        "dict": _dict,
        "namespace": environment.globals["namespace"],
        "raise_exception": _raise,
        "range": _range,
        "strftime_now": _now,
    }
    return environment


ENVIRONMENT = _environment()


@lru_cache(maxsize=64)
def _compile(source: str) -> jinja2.Template:
    return ENVIRONMENT.from_string(source)
