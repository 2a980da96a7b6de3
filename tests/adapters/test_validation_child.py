import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from adapters import validation_child
from adapters.errors import InvalidAdapter, StoreUnavailable, TooLarge, UnsupportedMedia
from adapters.limits import GIB, Limits
from adapters.validate import validate
from adapters.validation_child import ROOT, validate_in_child
from base.spec import BaseSpec
from tests.adapters.conftest import Saver
from tests.adapters.hostile import framed, write

CATASTROPHIC = r"(model\.|layers\.|[a-z0-9._]+)*!"


def test_says_the_same_as_in_process(save: Saver, spec: BaseSpec) -> None:
    saved = save("dora", targets=r".*[qv]_proj", modules_to_save=["norm"])
    here = validate(saved.config, saved.weights, spec, Limits())
    assert validate_in_child(saved.config, saved.weights, spec, Limits()) == here


def test_refusals_cross_the_border_whole(save: Saver, spec: BaseSpec, tmp_path: Path) -> None:
    saved = save(targets=["q_proj"])
    with pytest.raises(TooLarge) as caught:
        validate_in_child(saved.config, saved.weights, spec, Limits(max_rank=1))
    assert (caught.value.where, "rank 4" in caught.value.reason) == ("r", True)
    with pytest.raises(UnsupportedMedia, match="zip"):
        validate_in_child(saved.config, write(tmp_path / "w", b"PK\3\4 " * 9), spec, Limits())
    with pytest.raises(InvalidAdapter, match=r"^new_field: "):
        validate_in_child(saved.with_fields(new_field=1), saved.weights, spec, Limits())


def test_a_regex_that_never_ends_is_a_refusal(save: Saver, spec: BaseSpec) -> None:
    saved = save(targets=["q_proj"])
    config = saved.with_fields(target_modules=CATASTROPHIC)
    short = Limits(child_cpu_seconds=1)
    with pytest.raises(InvalidAdapter, match="processor time"):
        validate_in_child(config, saved.weights, spec, short)


def test_time_that_the_machine_does_not_give_is_no_fault_of_the_upload(
    save: Saver, spec: BaseSpec
) -> None:
    """The child waits for its turn on a busy machine, or for a disk: 503, and try again."""
    saved = save(targets=["q_proj"])
    with pytest.raises(StoreUnavailable, match="did not end within"):
        validate_in_child(saved.config, saved.weights, spec, Limits(child_seconds=0.01))
    assert Limits().child_seconds >= 10 * Limits().child_cpu_seconds


def test_a_child_without_memory_is_a_refusal(save: Saver, spec: BaseSpec) -> None:
    saved = save(targets=["q_proj"])
    template = "{% set x = range(9999) | list %}" * 3000
    poor = Limits(child_memory_bytes=GIB // 16)
    with pytest.raises(InvalidAdapter):
        validate_in_child(saved.config, saved.weights, spec, poor, template)


def test_a_child_that_dies_is_a_refusal(
    save: Saver, spec: BaseSpec, monkeypatch: pytest.MonkeyPatch
) -> None:
    saved = save(targets=["q_proj"])
    dying = (sys.executable, "-c", "import os; os.abort()")
    monkeypatch.setattr(validation_child, "COMMAND", dying)
    with pytest.raises(InvalidAdapter, match="crashed"):
        validate_in_child(saved.config, saved.weights, spec, Limits())


def test_a_hostile_header_is_refused_in_the_child(
    save: Saver, spec: BaseSpec, tmp_path: Path
) -> None:
    deep = write(tmp_path / "w", framed(b'{"a":' + b"[" * 500_000))
    with pytest.raises(InvalidAdapter, match="not JSON"):
        validate_in_child(save(targets=["q_proj"]).config, deep, spec, Limits())


def test_templates_are_tried_there_too(save: Saver, spec: BaseSpec) -> None:
    saved = save(targets=["q_proj"])
    good = "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"
    validate_in_child(saved.config, saved.weights, spec, Limits(), good)
    for bad in ("{% for", "{{ messages[0].content.__class__ }}", "nobody's text"):
        with pytest.raises(InvalidAdapter) as caught:
            validate_in_child(saved.config, saved.weights, spec, Limits(), bad)
        assert caught.value.where == "template"


def test_nothing_of_the_uploads_directory_is_imported(
    save: Saver, spec: BaseSpec, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A planted module beside the weights, and in the working directory, stays dead."""
    saved = save(targets=["q_proj"])
    for name in ("json.py", "numpy.py", "sitecustomize.py", "modeling_x.py"):
        (tmp_path / name).write_text("raise SystemExit(3)")
    weights = write(tmp_path / "adapter_model.safetensors", saved.weights.read_bytes())
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    mapping = {"base_model_class": "X", "parent_library": "modeling_x"}
    config = saved.with_fields(auto_mapping=mapping)
    validate_in_child(config, Path(weights.name), spec, Limits())


def test_the_child_is_light() -> None:
    """Neither torch nor the catalog: the child starts for every upload."""
    probe = (
        "import sys; sys.path.insert(0, sys.argv[1]); import adapters.validation_child;"
        "print(*(m for m in ('torch', 'transformers', 'sqlalchemy', 'jinja2', 'peft')"
        " if m in sys.modules))"
    )
    command = [sys.executable, "-I", "-c", probe, str(ROOT)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == ""


def test_the_checks_hold_without_asserts(save: Saver, spec: BaseSpec) -> None:
    """`python -O` removes assert statements: no refusal may be one."""
    saved = save(targets=["q_proj"])
    command = (validation_child.COMMAND[0], "-O", *validation_child.COMMAND[1:])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(validation_child, "COMMAND", command)
        with pytest.raises(InvalidAdapter):
            validate_in_child(saved.with_fields(r=8), saved.weights, spec, Limits())
        other = replace(spec, fingerprint="0" * 64)
        marked = saved.with_fields(nibble={"base_fingerprint": "1" * 64})
        with pytest.raises(InvalidAdapter):
            validate_in_child(marked, saved.weights, other, Limits())
