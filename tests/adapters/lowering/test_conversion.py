"""LoRAs that began as a part of the base's weights, as PEFT converts them when it saves."""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from adapters.errors import InvalidAdapter
from tests.adapters.lowering.mixed_batch import Server
from tests.oracle import PeftOracle, make_adapter, random_tokens, read_manifest, relative_error

Servers = Callable[..., Server]


def trained(base: Path, directory: Path, method: str, convert: bool) -> Path:
    """An adapter of rank 4 that PEFT began by `method`, moved a little and saved."""
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(str(base), dtype=torch.float32)
    config = LoraConfig(
        r=4,
        lora_alpha=6,
        target_modules=["q_proj", "down_proj"],
        init_lora_weights=method,
        task_type="CAUSAL_LM",
    )
    with warnings.catch_warnings(), torch.random.fork_rng():
        warnings.simplefilter("ignore")
        torch.manual_seed(0)
        adapted = get_peft_model(model, config)
        adapted.peft_config["default"].init_lora_weights = True  # the start is saved as a LoRA
        adapted.save_pretrained(str(directory / "start"))
        adapted.peft_config["default"].init_lora_weights = method
        for name, parameter in adapted.named_parameters():
            if "lora_" in name:
                parameter.data += 0.05 * torch.randn_like(parameter)
        start = str(directory / "start") if convert else None
        adapted.save_pretrained(
            str(directory / "end"), path_initial_model_for_weight_conversion=start
        )
    return directory / "end"


@pytest.mark.parametrize("method", ["pissa", "olora"])
def test_the_converted_adapter_equals_peft(method: str, server: Servers, tmp_path: Path) -> None:
    served, tokens = server("llama"), random_tokens(20)
    adapter = trained(served.directory, tmp_path, method, convert=True)
    assert read_manifest(adapter, served.base.spec).rank == 8  # what it became beside its start
    got = served.run([(tokens, served.lower(adapter)), (tokens, None)])
    assert relative_error(got[0], PeftOracle(served.directory, adapter).logits(tokens)) < 1e-5
    assert relative_error(got[0], got[1]) > 1e-2


@pytest.mark.parametrize("method", ["pissa", "olora"])
def test_without_conversion_it_is_refused(method: str, server: Servers, tmp_path: Path) -> None:
    """It belongs to the base that was left over when it began, and to no other."""
    served = server("llama")
    adapter = trained(served.directory, tmp_path, method, convert=False)
    assert json.loads((adapter / "adapter_config.json").read_text())["init_lora_weights"] == method
    with pytest.raises(InvalidAdapter, match="path_initial_model_for_weight_conversion"):
        served.lower(adapter)


def test_a_start_that_leaves_the_base_alone_does_not_matter(
    server: Servers, tmp_path: Path
) -> None:
    served, tokens = server("llama"), random_tokens(20)
    options = {"init_lora_weights": "orthogonal"}
    adapter = make_adapter(tmp_path / "a", served.directory, "lora", **options)
    got = served.run([(tokens, served.lower(adapter))])[0]
    assert relative_error(got, PeftOracle(served.directory, adapter).logits(tokens)) < 1e-5
