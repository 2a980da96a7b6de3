"""Two processes that train together: forks of this one, which has imported everything already."""

from __future__ import annotations

import os
import traceback
import warnings
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path

import psutil
import torch

from training.distributed import World

TIMEOUT = timedelta(seconds=240)  # a busy machine may let one of them wait


def in_two(work: Callable[[World], None], directory: Path, sharded: bool = False) -> None:
    """Run `work` in two processes over gloo; what they find out they write to files."""
    directory.mkdir(parents=True, exist_ok=True)
    children = [_start(rank, work, directory, sharded) for rank in range(2)]
    statuses = [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]
    said = [path.read_text() for path in sorted(directory.glob("error.*"))]
    assert statuses == [0, 0], "\n".join(said)


def lose(launcher: int) -> None:
    """Kill `accelerate launch` and its processes, whose sessions are their own: a lost machine."""
    root = psutil.Process(launcher)
    for process in (root, *root.children(recursive=True)):
        process.kill()


def _start(rank: int, work: Callable[[World], None], directory: Path, sharded: bool) -> int:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # of a fork beside threads
        child = os.fork()
    if child:
        return child
    try:
        torch.distributed.init_process_group(
            "gloo", f"file://{directory}/store", timeout=TIMEOUT, rank=rank, world_size=2
        )
        work(World(rank, 2, sharded))
        torch.distributed.barrier()
        os._exit(0)
    except BaseException:
        (directory / f"error.{rank}").write_text(traceback.format_exc())
        os._exit(1)
