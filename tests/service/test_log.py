"""Log lines: one per event, in one layout, whoever writes them."""

from __future__ import annotations

import json
import subprocess
import sys

SPEAK = """
import logging, structlog
from service.log import configure_logging
configure_logging("info", {layout!r})
structlog.contextvars.bind_contextvars(request_id="abc")
structlog.get_logger("ours").info("said", number=1)
structlog.get_logger("ours").debug("too quiet")
logging.getLogger("theirs").warning("also %s", "said")
logging.getLogger("httpx").info("chatter")
try:
    1 / 0
except ZeroDivisionError:
    logging.getLogger("theirs").exception("broke")
"""


def spoken(layout: str) -> list[str]:
    done = subprocess.run(
        [sys.executable, "-c", SPEAK.format(layout=layout)],
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout == ""
    return done.stderr.splitlines()


def test_json_is_one_object_a_line() -> None:
    lines = [json.loads(line) for line in spoken("json")]
    assert [line["event"] for line in lines] == ["said", "also said", "broke"]
    assert [line["level"] for line in lines] == ["info", "warning", "error"]
    assert [line["logger"] for line in lines] == ["ours", "theirs", "theirs"]
    assert all(line["request_id"] == "abc" for line in lines)
    assert lines[0]["number"] == 1
    assert "ZeroDivisionError" in lines[2]["exception"]


def test_text_names_the_request() -> None:
    lines = spoken("text")
    assert "said" in lines[0]
    assert "request_id=abc" in lines[0]
    assert not any("quiet" in line or "chatter" in line for line in lines)
