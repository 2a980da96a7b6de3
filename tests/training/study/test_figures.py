from __future__ import annotations

from xml.etree import ElementTree

import pytest

from training.study.figures import Dot, Point, Scale, curves, dots, pareto, percent, scatter, short


def test_nothing_on_the_front_is_beaten() -> None:
    points = [(1.0, 1.0), (2.0, 3.0), (2.0, 2.0), (3.0, 3.0), (4.0, 5.0), (5.0, 4.0)]
    assert pareto(points) == [0, 1, 4]
    assert pareto([]) == []


@pytest.mark.parametrize("log", [False, True])
@pytest.mark.parametrize("values", [[1.0, 3.0, 900.0], [0.5], [0.0, 0.0], [2e6, 3e6]])
def test_a_scale_keeps_order_and_marks_round_numbers_inside(values: list[float], log: bool) -> None:
    scale = Scale(values, 10.0, 110.0, log=log)
    places = [scale(value) for value in sorted(values)]
    assert places == sorted(places)
    assert all(10.0 <= place <= 110.0 for place in places)
    assert all(9.9 <= scale(tick) <= 110.1 for tick in scale.ticks())


def test_short_numbers() -> None:
    assert [short(v) for v in (155_648, 2_400_000, 0.05)] == ["156k", "2.4M", "0.05"]


def test_plots_are_xml_and_escape_names() -> None:
    rows = [Dot("a & <b>", 0.5, 0.4, 0.6, 0), Dot("c", 0.7, 0.6, 0.8, 1, mark=True)]
    points = [Point("a & <b>", 10.0, 0.5, 0), Point("c", 1e6, 0.7, 1)]
    lines = {"a & <b>": [[(1.0, 2.0), (2.0, 1.0)]]}
    for drawn in (
        dots("t < u", rows, percent),
        scatter("t", points, "x", percent, log=True),
        scatter("t", points, "x", short, up=False),
        curves("t", lines, [0]),
    ):
        tree = ElementTree.fromstring(drawn)
        assert any("a & <b>" in (node.text or "") for node in tree.iter())


def test_less_is_drawn_above_where_less_is_better() -> None:
    points = [Point("low", 1.0, 1.0, 0), Point("high", 2.0, 2.0, 1)]
    for up in (True, False):
        tree = ElementTree.fromstring(scatter("t", points, "x", short, up=up))
        heights = [float(node.attrib["cy"]) for node in tree.iter() if "cy" in node.attrib]
        assert (heights[0] > heights[1]) is up
