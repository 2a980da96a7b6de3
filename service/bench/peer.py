"""Peer: one way of answering requests, alone in its own process, driven round by round."""

from __future__ import annotations

import traceback
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, Protocol

from base.spec import BaseSpec
from service.bench import apart
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
        self._process, self._pipe = apart.started(_serve, make, setup)

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
        apart.close(self._process, self._pipe)

    def _ask(self, *question: Any) -> Any:
        try:
            with suppress(OSError):  # it is gone, and `answer` says how
                self._pipe.send(question)
            fine, said = apart.answer(self._process, self._pipe)
        except apart.Ended as error:
            raise PeerFailed(f"{self.name} {error}") from None
        if not fine:
            raise PeerFailed(f"{self.name}:\n{said}")
        return said


def _serve(pipe: Connection, make: Callable[[Setup], Peer], setup: Setup) -> None:
    """The peer's process: build it, then answer until the pipe closes."""
    import torch

    torch.set_num_threads(setup.threads)
    peer: Peer | None = None
    try:
        while True:
            question, *arguments = pipe.recv()
            try:
                peer = peer or make(setup)
                pipe.send((True, getattr(peer, question)(*arguments)))
            except Exception:
                pipe.send((False, traceback.format_exc()))
    except EOFError:
        pass
    finally:
        if peer is not None:
            peer.close()
