"""What this machine is, which dtype suits it, and which sizes of base fit in it.

torch is imported inside `inspect` only: the rest works without it.
"""

from __future__ import annotations

import os
import platform
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path

GIB = 1 << 30

# What decides the speed of a CPU here, as Linux names it (x86, then ARM).
_FEATURES = (
    "avx2",
    "fma",
    "avx512f",
    "avx512bw",
    "avx512_vnni",
    "avx_vnni",
    "avx512_bf16",
    "amx_tile",
    "amx_int8",
    "amx_bf16",
    "asimd",
    "asimddp",
    "i8mm",
    "bf16",
    "sve",
)
_FAST_BF16 = ("amx_bf16", "avx512_bf16")
_PACKAGES = ("torch", "bitsandbytes", "transformers", "peft")


@dataclass(frozen=True, slots=True)
class Gpu:
    """One CUDA device."""

    name: str
    memory_total: int  # bytes
    memory_free: int  # bytes
    capability: tuple[int, int]  # (8, 0) is Ampere


@dataclass(frozen=True, slots=True)
class Machine:
    """One machine as this process sees it: the limits of its container count, not the host's."""

    cpu: str
    features: tuple[str, ...]
    cores: int
    memory_total: int  # bytes
    memory_available: int  # bytes
    gpus: tuple[Gpu, ...] = ()
    versions: Mapping[str, str] = field(default_factory=dict)  # package -> version, if installed


@dataclass(frozen=True, slots=True)
class Size:
    """A common size of base, by the shape of a well-known model of that size."""

    label: str
    layers: int
    hidden: int
    intermediate: int
    kv_width: int  # key/value heads times width of a head
    vocab: int
    tied: bool

    @property
    def linear_shapes(self) -> tuple[tuple[int, int], ...]:
        """(out, in) of the seven linears of one layer."""
        h, i, kv = self.hidden, self.intermediate, self.kv_width
        return ((h, h), (kv, h), (kv, h), (h, h), (i, h), (i, h), (h, i))

    @property
    def linear_weights(self) -> int:
        return self.layers * sum(out * width for out, width in self.linear_shapes)

    @property
    def embedding_weights(self) -> int:
        return self.vocab * self.hidden * (1 if self.tied else 2)

    @property
    def lora_weights(self) -> int:
        """Rank 16 on each linear: A [16, in] and B [out, 16]."""
        return 16 * self.layers * sum(out + width for out, width in self.linear_shapes)


SIZES = (
    Size("0.5B", 24, 896, 4864, 128, 151_936, tied=True),
    Size("1.5B", 28, 1536, 8960, 256, 151_936, tied=True),
    Size("3B", 36, 2048, 11_008, 256, 151_936, tied=True),
    Size("8B", 32, 4096, 14_336, 1024, 128_256, tied=False),
    Size("14B", 48, 5120, 13_824, 1024, 152_064, tied=False),
    Size("32B", 64, 5120, 27_648, 1024, 152_064, tied=False),
    Size("70B", 80, 8192, 28_672, 1024, 128_256, tied=False),
)


@dataclass(frozen=True, slots=True)
class Fit:
    """Does one size fit? The parts, in bytes, are the whole arithmetic: their sum is compared."""

    size: Size
    serving: Mapping[str, int]
    training: Mapping[str, int]
    budget: int  # bytes that are free on the device that would be used

    @property
    def serving_bytes(self) -> int:
        return sum(self.serving.values())

    @property
    def training_bytes(self) -> int:
        return sum(self.training.values())

    @property
    def serves(self) -> bool:
        return self.serving_bytes <= self.budget

    @property
    def trains(self) -> bool:
        return self.training_bytes <= self.budget


# Bytes of one number; of int8, which only a KV cache keeps, with its share of a scale (kv_rows.py).
DTYPE_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2, "int8": 1 + 4 / 32}

# What stands beside each part of `Fit`, for people.
ARITHMETIC = {
    "nf4": "decoder linears: half a byte for each weight, and for each block of 64 one byte on a "
    "GPU (double quantisation), 4 on a CPU, which serves with its scales unpacked",
    "embeddings": "embeddings (and the output layer, unless tied) in the compute dtype",
    "kv_cache": "keys and values of 8 sequences of 4,096 tokens in the dtype of the cache",
    "lora": "rank 16 on every linear, float32: weights, gradients, two Adam moments",
    "activations": "4 sequences of 512 tokens: per token and layer 7 hidden and 4 intermediate "
    "widths in the compute dtype (measured), in 16 bit the inputs of LoRA once more in float32; "
    "the logits and their gradient in float32",
    "overhead": "the process or CUDA context, and the largest linear dequantised once",
}


def inspect() -> Machine:
    """Look at this machine. Reads a few small files; asks torch for GPUs."""
    total, available = _memory()
    return Machine(
        cpu=_cpu_name(),
        features=_cpu_features(),
        cores=_cores(),
        memory_total=total,
        memory_available=available,
        gpus=_gpus(),
        versions=_versions(),
    )


