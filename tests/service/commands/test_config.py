"""`nibble config`: what it prints is what is in force, and no secret."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from service.commands.config import app
from service.config import MASK, SECRETS, Settings


@pytest.fixture(autouse=True)
def _elsewhere(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)


def test_json_names_value_and_source(monkeypatch: pytest.MonkeyPatch) -> None:
    Path("nibble.toml").write_text('log_level = "debug"\n')
    monkeypatch.setenv("NIBBLE_MAX_RANK", "7")
    monkeypatch.setenv("NIBBLE_MAX_RANG", "7")
    monkeypatch.setenv("NIBBLE_HF_TOKEN", "canary")
    done = CliRunner().invoke(app, ["--json", "--slot-bytes", "3MiB", "--double-quant"])
    assert done.exit_code == 0, done.output
    found = json.loads(done.stdout)
    settings = found["settings"]
    assert set(settings) == set(Settings.model_fields)
    assert settings["log_level"] == {"value": "debug", "source": "file"}
    assert settings["max_rank"] == {"value": 7, "source": "env"}
    assert settings["slot_bytes"] == {"value": 3 << 20, "source": "flag"}
    assert settings["double_quant"] == {"value": True, "source": "flag"}
    assert settings["port"] == {"value": 8080, "source": "default"}
    assert settings["hf_token"] == {"value": MASK, "source": "env"}
    assert found["file"] == "nibble.toml"
    assert "NIBBLE_MAX_RANG" in found["unknown"]
    assert "canary" not in done.output


def test_text_shows_each_setting_once_and_warns(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NIBBLE_PROT", "7")
    done = CliRunner().invoke(app, [])
    first_words = [line.split()[0] for line in done.stdout.splitlines() if line.strip()]
    assert [first_words.count(name) for name in Settings.model_fields] == [1] * len(
        Settings.model_fields
    )
    assert "NIBBLE_PROT is set, but" in done.stderr


def test_every_setting_but_the_secrets_has_a_flag() -> None:
    done = CliRunner().invoke(app, ["--help"], env={"COLUMNS": "300"})
    for name in Settings.model_fields:
        assert (f"--{name.replace('_', '-')} " in done.stdout) == (name not in SECRETS), name


def test_a_bad_value_is_json_too() -> None:
    done = CliRunner().invoke(app, ["--json", "--port", "x"])
    assert done.exit_code == 2
    assert "--port" in json.loads(done.stdout)["error"]["message"]
