"""What a machine is, which dtype it gets, and which sizes fit: made-up machines, and this one."""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import psutil
import pytest
import torch

from base import machine
from base.kernels.kv_rows import stored_bytes
from base.machine import ARITHMETIC, GIB, SIZES, Fit, Gpu, Machine, choose_dtype, fits, inspect

LAPTOP = Machine("a laptop", ("avx2", "fma"), 4, 16 * GIB, 12 * GIB)
SERVER = replace(LAPTOP, features=("avx2", "avx512_bf16", "amx_bf16"))
AMPERE = replace(LAPTOP, gpus=(Gpu("A10", 24 * GIB, 23 * GIB, (8, 6)),))
TURING = replace(LAPTOP, gpus=(Gpu("T4", 16 * GIB, 15 * GIB, (7, 5)),))


@pytest.mark.parametrize(
    ("where", "device", "dtype", "why"),
    [
        (LAPTOP, "auto", "float32", "no bfloat16 instructions"),
        (SERVER, "auto", "float32", "has amx_bf16, but the native NF4 kernels compute in float32"),
        (AMPERE, "auto", "bfloat16", "A10 (capability 8.6)"),
        (AMPERE, "cuda", "bfloat16", "A10 (capability 8.6)"),
        (AMPERE, "cpu", "float32", "no bfloat16 instructions"),
        (TURING, "auto", "float16", "T4 (capability 7.5) has no fast bfloat16"),
    ],
)
def test_the_dtype_and_why(where: Machine, device: str, dtype: str, why: str) -> None:
    chosen, reason = choose_dtype(where, device)
    assert chosen == dtype
    assert why in reason


def fit_of(where: Machine, label: str) -> Fit:
    return next(f for f in fits(where) if f.size.label == label)


def test_the_sizes_are_those_of_known_models() -> None:
    """Weights in linears and embeddings, in units of 10⁹, as the models' cards state them."""
    stated = {"0.5B": 0.49, "1.5B": 1.54, "3B": 3.09, "8B": 8.03, "14B": 14.8, "32B": 32.8}
    stated["70B"] = 70.6
    assert {s.label for s in SIZES} == set(stated)
    for size in SIZES:
        count = (size.linear_weights + size.embedding_weights) / 1e9
        assert count == pytest.approx(stated[size.label], rel=0.01), size.label


def test_the_arithmetic_by_hand() -> None:
    """8B in float32: 32 layers of 218 M weights, 0.5625 byte each; keys and values 1024 wide."""
    fit = fit_of(LAPTOP, "8B")
    weights = 32 * (2 * 4096 * 4096 + 2 * 1024 * 4096 + 3 * 14336 * 4096)
    assert fit.serving["nf4"] == weights * 0.5625
    assert fit.serving["embeddings"] == 2 * 128_256 * 4096 * 4
    assert fit.serving["kv_cache"] == 2 * 32 * 1024 * 8 * 4096 * 4
    per_layer = 2 * (4096 + 4096) + 2 * (1024 + 4096) + 3 * (14336 + 4096)
    assert fit.training["lora"] == 16 * 32 * per_layer * 16
    kept = 32 * (7 * 4096 + 4 * 14336) * 4
    assert fit.training["activations"] == 2048 * (kept + 2 * 128_256 * 4)
    assert fit.serving_bytes == sum(fit.serving.values())
    assert fit.training_bytes == sum(fit.training.values())


def test_sixteen_bit_halves_what_is_not_quantised() -> None:
    cpu, gpu = fit_of(LAPTOP, "3B"), fit_of(AMPERE, "3B")
    weights = gpu.size.linear_weights
    assert cpu.serving["nf4"] == weights * (0.5 + 4 / 64)
    assert gpu.serving["nf4"] == weights * (0.5 + 1 / 64 + 4 / 64 / 256), "double quantisation"
    for part in ("embeddings", "kv_cache"):
        assert gpu.serving[part] * 2 == cpu.serving[part]


