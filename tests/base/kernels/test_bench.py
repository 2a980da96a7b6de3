import pytest

from base.kernels import bench, native


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
