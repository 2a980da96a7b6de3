"""Stands in for `nibble train` where a test is about the queue: it keeps the contract of its log.

What it does is in plan.json beside it: how its check ends, how many steps its run has, how long
each takes, at which step it dies, once or always, and behind which it waits to be let go or to be
asked to stop. A step's loss depends on the step alone.
"""

import json
import os
import signal
import sys
import time
from pathlib import Path

PLAN = json.loads(Path(__file__).with_name("plan.json").read_text())
RUN = Path("adapter/run")
CONFIG = {"optim": {"steps": 8, "batch_size": 4, "learning_rate": 0.1}, "budget": {"minutes": None}}


def check() -> int:
    config = json.loads(Path("job.json").read_text())
    data = {**config["data"], "max_bad_rows": 0, "packing": False, "max_length": 8}
    report = {"path": config["data"]["train"], "rows": 8, "bad": 0, "examples": 8, "tokens": 64}
    report |= {"rejects": [], **PLAN.get("report", {})}
    time.sleep(PLAN.get("check_seconds", 0))
    print(json.dumps({"config": {**config, **CONFIG, "data": data}, "data": [report]}))
    return 1 if report["bad"] else 0


def run() -> int:
    stopped: list[int] = []
    signal.signal(signal.SIGTERM, lambda number, frame: stopped.append(number))
    if PLAN.get("says"):
        print(PLAN["says"], file=sys.stderr)
        return int(PLAN["exit"])
    RUN.mkdir(parents=True, exist_ok=True)
    kept = RUN / "checkpoint.safetensors"
    done = int(kept.read_text()) if kept.exists() else 0
    happened("started", step=done)
    for step in range(done + 1, PLAN.get("steps", 8) + 1):
        time.sleep(PLAN.get("seconds", 0))
        line = {"number": step, "loss": 1 / step, "learning_rate": 0.1, "tokens": 8 * step}
        with (RUN / "log.jsonl").open("a") as file:
            file.write(json.dumps({**line, "time": time.time()}) + "\n")
        if step == PLAN.get("dies_at") and (PLAN.get("always") or not (RUN / "died").exists()):
            (RUN / "died").touch()
            os.kill(os.getpid(), signal.SIGKILL)
        while step == PLAN.get("holds_at") and not stopped and not (RUN / "go").exists():
            time.sleep(0.01)
        if step % 2 == 0 or stopped:
            kept.write_text(str(step))
            happened("checkpoint", step=step)
        if stopped:
            return 130
    happened("finished", steps=PLAN.get("steps", 8), tokens=64, loss=0.125, eval_loss=None)
    return 0


def happened(what: str, **data: object) -> None:
    with (RUN / "events.jsonl").open("a") as file:
        file.write(json.dumps({"event": what, "time": time.time(), **data}) + "\n")


sys.exit({"check": check, "run": run}[sys.argv[2]]())
