"""The audit log: only appended, and whatever is done to it shows."""

from __future__ import annotations

import json
import logging
import multiprocessing
import os
import re
from collections.abc import Callable
from pathlib import Path

import pytest
from typer.testing import CliRunner

from service.access import audit
from service.access.audit import AuditLog, find, lines, segments, verify
from service.commands import audit as command


def written(directory: Path, number: int, start: int = 0) -> AuditLog:
    log = AuditLog(directory)
    for n in range(start, start + number):
        log.note("POST /generate", request=f"r{n}", tenant="acme", digest="a" * 64, key=None)
    log.flush()
    return log


def test_lines_hold_together_over_restarts(tmp_path: Path) -> None:
    for start in (0, 3, 6):
        written(tmp_path, 3, start).close()
    assert [line["n"] for line in lines(tmp_path)] == list(range(1, 10))
    found = verify(tmp_path)
    assert (found.lines, found.broken) == (9, None)
    (one,) = find(tmp_path, "r4")
    assert (one["digest"], one["tenant"], "key" in one) == ("a" * 64, "acme", False)
    assert find(tmp_path, "r9") == []
    assert verify(tmp_path / "nothing").lines == 0


def change(old: bytes, new: bytes) -> Callable[[list[bytes]], list[bytes]]:
    return lambda rows: [row.replace(old, new) for row in rows]


@pytest.mark.parametrize(
    ("do", "said"),
    [
        (change(b'"r4"', b'"r5"'), "line 5 of"),
        (change(b'"acme", "digest"', b'"zeta", "digest"'), "line 1 of"),
        (lambda rows: rows[:4] + rows[5:], "line 6 of .* missing, or another"),
        (lambda rows: [*rows[:3], rows[4], rows[3], *rows[5:]], "missing, or another"),
        (lambda rows: [*rows[:2], rows[1], *rows[2:]], "missing, or another"),
        (lambda rows: [*rows[:3], b"{not json\n", *rows[4:]], "line 4: it is no line"),
    ],
)
def test_what_was_done_to_it_shows(
    tmp_path: Path, do: Callable[[list[bytes]], list[bytes]], said: str
) -> None:
    written(tmp_path, 9).close()
    (path,) = segments(tmp_path)
    path.write_bytes(b"".join(do(path.read_bytes().splitlines(keepends=True))))
    broken = verify(tmp_path).broken
    assert broken is not None
    assert re.search(said, broken), broken


def test_a_line_with_a_new_hash_breaks_the_next(tmp_path: Path) -> None:
    written(tmp_path, 5).close()
    (path,) = segments(tmp_path)
    rows = [json.loads(row) for row in path.read_bytes().splitlines()]
    rows[2]["tenant"] = "zeta"
    rows[2]["hash"] = audit._hash({k: v for k, v in rows[2].items() if k != "hash"})
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert "line 4" in str(verify(tmp_path).broken)


def test_what_a_crash_tore_off_does_not_break_what_follows(tmp_path: Path) -> None:
    written(tmp_path, 3).close()
    (path,) = segments(tmp_path)
    os.truncate(path, path.stat().st_size - 7)
    written(tmp_path, 2, 3).close()
    assert [line["request"] for line in lines(tmp_path)] == ["r0", "r1", "r3", "r4"]
    assert verify(tmp_path).broken is None


