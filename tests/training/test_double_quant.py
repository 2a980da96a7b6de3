"""Training and serving quantise a base alike where nobody says how: trained here, served there."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
from safetensors import safe_open
from structlog.testing import capture_logs

from adapters.catalog import Catalog
from adapters.config_schema import other_scales
from base.load import load_base
from base.mini import MINI
from service.config import Settings
from service.conformance.live import live
from tests.adapters.test_manifest import MANIFEST
from tests.oracle import PeftOracle
from tests.training.runs import run_of
from training import checkpoint, session
from training.config import TrainConfig
from training.errors import MethodError

PROMPT = "the robin sat"


@pytest.mark.parametrize(("asked", "found"), [(None, True), (True, True), (False, False)])
def test_a_run_says_what_its_base_is(base_directory: Path, asked: bool | None, found: bool) -> None:
    config = run_of().model_copy(update={"base": str(base_directory), "double_quant": asked})
    assert session.resolved(config).double_quant is found
    embedded = run_of().model_copy(update={"double_quant": asked})
    assert session.resolved(embedded).double_quant is bool(asked)
    whole = run_of("full").model_copy(update={"base": str(base_directory), "double_quant": asked})
    assert session.resolved(whole).double_quant is False, "in floating point there are no scales"


def test_serving_and_training_leave_it_to_the_base() -> None:
    assert Settings().double_quant is None
    assert run_of().double_quant is None
    assert not load_base(MINI, device="cpu", dtype="float32").spec.double_quant


def _trained(base: Path, out: Path, **more: object) -> Path:
    rows = [json.dumps({"prompt": PROMPT, "completion": " on a bare branch"})] * 4
    (out.parent / "data.jsonl").write_text("\n".join(rows) + "\n")
    config = TrainConfig.model_validate(
        {
            "base": str(base),
            "data": {"train": out.parent / "data.jsonl"},
            "method": {"kind": "lora", "rank": 2},
            "optim": {"learning_rate": 0.05, "steps": 4, "batch_size": 2},
            "logs": (),
            "out": out,
            **more,
        }
    )
    session.run(config)
    return out


def test_trained_by_default_serves_by_default(base_directory: Path, tmp_path: Path) -> None:
    """With PEFT's tokens, over weights that bitsandbytes rounded twice; what was trained over plain
    scales is refused, and so is the way back."""
    adapter = _trained(base_directory, tmp_path / "adapter")
    plain = _trained(base_directory, tmp_path / "plain", double_quant=False)
    said = json.loads((adapter / "training.json").read_text())["config"]
    assert said["double_quant"] is True, "the record does not say null"
    home = tmp_path / "home"
    home.mkdir()
    catalog = Catalog(str(home / "catalog.db"))
    catalog.add(replace(MANIFEST, version=0, base_fingerprint=_made_for(plain)))
    catalog.close()
    with capture_logs() as logs, live(base_directory, home) as running:
        (told,) = [line["why"] for line in logs if line["event"] == "stored adapters are refused"]
        assert told == other_scales(running.serving.spec.id, True, 1)
        assert running.serving.spec.double_quant
        assert _made_for(adapter) == running.serving.spec.fingerprint
        running.upload("trained", adapter)
        prompt, tokens, _ = running.generate("trained", PROMPT, 8)
        oracle = PeftOracle(base_directory, adapter, double_quant=True)
        assert tokens == oracle.greedy(prompt, 8).tokens
        assert tokens != PeftOracle(base_directory).greedy(prompt, 8).tokens, "it learned nothing"
        with pytest.raises(RuntimeError, match=r"422.*without double quantisation.*--no-double-q"):
            running.upload("plain", plain)
    base = load_base(base_directory, device="cpu", dtype="float32")
    checkpoint.load(adapter, base).detach()
    with pytest.raises(MethodError, match=r"without double quantisation.*--no-double-quant"):
        checkpoint.load(plain, base)


def _made_for(adapter: Path) -> str:
    with safe_open(adapter / "adapter_model.safetensors", "pt") as file:
        made_for: str = file.metadata()["base_fingerprint"]
    return made_for
