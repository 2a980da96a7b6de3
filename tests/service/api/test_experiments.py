"""An alias that shares its traffic: who is served by which version, and the A/B table of it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from adapters.intervals import rate, rate_difference
from service.api.adapters import AdapterDescriptionView, AliasView
from service.api.feedback import ExperimentView, FeedbackView
from tests.oracle import make_adapter
from tests.service.api.conftest import Running, until
from tests.service.api.test_adapters import push
from tests.service.api.test_generate import PROMPT
from tests.zoo import slowly

NAME, REFERENCE = "support", "support@prod"
ALIAS = f"/adapters/{NAME}/aliases/prod"
TABLE = f"/adapters/{NAME}/experiments/prod"


@pytest.fixture(scope="module")
def directories(tmp_path_factory: pytest.TempPathFactory, base_directory: Path) -> list[Path]:
    home = tmp_path_factory.mktemp("arms")
    return [
        make_adapter(home / f"v{seed}", base_directory, rank=2, seed=70 + seed) for seed in (1, 2)
    ]


@pytest.fixture
def digests(client: httpx.Client, directories: list[Path]) -> Iterator[dict[int, str]]:
    """Two versions of one name; {version: digest}."""
    made = [push(client, NAME, directory).json() for directory in directories]
    yield {one["version"]: one["digest"] for one in made}
    client.delete(ALIAS)
    assert client.delete(f"/adapters/{NAME}").status_code == 200


def split(client: httpx.Client, weights: dict[int, float]) -> httpx.Response:
    arms = [{"version": version, "weight": weight} for version, weight in weights.items()]
    return client.put(ALIAS, json={"split": arms})


def ask(client: httpx.Client, key: str | None = None, **more: Any) -> httpx.Response:
    given = {"adapter_id": REFERENCE, "max_new_tokens": 1, **more}
    headers = {"x-client-key": key} if key else {}
    reply = client.post("/generate", json={"inputs": PROMPT, "parameters": given}, headers=headers)
    assert reply.status_code == 200, reply.text
    return reply


def table(client: httpx.Client) -> ExperimentView:
    reply = client.get(TABLE)
    assert reply.status_code == 200, reply.text
    return ExperimentView.model_validate(reply.json())


def test_clients_stay_and_shares_are_kept(client: httpx.Client, digests: dict[int, str]) -> None:
    first, second = digests
    set_to = AliasView.model_validate(split(client, {first: 75, second: 25}).json())
    assert (set_to.version, set_to.digest) == (first, digests[first])
    assert [(one.version, one.weight) for one in set_to.split or ()] == [(first, 75), (second, 25)]
    served = {
        f"client-{n}": ask(client, f"client-{n}").headers["x-adapter-digest"] for n in range(48)
    }
    counted = Counter(served.values())
    assert set(counted) == set(digests.values())
    assert 4 <= counted[digests[second]] <= 22, "a quarter of 48, within three deviations"
    for key, digest in list(served.items())[:12]:
        again = ask(client, None, client_key=key, details=True)
        assert again.headers["x-adapter-digest"] == digest, "by the parameter as by the header"
        adapter = again.json()["details"]["adapter"]
        assert (adapter["digest"], adapter["alias"]) == (digest, "prod")
    split(client, {first: 60, second: 40})
    moved = [k for k, d in served.items() if ask(client, k).headers["x-adapter-digest"] != d]
    assert all(served[key] == digests[first] for key in moved), "only to the arm that grew"
    assert len(moved) < 20
    shown = AdapterDescriptionView.model_validate(client.get(f"/adapters/{NAME}").json())
    assert [one.weight for one in shown.aliases["prod"]] == [60, 40]  # type: ignore[union-attr]


def test_a_rollback_is_moving_the_alias(client: httpx.Client, digests: dict[int, str]) -> None:
    first, second = digests
    split(client, {first: 50, second: 50})
    for version in (second, first):
        assert client.put(ALIAS, json={"version": version}).status_code == 200
        found = {ask(client, f"c{n}").headers["x-adapter-digest"] for n in range(6)}
        assert found == {digests[version]}


def test_counts_times_and_feedback_make_the_table(
    client: httpx.Client, digests: dict[int, str]
) -> None:
    first, second = digests
    split(client, {first: 60, second: 40})
    asked: dict[int, list[str]] = {first: [], second: []}
    versions = {digest: version for version, digest in digests.items()}
    for n in range(30):
        reply = ask(client, f"client-{n}", max_new_tokens=3, ignore_eos=True)
        version = versions[reply.headers["x-adapter-digest"]]
        asked[version].append(reply.headers["x-request-id"])
    liked = {first: 0, second: 0}
    for version, ids in asked.items():
        for n, request_id in enumerate(ids):
            score = (n % 4 > 0) if version == second else (n % 4 == 0)
            given = {"request_id": request_id, "score": score}
            found = client.post("/feedback", json=given | ({"comment": "so"} if n == 0 else {}))
            view = FeedbackView.model_validate(found.json())
            assert (view.version, view.alias, view.replaced) == (version, "prod", None)
            liked[version] += score
    shown = table(client)
    assert [arm.version for arm in shown.arms] == [first, second]
    for arm in shown.arms:
        ids = asked[arm.version]
        assert (arm.requests, arm.scored, arm.failed) == (len(ids), len(ids), 0)
        assert (arm.digest, arm.generated_tokens) == (digests[arm.version], 3 * len(ids))
        wanted = rate(liked[arm.version], len(ids))
        assert wanted is not None
        assert arm.feedback is not None
        assert (arm.feedback.low, arm.feedback.high) == (wanted.low, wanted.high)
        assert arm.first_token_seconds is not None
        assert arm.total_seconds is not None
        assert 0 < arm.first_token_seconds.estimate < arm.total_seconds.estimate < 60
        assert arm.total_seconds.low is not None
        assert arm.total_seconds.low < arm.total_seconds.estimate
    (difference,) = shown.differences
    assert (difference.version, difference.control) == (second, first)
    wanted = rate_difference(liked[second], len(asked[second]), liked[first], len(asked[first]))
    assert wanted is not None
    assert difference.feedback is not None
    assert difference.feedback.estimate == pytest.approx(wanted.estimate)
    assert difference.feedback.low == pytest.approx(wanted.low)
    assert {(one.version, one.comment) for one in shown.comments} == {(first, "so"), (second, "so")}


def test_feedback_is_known_the_moment_a_stream_ends(
    client: httpx.Client, digests: dict[int, str]
) -> None:
    split(client, dict.fromkeys(digests, 1))
    body = {"inputs": PROMPT, "parameters": {"adapter_id": REFERENCE, "max_new_tokens": 2}}
    for score in (0.25, 0.75, True, False):
        with client.stream("POST", "/generate_stream", json=body) as reply:
            request_id = reply.headers["x-request-id"]
            for line in reply.iter_lines():
                if '"finish_reason"' in line:
                    given = {"request_id": request_id, "score": score}
                    assert client.post("/feedback", json=given).status_code == 200
    again = client.post("/feedback", json={"request_id": request_id, "score": 0.5})
    assert again.json()["replaced"] == 0.0
    assert sum(arm.scored for arm in table(client).arms) == 4


def test_a_client_that_goes_is_counted_apart(
    client: httpx.Client, server: Running, digests: dict[int, str]
) -> None:
    split(client, dict.fromkeys(digests, 1))
    given = {"adapter_id": REFERENCE, "max_new_tokens": 800, "ignore_eos": True}
    body = {"inputs": PROMPT, "parameters": given}
    with slowly(server.engine):
        with client.stream("POST", "/generate_stream", json=body) as reply:
            next(reply.iter_lines())
        until(lambda: server.desk.admission.inside == 0)
    arms = table(client).arms
    assert sum(arm.cancelled for arm in arms) == 1
    assert all(arm.total_seconds is None for arm in arms)


def test_the_figures_outlive_versions_and_go_with_the_alias(
    client: httpx.Client, digests: dict[int, str]
) -> None:
    first, second = digests
    split(client, {first: 0, second: 1})
    ask(client)
    client.put(ALIAS, json={"version": first})
    refused = client.delete(f"/adapters/{NAME}@{first}")
    assert refused.status_code == 409
    assert REFERENCE in refused.json()["error"]
    assert client.delete(f"/adapters/{NAME}@{second}").status_code == 200
    arms = {arm.version: arm for arm in table(client).arms}
    assert (arms[second].requests, arms[second].weight, arms[second].digest) == (1, 0, "")
    assert arms[first].requests == 0
    client.delete(ALIAS)
    assert client.get(TABLE).status_code == 404


def test_deleting_an_arm_names_the_alias(client: httpx.Client, digests: dict[int, str]) -> None:
    split(client, dict.fromkeys(digests, 1))
    for reference in (NAME, *(f"{NAME}@{version}" for version in digests)):
        reply = client.delete(f"/adapters/{reference}")
        assert reply.status_code == 409
        assert REFERENCE in reply.json()["error"]


@pytest.mark.parametrize(
    ("body", "status", "field"),
    [
        ({"split": []}, 422, "split"),
        ({"split": [{"version": 1}]}, 422, "split.0.weight"),
        ({"split": [{"version": 1, "weight": -1}]}, 422, "split.0.weight"),
        ({"split": [{"weight": 1}]}, 422, "split.0.version"),
        ({"split": [{"version": 1, "weight": 0}]}, 422, "split"),
        ({"split": [{"version": 1, "weight": 1}] * 2}, 422, "split.1"),
        ({"split": [{"version": 1, "weight": 1}], "version": 1}, 422, "version"),
        ({"split": [{"version": 9, "weight": 1}]}, 404, None),
        ({"split": [{"version": 1, "weight": 1}] * 17}, 422, "split"),
    ],
)
def test_splits_that_mean_nothing(
    client: httpx.Client, body: dict[str, Any], status: int, field: str | None
) -> None:
    reply = client.put("/adapters/lora/aliases/prod", json=body)
    assert reply.status_code == status, reply.text
    assert reply.json().get("field") == field
    assert client.get("/adapters/lora").json()["aliases"] == {}


@pytest.mark.parametrize(
    ("body", "status", "field"),
    [
        ({"request_id": "0" * 16, "score": 1}, 404, "request_id"),
        ({"score": 1}, 422, "request_id"),
        ({"request_id": "a", "score": 1.5}, 422, "score"),
        ({"request_id": "a", "score": -1}, 422, "score"),
        ({"request_id": "a", "score": "good"}, 422, "score"),
        ({"request_id": "a", "score": 1, "comment": "x" * 2001}, 422, "comment"),
    ],
)
def test_feedback_that_means_nothing(
    client: httpx.Client, body: dict[str, Any], status: int, field: str
) -> None:
    reply = client.post("/feedback", json=body)
    assert reply.status_code == status, reply.text
    assert reply.json()["field"].startswith(field)


def test_a_key_that_is_too_long(client: httpx.Client) -> None:
    reply = client.post("/generate", json={"inputs": "a"}, headers={"x-client-key": "k" * 257})
    assert reply.status_code == 422
    assert reply.json()["field"] == "x-client-key"
