"""`nibble doctor`: it tells of this machine what base.machine and the kernels know."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
from typer.testing import CliRunner

from adapters.catalog import Catalog
from adapters.config_schema import other_scales
from base.checkpoint import read_json, weight_files
from base.fingerprint import fingerprints
from base.kernels import fast_status, native_status
from base.machine import SIZES, choose_dtype, inspect
from base.mini import MINI
from service.commands import doctor
from service.config import Settings
from tests.adapters.test_manifest import MANIFEST


def test_json_holds_machine_choice_and_fits() -> None:
    done = CliRunner().invoke(doctor.app, ["--json"])
    assert done.exit_code == 0, done.output
    found = json.loads(done.stdout)
    assert found["machine"]["cores"] == inspect().cores
    assert tuple(found["dtype"].values()) == choose_dtype(inspect())
    assert found["kernels"] == native_status()
    assert found["precision"] == {
        "default": Settings(home=Path("/nowhere")).precision,
        "fast": fast_status(),
    }
    assert [fit["size"] for fit in found["fits"]] == [size.label for size in SIZES]
    for fit in found["fits"]:
        for use in ("serving", "training"):
            parts = {k: v for k, v in fit[use].items() if k not in ("bytes", "fits")}
            assert sum(parts.values()) == fit[use]["bytes"]
            assert fit[use]["fits"] == (fit[use]["bytes"] <= fit["budget"])


def test_text_says_the_same() -> None:
    done = CliRunner().invoke(doctor.app, [])
    assert done.exit_code == 0, done.output
    assert inspect().cpu in done.stdout
    assert choose_dtype(inspect())[1] in done.stdout
    for size in SIZES:
        assert size.label in done.stdout


def test_it_tells_where_bases_are_kept_and_how_large(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("NIBBLE_HOME", str(tmp_path))
    (tmp_path / "bases").mkdir()
    (tmp_path / "bases" / "x.safetensors").write_bytes(bytes(3 << 20))
    done = CliRunner().invoke(doctor.app, ["--json"])
    assert json.loads(done.stdout)["kept"] == {"bases": f"{tmp_path}/bases", "bytes": 3 << 20}
    assert "3 MiB in" in CliRunner().invoke(doctor.app, []).stdout


def test_keys_and_values_are_counted_in_the_dtype_that_is_set(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def kv_bytes(*flags: str) -> int:
        found = json.loads(CliRunner().invoke(doctor.app, ["--json", *flags]).stdout)
        return int(found["fits"][0]["serving"]["kv_cache"])

    own = kv_bytes("--kv-dtype", "float32")
    assert kv_bytes("--kv-dtype", "bfloat16") == own // 2
    monkeypatch.setenv("NIBBLE_KV_DTYPE", "int8")
    assert kv_bytes() == own * 9 // 32
    wrong = CliRunner().invoke(doctor.app, ["--kv-dtype", "int4"])
    assert wrong.exit_code == 2
    assert "--kv-dtype: Input should be" in wrong.output


def test_stored_adapters_that_would_be_refused(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("NIBBLE_HOME", str(tmp_path))
    files = weight_files(MINI)
    plain = fingerprints(read_json(MINI / "config.json"), files, tmp_path)[False]

    def told() -> tuple[str | None, str]:
        found = json.loads(CliRunner().invoke(doctor.app, ["--json"]).stdout)["stored_adapters"]
        return found, CliRunner().invoke(doctor.app, []).stdout

    assert told()[0] is None
    assert not (tmp_path / "catalog.db").exists()
    catalog = Catalog(str(tmp_path / "catalog.db"))
    catalog.add(replace(MANIFEST, version=0, base_fingerprint=plain))
    catalog.close()
    assert told()[0] is None
    monkeypatch.setenv("NIBBLE_DOUBLE_QUANT", "true")
    why, shown = told()
    assert why == other_scales("mini", True, 1)
    assert f"stored adapters: {why}" in shown


def test_a_problem_ends_with_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "shadowed", lambda: "something stands before ours")
    done = CliRunner().invoke(doctor.app, [])
    assert done.exit_code == 1
    assert "problem: something stands before ours" in done.stdout
