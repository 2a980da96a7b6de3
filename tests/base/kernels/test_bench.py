from dataclasses import replace
from pathlib import Path

import pytest
import torch

from base.kernels import bench, bench_page, bench_steps, native
from base.kernels.bench_page import Row


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
        *("low rank", "product and terms", "attention", "head in 8 bits", "argmax, logsumexp")
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
    rows = list(bench._steps(0.0, bench.Limits(20, 300, None)))
    sets = bench_steps.sets_of(library, bench.SETS)
    assert [row.isa for row in rows] == sets
    assert len(lines) == 1 + len(sets)
    assert all("low rank" in line and line.endswith(" %") for line in lines[1:])


def test_a_page_keeps_what_is_beside_the_section(tmp_path: Path) -> None:
    page = tmp_path / "PERFORMANCE.md"
    rows = [Row("NF4 product", "896x896, 1 rows", "avx2", 21e-6, 0.714)]
    rows += [replace(rows[0], isa="avx2 fast", best=1.5e-3), replace(rows[0], size="8 rows")]
    text = bench_page.section(rows, "A machine.", "nibble bench --kernel")
    bench_page.put(page, text)
    assert page.read_text() == text + "\n"
    assert "| NF4 product | 896x896, 1 rows | 21.0 (71 %) | 1,500.0 (71 %) |" in text
    assert "| NF4 product | 8 rows | 21.0 (71 %) |  |" in text
    page.write_text(f"# Performance\n\nOne.\n\n{text}\n\n## Versions\n\n- torch\n")
    bench_page.put(page, f"{bench_page.HEADING}\n\nOther.")
    expected = (
        f"# Performance\n\nOne.\n\n{bench_page.HEADING}\n\nOther.\n\n## Versions\n\n- torch\n"
    )
    assert page.read_text() == expected
    assert bench_page.section_of(expected) == f"{bench_page.HEADING}\n\nOther."
    assert not bench_page.section_of("# Performance\n")


def test_the_command_writes_its_table(
    library: native.Native, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(native, "load", lambda: (library, library.isa))
    monkeypatch.setattr(bench, "ROTATION", 1 << 16)
    monkeypatch.setattr(bench.Limits, "measured", lambda: bench.Limits(20, 300, None))
    page = tmp_path / "page.md"
    sizes = ["--part", "products", "--shapes", "64x64", "--rows", "2", "--seconds", "0"]
    bench.main([*sizes, "--markdown", str(page)])
    assert "| NF4 product | 64x64, 2 rows |" in page.read_text()
