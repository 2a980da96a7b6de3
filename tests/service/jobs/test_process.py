"""A process of training: behind everything else, bounded, gone when its server is."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from service.jobs.process import ROOT, Confinement, TrainProcess, answer, document

LINUX = pytest.mark.skipif(sys.platform != "linux", reason="another system's way")
GIVEN = "{{'parent': os.getppid(), 'nice': 7, 'memory_bytes': {memory}}}"
CONFINED = "import os; from service.jobs.launcher import confine; confine(" + GIVEN + "); {then}"


def confined(memory: int | None, then: str) -> subprocess.CompletedProcess[str]:
    program = CONFINED.format(memory=memory, then=then)
    command = [sys.executable, "-c", program]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)


def test_it_steps_back_and_its_memory_is_bounded() -> None:
    assert confined(None, "print(os.nice(0))").stdout.strip() == str(min(19, os.nice(0) + 7))


@LINUX
def test_memory_beyond_the_bound_is_an_error_and_no_kill() -> None:
    done = confined(256 << 20, "x = bytearray(512 << 20)")
    assert done.returncode == 1
    assert "MemoryError" in done.stderr
    assert confined(256 << 20, "x = bytearray(64 << 20)").returncode == 0


@LINUX
def test_it_is_killed_with_its_server(tmp_path: Path) -> None:
    """However the server ends: here by a signal that it cannot catch."""
    child = CONFINED.format(
        memory=None, then="import time; print('up', flush=True); time.sleep(60)"
    )
    server = (
        "import subprocess, sys\n"
        f"child = subprocess.Popen([sys.executable, '-c', {child!r}], stdout=subprocess.PIPE)\n"
        "child.stdout.readline(); print(child.pid, flush=True); child.wait()"
    )
    process = subprocess.Popen([sys.executable, "-c", server], cwd=ROOT, stdout=subprocess.PIPE)
    assert process.stdout is not None
    pid = int(process.stdout.readline())
    os.kill(pid, 0)
    process.send_signal(signal.SIGKILL)
    process.wait()
    process.stdout.close()
    end = time.monotonic() + 30
    while _runs(pid):
        assert time.monotonic() < end, "it outlived its server"
        time.sleep(0.02)


def _runs(pid: int) -> bool:
    try:
        return " Z " not in Path(f"/proc/{pid}/stat").read_text()  # nobody may be there to reap it
    except FileNotFoundError:
        return False


def test_it_knows_no_secret_of_the_server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", "secret")
    monkeypatch.setenv("NIBBLE_ADMIN_KEY", "secret")
    program = "import json, os; print(json.dumps(dict(os.environ)))"
    nibble = (sys.executable, "-c", program)
    confinement = Confinement(threads=3, nibble=nibble)
    status, found, _ = answer((), tmp_path, confinement, seconds=60)
    assert status == 0
    assert "secret" not in json.dumps(found)
    assert (found["OMP_NUM_THREADS"], found["HF_HUB_OFFLINE"]) == ("3", "1")


def test_one_that_does_not_stop_is_killed(tmp_path: Path) -> None:
    program = (
        "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN);"
        "print('up', flush=True); time.sleep(60)"
    )
    nibble = (sys.executable, "-c", program)
    process = TrainProcess((), tmp_path, Confinement(nibble=nibble))
    while "up" not in process.said():
        time.sleep(0.01)
    assert process.end(patience=0.1) == -signal.SIGKILL
    process.close()


def test_a_refusal_of_the_real_command_comes_back(tmp_path: Path) -> None:
    config = {"data": {"train": "x.jsonl"}, "optim": {"steps": 0}}
    (tmp_path / "job.json").write_text(json.dumps(config))
    arguments = ("train", "config", "job.json", "--json")
    status, found, said = answer(arguments, tmp_path, Confinement(nice=0), seconds=120)
    assert status == 2, said
    assert found["error"]["field"] == "optim.steps"


def test_what_is_no_document_is_none() -> None:
    assert document("a\nb") is None
    assert document("") is None
    assert document('warning\n{"a": 1}\n') == {"a": 1}
    assert document('{"a": 1') is None
