import pytest
import torch

from base.kernels import bench, bench_steps, native


def test_measures_every_candidate(library: native.Native, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(native, "load", lambda: (library, library.isa))
    monkeypatch.setattr(bench, "ROTATION", 1 << 20)
    found = {m.name: m for m in bench.measure((128, 256), 2, False, seconds=0.0)}
    assert {"portable", "portable fast", "bitsandbytes"} <= set(found)
    for measure in found.values():
        assert 0 < measure.best <= measure.median
        assert measure.weight_bytes == 128 * 128 + 128 * 256 // 16
        assert measure.gflops == pytest.approx(2e-9 * 128 * 256 * 2 / measure.best)


def test_the_same_rounds_for_all() -> None:
    times = bench.race({"a": lambda: None, "b": lambda: None}, 0.0)
    assert len(times["a"]) == len(times["b"]) >= 3


def test_every_other_kernel_runs_and_has_its_limit(
    library: native.Native, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(bench_steps, "VOCABULARY", 300)
    monkeypatch.setattr(bench_steps, "HIDDEN", 64)
    monkeypatch.setattr(bench_steps, "RANKS", (8,))
    found = list(bench_steps.tasks(library, rotation=1 << 16))
    assert {task.name for task in found} == {
        *("low rank", "attention", "head in 8 bits", "argmax, logsumexp")
    }
    for task in found:
        task.run()
        assert task.nbytes > 0
    one = next(task for task in found if task.size == "r 8, 1 of float32")
    assert one.nbytes == 4 * 8 * (896 + 4864)
    assert one.multiply_adds == 8 * (896 + 4864)
    read = 1e-9 * one.nbytes / 20  # seconds at 20 GB/s
    assert one.of_limit(2 * read, read=20, float32=300, int8=None) == pytest.approx(0.5)
    many = bench_steps.attention_task(library, 1, torch.float32, 64)
    least = 2e-9 * many.multiply_adds / 300
    assert many.of_limit(least, read=1e9, float32=300, int8=1000) == pytest.approx(1)


def test_what_it_prints(library: native.Native, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(native, "load", lambda: (library, library.isa))
    few = [bench_steps.lowrank_task(library, 1, "int8", 1, 8)]
    monkeypatch.setattr(bench_steps, "tasks", lambda *_: few)
    lines: list[str] = []
    monkeypatch.setattr("builtins.print", lambda *words, **_: lines.append(" ".join(words)))
    bench._print_steps(0.0, bench.Limits(20, 300, None))
    assert len(lines) == 1 + len(bench_steps.sets_of(library, bench.SETS))
    assert all("low rank" in line and line.endswith(" %") for line in lines[1:])
