"""Damaged uploads through the full validator, damaged headers through their parser, in children.

    python -m tests.reliability.mutants validator --count 1000000
    python -m tests.reliability.mutants header --count 100000000
    python -m tests.reliability.mutants header --count 100000000 --atheris    # with .[fuzz]

A child is confined as the server's own is, but that it takes many mutants and only 64 MiB more than
it had before the first. Mutant `--seed`:number is always the same: `--first N --count 1` repeats
one. SIGINT and SIGTERM end it with what it has found so far, and where to go on. Exit status 1:
something crashed, swelled, or took longer than the server's child may.
"""

from __future__ import annotations

import argparse
import base64
import dataclasses
import json
import os
import resource
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from random import Random
from types import FrameType
from typing import Any

from adapters.errors import InvalidAdapter
from adapters.limits import MIB, Limits
from adapters.safetensors_header import read_header
from adapters.validation_child import (
    ROOT,
    _cap,
    _spec,
    _spec_fields,
    _token_fields,
    _tokens,
    validate_here,
)
from base.spec import BaseSpec
from tests.reliability.mutations import Headers, Upload, framed, mutant

MORE_BYTES = 64 * MIB
SLOW_SECONDS = float(Limits().child_cpu_seconds)  # where the server's child is ended
AT_ONCE = 2000  # mutants of one child
HEADERS = 200_000  # the same, of headers
WARM = 50  # before memory is measured: what is imported late is imported then
COMMAND = (
    *(sys.executable, "-I", "-c"),
    "import sys; sys.path.insert(0, sys.argv[1]);"
    " from tests.reliability.mutants import child; child()",
    str(ROOT),
)
KEPT_FAULTS = 20


@dataclasses.dataclass(slots=True)
class Report:
    """What became of so many mutants."""

    count: int = 0
    ends: Counter[str] = dataclasses.field(default_factory=Counter)
    faults: list[str] = dataclasses.field(default_factory=list)
    slowest: tuple[float, int] = (0.0, -1)  # seconds, number
    grown: int = 0  # bytes over the baseline, at most
    cpu_seconds: float = 0.0

    def add(self, other: Report) -> None:
        self.count += other.count
        self.ends += other.ends
        self.faults = [*self.faults, *other.faults][:KEPT_FAULTS]
        self.slowest = max(self.slowest, other.slowest)
        self.grown = max(self.grown, other.grown)
        self.cpu_seconds += other.cpu_seconds

    def fault(self, number: int, what: str) -> None:
        self.ends["fault"] += 1
        if len(self.faults) < KEPT_FAULTS:
            self.faults.append(f"mutant {number}: {what}")

    def __str__(self) -> str:
        seconds, number = self.slowest
        lines = [
            f"{self.count} mutants, {self.ends['fault']} faults, {self.cpu_seconds:.0f} s of CPU",
            ", ".join(f"{kind} {many}" for kind, many in self.ends.most_common()),
            f"slowest {1e3 * seconds:.0f} ms (mutant {number}), memory +{self.grown / MIB:.1f} MiB",
        ]
        return "\n".join([*lines, *self.faults])


# In the child ------------------------------------------------------------------------------------


def child() -> None:
    """Read one question from stdin, write one report to stdout."""
    question = json.load(sys.stdin.buffer)
    seeds = [_upload(fields) for fields in question["seeds"]]
    kind = _Validator if question["spec"] else _Parser
    report = kind(seeds, question).run()
    json.dump(
        {one.name: getattr(report, one.name) for one in dataclasses.fields(report)}, sys.stdout
    )


class _Child:
    """Mutants `first` to `first + count` of one question."""

    def __init__(self, seeds: Sequence[Upload], question: dict[str, Any]) -> None:
        self.seeds, self.seed = seeds, question["seed"]
        self.first, self.count = question["first"], question["count"]
        # In memory: what is measured is the checks, and the disk lives longer.
        self.file = os.open(question["file"], os.O_RDWR | os.O_CREAT, 0o600)
        self.path = Path(question["file"])
        self.progress = os.open(question["progress"], os.O_RDWR | os.O_CREAT, 0o600)
        self.limits = Limits()

    def run(self) -> Report:
        for number in range(-WARM, 0):
            self.judge(Report(), number)
        _confine()
        report, began = Report(count=self.count), time.process_time()
        before = _rest()
        signal.signal(signal.SIGALRM, _too_slow)
        for number in range(self.first, self.first + self.count):
            self.judge(report, number)
        report.grown = _peak() - before
        report.cpu_seconds = time.process_time() - began
        return report

    def judge(self, report: Report, number: int) -> None:
        attempt = self.prepared(number)
        started = time.perf_counter()
        signal.setitimer(signal.ITIMER_REAL, SLOW_SECONDS if number >= 0 else 0)
        try:
            attempt()
            report.ends["accepted"] += 1
        except InvalidAdapter as error:
            report.ends[type(error).__name__] += 1
        except _TooSlow:
            # The server's child ends there, and the upload is refused.
            report.ends["ended by the clock"] += 1
        except Exception as error:
            report.fault(number, f"{type(error).__name__}: {str(error)[:200]}")
        finally:
            signal.setitimer(signal.ITIMER_REAL, 0)
        report.slowest = max(report.slowest, (time.perf_counter() - started, number))

    def prepared(self, number: int) -> Callable[[], object]:
        raise NotImplementedError

    def put(self, content: bytes) -> None:
        os.ftruncate(self.file, 0)
        os.pwrite(self.file, content, 0)


