"""What a client orders, and the run's config that comes of it. No torch here.

A client names settings by the schema of `nibble train` (training/config.py), but only those that
are listed here: nothing that names a path, a base or a server, and no value that could be one.
The schema itself is held against them by a process of `nibble train`, before the job exists.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from service.errors import InvalidRequest

TRAINING, VALIDATION = "training_file", "validation_file"  # in the job's directory, with a suffix
OUT = "adapter"  # there too
TEMPLATE = "template.yaml"  # and the prompt template, where one is named
SECTIONS = frozenset(("method", "optim", "eval", "budget", "data"))
DATA = frozenset(
    (
        *("split", "max_length", "too_long", "loss", "columns", "deduplicate", "max_bad_rows"),
        "packing",
    )
)
FREE_TEXT = frozenset(("method.init_text", "data.columns"))  # which are never looked up anywhere
MAX_TEXT = 2000  # characters
MAX_ENTRIES = 64  # of a list or a mapping
MOST = {
    "optim.steps": 1_000_000,
    "optim.batch_size": 4096,
    "data.max_length": 1 << 17,
    "checkpoint_every": 1_000_000,
}
LARGEST = 1e12
MAX_EPOCHS = 1000
_WORD = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,63}")
_ELSEWHERE = {  # fields of the schema that a client sets otherwise, or not at all
    "base": "model",
    "double_quant": "model",
    "data.train": TRAINING,
    "data.eval": VALIDATION,
    "data.template": "template",
    "seed": "seed",
    "publish": "publish and suffix",
    "optim.epochs": "n_epochs",
    "method.kind": "method.type",
}
# What has no adapter for its result, or wants other data than a prompt and its answer.
_NOT_HERE = frozenset(("full", "dpo", "reinforcement"))


@dataclass(frozen=True, slots=True)
class FileStamp:
    """A file as it was when a job was made of it."""

    id: str
    filename: str
    suffix: str
    nbytes: int
    sha256: str


@dataclass(frozen=True, slots=True)
class TemplateStamp:
    """A prompt template as it was when a job was made of it."""

    name: str
    version: int
    digest: str
    definition: str  # YAML

    def __str__(self) -> str:
        return f"{self.name}@{self.version}"


@dataclass(frozen=True, slots=True)
class Order:
    """A job as it was ordered."""

    model: str
    name: str  # of the adapter
    training: FileStamp
    validation: FileStamp | None = None
    method: str = "lora"
    config: Mapping[str, Any] = field(default_factory=dict)  # as `allowed` let it pass
    epochs: int | None = None
    rate_multiplier: float | None = None
    seed: int = 0
    publish: bool = True
    suffix: str | None = None
    metadata: Mapping[str, str] = field(default_factory=dict)
    given_method: str = "supervised"  # as the client called it
    template: TemplateStamp | None = None  # around every question
    replaces: bool = False  # also what was uploaded under its name

    def to_json(self) -> str:
        return json.dumps(asdict(self), ensure_ascii=False, sort_keys=True)

    @classmethod
    def from_json(cls, text: str) -> Order:
        """The order that `to_json` wrote."""
        fields = json.loads(text)
        for name in ("training", "validation"):
            if fields[name] is not None:
                fields[name] = FileStamp(**fields[name])
        if (template := fields.get("template")) is not None:
            fields["template"] = TemplateStamp(**template)
        return cls(**fields)


def allowed(config: Mapping[str, Any]) -> dict[str, Any]:
    """The settings themselves, when a client may give them. Raises InvalidRequest."""
    found: dict[str, Any] = {}
    for key, value in config.items():
        where = str(key)[:80]
        if key == "checkpoint_every":
            found[key] = _value(where, value)
        elif key in SECTIONS:
            found[key] = _section(key, value)
        else:
            raise _unknown(where, sorted(SECTIONS | {"checkpoint_every"}))
    return found


def _section(section: str, given: Any) -> dict[str, Any]:
    if not isinstance(given, Mapping):
        raise InvalidRequest(
            f"config.{section}: a mapping of settings is needed, this is "
            f"{type(given).__name__}: {{{json.dumps(section)}: {{…}}}}",
            f"config.{section}",
        )
    found = {}
    for key, value in given.items():
        where = f"{section}.{key}"[:160]
        if (section == "data" and key not in DATA) or where in _ELSEWHERE:
            raise _unknown(where, sorted(f"data.{name}" for name in DATA))
        if not isinstance(key, str) or not _WORD.fullmatch(key):
            raise InvalidRequest(f"config.{where}: there is no such setting", f"config.{where}")
        found[key] = _value(where, value)
    return found


def _unknown(where: str, known: list[str]) -> InvalidRequest:
    if other := _ELSEWHERE.get(where):
        why = f"is not set here: see {other}"
    else:
        why = f"cannot be set over HTTP; {', '.join(known)} can"
    return InvalidRequest(f"config.{where}: {why}", f"config.{where}")


def _value(where: str, value: Any) -> Any:
    """A number, a switch, a word, or a list or mapping of these."""
    if isinstance(value, bool) or value is None:
        return value
    if isinstance(value, int | float):
        return _number(where, value)
    if isinstance(value, str):
        return _text(where, value)
    if isinstance(value, list) and len(value) <= MAX_ENTRIES:
        return [_value(where, one) for one in value]
    if isinstance(value, Mapping) and len(value) <= MAX_ENTRIES:
        return {_text(where, str(key)): _value(where, one) for key, one in value.items()}
    raise InvalidRequest(
        f"config.{where}: a number, a switch, a word, or at most {MAX_ENTRIES} of these",
        f"config.{where}",
    )


def _number(where: str, value: int | float) -> int | float:
    most = MOST.get(where, LARGEST)
    if not math.isfinite(value) or abs(value) > most:
        raise InvalidRequest(
            f"config.{where}: at most {most:,.0f} (got {str(value)[:40]})", f"config.{where}"
        )
    return value


def _text(where: str, value: str) -> str:
    free = where in FREE_TEXT
    if len(value) <= MAX_TEXT and (free or (_WORD.fullmatch(value) and ".." not in value)):
        return value
    what = f"at most {MAX_TEXT} characters" if free else "a word of letters, digits, '_', '-', '.'"
    raise InvalidRequest(f"config.{where}: {what} (got {value[:80]!r})", f"config.{where}")


def method_kind(given: str) -> str:
    """The method of `nibble train` that a client's `method.type` is. Raises InvalidRequest."""
    if given in _NOT_HERE or not _WORD.fullmatch(given):
        raise InvalidRequest(
            f"method.type {given[:80]!r} is not trained here; supervised is, which is LoRA, and "
            "lora, dora, ia3 and the others that `nibble train run --help` lists",
            "method.type",
        )
    return "lora" if given == "supervised" else given


