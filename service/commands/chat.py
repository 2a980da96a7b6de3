"""`nibble chat`: a conversation with a running server, in which adapters can be changed."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator
from contextlib import closing, suppress
from dataclasses import dataclass, field
from typing import Annotated, Any

import typer

from service.client import Client, ServerRefused
from service.commands.output import fail
from service.commands.server import AdapterOption, Json, Url, connect, newest
from service.commands.streamed import pieces

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)

COMMANDS = {
    "/adapter NAME": "answer with this adapter from now on; alone: list them",
    "/base": "answer with the base alone",
    "/system TEXT": "say this first in every request; alone: say nothing first",
    "/reset": "forget what was said",
    "/help": "these lines",
    "/quit": "end; so does Ctrl-D",
}
_HELP = "\n".join(f"  {name:<15}{what}" for name, what in COMMANDS.items())
_TOO_LONG = "If the conversation has become too long, /reset begins anew."


@dataclass(slots=True)
class Conversation:
    """What every request of a chat says: who answers, how, and what was said before."""

    adapter: str | None
    system: str | None
    parameters: dict[str, Any]
    turns: list[dict[str, str]] = field(default_factory=list)

    def messages(self) -> list[dict[str, str]]:
        first = [{"role": "system", "content": self.system}] if self.system else []
        return [*first, *self.turns]

    def asked(self) -> dict[str, Any]:
        return {**self.parameters, **({"adapter_id": self.adapter} if self.adapter else {})}


@app.command()
def run(
    adapter: AdapterOption = None,
    system: Annotated[str | None, typer.Option(help="A system message before it all.")] = None,
    max_new_tokens: Annotated[
        int | None, typer.Option(min=1, help="Longest answer; the server's default when unset.")
    ] = None,
    temperature: Annotated[
        float | None, typer.Option(help="Sample at this temperature; greedy when unset.")
    ] = None,
    seed: Annotated[int | None, typer.Option(help="The same seed gives the same answers.")] = None,
    url: Url = None,
    as_json: Json = False,
) -> None:
    """Talk with a running server. Answers stream; /adapter NAME changes who gives them.

    From a pipe every line is a turn, and only answers are printed on standard output. With --json
    an answer is one line of JSON. /help lists the commands. Ctrl-C ends an answer, and the chat
    where none is being given.
    """
    given = {
        "max_new_tokens": max_new_tokens,
        "do_sample": None if temperature is None else True,
        "temperature": temperature,
        "seed": seed,
    }
    parameters = {name: value for name, value in given.items() if value is not None}
    talk = Conversation(adapter, system, parameters)
    at_terminal = sys.stdin.isatty()
    with connect(url, as_json) as client:
        if adapter:
            _check(client, adapter)
        if at_terminal:
            _note(_greeting(client))
        for line in _lines(at_terminal, talk):
            try:
                if not _take(client, talk, line, as_json):
                    return
            except ServerRefused as error:
                if not at_terminal:
                    raise
                _note(f"{error}\n{_TOO_LONG if error.status in (400, 422) else '/help helps.'}")


def _greeting(client: Client) -> str:
    names = ", ".join(newest(client)) or "none"
    return f"{client.info()['model_id']} at {client.url}; adapters: {names}. /help lists commands."


def _lines(at_terminal: bool, talk: Conversation) -> Iterator[str]:
    """What the user says, line by line, until the end of the input."""
    if not at_terminal:
        yield from (line.rstrip("\n") for line in sys.stdin)
        return
    with suppress(ImportError):
        import readline  # noqa: F401  (gives input() history and editing)
    while True:
        try:
            yield input(f"{talk.adapter or 'base'}> ")
        except EOFError:
            _note("")
            return
        except KeyboardInterrupt:
            raise typer.Exit(130) from None


def _take(client: Client, talk: Conversation, line: str, as_json: bool) -> bool:
    """Does what one line says. False when the chat is to end."""
    word, _, rest = line.strip().partition(" ")
    if not word:
        return True
    if word == "/quit":
        return False
    if not word.startswith("/"):
        _answer(client, talk, line.strip(), as_json)
        return True
    do = _DO.get(word)
    if do is None and sys.stdin.isatty():
        _note(f"{word} is no command:\n{_HELP}")
    elif do is None:
        fail(f"{word} is no command", f"These are:\n{_HELP}", as_json=as_json, status=2)
    else:
        do(client, talk, rest.strip())
    return True


def _answer(client: Client, talk: Conversation, text: str, as_json: bool) -> None:
    """One turn. A refused one leaves no trace; one that Ctrl-C ends keeps what was said by then."""
    talk.turns.append({"role": "user", "content": text})
    last: dict[str, Any] = {}
    said = ""

    def heard(events: Iterator[dict[str, Any]]) -> Iterator[dict[str, Any]]:
        for event in events:
            last.update(event)
            yield event

    stream = client.stream(talk.messages(), talk.asked())
    try:
        # closing: where Ctrl-C ends it, the connection ends, and with it the server's work.
        with closing(stream):  # type: ignore[type-var]
            for piece in pieces(heard(stream)):
                said += piece
                if not as_json:
                    typer.echo(piece, nl=False)
                    sys.stdout.flush()
    except KeyboardInterrupt:
        if not sys.stdin.isatty():
            raise
    except ServerRefused:
        talk.turns.pop()
        raise
    talk.turns.append({"role": "assistant", "content": said})
    details = {k: v for k, v in (last.get("details") or {}).items() if v is not None}
    reply = {"generated_text": said, **details}
    typer.echo(json.dumps(reply, ensure_ascii=False) if as_json else "")


def _set_adapter(client: Client, talk: Conversation, name: str) -> None:
    if not name:
        for one in newest(client).values():
            mark = "*" if talk.adapter == one["name"] else " "
            _note(f"{mark} {one['name']}  {one['kind']}, version {one['version']}")
        return
    _check(client, name)
    talk.adapter = name
    _note(f"{name} answers from now on")


def _check(client: Client, name: str) -> None:
    """Refused before the first question; of a sum (`a:0.7,b:0.3`), with it."""
    if "," not in name and (":" not in name or name.startswith("sha256:")):
        client.adapter(name)


def _set_base(client: Client, talk: Conversation, _: str) -> None:
    talk.adapter = None
    _note("the base answers from now on")


def _set_system(client: Client, talk: Conversation, text: str) -> None:
    talk.system = text or None
    _note("the system message is set" if text else "there is no system message now")


def _reset(client: Client, talk: Conversation, _: str) -> None:
    talk.turns.clear()
    _note("what was said is forgotten")


def _help(client: Client, talk: Conversation, _: str) -> None:
    _note(_HELP)


def _note(text: str) -> None:
    """Beside the answers: on standard error, so that a pipe gets answers alone."""
    typer.echo(text, err=True)


_DO: dict[str, Callable[[Client, Conversation, str], None]] = {
    "/adapter": _set_adapter,
    "/base": _set_base,
    "/system": _set_system,
    "/reset": _reset,
    "/help": _help,
}
