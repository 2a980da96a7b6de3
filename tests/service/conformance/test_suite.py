"""`nibble conformance` on the smallest shapes: one kind of each form here, all of them when slow.

And the checks themselves: each of them sees what it is there for.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from adapters.manifest import AdapterManifest
from service.conformance import recipes
from service.conformance.checks import TOKENS, Subject, against, equals_peft, isolation
from service.conformance.cost import flops_of, flops_of_base, method_of
from service.conformance.live import live
from service.conformance.oracle import PeftOracle
from service.conformance.recipes import RECIPES, Recipe
from service.conformance.result import CHECKS, Row
from service.conformance.steps import Answered, Asked, Steps
from service.conformance.suite import BASES, Options, run, served_kinds
from tests.oracle import make_adapter, read_manifest


def one_of_each_form() -> tuple[str, ...]:
    forms: dict[str | None, str] = {}
    for kind in served_kinds():
        forms.setdefault(method_of(kind, RECIPES[kind].peft_type).form, kind)
    return tuple(forms.values())


def assert_passed(rows: list[Row], left_out: tuple[str, ...] = ()) -> None:
    failed = {(r.kind, r.base, n): r.cells[n] for r in rows for n in r.failed}
    assert not failed, failed
    assert all(set(row.cells) == set(CHECKS) and row.cost for row in rows)
    for check in set(CHECKS).difference(left_out):  # each was possible for one kind at least
        assert any(row.cells[check].status == "pass" for row in rows), check


def test_one_kind_of_each_form(tmp_path: Path) -> None:
    kinds = one_of_each_form()
    assert len(kinds) >= 6
    rows = run(Options(("qwen3",), kinds, timed=False, zero=False), tmp_path)
    assert [row.kind for row in rows] == list(kinds)
    assert_passed(rows, left_out=("zero",))  # test_families.py has it, without a server


@pytest.mark.slow
@pytest.mark.parametrize("base", BASES)
def test_every_kind(base: str, tmp_path: Path) -> None:
    rows = run(Options((base,)), tmp_path)
    assert {row.kind for row in rows} == set(served_kinds())
    assert_passed(rows)
    assert all(row.cost and row.cost.seconds_over_base > 0 for row in rows)


def test_a_refused_adapter_is_a_failed_row(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The others go on: the suite is for finding out what fails."""
    broken = Recipe(lambda r, a, t: {"r": r, "init_lora_weights": "pissa"}, peft_type="LORA")
    monkeypatch.setattr(recipes, "RECIPES", {**RECIPES, "rslora": broken})
    options = Options(("qwen3",), ("ia3", "rslora"), timed=False, zero=False)
    one, two = run(options, tmp_path)
    assert (one.kind, one.failed) == ("ia3", [])
    assert (two.kind, two.failed) == ("rslora", ["round_trip"])
    assert "422" in two.cells["round_trip"].note
    assert "init_lora_weights" in two.cells["round_trip"].note


@pytest.fixture(scope="module")
def two(base_directory: Path, tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Two LoRAs that differ."""
    home = tmp_path_factory.mktemp("two")
    return [make_adapter(home / str(n), base_directory, "lora", seed=n) for n in (1, 2)]


def test_peft_s_check_sees_a_wrong_adapter_and_a_wrong_token(
    base_directory: Path, two: list[Path]
) -> None:
    prompt = (9, 8, 7, 6)
    oracle, other = (PeftOracle(base_directory, adapter) for adapter in two)
    tokens = oracle.greedy(prompt, 3).tokens
    logits = oracle.logits([*prompt, *tokens])[3:-1]
    assert against(oracle, prompt, tokens, logits).status == "pass"
    assert against(other, prompt, tokens, logits).status == "fail"
    assert against(oracle, prompt, tokens, logits + 1e-2).status == "fail"
    wrong = [*tokens[:2], (tokens[2] + 1) % 512]
    assert "PEFT has" in against(oracle, prompt, wrong).note


def test_isolation_and_reload_see_a_difference(
    base_directory: Path, two: list[Path], tmp_path: Path
) -> None:
    with live(base_directory, tmp_path) as running:
        steps = Steps(running.engine)
        manifests = [running.upload(f"lora-{n}", adapter) for n, adapter in enumerate(two)]
        subjects = [subject(m, a, base_directory) for m, a in zip(manifests, two, strict=True)]
        answers = steps.together([one.asked for one in subjects], TOKENS)
        assert steps.widest == 2
        for one, answer in zip(subjects, answers, strict=True):
            one.mixed = answer
            cells = isolation(one, running, steps)
            assert {name: cell.status for name, cell in cells.items()} == {
                "isolation": "pass",
                "reload": "pass",
            }
            assert equals_peft(one, one.oracle()).status == "pass"
        subjects[0].mixed = answers[1]  # as if the rows had been mixed up
        assert isolation(subjects[0], running, steps)["isolation"].status == "fail"
        assert equals_peft(subjects[0], subjects[0].oracle()).status == "fail"
        slightly = Answered(answers[0].tokens, answers[0].logits + 1e-2)
        subjects[0].mixed = slightly
        assert isolation(subjects[0], running, steps)["isolation"].status == "fail"
        plain = steps.alone(Asked((9, 8), None), 2)
        assert plain.logits.shape == torch.Size([2, 512])


def subject(manifest: AdapterManifest, adapter: Path, base: Path) -> Subject:
    return Subject("lora", adapter, base, manifest, (9, 8, 7, 6))


def test_flops_are_the_registry_s(base_directory: Path, two: list[Path], tmp_path: Path) -> None:
    from base.load import load_base

    base = load_base(base_directory, device="cpu", dtype="float32", cache_dir=tmp_path)
    manifest, spec = read_manifest(two[0], base.spec), base.spec
    quantised = [shape for shape in spec.linears.values() if shape.quantized]
    want = sum(2 * 4 * (shape.out_features + shape.in_features) for shape in quantised)
    assert flops_of(manifest, method_of("lora"), spec) == want
    assert flops_of_base(spec) == 2 * (
        512 * 64 + sum(s.out_features * s.in_features for s in quantised)
    )
