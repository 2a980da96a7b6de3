import struct
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from adapters.errors import InvalidAdapter, TooLarge, UnsupportedMedia
from adapters.limits import Limits
from adapters.safetensors_header import open_regular, read_header
from adapters.tensor_values import CHUNK_BYTES, as_float32, check_values
from adapters.validate import validate
from base.spec import BaseSpec
from tests.adapters.conftest import Saved, Saver
from tests.adapters.hostile import safetensors_bytes, shapes_of, write

Q0 = "base_model.model.model.layers.0.self_attn.q_proj."


def refusal(
    config: bytes, weights: Path, spec: BaseSpec, limits: Limits | None = None
) -> InvalidAdapter:
    with pytest.raises(InvalidAdapter) as caught:
        validate(config, weights, spec, limits or Limits())
    return caught.value


def changed(saved: Saved, path: Path, **tensors: torch.Tensor) -> Path:
    """A copy of the weights with tensors of layer 0's q_proj overwritten."""
    own = {Q0 + name.replace("__", "."): tensor for name, tensor in tensors.items()}
    save_file(load_file(str(saved.weights)) | own, str(path))
    return path


def test_says_what_the_adapter_is(save: Saver, spec: BaseSpec) -> None:
    saved = save("dora", targets=["q_proj", "v_proj"], rank=2, rank_pattern={"v_proj": 6})
    found = validate(saved.config, saved.weights, spec, Limits())
    assert (found.kind, found.rank) == ("dora", 6)
    assert found.targets == tuple(
        f"model.layers.{n}.self_attn.{p}_proj" for n in (0, 1) for p in "qv"
    )
    numbers = sum(tensor.numel() for tensor in load_file(str(saved.weights)).values())
    assert (found.parameters, found.memory_bytes) == (numbers, 4 * numbers)


def test_memory_is_counted_in_fp32(save: Saver, spec: BaseSpec, tmp_path: Path) -> None:
    saved = save(targets=["q_proj"])
    half = {name: tensor.bfloat16() for name, tensor in load_file(str(saved.weights)).items()}
    save_file(half, str(tmp_path / "half"))
    small = validate(saved.config, tmp_path / "half", spec, Limits())
    assert small.memory_bytes == validate(saved.config, saved.weights, spec, Limits()).memory_bytes


def test_the_bases_own_table_costs_nothing(save: Saver, spec: BaseSpec) -> None:
    """PEFT saves the base's embeddings beside a LoRA on them; they are no part of the adapter."""
    saved = save(targets=["embed_tokens"])
    tensors = load_file(str(saved.weights))
    copies = [name for name in tensors if name.endswith("base_layer.weight")]
    assert copies
    own = sum(tensor.numel() for name, tensor in tensors.items() if name not in copies)
    assert validate(saved.config, saved.weights, spec, Limits()).parameters == own


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("at", [0, -1])
def test_every_number_is_finite(
    save: Saver, spec: BaseSpec, tmp_path: Path, dtype: torch.dtype, bad: float, at: int
) -> None:
    saved = save(targets=["q_proj"])
    tensor = load_file(str(saved.weights))[Q0 + "lora_B.weight"].to(dtype)
    tensor.view(-1)[at] = bad
    weights = changed(saved, tmp_path / "w", lora_B__weight=tensor)
    error = refusal(saved.config, weights, spec)
    assert error.where == Q0 + "lora_B.weight"
    assert "finite" in error.reason


def test_numbers_have_a_sane_size(save: Saver, spec: BaseSpec, tmp_path: Path) -> None:
    saved = save(targets=["q_proj"])
    weights = changed(saved, tmp_path / "w", lora_A__weight=torch.full((4, 64), -2e6))
    assert "within" in refusal(saved.config, weights, spec).reason


@pytest.mark.parametrize("bad", [0.0, -1.0])
def test_magnitudes_are_positive(save: Saver, spec: BaseSpec, tmp_path: Path, bad: float) -> None:
    saved = save("dora", targets=["q_proj"])
    magnitude = torch.ones(64)
    magnitude[7] = bad
    weights = changed(saved, tmp_path / "w", lora_magnitude_vector=magnitude)
    assert refusal(saved.config, weights, spec).where == Q0 + "lora_magnitude_vector"
    longer = shapes_of(weights)
    longer[Q0 + "lora_magnitude_vector.weight"] = longer.pop(Q0 + "lora_magnitude_vector")
    write(weights, safetensors_bytes(longer))
    assert "magnitude" in refusal(saved.config, weights, spec).reason


