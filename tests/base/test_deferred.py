"""torch without what serving never asks for: that is left, and whoever asks gets all of it."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from base.deferred import TESTED, defer_torch, known

pytestmark = pytest.mark.skipif(not known(), reason=f"torch is not the {TESTED} for a CPU")

LEFT = """
import sys
from base.deferred import DEFERRED, defer_torch
deferral = defer_torch()
import torch
assert deferral.pending == DEFERRED, DEFERRED - deferral.pending
layer = torch.nn.Linear(3, 2)
with torch.inference_mode():
    assert layer(torch.ones(1, 3)).shape == (1, 2)
assert not torch.compiler.is_compiling()
assert deferral.pending == DEFERRED, DEFERRED - deferral.pending
"""
WHOLE = """
assert not deferral.pending
assert deferral not in sys.meta_path
from torch._higher_order_ops import cond
from torch.func import vmap
assert torch.cond is cond and torch.vmap is vmap
assert type(torch.compiler.is_compiling).__module__ != "base.deferred"
assert all(name in sys.modules for name in DEFERRED)
assert all("__getattr__" not in vars(sys.modules[n]) for n in ("torch.optim", "torch.export"))
hidden = torch.empty(4, 3, device="meta").std(0)  # registered by torch._meta_registrations
assert hidden.shape == (3,)
weight = torch.ones(2, requires_grad=True)
torch.optim.SGD([weight], lr=1.0).zero_grad()
assert torch.vmap(torch.sum)(torch.ones(2, 3)).tolist() == [3, 3]
"""


def run(program: str) -> None:
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(
    "ask",
    [
        "torch.optim.SGD",  # an attribute of one of them
        "torch.vmap(lambda x: x)(torch.ones(1))",  # a function that torch took from one of them
        pytest.param("import torch.utils.data.dataset", marks=pytest.mark.slow),  # a part of one
        pytest.param("import torch.utils.checkpoint", marks=pytest.mark.slow),  # another of torch's
        pytest.param("import transformers", marks=pytest.mark.slow),
    ],
)
def test_it_is_left_until_somebody_asks(ask: str) -> None:
    run(f"{LEFT}\n{ask}\n{WHOLE}")


def test_where_torch_is_there_already_nothing_is_left() -> None:
    __import__("torch")
    assert defer_torch() is None


SERVE = """
import sys
from pathlib import Path
from base.deferred import DEFERRED, defer_torch
deferral = defer_torch() if sys.argv[2] == "deferred" else None
from base.load import load_base
from base.mini import MINI
from service.engine.config import EngineConfig
from service.engine.loop import Engine
from service.engine.request import Request, Sampling, Token
base = load_base(MINI, device="cpu", precision="fast", cache_dir=Path(sys.argv[1]), lean=True)
engine = Engine(base, lambda ref: NotImplemented, EngineConfig())
engine.start()
for sampling in (Sampling(top_logprobs=3), Sampling(do_sample=True, top_p=0.9, top_k=40, seed=1)):
    stream = engine.submit(Request("r", tuple(range(9, 40)), sampling))
    print([str(event) for event in stream.iterate() if isinstance(event, Token)])
engine.stop()
if deferral:
    assert deferral.pending == DEFERRED, "something on the way of a request asked for them"
"""


@pytest.mark.slow
def test_a_server_answers_without_them(tmp_path: Path) -> None:
    def served(how: str) -> str:
        command = [sys.executable, "-c", SERVE, str(tmp_path), how]
        done = subprocess.run(command, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        return done.stdout

    served("whole")  # quantises, and keeps what a lean base is made of
    assert served("deferred") == served("whole")


NORM = """
from base.deferred import DEFERRED, defer_torch
deferral = defer_torch()
import torch
from adapters.operator import AdaptedNorm, OperatorContext
context = OperatorContext()
layer = AdaptedNorm("norm", torch.nn.RMSNorm(4), context)
context.plans = {"norm": [(1, 2, torch.full((4,), 3.0))]}
with torch.inference_mode():
    assert layer(torch.ones(1, 3, 4))[0, :, 0].round().tolist() == [1.0, 3.0, 1.0]
assert deferral.pending == DEFERRED, "an adapter's own norm asked for them"
"""


@pytest.mark.slow
def test_an_adapter_with_norms_of_its_own_is_served_without_them() -> None:
    run(NORM)