class _Validator(_Child):
    def __init__(self, seeds: Sequence[Upload], question: dict[str, Any]) -> None:
        super().__init__(seeds, question)
        self.spec = _spec(question["spec"])
        self.tokens = _tokens(question["tokens"])

    def prepared(self, number: int) -> Callable[[], object]:
        # Noted before it is made, so that the parent knows which one ended the child.
        os.pwrite(self.progress, number.to_bytes(8, "little", signed=True), 0)
        made = mutant(self.seeds, self.seed, number)
        self.put(made.weights)
        assert self.tokens is not None
        tokens = dataclasses.replace(self.tokens, own=made.tokenizer)
        return lambda: validate_here(
            made.config, self.path, self.spec, self.limits, made.template, tokens
        )


class _Parser(_Child):
    def __init__(self, seeds: Sequence[Upload], question: dict[str, Any]) -> None:
        super().__init__(seeds, question)
        self.headers, self.chance = Headers.make(), Random()

    def prepared(self, number: int) -> Callable[[], object]:
        if number % 1000 == 0:
            os.pwrite(self.progress, number.to_bytes(8, "little", signed=True), 0)
        self.chance.seed((self.seed << 48) + abs(number))
        self.put(self.headers.mutant(self.chance))
        return lambda: read_header(self.file, self.limits)


class _TooSlow(BaseException):
    """Not an Exception: no check may take it for its own."""


def _too_slow(sig: int, frame: FrameType | None) -> None:
    raise _TooSlow


def _confine() -> None:
    _cap(resource.RLIMIT_AS, _size() + MORE_BYTES)
    _cap(resource.RLIMIT_CORE, 0)
    _cap(resource.RLIMIT_NOFILE, 64)


def _size() -> int:
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    return pages * resource.getpagesize()


def _rest() -> int:
    """What is in memory now. From here on `_peak` counts anew; ru_maxrss is a parent's too."""
    Path("/proc/self/clear_refs").write_text("5")
    return _peak()


def _peak() -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(1024 * int(line.split()[1]) for line in lines if line.startswith("VmHWM"))


def _upload(fields: dict[str, Any]) -> Upload:
    raw = {name: text and base64.b64decode(text) for name, text in fields.items()}
    template = raw.pop("template")
    return Upload(**raw, template=template and template.decode())


# In the parent -----------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True, slots=True)
class Material:
    """Good uploads to damage. Without any: headers are."""

    seeds: tuple[Upload, ...] = ()
    spec: BaseSpec | None = None
    tokens: dict[str, Any] | None = None


def material(directory: Path, kinds: Iterable[str]) -> Material:
    """Adapters of these kinds for a tiny base, as PEFT saves them."""
    from adapters.vocabulary import Tokens
    from base.load import load_base
    from tests.oracle import CHAT_TEMPLATE, make_adapter, make_base

    source = make_base(directory / "base", "qwen3")
    base = load_base(source, device="cpu", dtype="float32", cache_dir=directory / "hashes")
    seeds = []
    for kind in kinds:
        saved = make_adapter(directory / kind, source, kind)
        tokenizer = saved / "tokenizer.json"
        seeds.append(
            Upload(
                (saved / "adapter_config.json").read_bytes(),
                (saved / "adapter_model.safetensors").read_bytes(),
                tokenizer.read_bytes() if tokenizer.exists() else None,
                CHAT_TEMPLATE if kind == "lora" else None,
            )
        )
    # With a tokenizer of its own to compare with, the base's whole vocabulary is told.
    tokens = _token_fields(dataclasses.replace(Tokens.of(base.tokenizer), own=b"{}"))
    return Material(tuple(seeds), base.spec, tokens)


def run(
    made: Material, work: Path, *, count: int, seed: int = 0, first: int = 0, at_once: int
) -> Iterator[Report]:
    """A report for each child."""
    for start in range(first, first + count, at_once):
        yield _ask(made, work, seed, start, min(at_once, first + count - start))