def test_segments_follow_each_other_and_the_oldest_go(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(audit, "SEGMENT_BYTES", 500)
    log = AuditLog(tmp_path, max_bytes=2000)
    for n in range(40):
        log.note("POST /generate", request=f"r{n}")
        log.flush()
    log.close()
    assert 3 <= len(segments(tmp_path)) <= 6
    found = verify(tmp_path)
    assert found.broken is None
    assert found.lines < 40
    assert [line for line in lines(tmp_path) if line["action"] == "audit drop"]
    assert find(tmp_path, "r39")
    assert not find(tmp_path, "r0")


def test_a_full_disk_loses_nothing(tmp_path: Path) -> None:
    (tmp_path / "audit").write_text("in the way of the directory")
    log = written(tmp_path / "audit", 3)
    assert log.unwritten == 3
    (tmp_path / "audit").unlink()
    log.close()
    assert (verify(tmp_path / "audit").lines, log.unwritten) == (3, 0)


def cut(directory: Path, keep: slice) -> None:
    (path,) = segments(directory)
    path.write_bytes(b"".join(path.read_bytes().splitlines(keepends=True)[keep]))


@pytest.mark.parametrize("keep", [slice(-1), slice(0), slice(2)])
def test_a_server_that_runs_notices_that_its_last_lines_were_cut_off(
    tmp_path: Path, keep: slice, caplog: pytest.LogCaptureFixture
) -> None:
    log = written(tmp_path, 5)
    newest = verify(tmp_path).last
    cut(tmp_path, keep)
    log.note("POST /generate", request="r5")
    log.close()
    assert f"line 5, {newest}, was cut off before it" in str(verify(tmp_path).broken)
    assert f"line 5, {newest}, is missing" in caplog.text
    assert find(tmp_path, "r5"), "what comes is written on"
    assert (log.cuts, log.unwritten) == (1, 0)


def test_a_last_line_in_another_s_place_is_noticed_too(tmp_path: Path) -> None:
    log = written(tmp_path, 5)
    cut(tmp_path, slice(-2))
    written(tmp_path, 3, 10).close()  # by another process, which knows of nothing
    assert verify(tmp_path).broken is None
    log.note("POST /generate", request="r5")
    log.close()
    assert "was cut off before it" in str(verify(tmp_path).broken)


def test_others_lines_are_no_cut(tmp_path: Path) -> None:
    log = written(tmp_path, 2)
    written(tmp_path, 400, 100).close()  # more than the end that is looked at
    log.note("POST /generate", request="r5")
    log.close()
    assert (verify(tmp_path).lines, verify(tmp_path).broken) == (403, None)


def test_a_hash_that_was_kept_shows_what_was_cut_off(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.INFO, "service.access.audit"):
        written(tmp_path, 3).close()
    kept = verify(tmp_path).last
    assert f"line 3 has the hash {kept}" in caplog.text
    assert verify(tmp_path, audit.START).broken is None
    written(tmp_path, 2, 3).close()
    assert verify(tmp_path, kept).broken is None
    cut(tmp_path, slice(2))
    assert verify(tmp_path).broken is None
    assert f"no line has the hash {kept}" in str(verify(tmp_path, kept).broken)


def test_lines_missing_at_the_beginning_were_dropped_or_it_shows(tmp_path: Path) -> None:
    written(tmp_path, 5).close()
    cut(tmp_path, slice(2, None))
    assert "lines 1 to 2 are missing" in str(verify(tmp_path).broken)


@pytest.mark.parametrize(
    ("damage", "kept", "broken"),
    [
        (b"\x00" * 200_000, 5, False),  # a block that a power loss left empty: it is cut off
        (b"\x00" * 300 + b"\n", 3, True),
        (b"[" * 30_000 + b"\n", 3, True),
        (b'{"n": "6"}\n', 3, True),
    ],
)
def test_an_end_that_cannot_be_read_stops_nothing(
    tmp_path: Path, damage: bytes, kept: int, broken: bool
) -> None:
    written(tmp_path, 3).close()
    (path,) = segments(tmp_path)
    with path.open("ab") as file:
        file.write(damage)
    written(tmp_path, 2, 3).close()
    found = verify(tmp_path)
    assert (found.lines, found.broken is not None) == (kept, broken), found.broken
    (line,) = find(tmp_path, "r3")
    assert line["n"] == 4


def test_half_a_character_is_written_too(tmp_path: Path) -> None:
    log = AuditLog(tmp_path)
    log.note("POST /adapters", of={"name": "\ud800"})
    log.close()
    assert (verify(tmp_path).lines, verify(tmp_path).broken) == (1, None)


def _write(directory: Path, start: int) -> None:
    for n in range(5):
        written(directory, 4, start + 4 * n).close()


def test_processes_write_one_chain(tmp_path: Path) -> None:
    context = multiprocessing.get_context("fork")
    others = [context.Process(target=_write, args=(tmp_path, 100 * n)) for n in range(3)]
    for one in others:
        one.start()
    for one in others:
        one.join(60)
    found = verify(tmp_path)
    assert (found.lines, found.broken) == (60, None)


def test_the_command(tmp_path: Path) -> None:
    written(tmp_path / "audit", 3).close()

    def run(*args: str) -> tuple[int, str]:
        done = CliRunner().invoke(command.app, [*args, "--home", str(tmp_path)])
        return done.exit_code, done.output

    assert run("verify", "--last", verify(tmp_path / "audit").last)[0] == 0
    assert run("verify", "--last", "a" * 64)[0] == 1
    assert "3 lines hold together" in run("verify")[1]
    assert json.loads(run("find", "r1", "--json")[1])[0]["digest"] == "a" * 64
    assert run("find", "r7")[0] == 1
    assert "r2" in run("list", "--limit", "1")[1]
    (path,) = segments(tmp_path / "audit")
    path.write_bytes(path.read_bytes().replace(b"r1", b"r2"))
    assert run("verify", "--last", "0" * 63)[0] == 2
    status, said = run("verify")
    assert (status, "1 lines hold together" in said) == (1, True)
