"""Somebody's template as a program: jinja's sandbox, with a budget of work on top. No torch here.

What it renders is plain text; `adapters.template` makes token ids of a chat with it.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextvars import ContextVar
from datetime import datetime
from functools import lru_cache
from itertools import islice
from typing import Any, NoReturn

import jinja2
from jinja2 import nodes
from jinja2.exceptions import SecurityError
from jinja2.ext import Extension, loopcontrols
from jinja2.meta import find_undeclared_variables
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

from adapters.errors import InvalidTemplate
from adapters.limits import KIB, MIB

MAX_TEXT = 4 * MIB  # characters of one rendered chat
MAX_RANGE = 10_000
MAX_BITS = 4096  # of a whole number
STEPS = 200_000  # one per loop turn and call, and one per KiB of text that is made

# What a program in the sandbox can run into; anything else would be our own bug.
FAILURES = (
    ArithmeticError,
    AttributeError,
    LookupError,
    MemoryError,
    NameError,  # of jinja's own program: a constant like 1e999 becomes the name inf in it
    RecursionError,
    SyntaxError,  # of that program too: more blocks in each other than Python takes
    TypeError,
    ValueError,
)


def begin() -> None:
    """A new budget for what this thread renders from now on."""
    _budget.set(Budget())


def run(source: str, values: Mapping[str, Any]) -> str:
    """The text that a template makes of the values, within the budget that `begin` gave.

    Raises jinja2.TemplateError, or one of FAILURES.
    """
    return "".join(_bounded(_compile(source).generate(values)))


def fill_texts(sources: Mapping[str, str], values: Mapping[str, Any]) -> dict[str, str]:
    """Each template of `sources` with the values, all within one budget.

    Raises InvalidTemplate, whose `where` is the key of the one that failed.
    """
    begin()
    found: dict[str, str] = {}
    for place, source in sources.items():
        try:
            found[place] = run(source, values)
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
