"""A trained adapter published: what is refused before training, and into a store directory."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch

from adapters.store import AdapterStore
from base.load import Base
from tests.training.runs import run_of
from training.config import PublishConfig, TrainConfig, read_config
from training.errors import ConfigError, PublishError
from training.methods import attach
from training.publish import note_origin, publish
from training.recipe import Trained


def made(base: Base, tmp_path: Path, **where: Any) -> TrainConfig:
    """An adapter on the disk, as a run leaves it, and the run's config."""
    data = tmp_path / "data.jsonl"
    data.write_text('{"prompt": "a", "completion": "b"}\n')
    config = run_of(rank=2).model_copy(
        update={
            "out": tmp_path / "out",
            "data": run_of().data.model_copy(update={"train": data}),
            "publish": PublishConfig(name="made", **where),
        }
    )
    adapter = attach(base, config)
    for parameter in adapter.parameters():
        torch.nn.init.normal_(parameter, std=0.02)
    adapter.save(config.out)
    adapter.detach()
    note_origin(config, Trained(3, 70, 0.5, 9, loss=0.25, eval_loss=None))
    return config


def test_into_a_store_with_where_it_came_from(base: Base, tmp_path: Path) -> None:
    config = made(base, tmp_path, store=tmp_path / "home")
    assert publish(config, base) == "made@1"
    assert publish(config, base) == "made@1", "the same adapter is the same version"
    store = AdapterStore(str(tmp_path / "home" / "blobs"), str(tmp_path / "home" / "catalog.db"))
    found = store.resolve("made")
    store.close()
    assert found.provenance["config"]["method"]["rank"] == 2
    assert found.provenance["config"]["data"]["train"] == "data.jsonl", "not where it lay"
    assert len(found.provenance["data"]["train"]) == 64
    assert (found.provenance["run"]["steps"], found.provenance["run"]["loss"]) == (3, 0.25)


def test_what_a_server_says_is_told(
    base: Base, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = made(base, tmp_path, url="http://server.example")
    sent: list[dict[str, Any]] = []

    def post(url: str, **given: Any) -> httpx.Response:
        names = ("config", "training")
        files = {name: json.loads(given["files"][name].read()) for name in names}
        sent.append({"url": url, **given["data"], **files, "headers": given["headers"]})
        body = {"name": "made", "version": 3} if len(sent) == 1 else {"error": "rank 2 is no rank"}
        return httpx.Response(201 if len(sent) == 1 else 422, json=body)

    monkeypatch.setattr(httpx, "post", post)
    monkeypatch.setenv("NIBBLE_API_KEY", "nbl_secret")
    assert publish(config, base) == "made@3"
    assert sent[0]["headers"] == {"authorization": "Bearer nbl_secret"}
    assert (sent[0]["url"], sent[0]["name"]) == ("http://server.example/adapters", "made")
    assert sent[0]["config"]["peft_type"] == "LORA"
    assert sent[0]["training"]["config"]["method"]["rank"] == 2
    with pytest.raises(PublishError, match="rank 2 is no rank"):
        publish(config, base)


def test_a_server_that_is_not_there(base: Base, tmp_path: Path) -> None:
    config = made(base, tmp_path, url="http://127.0.0.1:1")
    with pytest.raises(PublishError, match=r"the adapter is in .*refused"):
        publish(config, base)


@pytest.mark.parametrize(
    ("given", "field"),
    [
        ({"publish.name": "made"}, "publish"),
        ({"publish.name": "../x", "publish.url": "http://a"}, "publish.name"),
        ({"publish.name": "a", "publish.url": "file:///etc"}, "publish.url"),
        ({"publish.name": "a", "publish.store": "b", "method.kind": "full"}, "publish"),
    ],
)
def test_where_it_cannot_go_is_said_first(given: dict[str, Any], field: str) -> None:
    with pytest.raises(ConfigError, match="publish") as refused:
        read_config(None, {"data.train": "x", **given})
    assert refused.value.field == field


def test_a_wrong_field_is_named_without_the_tag_of_its_method() -> None:
    with pytest.raises(ConfigError, match=r"method.rank: .*got '0'") as refused:
        read_config(None, {"data.train": "x", "method.rank": 0})
    assert refused.value.field == "method.rank"