@pytest.mark.parametrize("at", [0, CHUNK_BYTES // 4 - 1, CHUNK_BYTES // 4, CHUNK_BYTES // 4 + 5])
def test_every_piece_of_a_long_tensor_is_read(tmp_path: Path, at: int) -> None:
    values = np.ones(CHUNK_BYTES // 4 + 6, dtype="<f4")
    path = write(tmp_path / "w", safetensors_bytes({"a": ("F32", [values.size], values.tobytes())}))
    with open_regular(path) as fd:
        check_values(fd, read_header(fd, Limits()).tensors["a"], 1e6)
    values[at] = np.nan
    write(path, safetensors_bytes({"a": ("F32", [values.size], values.tobytes())}))
    with open_regular(path) as fd, pytest.raises(InvalidAdapter, match="nan"):
        check_values(fd, read_header(fd, Limits()).tensors["a"], 1e6)


def test_bits_are_read_as_torch_reads_them() -> None:
    bits = torch.arange(-(1 << 15), 1 << 15, dtype=torch.int32).to(torch.int16)
    for dtype, name in ((torch.bfloat16, "BF16"), (torch.float16, "F16")):
        want = bits.view(dtype).float().numpy()
        np.testing.assert_array_equal(as_float32(bits.numpy().tobytes(), name), want)
    assert as_float32(struct.pack("<f", 1.5), "F32") == [1.5]


def test_each_missing_tensor_is_named(save: Saver, spec: BaseSpec, tmp_path: Path) -> None:
    saved = save("dora", targets=["q_proj"], modules_to_save=["lm_head"], bias="lora_only")
    tensors = load_file(str(saved.weights))
    for name in tensors:
        save_file({k: v for k, v in tensors.items() if k != name}, str(tmp_path / "w"))
        assert refusal(saved.config, tmp_path / "w", spec).where == name


def test_each_wrong_shape_is_named(save: Saver, spec: BaseSpec, tmp_path: Path) -> None:
    saved = save("dora", targets=["q_proj"], modules_to_save=["lm_head"], bias="lora_only")
    tensors = load_file(str(saved.weights))
    for name, tensor in tensors.items():
        longer = torch.cat([tensor, tensor[:1]])
        save_file(tensors | {name: longer}, str(tmp_path / "w"))
        error = refusal(saved.config, tmp_path / "w", spec)
        assert error.where == name
        assert f"shape {list(longer.shape)}, expected {list(tensor.shape)}" in error.reason


def test_ranks_of_a_and_b_agree(save: Saver, spec: BaseSpec, tmp_path: Path) -> None:
    saved = save(targets=["q_proj"], rank=4)
    weights = changed(saved, tmp_path / "w", lora_B__weight=torch.zeros(64, 5))
    assert refusal(saved.config, weights, spec).where == Q0 + "lora_B.weight"


@pytest.mark.parametrize("peft_type", ["XLORA", "OSF", "lora", None, 3, ["LORA"]])
def test_other_methods_are_refused_by_name(save: Saver, spec: BaseSpec, peft_type: object) -> None:
    saved = save(targets=["q_proj"])
    error = refusal(saved.with_fields(peft_type=peft_type), saved.weights, spec)
    assert error.where == "peft_type"
    assert "LORA" in error.reason


def test_the_mark_of_another_base_is_refused(save: Saver, spec: BaseSpec) -> None:
    saved = save(targets=["q_proj"])
    config = saved.with_fields(nibble={"base_fingerprint": spec.fingerprint})
    validate(config, saved.weights, spec, Limits())
    other = replace(spec, fingerprint="0" * 64)
    assert refusal(config, saved.weights, other).where == "nibble.base_fingerprint"


def test_limits(save: Saver, spec: BaseSpec) -> None:
    saved = save(targets=["q_proj"], rank=4)
    for limits in (
        Limits(max_rank=3),
        Limits(max_tensors=3),
        Limits(max_weights_bytes=999),
        Limits(max_header_bytes=100),
        Limits(max_config_bytes=100),
    ):
        assert isinstance(refusal(saved.config, saved.weights, spec, limits), TooLarge)


def test_a_pickle_is_another_medium(save: Saver, spec: BaseSpec, tmp_path: Path) -> None:
    saved = save(targets=["q_proj"])
    torch.save({"a": torch.zeros(1)}, tmp_path / "w")
    assert isinstance(refusal(saved.config, tmp_path / "w", spec), UnsupportedMedia)
