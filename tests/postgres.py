"""A PostgreSQL server of the tests' own, behind a Unix socket; its directory goes with it."""

from __future__ import annotations

import os
import pwd
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import sqlalchemy as sa

DEBIAN = Path("/usr/lib/postgresql")
USER = "nibble"
WAIT = ("-w", "-t", "240")  # for its start and its end, on a busy machine


def programs() -> Path | None:
    """The directory of `initdb` and `pg_ctl`: on the path, or where Debian puts them."""
    on_path = shutil.which("initdb")
    debian = sorted(DEBIAN.glob("*/bin"), key=lambda at: int(at.parent.name.split(".")[0]))
    places = [*([Path(on_path).resolve().parent] if on_path else []), *reversed(debian)]
    return next((at for at in places if (at / "pg_ctl").exists()), None)


@contextmanager
def running(at: Path) -> Iterator[sa.URL]:
    """A server whose only superuser needs no password; the URL of its database `postgres`."""
    owner = _owner()
    root = Path(tempfile.mkdtemp(prefix="pg-"))  # short: a socket's path has 107 characters
    data = root / "data"

    def run(*command: str | Path) -> None:
        done = subprocess.run(
            command, user=owner, cwd=root, env={"LC_ALL": "C"}, capture_output=True, text=True
        )
        assert done.returncode == 0, f"{command[0]}: {done.stdout}{done.stderr}"

    try:
        if owner is not None:
            os.chown(root, owner, -1)
        # Its own syncs are not what is tested.
        run(at / "initdb", "-D", data, "-U", USER, "-A", "trust", "-N", "-E", "UTF8")
        options = f"-c listen_addresses='' -c fsync=off -k {root}"
        run(at / "pg_ctl", "-D", data, *WAIT, "-l", root / "log", "-o", options, "start")
        try:
            query = {"host": str(root)}
            yield sa.URL.create("postgresql", username=USER, database="postgres", query=query)
        finally:
            run(at / "pg_ctl", "-D", data, *WAIT, "-m", "immediate", "stop")
    finally:
        shutil.rmtree(root, ignore_errors=True)


@contextmanager
def database(server: sa.URL, name: str) -> Iterator[str]:
    """An empty database of its own: its URL, as a setting has it."""
    engine = sa.create_engine(server, isolation_level="AUTOCOMMIT")
    try:
        with engine.connect() as connection:
            connection.exec_driver_sql(f"CREATE DATABASE {name}")
        yield server.set(database=name).render_as_string(hide_password=False)
    finally:
        with engine.connect() as connection:
            connection.exec_driver_sql(f"DROP DATABASE IF EXISTS {name} WITH (FORCE)")
        engine.dispose()


def _owner() -> int | None:
    """Who runs it: PostgreSQL refuses to run as root."""
    if os.geteuid() != 0:
        return None
    known = {entry.pw_name: entry.pw_uid for entry in pwd.getpwall()}
    return known.get("postgres", known["nobody"])
