"""llama.cpp through `llama-cpp-python`: Q4_0 of the same weights, driven by token ids.

Its low-level interface batches sequences as its server does. LoRAs belong to its context and not to
a sequence, so requests with distinct ones run one after another, as in its server.
"""

from __future__ import annotations

import ctypes
import importlib
import importlib.util
import re
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from service.bench.gguf_files import write_base, write_lora
from service.bench.peer import Setup
from service.bench.scenario import Job, Round, round_of

ONE_BATCH = "one batch"
ONE_BY_ONE = "one by one"
NEEDS = {"llama_cpp": "llama-cpp-python", "gguf": "gguf"}  # module: package
SEQUENCES = 8
CONTEXT = 8 * 1024  # tokens of all sequences
STEP = 512  # tokens computed at once, llama.cpp's default


def missing() -> tuple[str, ...]:
    """The packages that this peer needs and that are not installed."""
    return tuple(NEEDS[name] for name in NEEDS if importlib.util.find_spec(name) is None)


def sets_of(system: str) -> tuple[str, ...]:
    """What a llama.cpp was built with, by its line of what the system has: AVX2, FMA, and so on."""
    return tuple(re.findall(r"\b([A-Z]\w+) = 1\b", system))


@dataclass(frozen=True, slots=True)
class _Place:
    """One token of a batch. Its logits are wanted, or not."""

    token: int
    position: int
    sequence: int
    wanted: bool