def choose_dtype(machine: Machine, device: str = "auto") -> tuple[str, str]:
    """The compute dtype for "auto", "cpu" or "cuda", and why: ("float32", "…")."""
    if device != "cpu" and machine.gpus:
        gpu = machine.gpus[0]
        major, minor = gpu.capability
        if gpu.capability >= (8, 0):
            return "bfloat16", f"{gpu.name} (capability {major}.{minor}) multiplies bfloat16 fast"
        return "float16", (
            f"{gpu.name} (capability {major}.{minor}) has no fast bfloat16, which begins at 8.0"
        )
    fast = [name for name in _FAST_BF16 if name in machine.features]
    if fast:
        return "float32", (
            f"the CPU has {fast[0]}, but the native NF4 kernels compute in float32 and read the "
            "weights in 4 bits, so bfloat16 would save no memory traffic and cost digits"
        )
    return (
        "float32",
        "this CPU has no bfloat16 instructions; emulating them is ten times slower",
    )


def fits(machine: Machine, kv_dtype: str = "auto") -> tuple[Fit, ...]:
    """Each common size against what is free on the first GPU, or in memory where there is none.

    `kv_dtype`: what the KV cache keeps, "auto" is the compute dtype.
    """
    dtype, _ = choose_dtype(machine)
    width, kept = DTYPE_BYTES[dtype], DTYPE_BYTES[dtype if kv_dtype == "auto" else kv_dtype]
    budget = machine.gpus[0].memory_free if machine.gpus else machine.memory_available
    sizes = ((s, _base(s, int(width), double_quant=bool(machine.gpus))) for s in SIZES)
    return tuple(
        Fit(s, base | _kv_cache(s, kept), base | _training(s, int(width)), budget)
        for s, base in sizes
    )


def _base(size: Size, width: int, double_quant: bool) -> dict[str, int]:
    largest = max(out * columns for out, columns in size.linear_shapes)
    blocks = size.linear_weights // 64
    scales = blocks + blocks // 256 * 4 if double_quant else blocks * 4
    return {
        "nf4": size.linear_weights // 2 + scales,
        "embeddings": size.embedding_weights * width,
        "overhead": GIB + largest * width,
    }


def _kv_cache(size: Size, kept: float) -> dict[str, int]:
    tokens = 8 * 4096
    return {"kv_cache": int(2 * size.layers * size.kv_width * tokens * kept)}


def _training(size: Size, width: int) -> dict[str, int]:
    tokens = 4 * 512
    per_layer = (7 * size.hidden + 4 * size.intermediate) * width
    if width < 4:
        per_layer += (6 * size.hidden + size.intermediate) * 4
    return {
        "lora": size.lora_weights * 4 * 4,
        "activations": tokens * (size.layers * per_layer + 2 * size.vocab * 4),
    }


def _gpus() -> tuple[Gpu, ...]:
    try:
        import torch
    except ImportError:
        return ()
    if not torch.cuda.is_available():
        return ()
    return tuple(_gpu(i) for i in range(torch.cuda.device_count()))


def _gpu(index: int) -> Gpu:
    import torch

    properties = torch.cuda.get_device_properties(index)
    free, total = torch.cuda.mem_get_info(index)
    return Gpu(properties.name, total, free, (properties.major, properties.minor))


def _cpuinfo() -> str:
    try:
        return Path("/proc/cpuinfo").read_text()
    except OSError:  # not Linux
        return ""


def _cpu_name() -> str:
    found = re.search(r"^model name\s*:\s*(.+)$", _cpuinfo(), re.MULTILINE)
    return found[1].strip() if found else platform.processor() or platform.machine()


def _cpu_features() -> tuple[str, ...]:
    found = re.search(r"^(?:flags|Features)\s*:\s*(.+)$", _cpuinfo(), re.MULTILINE)
    present = set(found[1].split()) if found else set()
    return tuple(name for name in _FEATURES if name in present)


def _cores() -> int:
    """Cores this process may use: its affinity, or the container's quota where that is less."""
    seen, quota = _cores_seen(), _cgroup("cpu.max").split()
    if len(quota) == 2 and quota[0].isdigit():
        return min(seen, max(1, int(quota[0]) // int(quota[1])))
    return seen


def _cores_seen() -> int:
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def bound_threads() -> None:
    """Before torch is loaded, which starts a thread for each core that it sees, and does not see a
    container's quota. What OMP_NUM_THREADS says already holds."""
    if (cores := _cores()) < _cores_seen():
        os.environ.setdefault("OMP_NUM_THREADS", str(cores))


def _memory() -> tuple[int, int]:
    """(total, available) bytes, bounded by the container's limit."""
    import psutil

    seen = psutil.virtual_memory()
    limit, used = _cgroup("memory.max"), _cgroup("memory.current")
    if not limit.isdigit() or not used.isdigit():
        return int(seen.total), int(seen.available)
    total = min(int(seen.total), int(limit))
    return total, max(0, min(int(seen.available), total - int(used)))


def _cgroup(name: str) -> str:
    """One value of our control group (version 2), "" where there is none."""
    try:
        return (Path("/sys/fs/cgroup") / name).read_text().strip()
    except OSError:
        return ""


def _versions() -> dict[str, str]:
    versions = {"python": platform.python_version()}
    for name in _PACKAGES:
        try:
            versions[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return versions
