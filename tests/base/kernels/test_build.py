import subprocess
import sys
from pathlib import Path

import pytest

from base.kernels import build, native


def test_names_agree_with_the_loader() -> None:
    assert (build.LIBRARY, build.REASON) == (native.LIBRARY, native.REASON)


def test_without_a_compiler_there_is_a_reason(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CC", raising=False)
    assert build.build(tmp_path) is None
    library, status = native.load(tmp_path)
    assert library is None
    assert "no C compiler" in status


def test_a_failing_compiler_is_quoted_and_leaves_no_old_library(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    compiler = tmp_path / "broken-cc"
    compiler.write_text("#!/bin/sh\necho 'x.c:1: error: out of ideas' >&2\nexit 1\n")
    compiler.chmod(0o755)
    monkeypatch.setenv("CC", str(compiler))
    (tmp_path / build.LIBRARY).write_bytes(b"old")
    assert build.build(tmp_path) is None
    assert not (tmp_path / build.LIBRARY).exists()
    assert "out of ideas" in native.load(tmp_path)[1]


def test_a_library_that_does_not_load_is_no_crash(tmp_path: Path) -> None:
    (tmp_path / build.LIBRARY).write_bytes(b"not a library")
    library, status = native.load(tmp_path)
    assert library is None
    assert status.startswith("not loaded")


def test_can_be_switched_off(
    library: native.Native, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("NIBBLE_NATIVE", "0")
    assert native.load(tmp_path) == (None, "off: NIBBLE_NATIVE=0")


def test_runs_as_a_script_without_torch() -> None:
    """The installer's environment has none."""
    code = (
        "import runpy, sys; names = runpy.run_path(sys.argv[1]);"
        "assert 'build' in names and 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-I", "-c", code, build.__file__], check=True)


def test_an_unknown_instruction_set_is_refused(library: native.Native) -> None:
    before = library.isa
    with pytest.raises(ValueError, match="NIBBLE_ISA=mmx"):
        library.select("mmx")
    assert library.select(before) == before
