"""A package of another project must not stand in the place of ours."""

from __future__ import annotations

from pathlib import Path

import pytest

from service.commands.installation import shadowed, versions


def test_this_installation_is_ours() -> None:
    assert shadowed() is None


def test_the_namesake_on_the_index_is_noticed(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """The trap itself: a distribution called `adapters` on the path."""
    metadata = tmp_path / "adapters-1.3.0.dist-info"
    metadata.mkdir()
    (metadata / "METADATA").write_text("Metadata-Version: 2.1\nName: adapters\nVersion: 1.3.0\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    assert "adapters 1.3.0" in str(shadowed())


def test_a_package_from_elsewhere_is_noticed(tmp_path: Path) -> None:
    assert "is imported from" in str(shadowed(tmp_path))


def test_versions_are_the_installed_ones() -> None:
    import torch

    assert versions()["torch"] == torch.__version__
