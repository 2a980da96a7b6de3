"""The configuration: order of sources, bounds, and secrets that stay secret."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from pydantic import ValidationError

from base.mini import MINI
from service import config
from service.config import GIB, MASK, MIB, SAMPLES, ConfigError, Settings, configure


@pytest.fixture(autouse=True)
def _clean(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in [v for v in os.environ if v.startswith("NIBBLE_")]:
        monkeypatch.delenv(name)
    monkeypatch.chdir(tmp_path)


def test_flags_over_environment_over_file_over_defaults(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "nibble.toml").write_text('port = 1\nmax_rank = 2\nhost = "file"\n')
    monkeypatch.setenv("NIBBLE_MAX_RANK", "3")
    monkeypatch.setenv("NIBBLE_HOST", "env")
    found = configure({"host": "flag", "device": None})
    assert (found.settings.port, found.settings.max_rank, found.settings.host) == (1, 3, "flag")
    named = {name: found.sources[name] for name in ("port", "max_rank", "host", "device")}
    assert named == {"port": "file", "max_rank": "env", "host": "flag", "device": "default"}


def test_a_flag_turns_off_what_the_environment_turned_on(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NIBBLE_DOUBLE_QUANT", "true")
    assert configure().settings.double_quant
    assert not configure({"double_quant": False}).settings.double_quant


def test_named_file_replaces_the_one_in_the_working_directory(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "nibble.toml").write_text("port = 1\n")
    other = tmp_path / "other.toml"
    other.write_text("max_rank = 9\n")
    assert configure(file=other).settings.port == Settings().port
    monkeypatch.setenv("NIBBLE_CONFIG", str(other))
    found = configure()
    assert found.file == other
    assert found.settings.max_rank == 9


def test_sizes_are_read_in_units() -> None:
    settings = configure({"slot_bytes": "512MiB", "host_cache_bytes": 2 * GIB}).settings
    assert settings.slot_bytes == 512 * MIB
    assert settings.host_cache_bytes == 2 * GIB


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ({"port": "70000"}, "--port: Input should be less than or equal to 65535 (got '70000')"),
        ({"prot": 1}, "--prot: there is no such setting; did you mean port?"),
        ({"block_size": 12}, "--block-size: must be a power of two"),
        ({"max_num_seqs": 64, "max_step_tokens": 32}, "must be at least max_num_seqs (64)"),
        ({"device": "tpu"}, "--device"),
        ({"dtype": "int8"}, "--dtype"),
        ({"slot_bytes": "1"}, "--slot-bytes"),
        ({"drain_seconds": "nan"}, "--drain-seconds"),
    ],
)
def test_a_bad_value_is_refused_by_name(flags: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError) as refused:
        configure(flags)
    assert message in str(refused.value)
    assert "default of" not in str(refused.value)


def test_every_number_is_bounded() -> None:
    for name, field in Settings.model_fields.items():
        if isinstance(field.default, bool) or not isinstance(field.default, int | float):
            continue
        with pytest.raises(ValidationError):
            Settings.model_validate({name: -1})
        with pytest.raises(ValidationError):
            Settings.model_validate({name: 1 << 60})


def test_a_bad_value_names_the_variable_or_the_file(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "nibble.toml").write_text("max_rank = 0\n")
    monkeypatch.setenv("NIBBLE_PORT", "http")
    with pytest.raises(ConfigError, match=r"NIBBLE_PORT: .*; max_rank in nibble.toml: ") as refused:
        configure()
    assert "'http'" in str(refused.value)


def test_missing_and_broken_files_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="does not exist"):
        configure(file=tmp_path / "absent.toml")
    broken = tmp_path / "broken.toml"
    broken.write_text("port =\n")
    with pytest.raises(ConfigError, match=r"broken\.toml"):
        configure(file=broken)


@pytest.mark.parametrize(
    ("store", "said"),
    [
        ("redis://:canary@cache:6379", "should match pattern"),
        ("async+redis://:canary@cache:six", "its port is no number"),
    ],
)
def test_no_error_repeats_the_password_of_a_url(
    monkeypatch: pytest.MonkeyPatch, store: str, said: str
) -> None:
    monkeypatch.setattr(config, "find_spec", lambda name: object())
    monkeypatch.setenv("NIBBLE_QUOTA_STORE", store)
    with pytest.raises(ConfigError, match=said) as refused:
        configure()
    assert "canary" not in str(refused.value)
    assert f":{MASK}@cache" in str(refused.value)
    monkeypatch.setenv("NIBBLE_QUOTA_STORE", "async+rediss://:canary@cache:6380/1")
    settings = configure().settings
    assert settings.shown()["quota_store"] == f"async+rediss://:{MASK}@cache:6380/1"
    assert "canary" not in repr(settings)


def test_a_catalog_is_in_a_database_that_is_known() -> None:
    with pytest.raises(ConfigError, match=r"sqlite:/// or postgresql://.*me:\*+@host") as refused:
        configure({"catalog": "mysql://me:canary@host/db"})
    assert "canary" not in str(refused.value)
    for url in ("postgresql://host/db", "postgresql+psycopg://host/db", "sqlite:////data/rows.db"):
        assert configure({"catalog": url}).settings.catalog == url


def test_secrets_are_masked_everywhere(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NIBBLE_HF_TOKEN", "canary")
    monkeypatch.setenv("NIBBLE_CATALOG", "postgresql://me:canary@host/db")
    settings = configure().settings
    assert settings.hf_token is not None
    assert settings.hf_token.get_secret_value() == "canary"
    assert settings.shown()["hf_token"] == MASK
    assert settings.shown()["catalog"] == f"postgresql://me:{MASK}@host/db"
    assert "canary" not in repr(settings) + str(settings.shown())
    with pytest.raises(ConfigError, match="--hf-token") as refused:
        configure({"hf_token": ["canary"]})
    assert "canary" not in str(refused.value)


def test_store_follows_home(tmp_path: Path) -> None:
    settings = Settings(home=tmp_path / "n")
    assert settings.blobs == (tmp_path / "n" / "blobs").as_uri()
    assert settings.catalog == f"sqlite:///{tmp_path / 'n' / 'catalog.db'}"
    assert Settings(home=tmp_path, blobs="s3://bucket").blobs == "s3://bucket"


def test_samples_start_with_the_embedded_base_only(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    assert MINI.parents[2] / "training" / "samples" == SAMPLES
    assert Settings().base_source == str(MINI)
    monkeypatch.setattr(config, "SAMPLES", tmp_path)
    assert Settings().adapters == tmp_path
    assert Settings(base="some/model").adapters is None
    assert Settings(base="some/model").base_source == "some/model"
    assert Settings.model_validate({"adapters": "none"}).adapters is None
    monkeypatch.setattr(config, "SAMPLES", tmp_path / "removed")
    assert Settings().adapters is None


def test_a_directory_of_adapters_must_be_there(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="--adapters: is not a directory"):
        configure({"adapters": tmp_path / "absent"})


def test_a_redis_wants_its_client(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(config, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"--quota-store: needs .*'\.\[redis\]'"):
        configure({"quota_store": "async+redis://127.0.0.1:6379"})
    assert configure({}).settings.quota_store == "async+memory://"


def test_settings_are_frozen_and_read_nothing_themselves(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NIBBLE_PORT", "9")
    settings = Settings()
    assert settings.port == 8080
    with pytest.raises(ValidationError):
        settings.port = 1


def test_variables_that_set_nothing_are_reported(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NIBBLE_PROT", "9")
    monkeypatch.setenv("NIBBLE_PORT", "9")
    assert configure().unknown == ("NIBBLE_PROT",)
