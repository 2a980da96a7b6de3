"""PEFT over bitsandbytes' Linear4bit: the loops that people run today, on the same NF4 bytes."""

from __future__ import annotations

import logging
import time
import warnings
from typing import Any

import torch
from torch import Tensor

from base.kernels import NF4Weight
from base.kernels.quantization import NESTED_BLOCKSIZE
from base.load import Base, load_base
from base.nf4 import NF4Linear
from service.bench.cpuid import hold_bitsandbytes
from service.bench.memory import head_bytes, quantised_bytes
from service.bench.peer import Setup
from service.bench.scenario import Job, Round, round_of

ONE_BY_ONE = "set_adapter, one by one"
ONE_BATCH = "set_adapter, one batch"
MIXED = "adapter_names, mixed batch"


class PeftPeer:
    """Every adapter is loaded at the start. `options["dtype"]` is what the model computes in,
    `options["isa"]` what bitsandbytes is held to."""

    def __init__(self, setup: Setup) -> None:
        logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
        hold(setup)
        self._dtype: str = setup.options["dtype"]
        base = load_base(setup.model, device="cpu", dtype=self._dtype)
        self._bytes, self._head_bytes = quantised_bytes(base), head_bytes(base)
        self._linears = to_bitsandbytes(base)
        self._model = _with_adapters(base, setup)

    @torch.inference_mode()
    def run(self, job: Job, way: str) -> Round:
        prompts = torch.tensor(job.prompts)
        times: list[list[float]] = []
        arrival = time.perf_counter()
        if way == ONE_BY_ONE:
            for row, adapter in enumerate(job.scenario.adapters):
                times += self._generate(prompts[row : row + 1], adapter, job.new_tokens)
        elif way == ONE_BATCH:
            (adapter,) = set(job.scenario.adapters)
            times = self._generate(prompts, adapter, job.new_tokens)
        else:
            assert way == MIXED, way
            names = [_name(adapter) for adapter in job.scenario.adapters]
            times = self._tokens(prompts, job.new_tokens, adapter_names=names)
        return round_of(arrival, times)

    def facts(self) -> dict[str, Any]:
        """`repacked`: bitsandbytes changed its weights to its fused bf16 kernel's layout."""
        states = [linear.weight.quant_state for linear in self._linears]
        return {
            "dtype": self._dtype,
            "nf4_bytes": self._bytes,
            "step_bytes": self._bytes + self._head_bytes,
            "arithmetic": "float32",
            "kernels": torch.backends.cpu.get_cpu_capability().lower(),
            "repacked": all(getattr(state, "packing_format_for_cpu", False) for state in states),
        }

    def close(self) -> None:
        """Nothing is held but memory."""

    def _generate(self, prompts: Tensor, adapter: int | None, new: int) -> list[list[float]]:
        if adapter is None:
            with self._model.disable_adapter():
                return self._tokens(prompts, new)
        self._model.set_adapter(_name(adapter))
        return self._tokens(prompts, new)

    def _tokens(self, prompts: Tensor, new: int, **more: Any) -> list[list[float]]:
        """When each of the `new` tokens of each row came."""
        clock = _Clock()
        self._model.generate(
            input_ids=prompts,
            attention_mask=torch.ones_like(prompts),
            max_new_tokens=new,
            min_new_tokens=new,
            do_sample=False,
            stopping_criteria=[clock],
            **more,
        )
        assert len(clock.times) == new
        return [clock.times] * len(prompts)


class _Clock:
    """A stopping criterion that never stops: generate calls it after each token."""

    def __init__(self) -> None:
        self.times: list[float] = []

    def __call__(self, input_ids: Tensor, scores: Any, **kwargs: Any) -> Tensor:
        self.times.append(time.perf_counter())
        return torch.zeros(len(input_ids), dtype=torch.bool)


def _name(adapter: int | None) -> str:
    return "__base__" if adapter is None else f"adapter{adapter}"


def _with_adapters(base: Base, setup: Setup) -> Any:
    from peft import PeftModel

    base.model.is_loaded_in_4bit = True  # what PEFT looks at to choose its own Linear4bit
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = PeftModel.from_pretrained(base.model, str(setup.adapters[0]), _name(0))
        for number, directory in enumerate(setup.adapters[1:], start=1):
            model.load_adapter(str(directory), _name(number))
    return model.eval()


def hold(setup: Setup) -> None:
    """`options["isa"]`, if any, holds bitsandbytes' loops too; before it is imported."""
    if setup.options.get("isa"):
        hold_bitsandbytes()


def to_bitsandbytes(base: Base) -> list[Any]:
    """Each NF4Linear -> bitsandbytes' Linear4bit over the very same bytes."""
    linears = {p: m for p, m in base.model.named_modules() if isinstance(m, NF4Linear)}
    made = []
    for path, linear in linears.items():
        parent, _, name = path.rpartition(".")
        made.append(_linear4bit(linear, base.dtype))
        setattr(base.model.get_submodule(parent), name, made[-1])
    return made


def _state_of_scales(weight: NF4Weight) -> Any:
    """How the scales themselves are quantised; None where they are plain."""
    from bitsandbytes.functional import QuantState

    if not weight.is_nested:
        return None
    return QuantState(
        absmax=weight.nested_absmax,
        code=weight.nested_code,
        blocksize=NESTED_BLOCKSIZE,
        dtype=torch.float32,
    )


def _linear4bit(linear: NF4Linear, dtype: torch.dtype) -> Any:
    import bitsandbytes as bnb
    from bitsandbytes.functional import QuantState, get_4bit_type

    weight = linear.weight
    assert isinstance(weight, NF4Weight)
    layer = bnb.nn.Linear4bit(
        linear.in_features,
        linear.out_features,
        bias=linear.bias is not None,
        compute_dtype=dtype,
        compress_statistics=weight.is_nested,
        quant_type="nf4",
        device="meta",
    )
    state = QuantState(
        absmax=weight.absmax,
        shape=torch.Size(weight.shape),
        code=get_4bit_type("nf4", device="cpu"),
        blocksize=weight.blocksize,
        quant_type="nf4",
        dtype=dtype,
        offset=weight.nested_offset,
        state2=_state_of_scales(weight),
    )
    layer.weight = bnb.nn.Params4bit(
        weight.packed.view(-1, 1),
        requires_grad=False,
        quant_state=state,
        blocksize=weight.blocksize,
        compress_statistics=weight.is_nested,
        quant_type="nf4",
        bnb_quantized=True,
        module=layer,
    )
    layer.quant_state = state
    layer.bias = linear.bias
    return layer.eval()
