"""What the host of a virtual machine gives to others of the time that its cores were to have. A
measurement beside it says something of the host, so it is made again."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

STOLEN = 0.02  # of all cores' time, in a measurement that counts

T = TypeVar("T")


class Host:
    """Measures again what the host disturbed, `repeats` times in all."""

    def __init__(self, repeats: int) -> None:
        self.repeats = repeats
        self.disturbed = 0  # measurements that counted nevertheless

    def quiet(self, measure: Callable[[], T]) -> T:
        while True:
            before = _seconds()
            found = measure()
            stolen, passed = (now - then for now, then in zip(_seconds(), before, strict=True))
            if stolen <= STOLEN * passed:
                return found
            again = self.repeats > 0
            what = "measured again" if again else "counted, for there is no repeat left"
            print(f"  the host took {stolen / passed:.1%} of that: {what}", flush=True)
            if not again:
                self.disturbed += 1
                return found
            self.repeats -= 1

    def __str__(self) -> str:
        most = f"the host took at most {STOLEN:.0%} of the machine"
        return f"{most}, but for {self.disturbed} measurements" if self.disturbed else most


def _seconds() -> tuple[float, float]:
    """Of all cores: what their host gave to others, and all that passed."""
    fields = Path("/proc/stat").read_text().splitlines()[0].split()[1:9]
    ticks = [int(field) for field in fields]
    return ticks[7] / os.sysconf("SC_CLK_TCK"), sum(ticks) / os.sysconf("SC_CLK_TCK")
