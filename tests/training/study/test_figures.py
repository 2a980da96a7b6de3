from __future__ import annotations

from xml.etree import ElementTree

import pytest

from training.study.figures import Dot, Point, Scale, curves, dots, pareto, percent, scatter, short
from training.study.labels import labels


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


def test_the_arms_of_every_method_are_told_apart() -> None:
    points = [Point(f"m{i}", float(i), i % 3, i) for i in range(23)]
    tree = ElementTree.fromstring(scatter("t", points, "x", short))
    marks = [
        (group.attrib["class"], mark.tag)
        for group in tree.iter("{http://www.w3.org/2000/svg}g")
        for mark in group
        if mark.tag.endswith(("circle", "rect", "polygon"))
    ]
    assert len(set(marks)) == len(marks) == 23
    lines = {p.name: [[(1.0, 2.0), (2.0, 1.0)]] for p in points}
    tree = ElementTree.fromstring(curves("t", lines, range(23)))
    named = [node.text for node in tree.iter() if node.attrib.get("class") == "point"]
    assert sorted(filter(None, named)) == sorted(lines)


def test_names_stand_beside_their_points_and_on_no_other_name() -> None:
    crowd = [(70.0 + 20 * (i % 5), 205.0 - 120 * (i // 5)) for i in range(10)]
    names = [f"prompt_tuning{i}" for i in range(10)]
    found = labels(crowd, names, (54, 24, 360, 213))
    assert not [(a, b) for i, a in enumerate(found) for b in found[:i] if a.covers(b)]
    assert all(name.x >= 54 and name.x + name.width <= 360 for name in found)
    assert all(name.y - 9 >= 24 and name.y <= 213 for name in found)
    (alone,) = labels([(100.0, 100.0)], ["lora"], (54, 24, 360, 213))
    assert (alone.y, alone.far) == (91.0, False)


def test_less_is_drawn_above_where_less_is_better() -> None:
    points = [Point("low", 1.0, 1.0, 0), Point("high", 2.0, 2.0, 1)]
    for up in (True, False):
        tree = ElementTree.fromstring(scatter("t", points, "x", short, up=up))
        heights = [float(node.attrib["cy"]) for node in tree.iter() if "cy" in node.attrib]
        assert (heights[0] > heights[1]) is up
