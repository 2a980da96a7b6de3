"""The shape of the house: who may import whom, what stays light, and what is never written."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from collections.abc import Iterator, Mapping
from functools import cache
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
ARROWS = {
    "base": {"base"},
    "adapters": {"adapters", "base"},
    "service": {"service", "adapters", "base"},
    "training": {"training", "adapters", "base"},
}
WITHOUT_TORCH = (
    "base.spec",
    "base.machine",
    "adapters.errors",
    "adapters.manifest",
    "adapters.validate",
    "adapters.store",
    "adapters.sandbox",
    "adapters.template",
    "service.cli",
    "service.client",
    "service.config",
    "service.errors",
    "service.admission",
    "service.engine.request",
    "service.engine.observer",
    "service.engine.sequence",
    "service.engine.scheduler",
    "service.engine.kv_cache",
)
WIRE = ("pydantic", "pydantic_settings", "fastapi", "starlette")
AT_THE_WIRE = ("service/api/", "service/commands/", "service/app.py", "service/config.py")
# Users' files, so pydantic checks them; no web parts.
SETTINGS_OF_TRAINING = ("training/config.py", "training/study/config.py")
NEVER_IMPORTED = ("pickle", "cloudpickle", "dill", "joblib", "shelve", "marshal")
LONGEST_FILE = 600  # lines


def sources() -> list[Path]:
    return sorted(path for package in ARROWS for path in (ROOT / package).rglob("*.py"))


def module_of(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


@cache
def tree(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"), str(path))


def imports(path: Path) -> Iterator[str]:
    """Every module that `path` imports, in functions and for type checkers too.

    `from a.b import c` yields a.b.c too: c may be a module.
    """
    package = module_of(path) if path.name == "__init__.py" else module_of(path).rpartition(".")[0]
    for node in ast.walk(tree(path)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            module = node.module or ""
            if node.level:
                above = package.split(".")[: len(package.split(".")) - node.level + 1]
                module = ".".join([*above, module] if module else above)
            yield module
            yield from (f"{module}.{alias.name}" for alias in node.names)


def named(names: Mapping[str, str]) -> str:
    return "\n".join(f"{where}: {what}" for where, what in names.items())


def test_arrows_point_down() -> None:
    wrong = {
        module_of(path): f"imports {name}"
        for path in sources()
        for name in imports(path)
        if name.split(".")[0] in ARROWS
        and name.split(".")[0] not in ARROWS[module_of(path).split(".")[0]]
    }
    assert not wrong, named(wrong)


def test_tests_are_imported_by_nobody() -> None:
    wrong = {
        module_of(path): name
        for path in sources()
        for name in imports(path)
        if name.split(".")[0] in {"tests", "pytest", "hypothesis", "conftest"}
    }
    assert not wrong, named(wrong)


def test_no_import_cycles() -> None:
    """Imports for types and those inside functions count too."""
    known = {module_of(path) for path in sources()}
    graph = {module_of(path): known.intersection(imports(path)) for path in sources()}
    # `from package import module` names the package as well; the module itself is the arrow meant.
    for module, targets in graph.items():
        outer = {t for t in targets if any(other.startswith(f"{t}.") for other in targets)}
        targets -= outer | {module}
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        pytest.fail("import cycle: " + " -> ".join(error.args[1]))


@pytest.mark.parametrize("module", WITHOUT_TORCH)
def test_torch_stays_out(module: str) -> None:
    """Not even through what it imports: these modules load in milliseconds."""
    probe = (
        f"import sys, {module}\n"
        "print([m for m in ('torch', 'transformers', 'peft', 'bitsandbytes') if m in sys.modules])"
    )
    done = subprocess.run(
        [sys.executable, "-c", probe], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "[]", f"{module} imports {done.stdout.strip()}"


def test_wire_models_stay_at_the_wire() -> None:
    wrong = {}
    for path in sources():
        where = path.relative_to(ROOT).as_posix()
        found = {name.split(".")[0] for name in imports(path)} & set(WIRE)
        if where in SETTINGS_OF_TRAINING:
            found -= {"pydantic"}
        if found and not where.startswith(AT_THE_WIRE):
            wrong[where] = ", ".join(sorted(found))
    assert not wrong, named(wrong)


def test_nothing_unpickles() -> None:
    """Neither an import of a pickler nor a call that would use one."""
    wrong = {}
    for path in sources():
        where = path.relative_to(ROOT).as_posix()
        for name in imports(path):
            if name == "torch.load" or name.split(".")[0] in NEVER_IMPORTED:
                wrong[where] = f"imports {name}"
        for call in (node for node in ast.walk(tree(path)) if isinstance(node, ast.Call)):
            if ast.unparse(call.func) == "torch.load":
                wrong[f"{where}:{call.lineno}"] = "torch.load"
            for keyword in call.keywords:
                if keyword.arg == "allow_pickle" and ast.unparse(keyword.value) != "False":
                    wrong[f"{where}:{call.lineno}"] = "allow_pickle"
    assert not wrong, named(wrong)


def test_no_remote_code() -> None:
    wrong = {
        f"{path.relative_to(ROOT)}:{keyword.value.lineno}": ast.unparse(keyword.value)
        for path in sources()
        for call in ast.walk(tree(path))
        if isinstance(call, ast.Call)
        for keyword in call.keywords
        if keyword.arg == "trust_remote_code" and ast.unparse(keyword.value) != "False"
    }
    assert not wrong, named(wrong)


def _tracked() -> list[Path]:
    """The files of the repository; in an unpacked archive, all that are not built."""
    listed = subprocess.run(
        ["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=False
    )
    if listed.returncode == 0:
        return [ROOT / name for name in listed.stdout.split("\0") if name]
    return [
        path
        for path in ROOT.rglob("*")
        if not any(part.startswith(".") for part in path.relative_to(ROOT).parts)
    ]


BINARY = {".safetensors", ".png", ".woff2", ".so", ".whl"}
LEARNED = {"tokenizer.json", "vocab.json", "merges.txt"}  # made of a corpus, not written
# In pieces, so that this file does not contain what it looks for.
FORBIDDEN = {
    "a path of one machine": re.compile("/(?:work|root)" + r"/|/home" + r"/\w"),
    "the host of a registry": re.compile(
        r"pypi\." + "org|pytorch" + r"\.org/whl|python" + r"hosted\b"
    ),
}


def test_no_path_of_a_machine_and_no_registry_host() -> None:
    wrong = {}
    for path in _tracked():
        if path.suffix in BINARY or path.name in LEARNED or not path.is_file():
            continue
        text = path.read_text(encoding="utf-8", errors="ignore")
        for what, pattern in FORBIDDEN.items():
            if found := pattern.search(text):
                line = text.count("\n", 0, found.start()) + 1
                wrong[f"{path.relative_to(ROOT)}:{line}"] = f"{what} ({found.group()})"
    assert not wrong, named(wrong)


def test_files_stay_short() -> None:
    long = {
        path.relative_to(ROOT).as_posix(): f"{lines} lines"
        for path in sources()
        if (lines := len(path.read_text(encoding="utf-8").splitlines())) > LONGEST_FILE
    }
    assert not long, named(long)


def test_every_public_module_says_what_it_is() -> None:
    silent = {
        module_of(path): "has no docstring"
        for path in sources()
        if tree(path).body and ast.get_docstring(tree(path)) is None
    }
    assert not silent, named(silent)


def test_the_map_names_what_exists() -> None:
    """ARCHITECTURE.md points to no file that is gone, and leaves out no directory of a package."""
    text = (ROOT / "ARCHITECTURE.md").read_text(encoding="utf-8")
    named_paths = set(re.findall(r"`((?:base|adapters|service|training|tests)/[\w./]*)`", text))
    gone = {path: "does not exist" for path in named_paths if not (ROOT / path).exists()}
    assert not gone, named(gone)
    tracked = {path.relative_to(ROOT) for path in _tracked() if path.suffix == ".py"}
    folders = {f"{p.parts[0]}/{p.parts[1]}/" for p in tracked if len(p.parts) > 2}
    left_out = {f for f in folders if f.split("/")[0] in ARROWS and f"`{f}" not in text}
    assert not left_out, left_out