def _ask(made: Material, work: Path, seed: int, first: int, count: int) -> Report:
    progress = work / "progress"
    with _memory_file() as file:
        question = {
            "seeds": [_fields(upload) for upload in made.seeds],
            "spec": _spec_fields(made.spec) if made.spec else None,
            "tokens": made.tokens,
            "seed": seed,
            "first": first,
            "count": count,
            "file": str(file),
            "progress": str(progress),
        }
        done = subprocess.run(
            COMMAND,
            input=json.dumps(question).encode(),
            capture_output=True,
            env={"PATH": os.defpath, "LC_ALL": "C.UTF-8", "OPENBLAS_NUM_THREADS": "1"},
            check=False,
        )
    if done.returncode == 0:
        answer = json.loads(done.stdout)
        answer["ends"], answer["slowest"] = Counter(answer["ends"]), tuple(answer["slowest"])
        return Report(**answer)
    report = Report(count)
    number = int.from_bytes(progress.read_bytes()[:8], "little", signed=True)
    last = done.stderr.decode(errors="replace").strip().rpartition("\n")[2]
    report.fault(number, f"or one after it ended the child with {done.returncode}: {last[:300]}")
    return report


@contextmanager
def _memory_file() -> Iterator[Path]:
    shared = Path("/dev/shm")
    with tempfile.TemporaryDirectory(dir=shared if shared.is_dir() else None) as directory:
        yield Path(directory) / "weights"


def _fields(upload: Upload) -> dict[str, str | None]:
    raw = {
        "config": upload.config,
        "weights": upload.weights,
        "tokenizer": upload.tokenizer,
        "template": upload.template and upload.template.encode(),
    }
    return {name: base64.b64encode(one).decode() if one else None for name, one in raw.items()}


def guided(work: Path, count: int) -> None:
    """The parser of headers under atheris, which looks for inputs that reach new lines of it."""
    import atheris

    del sys.modules[read_header.__module__]  # it is imported anew, with counters in it
    with atheris.instrument_imports():
        from adapters.safetensors_header import read_header as instrumented

    corpus = work / "corpus"
    corpus.mkdir(exist_ok=True)
    for number, (tokens, data) in enumerate(Headers.make().seeds):
        (corpus / f"{number}").write_bytes(framed(b"".join(tokens), data))
    file, limits = os.memfd_create("weights"), Limits()

    def attempt(content: bytes) -> None:
        os.ftruncate(file, 0)
        os.pwrite(file, content, 0)
        with suppress(InvalidAdapter):
            instrumented(file, limits)

    memory = f"-rss_limit_mb={_peak() // MIB + MORE_BYTES // MIB}"
    atheris.Setup([sys.argv[0], f"-runs={count}", memory, "-max_len=65536", str(corpus)], attempt)
    atheris.Fuzz()


def kinds_of(asked: str) -> Iterable[str]:
    from service.conformance.recipes import RECIPES  # it brings torch

    return RECIPES if asked == "all" else asked.split(",")


def count_all(asked: argparse.Namespace, work: Path, total: Report) -> None:
    """Add to `total` what each child reports, and show it."""
    began = time.monotonic()
    made = Material() if asked.what == "header" else material(work, kinds_of(asked.kinds))
    reports = run(
        made,
        work,
        count=asked.count,
        seed=asked.seed,
        first=asked.first,
        at_once=HEADERS if asked.what == "header" else AT_ONCE,
    )
    for report in reports:
        total.add(report)
        print(f"{total}\n", flush=True)
        if time.monotonic() - began > asked.seconds:
            break


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("what", choices=("validator", "header"))
    parser.add_argument("--count", type=int, default=10_000)
    parser.add_argument("--first", type=int, default=0)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--kinds", default="all", help="of service/conformance/recipes.py")
    parser.add_argument("--seconds", type=float, default=float("inf"), help="begin nothing after")
    parser.add_argument("--atheris", action="store_true", help="guided by coverage; headers only")
    asked = parser.parse_args()
    for sig in (signal.SIGINT, signal.SIGTERM):  # SIGINT is ignored in a shell's background
        signal.signal(sig, signal.default_int_handler)
    total = Report()
    with tempfile.TemporaryDirectory() as directory:
        if asked.atheris:
            return guided(Path(directory), asked.count)
        try:
            count_all(asked, Path(directory), total)
        except KeyboardInterrupt:
            print(f"stopped; go on with --first {asked.first + total.count}:\n{total}", flush=True)
    sys.exit(1 if total.faults else 0)


if __name__ == "__main__":
    main()
