"""Hub ids, through the hub's real client in a process of its own, against a hub on 127.0.0.1."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from base.errors import UnservableBase
from base.hub import Source, locate
from base.load import load_base
from tests.base.hub_stand_in import Hub, serving
from tests.base.tiny import CONFIGS, save_tiny, save_tokenizer

ROOT = Path(__file__).parents[2]
NAME = "nobody/tiny"

LOCATE = """
import json, sys
from base.errors import UnservableBase
from base.hub import locate
try:
    found = locate(sys.argv[1], json.loads(sys.argv[2]))
    print(json.dumps({"directory": str(found.directory), "revision": found.revision}))
except UnservableBase as error:
    print(json.dumps({"reason": error.reason}))
"""

LOAD = """
import json, sys
from base.load import load_base
base = load_base(sys.argv[1], cache_dir=sys.argv[2])
print(json.dumps([base.spec.id, base.spec.revision, base.spec.fingerprint,
                  base.tokenizer.encode("ab")]))
"""


@pytest.fixture
def hub(tmp_path: Path) -> Iterator[Hub]:
    (tmp_path / "repository").mkdir()
    with serving(Hub(NAME, tmp_path / "repository")) as running:
        yield running


def run(script: str, hub: Hub, cache: Path, *args: str, **env: str) -> Any:
    """Run a script whose hub is `hub`; the client reads its settings once, at import."""
    plain = {k: v for k, v in os.environ.items() if not k.lower().endswith("_proxy")}
    settings = {
        "HF_ENDPOINT": hub.url,
        "HF_HOME": str(cache),
        "HF_HUB_DISABLE_XET": "1",
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "HF_HUB_DISABLE_PROGRESS_BARS": "1",
        "HF_HUB_OFFLINE": "0",
        "HF_HUB_ETAG_TIMEOUT": "5",
        "PYTHONPATH": str(ROOT),
    }
    done = subprocess.run(
        [sys.executable, "-c", script, *args],
        env={**plain, **settings, **env},
        capture_output=True,
        text=True,
        check=False,
        timeout=240,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def find(hub: Hub, cache: Path, revision: str | None = None, name: str = NAME, **env: str) -> Any:
    return run(LOCATE, hub, cache, name, json.dumps(revision), **env)


def test_a_base_from_the_hub_is_the_base_in_the_directory(hub: Hub, tmp_path: Path) -> None:
    save_tiny(CONFIGS["qwen3"], hub.directory, max_shard_size="60KB")
    save_tokenizer(hub.directory)
    found = run(LOAD, hub, tmp_path / "hf", NAME, str(tmp_path / "cache"))
    local = load_base(hub.directory, cache_dir=tmp_path / "cache")
    assert found == [NAME, hub.commit, local.spec.fingerprint, [4, 5]]


def test_what_is_downloaded(hub: Hub, tmp_path: Path) -> None:
    save_tiny(CONFIGS["llama"], hub.directory, max_shard_size="60KB")
    shards = {f.name for f in hub.directory.glob("*.safetensors")}
    save_tokenizer(hub.directory)
    for name in ("modeling_x.py", "tokenizer_x.py", "pytorch_model.bin", "model.gguf"):
        (hub.directory / name).write_text("unwanted")
    (hub.directory / "consolidated.safetensors").write_text("a second copy")
    found = find(hub, tmp_path / "hf")
    assert found["revision"] == hub.commit
    wanted = {"config.json", "generation_config.json", "model.safetensors.index.json"}
    wanted |= {"tokenizer.json", "tokenizer_config.json"}
    assert sorted(hub.downloads) == sorted(wanted | shards)
    assert {f.name for f in Path(found["directory"]).iterdir()} == wanted | shards


def test_a_revision_is_pinned_to_its_commit(hub: Hub, tmp_path: Path) -> None:
    save_tiny(CONFIGS["llama"], hub.directory)
    hub.branches = {"v1": hub.commit}
    assert find(hub, tmp_path / "hf", "v1")["revision"] == hub.commit
    assert find(hub, tmp_path / "hf", hub.commit)["revision"] == hub.commit
    reason = find(hub, tmp_path / "hf", "v2")["reason"]
    assert f"{NAME} at revision v2 is no directory here, and the hub does not give it" in reason


def test_once_downloaded_it_loads_offline(hub: Hub, tmp_path: Path) -> None:
    save_tiny(CONFIGS["llama"], hub.directory)
    online = find(hub, tmp_path / "hf")
    asked = len(hub.downloads)
    assert find(hub, tmp_path / "hf", HF_HUB_OFFLINE="1") == online
    assert len(hub.downloads) == asked


def test_offline_without_a_copy_says_so(hub: Hub, tmp_path: Path) -> None:
    save_tiny(CONFIGS["llama"], hub.directory)
    for env in ({"HF_HUB_OFFLINE": "1"}, {"HF_ENDPOINT": "http://127.0.0.1:9"}):
        reason = find(hub, tmp_path / "hf", **env)["reason"]
        assert reason.startswith(f"{NAME} is no directory here, and the hub does not give it:")
        assert "Cannot find" in reason or "cannot find" in reason
    assert hub.downloads == []


def test_an_unknown_repository_says_so(hub: Hub, tmp_path: Path) -> None:
    reason = find(hub, tmp_path / "hf", name="nobody/else")["reason"]
    assert reason.startswith("nobody/else is no directory here, and the hub does not give it: 404")


def test_a_repository_without_safetensors_is_refused(hub: Hub, tmp_path: Path) -> None:
    (hub.directory / "config.json").write_text("{}")
    (hub.directory / "pytorch_model.bin").write_text("pickled")
    reason = find(hub, tmp_path / "hf")["reason"]
    assert reason == f"{NAME} has no model.safetensors; only safetensors are read"
    assert hub.downloads == ["config.json"]


def test_a_directory_goes_before_a_hub_id(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "nobody" / "tiny").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    assert locate(NAME) == Source(Path(NAME), "tiny", "")
    with pytest.raises(UnservableBase, match="is a directory; revision='v1' is for hub ids"):
        locate(NAME, "v1")


@pytest.mark.parametrize("source", ["tiny", "/no/such/base", "./no/such", "a/b/c", "../b", "a/.."])
def test_what_is_neither_directory_nor_hub_id(
    source: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UnservableBase, match="neither a directory nor a hub id"):
        locate(source)


def test_no_name_is_not_the_working_directory() -> None:
    with pytest.raises(UnservableBase, match="no base is named"):
        locate("")


def test_a_file_is_no_base(tmp_path: Path) -> None:
    (tmp_path / "model.gguf").write_text("")
    with pytest.raises(UnservableBase, match="is a file; a base is a directory or a hub id"):
        locate(str(tmp_path / "model.gguf"))
