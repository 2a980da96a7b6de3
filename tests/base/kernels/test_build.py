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


def test_what_was_made_from_the_same_sources_is_not_made_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An extra is installed into a checkout by installing the checkout again."""
    sources = tmp_path / "csrc"
    sources.mkdir()
    (sources / "one.c").write_text("int nibble_one(void) { return 1; }\n")
    monkeypatch.setattr(build, "SOURCES", sources)
    monkeypatch.setattr(build, "_units", lambda: {"one": []})
    made = build.build(tmp_path)
    if made is None:
        pytest.skip((tmp_path / build.REASON).read_text())

    def is_made_again() -> bool:
        before = made.stat().st_ino
        with made.open("rb"):  # so that no new file can have the number of the old one
            build.build(tmp_path)
            return made.stat().st_ino != before

    assert build.is_current(made)
    assert not is_made_again()
    (sources / "one.c").write_text("int nibble_one(void) { return 2; }\n")
    assert not build.is_current(made)
    assert is_made_again()
    monkeypatch.setenv("NIBBLE_CFLAGS", "-O1")
    assert is_made_again()
    assert not is_made_again()
    (sources / "used.h").write_text("/* another file that a unit may include */\n")
    assert is_made_again()
    made.write_bytes(b"cut off")
    assert is_made_again()


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
