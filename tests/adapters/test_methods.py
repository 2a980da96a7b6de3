"""Every method of the installed PEFT is served, or refused with a reason."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from peft import PeftType

from adapters.errors import InvalidAdapter
from adapters.limits import Limits
from adapters.lowering import FAMILIES
from adapters.methods import METHODS, REFUSED_METHODS
from adapters.validate import CHECKERS, validate
from base.spec import BaseSpec
from tests.adapters.conftest import Saver


def test_every_method_of_peft_has_one_row() -> None:
    """A new version of PEFT with a new method fails here, until somebody decides about it."""
    assert not {method.value for method in PeftType} - METHODS.keys()


def test_what_a_row_serves_is_checked() -> None:
    assert {name for name, row in METHODS.items() if row.form} == set(CHECKERS)
    assert all((row.form is None) == bool(row.refused) for row in METHODS.values())


def test_what_is_checked_is_lowered() -> None:
    assert {name.lower() for name in CHECKERS} | {"rslora", "dora", "alora"} == set(FAMILIES)


@pytest.mark.parametrize("method", REFUSED_METHODS)
def test_the_refusal_quotes_the_reason(method: str, spec: BaseSpec, tmp_path: Path) -> None:
    config = json.dumps({"peft_type": method}).encode()
    with pytest.raises(InvalidAdapter) as caught:
        validate(config, tmp_path / "unread", spec, Limits())
    assert caught.value.where == "peft_type"
    assert f"{method!r} is not served: {REFUSED_METHODS[method]}; expected one of LORA" in (
        caught.value.reason
    )


@pytest.mark.parametrize("method", ["NOVEL", "lora", 7, None, ["LORA"]])
def test_what_is_no_method_is_refused(method: object, save: Saver, spec: BaseSpec) -> None:
    saved = save(targets=["q_proj"])
    with pytest.raises(InvalidAdapter, match="expected one of LORA") as caught:
        validate(saved.with_fields(peft_type=method), saved.weights, spec, Limits())
    assert caught.value.where == "peft_type"
