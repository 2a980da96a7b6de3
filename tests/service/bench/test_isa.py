from __future__ import annotations

import os
from pathlib import Path

import pytest

from base.machine import Machine
from service.bench import isa
from service.bench.llama_peer import sets_of

WIDE = Machine("", ("avx2", "fma", "avx512f"), 2, 1, 1)
SAYS = "system_info: n_threads = 1 | CPU : SSE3 = 1 | AVX2 = 1 | {more}LLAMAFILE = 1 | "


@pytest.fixture(autouse=True)
def _alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """No llama-cpp-python, and the variables as they were."""
    monkeypatch.setattr(isa, "missing", lambda: ("llama_cpp",))
    monkeypatch.setattr(os, "environ", dict(os.environ))


def _server(where: Path, says: str) -> Path:
    program = where / "llama-server"
    program.write_text(f"#!/bin/sh\necho '{says}' >&2\nexit 1\n")
    program.chmod(0o755)
    return program


def test_what_is_started_afterwards_is_held(tmp_path: Path) -> None:
    isa.hold("avx2", WIDE, llama=True, server=_server(tmp_path, SAYS.format(more="")))
    assert {name: os.environ[name] for name in isa.VARIABLES["avx2"]} == isa.VARIABLES["avx2"]


@pytest.mark.parametrize(
    ("says", "told"),
    [
        (SAYS.format(more="AVX_VNNI = 0 | AVX512 = 1 | AVX512_VNNI = 1 | "), "AVX512, AVX512_VNNI"),
        ("unknown argument", "does not say what it was built for: 'unknown argument'"),
    ],
)
def test_a_server_that_was_built_for_more_is_refused(tmp_path: Path, says: str, told: str) -> None:
    with pytest.raises(isa.CannotHold, match=told) as error:
        isa.hold("avx2", WIDE, llama=True, server=_server(tmp_path, says))
    assert "GGML_NATIVE=OFF" in str(error.value)
    assert "NIBBLE_ISA" not in os.environ
    isa.hold("avx2", WIDE, llama=False, server=None)


def test_a_cpu_that_has_it_not_and_a_name_that_is_none() -> None:
    with pytest.raises(isa.CannotHold, match="this CPU has no avx2, but asimd"):
        isa.hold("avx2", Machine("", ("asimd",), 2, 1, 1), llama=False, server=None)
    with pytest.raises(isa.CannotHold, match="got mmx; avx2 is known"):
        isa.hold("mmx", WIDE, llama=False, server=None)


def test_a_llama_cpp_says_what_it_was_built_with() -> None:
    assert sets_of(SAYS.format(more="AVX512 = 0 | ")) == ("SSE3", "AVX2", "LLAMAFILE")