class LlamaPeer:
    """Two contexts of one model. `options`: where the base is kept (`gguf`), its `architecture`
    and the size of its `vocabulary`."""

    def __init__(self, setup: Setup) -> None:
        self._llama: Any = importlib.import_module("llama_cpp")
        self._quiet = self._llama.llama_log_callback(lambda level, text, data: None)
        self._llama.llama_log_set(self._quiet, ctypes.c_void_p(0))
        self._llama.llama_backend_init()
        path = write_base(setup.model, Path(setup.options["gguf"]), setup.threads)
        self._model = self._loaded("model", self._llama.llama_model_load_from_file, path)
        # Sequences share a prefix only in a common cache, and are faster each in a part of its own.
        self._apart, self._common = (self._new_context(setup.threads, c) for c in (False, True))
        self._context = self._apart
        self._batch = self._llama.llama_batch_init(STEP, 0, 1)
        self._adapters, self._adapter_bytes = self._load_adapters(setup)
        self._vocabulary = int(setup.options["vocabulary"])

    def run(self, job: Job, way: str) -> Round:
        arrival = time.perf_counter()
        times: list[list[float]] = []
        if way == ONE_BATCH:
            (adapter,) = set(job.scenario.adapters)
            times, _ = self._generate(job.prompts, adapter, job)
        else:
            assert way == ONE_BY_ONE, way
            for prompt, adapter in zip(job.prompts, job.scenario.adapters, strict=True):
                times += self._generate([prompt], adapter, job)[0]
        return round_of(arrival, times)

    def facts(self) -> dict[str, Any]:
        weights = int(self._llama.llama_model_size(self._model))
        system = self._llama.llama_print_system_info().decode()
        return {
            "version": self._llama.__version__,
            "dtype": "Q4_0, head and embeddings as llama.cpp chooses",
            "kernels": ", ".join(sets_of(system)),
            "step_bytes": weights,
            "each_adapter_bytes": self._adapter_bytes,
            "arithmetic": "int8",
        }

    def close(self) -> None:
        self._llama.llama_batch_free(self._batch)
        for context in (self._apart, self._common):
            self._llama.llama_free(context)
        self._llama.llama_model_free(self._model)

    def _generate(
        self, prompts: Sequence[tuple[int, ...]], adapter: int | None, job: Job
    ) -> tuple[list[list[float]], list[list[int]]]:
        """When each token of each prompt came, and the tokens: the likeliest each time."""
        shared = job.scenario.shared_tokens
        self._context = self._common if shared else self._apart
        self._use(adapter)
        self._llama.llama_memory_clear(self._llama.llama_get_memory(self._context), True)
        if shared:
            self._share(prompts[0][:shared], len(prompts))
        places = [
            _Place(token, position, number, position == len(prompt) - 1)
            for number, prompt in enumerate(prompts)
            for position, token in enumerate(prompt)
            if position >= shared
        ]
        times: list[list[float]] = [[] for _ in prompts]
        tokens: list[list[int]] = [[] for _ in prompts]
        for step in range(job.new_tokens):
            for number, token in self._decode(places, times):
                tokens[number].append(token)
            places = [
                _Place(own[-1], len(prompt) + step, number, True)
                for number, (prompt, own) in enumerate(zip(prompts, tokens, strict=True))
            ]
        return times, tokens

    def _share(self, prefix: tuple[int, ...], sequences: int) -> None:
        """Compute what all prompts begin with once, and give it to every sequence."""
        self._decode([_Place(token, i, 0, False) for i, token in enumerate(prefix)], [])
        for number in range(1, sequences):
            memory = self._llama.llama_get_memory(self._context)
            self._llama.llama_memory_seq_cp(memory, 0, number, 0, len(prefix))

    def _decode(self, places: Sequence[_Place], times: list[list[float]]) -> list[tuple[int, int]]:
        """(sequence, token) of each wanted place; `times` gets the moment."""
        found = []
        for begin in range(0, len(places), STEP):
            part = places[begin : begin + STEP]
            self._fill(part)
            code = self._llama.llama_decode(self._context, self._batch)
            if code != 0:
                raise RuntimeError(f"llama_decode of {len(part)} tokens gave {code}")
            chosen = [
                (place.sequence, int(self._logits(row).argmax()))
                for row, place in enumerate(part)
                if place.wanted
            ]
            now = time.perf_counter()
            for sequence, _ in chosen:
                times[sequence].append(now)
            found += chosen
        return found

    def _fill(self, places: Sequence[_Place]) -> None:
        batch = self._batch
        batch.n_tokens = len(places)
        for row, place in enumerate(places):
            batch.token[row] = place.token
            batch.pos[row] = place.position
            batch.n_seq_id[row] = 1
            batch.seq_id[row][0] = place.sequence
            batch.logits[row] = place.wanted

    def _logits(self, row: int) -> np.ndarray[Any, np.dtype[np.float32]]:
        pointer = self._llama.llama_get_logits_ith(self._context, row)
        return np.ctypeslib.as_array(pointer, shape=(self._vocabulary,))

    def _use(self, adapter: int | None) -> None:
        chosen = [] if adapter is None else [self._adapters[adapter]]
        kind = self._llama.llama_adapter_lora_p_ctypes
        handles = (kind * len(chosen))(*chosen)
        scales = (ctypes.c_float * len(chosen))(*[1.0] * len(chosen))
        code = self._llama.llama_set_adapters_lora(self._context, handles, len(chosen), scales)
        if code != 0:
            raise RuntimeError(f"llama.cpp refused adapter {adapter}: {code}")

    def _new_context(self, threads: int, common: bool) -> Any:
        wanted = self._llama.llama_context_default_params()
        wanted.n_ctx = CONTEXT
        wanted.n_batch = wanted.n_ubatch = STEP
        wanted.n_seq_max = SEQUENCES
        wanted.n_threads = wanted.n_threads_batch = threads
        wanted.kv_unified = common
        context = self._llama.llama_init_from_model(self._model, wanted)
        if not context:
            raise RuntimeError("llama.cpp made no context")
        return context

    def _loaded(self, what: str, load: Any, path: Path) -> Any:
        found = load(str(path).encode(), self._llama.llama_model_default_params())
        if not found:
            raise RuntimeError(f"llama.cpp could not load the {what} {path}")
        return found

    def _load_adapters(self, setup: Setup) -> tuple[list[Any], list[int]]:
        architecture = str(setup.options["architecture"])
        loaded, sizes = [], []
        with tempfile.TemporaryDirectory(prefix="nibble-gguf-") as scratch:
            for number, directory in enumerate(setup.adapters):
                path = write_lora(directory, architecture, Path(scratch) / f"{number}.gguf")
                handle = self._llama.llama_adapter_lora_init(self._model, str(path).encode())
                if not handle:
                    raise RuntimeError(f"llama.cpp could not load the LoRA of {directory}")
                loaded.append(handle)
                sizes.append(path.stat().st_size)
        return loaded, sizes
