"""What a process of `nibble train` came to: what its check found, or why it failed."""

from __future__ import annotations

import signal
from typing import Any

from service.jobs.job import Checked, Fault
from service.jobs.order import TRAINING, VALIDATION, Order, named, refusal, settled
from service.jobs.process import REFUSED, STOPPED, document

MOST_STARTS = 3  # of a run, without a step in between
MOST_REJECTS = 5  # bad rows that a fault names


def verdict(order: Order, status: int, said: str) -> Checked | Fault:
    """What the check of a job's data came to."""
    found = document(said) or {}
    if refused := found.get("error"):
        return Fault(
            "invalid_config" if refused.get("field") else "invalid_data", *refusal(order, refused)
        )
    if "data" not in found:
        return why_it_failed(order, status, said)
    for param, report in zip((TRAINING, VALIDATION), found["data"], strict=False):
        limit = found["config"]["data"]["max_bad_rows"]
        if report["bad"] > limit or not report["rows"]:
            return Fault("invalid_data", named(order, _bad_rows(report, limit)), param)
    train = found["data"][0]
    if not train["examples"]:
        return Fault("invalid_data", f"{TRAINING}: no rows are left to learn from", TRAINING)
    config = settled(order, found["config"], train["examples"], train["tokens"])
    return Checked(config, train["examples"], train["tokens"])


def _bad_rows(report: dict[str, Any], limit: int) -> str:
    if not report["rows"]:
        return f"{report['path']}: no rows: at least one example is needed"
    alike: dict[str, list[str]] = {}
    for place, _, why in (reject.partition(": ") for reject in report["rejects"]):
        alike.setdefault(why, []).append(place)
    shown = dict(list(alike.items())[:MOST_REJECTS])
    lines = [
        f"{places[0]}: {why}" + (f" (and {len(places) - 1:,} like it)" if places[1:] else "")
        for why, places in shown.items()
    ]
    if more := report["bad"] - sum(map(len, shown.values())):
        lines.append(f"and {more:,} more")
    count = f"{report['bad']:,} of {report['rows']:,} rows are bad (data.max_bad_rows is {limit}): "
    return count + "; ".join(lines)


def why_it_failed(order: Order, status: int, said: str) -> Fault:
    """From the exit status and the last words of a process."""
    if status == REFUSED:
        reason = said[said.rfind("refused:") :].removeprefix("refused:").strip()
        return Fault("refused", named(order, " ".join(reason.split())[:2000]))
    if status < 0 or status == STOPPED:
        return Fault("killed", f"{death(status)}, {MOST_STARTS} times without a step in between.")
    lines = [line.strip() for line in said.strip().splitlines() if line.strip()]
    last = lines[-1][:500] if lines else "it said nothing"
    if "MemoryError" in said or "can't allocate memory" in said or "out of memory" in said:
        return Fault(
            "out_of_memory",
            "The run needed more memory than job_memory_bytes gives it: a smaller "
            f"optim.batch_size or data.max_length needs less. {last}",
        )
    if "No space left on device" in said:
        return Fault("store_full", f"The server's disk is full: {last}")
    return Fault("training_failed", named(order, f"The run failed (exit {status}): {last}"))


def death(status: int) -> str:
    """How a process ended that nobody here asked to."""
    if status == -signal.SIGKILL:
        return "The run was killed (signal 9: often the system was out of memory)"
    what = f"signal {-status}" if status < 0 else "a request to stop that was not the server's"
    return f"The run was ended by {what}"
