"""Templates rendered in a process that can be killed: short of memory, of time and of rights.

A budget of work bounds what a template does step by step (`adapters.sandbox`); this bounds what
one step may do, and whatever a bound forgets. A process that does not answer in time is killed and
another one takes its place; the request is refused, and nobody else notices.
"""

from __future__ import annotations

import hashlib
import json
import os
import resource
import select
import subprocess
import sys
import threading
import time
from collections import OrderedDict
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from queue import LifoQueue
from typing import Any

from adapters.errors import InvalidTemplate, InvalidVariables, StoreUnavailable
from adapters.limits import MIB
from adapters.prompts.filling import MAX_FILLED, Filled, check, fill
from adapters.prompts.template import PromptTemplate, parse_template
from adapters.prompts.variables import Value

ROOT = Path(__file__).resolve().parents[2]
# -I: neither PYTHON* variables nor the working directory decide what is imported.
COMMAND = (
    sys.executable,
    "-I",
    "-c",
    "import sys; sys.path.insert(0, sys.argv[1]); from adapters.prompts.worker import main; main()",
    str(ROOT),
)
SECONDS = 5.0  # for one rendering; a usual one takes a millisecond
START_SECONDS = 60.0  # until a process is there, on a busy machine
MEMORY = 512 * MIB  # address space of one process
MAX_ANSWER = 8 * MAX_FILLED  # bytes: what JSON makes of the longest result
MAX_QUESTION = 64 * MIB
KEPT = 256  # results
KEPT_BYTES = 16 * MIB


class Renderer:
    """Fills templates in processes of its own, started when first needed. Thread-safe.

    Results are kept by the hash of template and values, for templates are functions of these.
    """

    def __init__(self, processes: int = 2, seconds: float = SECONDS) -> None:
        self._seconds = seconds
        self._free: LifoQueue[_Process | None] = LifoQueue()
        for _ in range(processes):
            self._free.put(None)
        self._processes = processes
        self._kept: OrderedDict[str, tuple[Filled, int]] = OrderedDict()
        self._kept_bytes = 0
        self._lock = threading.Lock()
        self.hits = 0

    def fill(
        self,
        template: PromptTemplate,
        values: Mapping[str, Value],
        text: str | None = None,
        *,
        passages: bool = False,
    ) -> Filled:
        """As `filling.fill`. Raises what it raises, InvalidTemplate too where time or memory ran
        out, and StoreUnavailable where no process can be started."""
        question = {"values": dict(values), "text": text, "passages": passages}
        told = json.dumps(question, sort_keys=True, ensure_ascii=False)
        key = hashlib.sha256(f"{template.digest}{told}".encode(errors="surrogatepass")).hexdigest()
        with self._lock:
            if key in self._kept:
                self._kept.move_to_end(key)
                self.hits += 1
                return self._kept[key][0]
        answer = self._ask({"template": template.plain(), **question})
        found = Filled(
            answer["system"],
            tuple((user, assistant) for user, assistant in answer["examples"]),
            answer["user"],
            answer["answer"],
        )
        self._keep(key, found)
        return found

    def check(self, template: PromptTemplate) -> None:
        """As `filling.check`. Raises as `fill` does."""
        self._ask({"template": template.plain(), "check": True})

    def close(self) -> None:
        """End the processes; those that work end with what they do."""
        for process in [self._free.get() for _ in range(self._processes)]:
            if process is not None:
                process.kill()
            self._free.put(None)

    def _ask(self, question: dict[str, Any]) -> dict[str, Any]:
        raw = json.dumps(question).encode()
        if len(raw) > MAX_QUESTION:
            raise InvalidVariables(f"have {len(raw)} bytes; at most {MAX_QUESTION}", "variables")
        process = self._free.get()
        try:
            if process is not None and process.ended:
                process.kill()
                process = None
            process = process or _Process()
            answer = json.loads(process.ask(raw, self._seconds))
        except _NoAnswer as error:
            assert process is not None
            process.kill()
            process = None
            raise InvalidTemplate(str(error), "template") from None
        finally:
            self._free.put(process)
        if "error" in answer:
            kind = InvalidVariables if answer["values"] else InvalidTemplate
            raise kind(answer["error"], answer["where"])
        found: dict[str, Any] = answer
        return found

    def _keep(self, key: str, found: Filled) -> None:
        size = sum(map(len, (found.system, found.user, found.answer, *sum(found.examples, ()))))
        if size > KEPT_BYTES // 8:
            return
        with self._lock:
            if key not in self._kept:
                self._kept[key] = (found, size)
                self._kept_bytes += size
            while len(self._kept) > KEPT or self._kept_bytes > KEPT_BYTES:
                self._kept_bytes -= self._kept.popitem(last=False)[1][1]


