"""Whose scales are quantised too where nobody says it, and who has the last word."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from base.mini import MINI
from base.scales import double_quant_of

NF4 = {"quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}


def base(tmp_path: Path, **config: Any) -> Path:
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "qwen3", **config}))
    return tmp_path


def test_a_float_base_is_double_quantised_unless_asked_otherwise(tmp_path: Path) -> None:
    directory = base(tmp_path)
    assert [double_quant_of(directory, asked) for asked in (None, True, False)] == [
        True,
        True,
        False,
    ]


def test_the_embedded_base_says_that_it_is_plain(tmp_path: Path) -> None:
    assert [double_quant_of(MINI, asked) for asked in (None, True, False)] == [False, True, False]
    (tmp_path / "link").symlink_to(MINI)
    assert not double_quant_of(tmp_path / "link"), "by another path"
    shutil.copy(MINI / "config.json", tmp_path)
    assert double_quant_of(tmp_path), "a base of one's own"


@pytest.mark.parametrize("stored", [True, False, None])
def test_a_base_that_is_nf4_stays_as_it_is(tmp_path: Path, stored: bool | None) -> None:
    said = {} if stored is None else {"bnb_4bit_use_double_quant": stored}
    directory = base(tmp_path, quantization_config=NF4 | said)
    for asked in (None, True, False):
        assert double_quant_of(directory, asked) == bool(stored)
