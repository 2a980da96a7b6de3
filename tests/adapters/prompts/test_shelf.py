"""Names, versions and aliases of templates in the catalog."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from adapters.catalog import Catalog
from adapters.errors import InvalidAdapter, InvalidTemplate, TemplateInUse, TemplateNotFound
from adapters.prompts.filling import check
from adapters.prompts.shelf import PROVENANCE, TemplateShelf
from adapters.prompts.template import PromptTemplate, parse_template
from tests.adapters.test_manifest import MANIFEST


def made(text: str) -> PromptTemplate:
    return parse_template({"user": f"{text} {{{{ input }}}}"})


A, B = made("a"), made("b")


@pytest.fixture
def catalog(tmp_path: Path) -> Iterator[Catalog]:
    found = Catalog(str(tmp_path / "catalog.db"))
    yield found
    found.close()


@pytest.fixture
def shelf(catalog: Catalog) -> TemplateShelf:
    found = TemplateShelf(catalog)
    assert [found.add("support", one).version for one in (A, A, B)] == [1, 1, 2]
    return found


def test_references(shelf: TemplateShelf) -> None:
    shelf.set_alias("support", "prod", 1)
    assert shelf.get("support").template == B
    assert shelf.get("support@1").template == A == shelf.get("support", 1).template
    assert str(shelf.get("support@prod")) == "support@1"
    shelf.set_alias("support", "prod", 2)
    assert shelf.get("support@prod").digest == B.digest
    assert shelf.aliases_of("support") == {"prod": 2}
    assert [str(one) for one in shelf.versions("support")] == ["support@1", "support@2"]
    shelf.add("other", A)
    assert [str(one) for one in shelf.page("", 10)] == ["other@1", "support@2"]
    with pytest.raises(InvalidTemplate, match="version"):
        shelf.get("support@prod", 2)


@pytest.mark.parametrize(
    "reference",
    ["none", "support@9", "support@none", "", "../x", "support@", "@1", "a@b@c", "x" * 99],
)
def test_what_is_not_there(shelf: TemplateShelf, reference: str) -> None:
    with pytest.raises(TemplateNotFound):
        shelf.get(reference)
    with pytest.raises(TemplateNotFound):
        shelf.delete(reference)


def test_a_number_is_never_given_again(shelf: TemplateShelf) -> None:
    shelf.delete("support@2")
    assert str(shelf.get("support")) == "support@1"
    assert shelf.add("support", B).version == 3
    shelf.delete("support")
    with pytest.raises(TemplateNotFound):
        shelf.versions("support")
    assert shelf.page("", 10) == []
    assert shelf.add("support", B).version == 4


def test_an_alias_holds_its_version(shelf: TemplateShelf) -> None:
    shelf.set_alias("support", "prod", 1)
    for reference in ("support@1", "support"):
        with pytest.raises(TemplateInUse, match="support@prod"):
            shelf.delete(reference)
    assert [one.version for one in shelf.delete("support@2")] == [2]
    shelf.drop_alias("support", "prod")
    with pytest.raises(TemplateNotFound):
        shelf.drop_alias("support", "prod")
    shelf.delete("support")
    with pytest.raises(TemplateNotFound):
        shelf.set_alias("support", "prod", 1)
    with pytest.raises(InvalidAdapter):
        shelf.set_alias("support", "2", 1)


def test_an_adapter_holds_what_it_was_trained_with(catalog: Catalog, shelf: TemplateShelf) -> None:
    trained = replace(MANIFEST, name="desk", version=0, provenance={PROVENANCE: A.digest})
    catalog.add(trained)
    for reference in ("support@1", "support"):
        with pytest.raises(TemplateInUse, match="desk@1 was trained"):
            shelf.delete(reference)
    shelf.delete("support@2")
    shelf.add("other", A)
    shelf.delete("support@1")  # the content is still there under another name
    with pytest.raises(TemplateInUse):
        shelf.delete("other")
    catalog.delete("desk", None, "now")
    shelf.delete("other")


def test_a_directory_is_loaded_once(tmp_path: Path, shelf: TemplateShelf) -> None:
    folder = tmp_path / "templates"
    folder.mkdir()
    (folder / "one.yaml").write_text("user: '{{ input }}'")
    (folder / "two.yml").write_text("name: named\nuser: 'Hello'")
    (folder / "bad.yaml").write_text("user: '{{ nope }}'")
    (folder / "notes.txt").write_text("not a template")
    for _ in range(2):
        report = shelf.load_directory(folder, check)
        assert [str(one) for one in report.added] == ["one@1", "named@1"]
        assert list(report.refused) == ["bad.yaml"]