class _NoAnswer(Exception):
    """The process is of no more use; the message says why."""


class _Process:
    """One process: a line of JSON in, a line of JSON out."""

    def __init__(self) -> None:
        try:
            self._process = subprocess.Popen(
                COMMAND,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
                cwd="/",
                env={"PATH": os.defpath, "LC_ALL": "C.UTF-8", "PYTHONIOENCODING": "utf-8"},
                bufsize=0,
                start_new_session=True,  # Ctrl-C is the server's to hear; it ends with our pipe
            )
        except OSError as error:
            why = f"no process could be started for templates: {error.strerror}"
            raise StoreUnavailable(why) from error
        try:
            self._line(START_SECONDS)
        except _NoAnswer as error:
            self.kill()
            raise StoreUnavailable(f"the process for templates did not start: {error}") from None

    @property
    def ended(self) -> bool:
        return self._process.poll() is not None

    def ask(self, raw: bytes, seconds: float) -> bytes:
        """Raises _NoAnswer."""
        assert self._process.stdin is not None
        view = memoryview(raw + b"\n")
        try:
            while view:
                view = view[self._process.stdin.write(view) :]
        except OSError:
            raise _NoAnswer(self._why()) from None
        return self._line(seconds)

    def kill(self) -> None:
        self._process.kill()
        self._process.wait()
        for pipe in (self._process.stdin, self._process.stdout):
            if pipe is not None:
                with suppress(OSError):
                    pipe.close()

    def _line(self, seconds: float) -> bytes:
        assert self._process.stdout is not None
        pieces: list[bytes] = []
        size, end = 0, time.monotonic() + seconds
        while not pieces or not pieces[-1].endswith(b"\n"):
            ready = select.poll()
            ready.register(self._process.stdout, select.POLLIN | select.POLLHUP)
            if not ready.poll(max(0.0, end - time.monotonic()) * 1000):
                raise _NoAnswer(f"did not end within {seconds:g} s")
            piece = os.read(self._process.stdout.fileno(), 1 << 16)
            size += len(piece)
            if not piece:
                raise _NoAnswer(self._why())
            if size > MAX_ANSWER:
                raise _NoAnswer("answered too much")
            pieces.append(piece)
        return b"".join(pieces)

    def _why(self) -> str:
        with suppress(subprocess.TimeoutExpired):
            self._process.wait(1)
        if self._process.returncode == MEMORY_EXIT:
            return f"needed more than {MEMORY} bytes of memory"
        return f"crashed the process that renders it (exit {self._process.returncode})"


# In the process ---------------------------------------------------------------------------------

MEMORY_EXIT = 77


def main() -> None:
    """Say that it is there, then answer lines until there are no more."""
    _confine()
    out = sys.stdout.buffer
    out.write(b"{}\n")
    out.flush()
    for line in sys.stdin.buffer:
        try:
            answer = _answer(json.loads(line))
        except MemoryError:
            os._exit(MEMORY_EXIT)
        out.write(json.dumps(answer).encode() + b"\n")
        out.flush()


def _confine() -> None:
    for what, amount in (
        (resource.RLIMIT_AS, MEMORY),
        (resource.RLIMIT_FSIZE, 0),
        (resource.RLIMIT_CORE, 0),
    ):
        hard = resource.getrlimit(what)[1]
        most = amount if hard == resource.RLIM_INFINITY else min(amount, hard)
        resource.setrlimit(what, (most, most))


def _answer(question: Mapping[str, Any]) -> dict[str, Any]:
    try:
        template = parse_template(question["template"])
        if question.get("check"):
            check(template)
            return {}
        found = fill(template, question["values"], question["text"], passages=question["passages"])
    except InvalidTemplate as error:
        values = isinstance(error, InvalidVariables)
        return {"error": error.reason, "where": error.where, "values": values}
    return {
        "system": found.system,
        "examples": found.examples,
        "user": found.user,
        "answer": found.answer,
    }