def test_keys_and_values_are_counted_in_the_dtype_of_the_cache() -> None:
    sizes = {
        dtype: next(f for f in fits(LAPTOP, dtype) if f.size.label == "8B").serving["kv_cache"]
        for dtype in ("auto", "float32", "bfloat16", "int8")
    }
    assert sizes["auto"] == sizes["float32"] == 2 * sizes["bfloat16"]
    head = 128  # numbers: as many bytes and four scales
    assert sizes["int8"] == 2 * 32 * (1024 // head) * stored_bytes(head, torch.int8) * 8 * 4096


def test_the_gpu_s_free_memory_is_the_budget_where_there_is_one() -> None:
    assert fit_of(LAPTOP, "8B").budget == 12 * GIB
    assert fit_of(AMPERE, "8B").budget == 23 * GIB
    assert fit_of(AMPERE, "8B").serves
    assert not fit_of(AMPERE, "70B").serves


def test_a_budget_decides() -> None:
    fit = fit_of(LAPTOP, "1.5B")
    assert replace(fit, budget=fit.serving_bytes).serves
    assert not replace(fit, budget=fit.serving_bytes - 1).serves
    assert replace(fit, budget=fit.training_bytes).trains
    assert not replace(fit, budget=fit.training_bytes - 1).trains


def test_every_part_is_explained() -> None:
    for fit in fits(LAPTOP):
        assert set(fit.serving) | set(fit.training) == set(ARITHMETIC)


def test_this_machine() -> None:
    here = inspect()
    assert here.cpu
    assert 0 < here.memory_available <= here.memory_total <= psutil.virtual_memory().total
    assert 1 <= here.cores <= psutil.cpu_count()
    assert {"python", "torch", "bitsandbytes"} <= set(here.versions)
    assert choose_dtype(here)[0] in ("float32", "bfloat16", "float16")


CPUINFO = """processor\t: 0
model name\t: Some CPU @ 2.00GHz
flags\t\t: fpu sse avx2 fma avx512_bf16 somethingelse
processor\t: 1
model name\t: Some CPU @ 2.00GHz
"""


def test_the_cpu_s_own_words(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "_cpuinfo", lambda: CPUINFO)
    here = inspect()
    assert (here.cpu, here.features) == ("Some CPU @ 2.00GHz", ("avx2", "fma", "avx512_bf16"))


def test_the_limits_of_a_container_count(monkeypatch: pytest.MonkeyPatch) -> None:
    total = psutil.virtual_memory().total
    group = {"memory.max": str(total // 2), "memory.current": str(total // 4)}
    group["cpu.max"] = "100000 100000"
    monkeypatch.setattr(machine, "_cgroup", lambda name: group[name])
    here = inspect()
    assert here.memory_total == total // 2
    assert here.memory_available <= total // 4
    assert here.cores == 1
    group.update({"memory.max": "max", "cpu.max": "max 100000"})
    assert inspect().memory_total == total


def test_no_more_threads_than_a_container_s_quota(monkeypatch: pytest.MonkeyPatch) -> None:
    group = {"cpu.max": "200000 100000"}
    monkeypatch.setattr(machine, "_cgroup", lambda name: group[name])
    monkeypatch.setattr(machine, "_cores_seen", lambda: 64)
    monkeypatch.setenv("OMP_NUM_THREADS", "7")
    machine.bound_threads()
    assert os.environ["OMP_NUM_THREADS"] == "7"
    monkeypatch.delenv("OMP_NUM_THREADS")
    machine.bound_threads()
    assert os.environ["OMP_NUM_THREADS"] == "2"
    monkeypatch.delenv("OMP_NUM_THREADS")
    group["cpu.max"] = "max 100000"
    machine.bound_threads()
    assert "OMP_NUM_THREADS" not in os.environ, "torch knows which cores are threads of one"


def test_importing_the_module_leaves_torch_out() -> None:
    code = "import sys, base.machine; sys.exit('torch' in sys.modules)"
    root = Path(__file__).parents[2]
    assert subprocess.run([sys.executable, "-c", code], cwd=root, check=False).returncode == 0
