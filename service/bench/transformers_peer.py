"""transformers' continuous batching over bitsandbytes' Linear4bit: no adapters, the same NF4."""

from __future__ import annotations

import logging
import time
from typing import Any

import torch

from base.load import load_base
from service.bench.memory import head_bytes, quantised_bytes
from service.bench.peer import Setup
from service.bench.peft_peer import hold, to_bitsandbytes
from service.bench.scenario import Job, Round, round_of

CONTINUOUS = "continuous batching"
PAGE = 64  # tokens
PAGES = 128  # of keys and values: what 8 sequences of 1,024 tokens need
STEP = 512  # tokens computed at once, as the others do
ANSWER_SECONDS = 600.0


class TransformersPeer:
    """One manager for all rounds. It takes no adapters: it cannot batch distinct ones."""

    def __init__(self, setup: Setup) -> None:
        from transformers import ContinuousBatchingConfig, GenerationConfig

        logging.getLogger("transformers").setLevel(logging.ERROR)
        hold(setup)
        base = load_base(setup.model, device="cpu", dtype="float32")
        self._bytes, self._head_bytes = quantised_bytes(base), head_bytes(base)
        to_bitsandbytes(base)
        for weight in base.model.parameters():
            if weight.dtype is torch.bfloat16:  # it keeps keys in the dtype of the first weight
                weight.data = weight.data.float()
        bounds = ContinuousBatchingConfig(
            page_size=PAGE, num_blocks=PAGES, max_batch_tokens=STEP, allow_block_sharing=False
        )
        self._manager: Any = base.model.init_continuous_batching(
            GenerationConfig(do_sample=False, eos_token_id=-1), bounds
        )
        self._manager.start()

    def run(self, job: Job, way: str) -> Round:
        assert way == CONTINUOUS, way
        assert set(job.scenario.adapters) == {None}
        arrival = time.perf_counter()
        names = self._manager.add_requests(
            [list(prompt) for prompt in job.prompts],
            max_new_tokens=job.new_tokens,
            record_timestamps=True,
        )
        found = {name: self._result(name) for name in names}
        assert {len(times) for times in found.values()} == {job.new_tokens}
        return round_of(arrival, list(found.values()))

    def facts(self) -> dict[str, Any]:
        return {
            "dtype": "float32",
            "nf4_bytes": self._bytes,
            "step_bytes": self._bytes + self._head_bytes,
            "arithmetic": "float32",
            "kernels": torch.backends.cpu.get_cpu_capability().lower(),
        }

    def close(self) -> None:
        self._manager.stop(block=True, timeout=5)

    def _result(self, name: str) -> list[float]:
        """When each token of one request came, once it is done."""
        result = self._manager.get_result(request_id=name, timeout=ANSWER_SECONDS)
        if result is None or result.error is not None:
            raise RuntimeError(f"{name}: {result.error if result else 'no answer in time'}")
        return [float(at) for at in result.timestamps]
