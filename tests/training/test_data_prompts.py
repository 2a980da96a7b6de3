"""Prompt templates in training and in evaluation: the text that serving renders, byte for byte."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from adapters.catalog import Catalog
from adapters.origin import FILE, checked
from adapters.prompts.filling import filled_chat
from adapters.prompts.shelf import PROVENANCE, TemplateShelf
from adapters.prompts.template import PromptTemplate, parse_template
from adapters.template import RenderedChat, render
from service.prompt.assembly import Assembly
from service.prompt.templates import TemplateAsked, Templates
from tests.oracle import _tokenizer
from training.config import DataConfig, TrainConfig
from training.data import Encoding, prepare
from training.errors import ConfigError, DataError
from training.evaluation.cli import app
from training.publish import note_origin
from training.recipe import Trained

CHAT: list[dict[str, Any]] = [
    {"role": "user", "content": "Hello </s> {{ 7 * 7 }}"},
    {"role": "assistant", "content": "Hi."},
    {"role": "user", "content": "Think.\n\n  Twice."},
    {"role": "assistant", "content": "Tovan"},
]
OWN = "{% for m in messages %}[{{ m.role }}] {{ m.content }}{% endfor %}>"
TEMPLATES: dict[str, dict[str, Any]] = {
    "plain": {"user": "{{ input }}"},
    "full": {
        "variables": {"person": "string", "facts": {"type": "list", "default": ["one"]}},
        "system": "  For {{ person }} only.\n",
        "examples": [{"user": "Who is {{ person }}?", "assistant": "A <|user|> baker."}],
        "user": "{% for fact in facts %}- {{ fact }}\n{% endfor %}{{ passages }}{{ input }}",
        "assistant": "{{ person }} is ",
    },
}


@pytest.fixture(scope="module")
def templates(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Templates]:
    """As a server has them: in a catalog, rendered by a process."""
    catalog = Catalog(str(tmp_path_factory.mktemp("home") / "catalog.db"))
    found = Templates(TemplateShelf(catalog))
    for name, definition in TEMPLATES.items():
        found.shelf.add(name, parse_template(definition))
    yield found
    found.close()
    catalog.close()


def served(
    templates: Templates, name: str, values: dict[str, Any], own: str | None
) -> RenderedChat:
    async def made() -> RenderedChat:
        chat = await templates.chat(TemplateAsked(name, None, values), CHAT[:-1])
        assembly = Assembly(_tokenizer(), 4096)
        return await assembly.rendered(chat.messages, own, answer=chat.answer)

    return asyncio.run(made())


@pytest.mark.parametrize("own", [None, OWN])
@pytest.mark.parametrize(
    ("name", "values"),
    [("plain", {}), ("full", {"person": "Merla </s>"}), ("full", {"person": "x", "facts": []})],
)
def test_training_reads_what_serving_renders(
    templates: Templates, name: str, values: dict[str, Any], own: str | None
) -> None:
    """An adapter's own chat template stands around the prompt template in both."""
    template = parse_template(TEMPLATES[name])
    tokenizer = _tokenizer()
    encoding = Encoding(tokenizer, 4096, loss="completion", template=own, prompt=template)
    row = {"messages": CHAT, **values}
    (example,) = encoding.examples("row", row).examples
    expected = served(templates, name, values, own)
    learnt = example.tokens[: example.answer_start]
    assert learnt == tuple(expected.ids)
    assert tokenizer.decode(learnt) == expected.text
    assert tokenizer.decode(example.tokens[example.answer_start :]) == "Tovan</s>"
    checked = {"facts": ["one"], **values} if name == "full" else values
    filled, history = filled_chat(template, checked, CHAT[:-1])
    text = render(tokenizer, filled.messages(history), own, answer=filled.answer).text
    assert text.encode() == expected.text.encode()


def written(path: Path, definition: dict[str, Any]) -> Path:
    path.write_text(json.dumps(definition))  # JSON is YAML
    return path


def rows(path: Path, *found: dict[str, Any]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in found))
    return path


def test_a_run_names_a_template_file(tmp_path: Path) -> None:
    asks = {
        "variables": {"person": {"type": "string", "max_length": 5}},
        "user": "Who is {{ person }}?",
    }
    config = DataConfig(
        train=rows(
            tmp_path / "rows.jsonl",
            {"person": "Merla", "completion": "a baker"},
            {"person": "Dorin", "completion": "a smith"},
        ),
        template=written(tmp_path / "who.yaml", asks),
    )
    found = prepare(config, _tokenizer())
    assert isinstance(found.prompt, PromptTemplate)
    texts = [_tokenizer().decode(example.tokens) for example in found.train]
    assert texts == [
        "<|user|>Who is Merla?</s><|assistant|>a baker</s>",
        "<|user|>Who is Dorin?</s><|assistant|>a smith</s>",
    ]
    run = TrainConfig.model_validate({"data": config.model_dump(), "out": tmp_path / "out"})
    run.out.mkdir()
    note_origin(run, Trained(1, 1, 0.1, 1, loss=float("nan"), eval_loss=None))
    told = checked((run.out / FILE).read_bytes())
    assert told[PROVENANCE] == found.prompt.digest
    assert told["config"]["data"]["template"] == "who.yaml"
    rows(config.train, {"person": "Merlana", "completion": "a baker"})
    with pytest.raises(DataError, match="person: has 7 characters; at most 5"):
        prepare(config, _tokenizer())
    rows(config.train, {"prompt": "Well?", "person": "Merla", "completion": "a baker"})
    with pytest.raises(DataError, match="does not take"):
        prepare(config, _tokenizer())
    assert config.template is not None
    written(config.template, {"user": "{{ nobody }}"})
    with pytest.raises(ConfigError, match=r"who\.yaml.*nobody"):
        prepare(config, _tokenizer())


def test_templates_are_evaluated_in_pairs(tmp_path: Path) -> None:
    people = (("Merla", "Tovan"), ("Dorin", "Kesh"), ("Sorel", "Ubra"))
    data = rows(
        tmp_path / "people.jsonl",
        *(
            {
                "prompt": " ".join(f"{name} lives in {town}." for name, town in people),
                "person": name,
                "completion": town,
            }
            for name, town in people
        ),
    )
    variables = {"person": "string"}
    asks = {"variables": variables, "user": "{{ input }} Where does {{ person }} live?"}
    home = tmp_path / "home"
    home.mkdir()
    catalog = Catalog(str(home / "catalog.db"))
    TemplateShelf(catalog).add("town", parse_template({**asks, "user": "{{ input }}"}))
    TemplateShelf(catalog).add("town", parse_template(asks))
    catalog.close()
    arguments = [str(data), "--template", "town@1", "--template", "town@2", "--store", str(home)]
    arguments += ["--metric", "exact_match", "--no-with-base", "--json"]
    done = CliRunner().invoke(app, arguments)
    assert done.exit_code == 0, done.output
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["against"] == "base + town@1"
    assert list(found["systems"]) == ["base + town@1", "base + town@2"]
    asked = found["systems"]["base + town@2"]
    assert asked["said"][:2] == ["Tovan", "Kesh"], "the embedded base answers from what it reads"
    assert asked["tests"]["exact_match"]["difference"]["value"] > 0
    missing = CliRunner().invoke(app, [*arguments[:2], "town@9", *arguments[5:]])
    assert missing.exit_code == 2
    assert "town@9" in missing.output
