from __future__ import annotations

from pathlib import Path

from service.bench.registered import Setting, _in_turns, measure


def test_rounds_take_turns_and_the_first_is_not_counted() -> None:
    asked: list[tuple[str, int]] = []

    def one(name: str, number: int) -> float:
        asked.append((name, number))
        return float(len(asked))

    taken = _in_turns([lambda n: one("a", n), lambda n: one("b", n)], 2)
    assert asked == [("b", 1), ("a", 0), ("a", 2), ("b", 3), ("b", 5), ("a", 4)]
    assert taken == [[3.0, 6.0], [4.0, 5.0]]


def test_the_figures_of_a_few(base_directory: Path) -> None:
    setting = Setting(
        base_directory,
        "exact",
        threads=1,
        rounds=1,
        rank=2,
        counts=(1, 4),
        resident=2,
        clients=2,
        zipf_requests=8,
    )
    figures = measure(setting)
    assert [row["registered"] for row in figures["growth"]] == [1, 4]
    assert figures["growth"][0]["ratio"] == 1.0
    assert all(row["token_ms"] > 0 for row in figures["growth"])
    assert figures["resident"]["many_tokens_per_second"] > 0
    assert (figures["zipf"]["registered"], figures["zipf"]["requests"]) == (4, 8)
    assert 0 < figures["zipf"]["distinct"] <= 4
