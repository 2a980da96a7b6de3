"""Peer: one way of answering requests, alone in its own process, driven round by round."""

from __future__ import annotations

import multiprocessing
import traceback
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, Protocol

from base.spec import BaseSpec
from service.bench.scenario import Job, Round


@dataclass(frozen=True, slots=True)
class Setup:
    """What every peer is given."""

    model: Path
    adapters: tuple[Path, ...]
    threads: int
    options: Mapping[str, Any] = field(default_factory=dict)  # of this kind of peer


class Peer(Protocol):
    """Built in its process from a Setup; `way` is one of its ways of serving a job."""

    def run(self, job: Job, way: str) -> Round: ...

    def facts(self) -> dict[str, Any]:
        """What it is: dtype, bytes, whatever a reader must know to believe the figures."""
        ...

    def close(self) -> None: ...


class PeerFailed(Exception):
    """A peer's process raised; the message is its traceback."""

    @property
    def reason(self) -> str:
        """Its last line."""
        return str(self).strip().splitlines()[-1][:300]


class PeerProcess:
    """A peer at the other end of a pipe. It waits in its pipe, idle, while others are measured."""

    def __init__(self, name: str, make: Callable[[Setup], Peer], setup: Setup) -> None:
        self.name = name
        context = multiprocessing.get_context("spawn")  # a forked torch would inherit its threads
        self._pipe, far_end = context.Pipe()
        self._process = context.Process(target=_serve, args=(far_end, make, setup), daemon=True)
        self._process.start()
        far_end.close()

    def run(self, job: Job, way: str) -> Round:
        answer = self._ask("run", job, way)
        assert isinstance(answer, Round)
        return answer

    def facts(self) -> dict[str, Any]:
        answer = self._ask("facts")
        assert isinstance(answer, dict)
        return answer

    def spec(self) -> BaseSpec:
        """Of the base that the peer loaded; only nibble's peer tells."""
        answer = self._ask("spec")
        assert isinstance(answer, BaseSpec)
        return answer

    def close(self) -> None:
        self._pipe.close()  # the process ends when its pipe does
        self._process.join(10)
        if self._process.is_alive():
            self._process.terminate()

    def _ask(self, *question: Any) -> Any:
        try:
            self._pipe.send(question)
            fine, answer = self._pipe.recv()
        except (EOFError, OSError):
            self._process.join(5)
            raise PeerFailed(f"{self.name} ended with {self._process.exitcode}") from None
        if not fine:
            raise PeerFailed(f"{self.name}:\n{answer}")
        return answer


def _serve(pipe: Connection, make: Callable[[Setup], Peer], setup: Setup) -> None:
    """The peer's process: build it, then answer until the pipe closes."""
    import torch

    torch.set_num_threads(setup.threads)
    peer: Peer | None = None
    while True:
        try:
            question, *arguments = pipe.recv()
        except EOFError:
            break
        try:
            peer = peer or make(setup)
            pipe.send((True, getattr(peer, question)(*arguments)))
        except Exception:
            pipe.send((False, traceback.format_exc()))
    if peer is not None:
        peer.close()
