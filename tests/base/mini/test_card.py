import json
from pathlib import Path

from base.mini import MINI, card


def _evaluation() -> dict[str, object]:
    table = {"context": {"all": 0.91}, "tasks": {"copy": 0.5}, "loss": {"story": 1.25}}
    rounded = {"context": {"all": 0.875}, "tasks": {"copy": 0.25}, "loss": {"story": 1.5}}
    return {
        "environment": {"processor": "a processor"},
        "parameters": 4_068_864,
        "items": {"context": 600},
        "fp32": table,
        "nf4": rounded,
    }


def test_the_card_shows_what_was_measured_side_by_side(tmp_path: Path) -> None:
    training = {
        "seed": 3,
        "steps": 1200,
        "tokens": 2_500_000,
        "seconds": 600,
        "minutes": None,
        "rate": 0.003,
        "dtype": "float32",
        "environment": {"processor": "another"},
    }
    (tmp_path / "evaluation.json").write_text(json.dumps(_evaluation()), encoding="utf-8")
    (tmp_path / "training.json").write_text(json.dumps(training), encoding="utf-8")
    config = (MINI / "config.json").read_text(encoding="utf-8")
    (tmp_path / "config.json").write_text(config, encoding="utf-8")
    text = card.write(tmp_path).read_text(encoding="utf-8")
    assert "| all | 91.0% | 87.5% |" in text
    assert "| copy | 50.0% | 25.0% |" in text
    assert "| story | 1.250 | 1.500 |" in text
    assert "1,200\nsteps, 2,500,000 tokens, 10 minutes, seed 3" in text
    assert "a processor" in text
    assert "another" in text


def test_the_shipped_card_is_the_one_its_figures_make(tmp_path: Path) -> None:
    names = ("evaluation.json", "training.json", "config.json")
    for name in names:
        (tmp_path / name).write_bytes((MINI / name).read_bytes())
    assert card.write(tmp_path).read_bytes() == (MINI / "README.md").read_bytes()
