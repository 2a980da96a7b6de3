"""Command-line flags made from Settings, so that every setting has one and none is forgotten."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import typer
from pydantic import SecretStr
from pydantic.fields import FieldInfo

from service.commands.output import fail
from service.config import PREFIX, ConfigError, Configuration, Settings, configure

SWITCHES = (bool, bool | None)


def with_settings(command: Callable[..., None]) -> Callable[..., None]:
    """Give `command(configuration, …)` a flag for every setting, and `--config`.

    The first parameter of `command` receives the effective Configuration; its other parameters
    stay its own options. A wrong value ends with status 2.
    """
    first, *own = inspect.signature(command, eval_str=True).parameters.values()
    flags = [_flag(name, field) for name, field in Settings.model_fields.items() if _public(field)]

    def run(**given: Any) -> None:
        values = {flag.name: given.pop(flag.name) for flag in flags}
        try:
            configuration = configure(values, given.pop("config"))
        except ConfigError as error:
            fail(str(error), status=2, as_json=bool(given.get("as_json")))
        command(configuration, **given)

    assert first.annotation is Configuration, "the first parameter receives the configuration"
    run.__signature__ = inspect.Signature([*own, _CONFIG, *flags])  # type: ignore[attr-defined]
    paragraphs = inspect.cleandoc(command.__doc__ or "").split("\n\n")
    run.__doc__ = "\n\n".join(" ".join(paragraph.split()) for paragraph in paragraphs)
    return run


def _public(field: FieldInfo) -> bool:
    """Secrets have no flag: the arguments of a process are readable by everybody."""
    return field.annotation != SecretStr | None


def _flag(name: str, field: FieldInfo) -> inspect.Parameter:
    extra = field.json_schema_extra
    assert isinstance(extra, dict), "every setting names its panel"
    is_switch = field.annotation in SWITCHES
    dashed = name.replace("_", "-")
    option = typer.Option(
        f"--{dashed}/--no-{dashed}" if is_switch else f"--{dashed}",
        help=f"{field.description}{_default(field)}",
        rich_help_panel=str(extra["panel"]),
        metavar=None if is_switch else "VALUE",
        show_default=False,
    )
    kind: Any = bool | None if is_switch else str | None
    return _parameter(name, Annotated[kind, option])


def _default(field: FieldInfo) -> str:
    if field.default_factory is not None or field.default is None or field.annotation is bool:
        return ""
    return f" ({field.default})"


def _parameter(name: str, annotation: Any) -> inspect.Parameter:
    return inspect.Parameter(
        name, inspect.Parameter.KEYWORD_ONLY, default=None, annotation=annotation
    )


_CONFIG = _parameter(
    "config",
    Annotated[
        Path | None,
        typer.Option(
            "--config",
            help=f"Settings as TOML; nibble.toml in the working directory is read by itself. "
            f"Every flag is also a key there and a variable {PREFIX}NAME.",
            rich_help_panel="Configuration",
        ),
    ],
)
