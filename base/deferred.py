"""Parts of torch that serving never asks for: `import torch` leaves them; whoever asks gets them.

`import torch` runs 940 modules, half of them for compiling, exporting, quantising and training. A
server on a CPU calls none of that. Each module of DEFERRED stays an empty place until something
reads an attribute of it, or imports transformers, Triton or another module of torch: then all of
them run, in torch's own order, and from there on torch is what it always is. What they register
meanwhile lacks: the Python versions of operators on the meta device, and CUDA's extra kernels.
"""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable, Sequence
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec, PathFinder
from importlib.metadata import PackageNotFoundError, version
from types import ModuleType
from typing import Any

from base.preload import torch_library

CUDA_LIBRARY = "libtorch_cuda.so"
TESTED = "2.13.0"  # the torch whose imports these are; another one is imported whole
DEFERRED = frozenset(
    {
        "torch._higher_order_ops",
        "torch._meta_registrations",
        "torch._native",
        "torch.ao",
        "torch.compiler",
        "torch.distributed._meta_registrations",
        "torch.distributions",
        "torch.export",
        "torch.func",
        "torch.masked",
        "torch.nested",
        "torch.nn.intrinsic",
        "torch.nn.qat",
        "torch.nn.quantizable",
        "torch.nn.quantized",
        "torch.optim",
        "torch.profiler",
        "torch.quantization",
        "torch.utils.data",
        "torchgen",
        "torchgen.model",
    }
)
# What torch itself takes from them by name while it is imported: module -> functions of `torch`.
TAKEN = {"torch._higher_order_ops": ("cond", "while_loop"), "torch.func": ("vmap",)}
# What torch's own modules ask on every call, with the answer while they are empty.
NOT_COMPILING = ("is_compiling", "is_dynamo_compiling", "is_exporting")
WANT_ALL = frozenset({"torch", "torchgen", "transformers", "triton", "peft", "accelerate"})


def defer_torch() -> Deferral | None:
    """To be called before torch is imported. None where torch will be whole at once: it is imported
    already, it is not the one tested, or it was built for CUDA.
    """
    if "torch" in sys.modules or not known():
        return None
    deferral = Deferral()
    sys.meta_path.insert(0, deferral)
    return deferral


def known() -> bool:
    """Is this the torch that DEFERRED was found on, for a CPU?"""
    try:
        tested = version("torch").split("+")[0] == TESTED
    except PackageNotFoundError:
        return False
    return tested and torch_library(CUDA_LIBRARY) is None


class Deferral(MetaPathFinder, Loader):
    """Finds the modules of DEFERRED and leaves them empty until `complete`."""

    def __init__(self) -> None:
        self._own: dict[str, Loader] = {}  # the loaders of modules that are empty yet
        self._empty: dict[str, ModuleType] = {}
        self._lock = threading.RLock()
        self._completing = False

    @property
    def pending(self) -> frozenset[str]:
        """Modules that torch has imported and that did not run."""
        return frozenset(self._empty)

    def complete(self) -> None:
        """Run them all; torch is whole after that."""
        with self._lock:
            if self._completing:  # by this thread, further up
                return
            self._completing = True
            if self in sys.meta_path:
                sys.meta_path.remove(self)
            for name in list(self._empty):
                self._run(name)
            for name, functions in TAKEN.items():
                for function in functions if name in sys.modules else ():
                    setattr(sys.modules["torch"], function, getattr(sys.modules[name], function))

    def find_spec(
        self, name: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if name.partition(".")[0] not in WANT_ALL:
            return None
        if not _importing_torch():
            if self._empty and not self._completing:
                self.complete()
            return None
        if name.rpartition(".")[0] in self._empty and name not in DEFERRED:
            self.complete()  # a part of one of them, which this torch wants after all
        if name not in DEFERRED or self._completing:
            return None
        spec = PathFinder.find_spec(name, path, target)
        if spec is not None and spec.loader is not None:
            self._own[name] = spec.loader
            spec.loader = self
        return spec

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        return self._own[spec.name].create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        self._empty[module.__name__] = module
        module.__dict__["__getattr__"] = self._asked(module)
        if module.__name__ == "torch.compiler":
            module.__dict__.update(dict.fromkeys(NOT_COMPILING, lambda: False))

    def _asked(self, module: ModuleType) -> Callable[[str], Any]:
        """The `__getattr__` of an empty module."""

        def found(attribute: str) -> Any:
            if attribute.startswith("__"):
                raise AttributeError(f"module {module.__name__} has no attribute {attribute}")
            if _importing_torch() and attribute in TAKEN.get(module.__name__, ()):
                return lambda *args, **named: self._forwarded(module, attribute)(*args, **named)
            with self._lock:
                self.complete()
                self._run(module.__name__)  # in the middle of it, one asks for a later one
            return getattr(module, attribute)

        return found

    def _forwarded(self, module: ModuleType, function: str) -> Any:
        self.complete()
        return getattr(module, function)

    def _run(self, name: str) -> None:
        module = self._empty.pop(name, None)
        if module is None:
            return
        own = self._own[name]
        del module.__dict__["__getattr__"]
        module.__loader__ = own
        if module.__spec__ is not None:
            module.__spec__.loader = own
        own.exec_module(module)


def _importing_torch() -> bool:
    torch = sys.modules.get("torch")
    return torch is None or bool(getattr(torch.__spec__, "_initializing", False))
