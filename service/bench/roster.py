"""Roster: every peer of a run, started one after the other and closed together."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import ExitStack, closing, suppress
from functools import partial
from pathlib import Path

from base.spec import BaseSpec
from service.bench.anchor import anchor
from service.bench.llama_peer import LlamaPeer
from service.bench.nibble_peer import NibblePeer
from service.bench.options import Options, Report
from service.bench.peer import Peer, PeerFailed, PeerProcess, Setup
from service.bench.peft_peer import PeftPeer
from service.bench.plan import (
    BARE,
    LLAMA,
    LLAMA_SERVER,
    NIBBLE,
    NIBBLE_SERVER,
    PEFT,
    TRANSFORMERS,
    ways_of,
)
from service.bench.scenario import DISTINCT, NONE
from service.bench.server_peers import LlamaServerPeer, NibbleServerPeer
from service.bench.transformers_peer import TransformersPeer


class Roster:
    """Starts who takes part in the options' scenarios; `stack` closes them all."""

    def __init__(
        self,
        options: Options,
        spec: BaseSpec,
        adapters: Sequence[Path],
        stack: ExitStack,
        report: Report,
    ) -> None:
        self.trials: dict[str, float] = {}  # PEFT's rates in each dtype that it was tried in
        self.failed: dict[str, str] = {}  # others that did not start, and why
        self._options = options
        self._spec = spec
        self._adapters = adapters
        self._plain = adapters[: len(DISTINCT.adapters)]  # LoRAs: all that the others serve here
        self._stack = stack
        self._report = report
        self._peers: dict[str, PeerProcess] = {}

    def start(self, *, llama: bool) -> dict[str, PeerProcess]:
        """All peers by name, ready: nobody loads while another is measured."""
        self._ours()
        if llama:
            self._llama()
        if self._options.transformers:
            setup = self._options.setup([], isa=self._options.isa)
            self._start(TRANSFORMERS, TransformersPeer, setup)
        if self._options.peft_dtypes:
            self._add(PEFT, self._peft)
        for name, peer in self._peers.items():
            try:
                peer.facts()  # answers once it is ready
            except PeerFailed as error:
                if name.startswith(NIBBLE):
                    raise
                self.failed[name] = error.reason
        return {name: peer for name, peer in self._peers.items() if name not in self.failed}

    def _ours(self) -> None:
        options = self._options
        for precision in options.precisions:
            setup = options.setup(self._adapters, precision=precision)
            self._start(f"{NIBBLE} {precision}", NibblePeer, setup)
        if NONE in options.scenarios:
            for precision in options.precisions:
                setup = options.setup([], precision=precision)
                self._start(f"{NIBBLE} {precision}{BARE}", NibblePeer, setup)

    def _llama(self) -> None:
        options = self._options
        more = {"gguf": str(options.gguf), "architecture": self._spec.architecture}
        setup = options.setup(self._plain, vocabulary=self._spec.vocab_size, **more)
        self._start(LLAMA, LlamaPeer, setup)
        if options.llama_server is not None:
            if LLAMA in self._peers:
                with suppress(PeerFailed):  # said when all have started
                    self._peers[LLAMA].facts()  # it may still write the weights that both read
            setup = options.setup(self._plain, binary=str(options.llama_server), **more)
            self._start(LLAMA_SERVER, LlamaServerPeer, setup)
            setup = options.setup(self._plain, precision=options.precisions[0])
            self._start(NIBBLE_SERVER, NibbleServerPeer, setup)

    def _peft(self) -> PeerProcess:
        chosen, rates = anchor(
            lambda dtype: PeerProcess(
                PEFT,
                PeftPeer,
                self._options.setup(self._plain, dtype=dtype, isa=self._options.isa),
            ),
            self._options.peft_dtypes,
            self._spec.vocab_size,
            self._options.prompt_tokens,
        )
        self.trials.update(rates)
        return chosen

    def _start(self, name: str, make: Callable[[Setup], Peer], setup: Setup) -> None:
        self._add(name, partial(PeerProcess, name, make, setup))

    def _add(self, name: str, make: Callable[[], PeerProcess]) -> None:
        """Where it takes part in any scenario."""
        if any(ways_of(name, scenario) for scenario in self._options.scenarios):
            self._report(f"{name} starts", 0, 1)
            self._peers[name] = self._stack.enter_context(closing(make()))