def run_config(order: Order, base: str, double_quant: bool | None = None) -> dict[str, Any]:
    """The config of a run in the job's own directory, before its epochs are steps."""
    config = dict(order.config)
    config["data"] = {
        **config.get("data", {}),
        "train": TRAINING + order.training.suffix,
        "eval": None if order.validation is None else VALIDATION + order.validation.suffix,
    }
    if order.template is not None:
        config["data"]["template"] = TEMPLATE
    config["method"] = {**config.get("method", {}), "kind": order.method}
    served = {"base": base, "double_quant": double_quant}  # what it is to be published to
    return {**config, **served, "seed": order.seed, "out": OUT}


def settled(order: Order, config: Mapping[str, Any], examples: int, tokens: int) -> dict[str, Any]:
    """The resolved config with the steps that the order's epochs come to, and its rate."""
    optim = dict(config["optim"])
    if order.rate_multiplier is not None:
        optim["learning_rate"] *= order.rate_multiplier
    if order.epochs is not None:
        data = config["data"]
        rows = tokens / data["max_length"] if data["packing"] else examples
        wanted = math.ceil(order.epochs * rows / optim["batch_size"])
        optim["steps"] = min(max(1, wanted), int(MOST["optim.steps"]))
    return {**config, "optim": optim}


def named(order: Order, message: str) -> str:
    """A message of the run, with the client's files by their ids: of directories it never hears."""
    for local, stamp in ((TRAINING, order.training), (VALIDATION, order.validation)):
        if stamp is not None:
            message = message.replace(local + stamp.suffix, f"{local} {stamp.id}")
    if order.template is not None:
        message = message.replace(TEMPLATE, f"template {order.template}")
    return message


def refusal(order: Order, refused: Mapping[str, Any]) -> tuple[str, str]:
    """What `nibble train` refused, and the client's parameter: both in the client's words."""
    field, message = refused.get("field"), named(order, refused["message"])
    for own, theirs in _ELSEWHERE.items():  # a plain word may be one of a sentence, too
        place = rf"\b{re.escape(own)}\b" if "." in own else f"^{own}(?=:)"
        message = re.sub(place, theirs, message, flags=re.MULTILINE)
    return message, _ELSEWHERE.get(field, f"config.{field}") if field else TRAINING
