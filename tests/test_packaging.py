"""The wheel carries everything that a server needs, and nothing that belongs to tests."""

from __future__ import annotations

import shutil
import subprocess
import sys
import tomllib
import venv
import zipfile
from email.parser import Parser
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> zipfile.ZipFile:
    """Built from the files of the repository alone, in a directory of its own."""
    source = tmp_path_factory.mktemp("source")
    for path in _files():
        target = source / path.relative_to(ROOT)
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(path, target)
    out = tmp_path_factory.mktemp("wheel")
    command = [sys.executable, "-m", "pip", "wheel", "--quiet", "--disable-pip-version-check"]
    command += ["--no-deps", "--no-build-isolation", "-w", str(out), str(source)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    (built,) = out.iterdir()
    return zipfile.ZipFile(built)


def _files() -> list[Path]:
    listed = subprocess.run(
        ["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=False
    )
    if listed.returncode != 0:
        pytest.skip("not a git checkout: which files belong to the repository is not known")
    paths = [ROOT / name for name in listed.stdout.split("\0") if name]
    return [path for path in paths if path.is_file()]


def _of(names: list[str], folder: str) -> set[str]:
    return {name for name in names if name.startswith(folder)}


def test_wheel_holds_every_tracked_file_of_the_packages(wheel: zipfile.ZipFile) -> None:
    """Sources of C, migrations, the embedded base and the samples are files, not modules: each
    needs its line in pyproject.toml, and a forgotten one is noticed by users only."""
    packages = ("base", "adapters", "service", "training")
    wanted = {
        path.relative_to(ROOT).as_posix()
        for path in _files()
        if path.relative_to(ROOT).parts[0] in packages and not path.name.startswith(".")
    }
    assert wanted - set(wheel.namelist()) == set()


@pytest.mark.parametrize(
    ("folder", "suffix"),
    [
        ("base/kernels/csrc/", ".c"),
        ("service/net/csrc/", ".c"),
        ("base/mini/", ".safetensors"),
        ("base/mini/", "tokenizer.json"),
        ("adapters/migrations/", ".py"),
        ("training/samples/", "adapter_model.safetensors"),
        ("training/samples/", "adapter_config.json"),
    ],
)
def test_what_runs_offline_is_inside(wheel: zipfile.ZipFile, folder: str, suffix: str) -> None:
    assert any(name.endswith(suffix) for name in _of(wheel.namelist(), folder))


def test_both_libraries_are_inside_where_there_is_a_compiler(wheel: zipfile.ZipFile) -> None:
    made = {name for name in wheel.namelist() if name.endswith((".so", ".txt")) and "/_" in name}
    kinds = {name.rpartition(".")[2] for name in made if "dist-info" not in name}
    assert len(kinds) == 1, made
    assert {name.rpartition(".")[0] for name in made} >= {
        "base/kernels/_native",
        "service/net/_net",
    }


def test_nothing_else_is_inside(wheel: zipfile.ZipFile) -> None:
    tops = {name.split("/")[0] for name in wheel.namelist()}
    info = f"nibble_serve-{PROJECT['version']}.dist-info"
    assert tops == {"base", "adapters", "service", "training", info}
    assert not [name for name in wheel.namelist() if "__pycache__" in name]


def test_console_script_and_groups(wheel: zipfile.ZipFile) -> None:
    (name,) = [n for n in wheel.namelist() if n.endswith("entry_points.txt")]
    text = wheel.read(name).decode()
    assert "nibble = service.cli:main" in text
    assert "[nibble.commands]" in text


def test_metadata_is_ours_and_stays_private(wheel: zipfile.ZipFile) -> None:
    (name,) = [n for n in wheel.namelist() if n.endswith("METADATA")]
    metadata = Parser().parsestr(wheel.read(name).decode())
    assert metadata["Version"] == PROJECT["version"]
    assert "Private :: Do Not Upload" in metadata.get_all("Classifier", [])


@pytest.mark.parametrize("extra", [None, *PROJECT["optional-dependencies"]])
def test_every_dependency_is_pinned(extra: str | None) -> None:
    """What the README's commands install is what the tests ran with."""
    own = ROOT / "tests" / str(extra) / "constraints.txt"  # of an environment of its own
    files = [ROOT / "constraints.txt", *([own] if own.is_file() else [])]
    pinned = {
        line.split("==")[0].lower().replace("_", "-")
        for file in files
        for line in file.read_text().splitlines()
        if line and not line.startswith("#")
    }
    names = PROJECT["dependencies"] if extra is None else PROJECT["optional-dependencies"][extra]
    assert {_name(line) for line in names} - pinned == set()


def test_constraints_name_no_place_and_no_local_build() -> None:
    for line in (ROOT / "constraints.txt").read_text().splitlines():
        assert "://" not in line
        assert "+" not in line, "a local build, say +cpu, exists on some indexes only"
        assert line.startswith("#") or "==" in line


def _name(requirement: str) -> str:
    end = next((i for i, c in enumerate(requirement) if c in " <>=~![;"), len(requirement))
    return requirement[:end].lower().replace("_", "-")


@pytest.mark.skipif(shutil.which("make") is None, reason="there is no make here")
def test_an_environment_that_outlived_its_python_is_named(tmp_path: Path) -> None:
    """After an upgrade of the system's Python: a traceback about `service` would say nothing."""

    def make(where: Path) -> subprocess.CompletedProcess[str]:
        command = ["make", "--no-print-directory", "venv", f"VENV={where}"]
        return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)

    assert make(tmp_path / "none").returncode == 0
    broken = tmp_path / "venv"
    (broken / "bin").mkdir(parents=True)
    (broken / "bin" / "python").symlink_to(tmp_path / "gone")
    assert "`make clean`, then again" in make(broken).stderr
    pipless = tmp_path / "pipless"
    venv.create(pipless)
    assert "`make clean`, then again" in make(pipless).stderr
    assert make(Path(sys.prefix)).returncode == 0
