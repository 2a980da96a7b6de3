"""Every kind on some bases: runs the checks and collects the matrix."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from adapters.errors import AdapterError
from adapters.lowering import FAMILIES
from base.mini import MINI
from service.conformance import checks
from service.conformance.checks import TOKENS, Subject
from service.conformance.cost import flops_of, flops_of_base, method_of
from service.conformance.live import Live, live
from service.conformance.recipes import RECIPES
from service.conformance.result import Cell, Cost, Row
from service.conformance.steps import Steps
from service.conformance.tiny import make_base
from service.errors import ServiceError

TINY = ("qwen3", "gemma")  # with biases; with a tied, scaled table and norms of 1 + w
BASES = ("mini", *TINY)
_TIMED_ROWS = 8

Tell = Callable[[str], None]


@dataclass(frozen=True, slots=True)
class Options:
    """What to run; the whole suite by default."""

    bases: tuple[str, ...] = BASES
    kinds: tuple[str, ...] = ()  # () for all
    timed: bool = True
    zero: bool = True


def served_kinds() -> tuple[str, ...]:
    """Every kind that lowering takes, in the order of the recipes."""
    return tuple(kind for kind, made in RECIPES.items() if kind in FAMILIES or made.new_tokens)


def run(options: Options, home: Path, tell: Tell = lambda line: None) -> list[Row]:
    """One row for each kind on each base."""
    rows: list[Row] = []
    for name in options.bases:
        base = MINI if name == "mini" else make_base(home / name / "base", name)
        with live(base, home / name / "home") as running:
            found = _OnBase(name, base, home / name, running, options, tell)
            rows += found.rows(options.kinds or served_kinds())
    return rows


class _OnBase:
    """The suite on one base."""

    def __init__(
        self, name: str, base: Path, home: Path, running: Live, options: Options, tell: Tell
    ) -> None:
        self.name, self.base, self.home = name, base, home
        self.live, self.options, self.tell = running, options, tell
        self.steps = Steps(running.engine)

    def rows(self, kinds: Sequence[str]) -> list[Row]:
        subjects: list[Subject] = []
        broken: list[Row] = []
        for number, kind in enumerate(kinds):
            try:
                subjects.append(checks.saved(self.live, self.base, self.home, kind, number))
            except RuntimeError as error:  # refused: a cell of its own, and the others go on
                failure = {"round_trip": Cell("fail", None, str(error))}
                broken.append(Row(kind, self.name, failure))
        checks.run_mixed(subjects, self.live, self.steps)
        return [*(self._row(subject) for subject in subjects), *broken]

    def _row(self, subject: Subject) -> Row:
        oracle = subject.oracle()
        running: dict[str, Callable[[], Mapping[str, Cell]]] = {
            "isolation": lambda: checks.isolation(subject, self.live, self.steps),
            "peft": lambda: {"peft": checks.equals_peft(subject, oracle)},
            "merged": lambda: {"merged": checks.merged(subject, self.live, self.steps)},
            "zero": lambda: {"zero": self._zero(subject.kind)},
            "round_trip": lambda: {"round_trip": checks.round_trip(subject, self.live, oracle)},
        }
        cells: dict[str, Cell] = {}
        for name, check in running.items():
            try:
                cells |= check()
            except (ServiceError, AdapterError, RuntimeError) as error:
                cells[name] = Cell("fail", None, str(error))
        row = Row(subject.kind, self.name, cells, self._cost(subject))
        self.tell(
            f"{self.name:8} {subject.kind:24} {'FAILED: ' if row.failed else 'passed'}"
            + ", ".join(row.failed)
        )
        return row

    def _zero(self, kind: str) -> Cell:
        if not self.options.zero:
            return Cell.nothing("left out of this run")
        return checks.begins_as_base(kind, self.live, self.steps, self.base, self.home)

    def _cost(self, subject: Subject) -> Cost:
        spec = self.live.serving.spec
        method = method_of(subject.kind, RECIPES[subject.kind].peft_type)
        flops = flops_of(subject.manifest, method, spec)
        return Cost(
            form=method.form or "",
            memory=method.memory,
            flops=method.flops,
            bytes=self.live.engine.load(subject.ref).nbytes,
            flops_per_token=flops,
            flops_of_base=flops / flops_of_base(spec),
            seconds_over_base=self._time(subject) if self.options.timed else 0.0,
        )

    def _time(self, subject: Subject) -> float:
        """Base and adapter take turns, and the cheapest step of each counts: others use the CPU
        too."""
        own = [replace(subject.asked, prompt=(*subject.prompt, 7 + i)) for i in range(_TIMED_ROWS)]
        plain = [checks.of_base(one.prompt, self.live) for one in own]
        best = [float("inf")] * 2
        for _ in range(3):
            for i, batch in enumerate((plain, own)):
                best[i] = min(best[i], self.steps.decode_seconds(batch, 2 * TOKENS))
        return best[1] / best[0]
