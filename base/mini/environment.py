"""Machine and versions, as the card names them."""

from __future__ import annotations

import platform
from importlib.metadata import version
from pathlib import Path

import torch


def _processor() -> str:
    """The processor's name where the system tells it."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor()
    names = [line.split(":")[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor()


def environment(device: str = "cpu") -> dict[str, str]:
    """What computed, with which versions."""
    processor = torch.cuda.get_device_name() if device == "cuda" else _processor()
    packages = ("torch", "transformers", "bitsandbytes", "tokenizers")
    return {
        "processor": f"{processor} ({torch.backends.cpu.get_cpu_capability()})",
        "threads": str(torch.get_num_threads()),
        "python": platform.python_version(),
        **{name: version(name) for name in packages},
    }
