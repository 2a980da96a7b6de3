"""The reader of an adapter's tensors, against what safetensors wrote. No base is needed."""

from __future__ import annotations

import gc
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from adapters.errors import InvalidAdapter, StoreUnavailable, TooLarge, UnsupportedMedia
from adapters.lowering.checkpoint import WRAPPED, AdapterCheckpoint

CPU = torch.device("cpu")
DTYPES = (torch.float32, torch.float16, torch.bfloat16)


def saved(path: Path, **tensors: torch.Tensor) -> Path:
    save_file({WRAPPED + name: tensor for name, tensor in tensors.items()}, path)
    return path


@pytest.mark.parametrize("dtype", DTYPES)
def test_values_are_those_that_were_saved(tmp_path: Path, dtype: torch.dtype) -> None:
    # A name of odd length before it: nothing may count on where in the file a tensor begins.
    odd, own = torch.randn(3, dtype=torch.float32).to(dtype), torch.randn(5, 3, 2).to(dtype)
    path = saved(tmp_path / "weights", odd=odd, own=own)
    with AdapterCheckpoint(path, CPU) as file:
        assert torch.equal(file.peek("own", 1, 4), own[1:4].float())
        assert torch.equal(file.peek("own", 2, 2), own[2:2].float())
        taken = file.take("own", 5, 3, 2)
        assert taken.dtype == torch.float32
        assert torch.equal(taken, own.float())
        assert torch.equal(file.take("odd", 3), odd.float())
        file.finish()


def test_whole_numbers_stay_whole(tmp_path: Path) -> None:
    own = torch.tensor([[0, 2**31 - 1], [2**24 + 1, -5]], dtype=torch.int32)
    with AdapterCheckpoint(saved(tmp_path / "weights", own=own), CPU) as file:
        taken = file.take_indices("own", 2, 2)
    assert taken.dtype == torch.int64
    assert torch.equal(taken, own.long())


def test_what_is_missing_misshapen_or_left_over_is_named(tmp_path: Path) -> None:
    path = saved(tmp_path / "weights", own=torch.zeros(4, 2), more=torch.zeros(1))
    with AdapterCheckpoint(path, CPU) as file:
        with pytest.raises(InvalidAdapter, match=r"other: this tensor is missing, shape \[3\]"):
            file.take("other", 3)
        with pytest.raises(InvalidAdapter, match=r"own: shape \[4, 2\], expected \[2, 4\]"):
            file.take("own", 2, 4)
        file.take("own", 4, 2)
        with pytest.raises(InvalidAdapter, match=r"more: left over"):
            file.finish()


def test_what_is_no_such_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UnsupportedMedia, match=r"cannot be read: .*No such file"):
        AdapterCheckpoint(tmp_path / "weights", CPU)
    (tmp_path / "weights").write_bytes((1 << 40).to_bytes(8, "little") + b"{}" + bytes(9))
    with pytest.raises(TooLarge, match="header of 1099511627776 bytes"):
        AdapterCheckpoint(tmp_path / "weights", CPU)


def test_a_file_that_shrinks_meanwhile_is_an_error(tmp_path: Path) -> None:
    """By a memory map it would be the end of the process."""
    path = saved(tmp_path / "weights", own=torch.zeros(64, 1024))
    with AdapterCheckpoint(path, CPU) as file, path.open("r+b") as same:
        same.truncate(100_000)
        with pytest.raises(StoreUnavailable, match=r"cut short within base_model\.model\.own"):
            file.take("own", 64, 1024)


def test_reading_leaves_nothing_behind(tmp_path: Path) -> None:
    """safetensors' own reader leaves two integers for each tensor: 26 kB for each time that an
    adapter of a 0.4 B base is lowered."""
    tensors = {f"layers.{n}.lora_A.weight": torch.zeros(2, 300) for n in range(200)}
    path = saved(tmp_path / "weights", **tensors)

    def read() -> None:
        with AdapterCheckpoint(path, CPU) as file:
            for name in tensors:
                file.peek(name, 1, 2)
                file.take(name, 2, 300)

    read()
    gc.collect()
    before = sys.getallocatedblocks()
    for _ in range(5):
        read()
    gc.collect()
    assert sys.getallocatedblocks() - before < len(tensors)
