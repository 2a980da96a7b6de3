from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from service.bench.apart import Ended, apart

WAITING = """
import signal, sys, tempfile, time
from pathlib import Path
from service.bench.apart import apart, heeding_sigterm

def work(where):
    with tempfile.TemporaryDirectory(dir=where, prefix="held-"):
        Path(where, "ready").touch()
        time.sleep(60)

if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background job is deaf
    with heeding_sigterm():
        apart(work, sys.argv[1])
"""


def square(number: int) -> int:
    if number < 0:
        raise ValueError("negative")
    if number == 0:
        os._exit(3)
    return number * number


def test_an_answer_an_error_and_an_end() -> None:
    assert apart(square, 7) == 49
    with pytest.raises(ValueError, match="negative"):
        apart(square, -1)
    with pytest.raises(Ended, match="ended with 3"):
        apart(square, 0)


@pytest.mark.parametrize(
    ("number", "told"), [(signal.SIGINT, "KeyboardInterrupt"), (signal.SIGTERM, "")]
)
def test_who_is_interrupted_leaves_nothing(tmp_path: Path, number: int, told: str) -> None:
    """All processes of the terminal hear Ctrl-C, and only the first says so."""
    (tmp_path / "waiting.py").write_text(WAITING)
    process = subprocess.Popen(
        [sys.executable, str(tmp_path / "waiting.py"), str(tmp_path)],
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
        env={**os.environ, "PYTHONPATH": os.getcwd()},
    )
    while not (tmp_path / "ready").exists():
        assert process.poll() is None
        time.sleep(0.02)
    os.killpg(process.pid, number) if number == signal.SIGINT else process.terminate()
    _, said = process.communicate(timeout=60)
    assert process.returncode in (-number, 128 + number)
    assert not list(tmp_path.glob("held-*"))
    assert said.count("Traceback") == said.count(told if told else "Traceback") <= 1
