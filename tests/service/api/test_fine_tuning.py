"""Fine-tuning jobs through OpenAI's own SDK, against a server that trains for real."""

from __future__ import annotations

import json
import re
import time
from typing import Any

import httpx
import pytest
from openai import BadRequestError, NotFoundError, OpenAI

from tests.service.api.conftest import Running
from tests.service.api.test_openapi import upload

JOBS = "/v1/fine_tuning/jobs"
PATIENCE = 400.0
ROWS = [{"prompt": f"say {n}", "completion": f"word {n * 7}"} for n in range(24)]
QUICK: dict[str, Any] = {
    "optim": {"steps": 3, "batch_size": 4},
    "data": {"max_length": 64},
    "checkpoint_every": 2,
}


@pytest.fixture
def sdk(server: Running) -> OpenAI:
    return OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0)


@pytest.fixture
def file_id(sdk: OpenAI) -> str:
    return kept(sdk, ROWS)


def kept(sdk: OpenAI, rows: list[Any]) -> str:
    text = "".join(json.dumps(row) + "\n" for row in rows)
    return sdk.files.create(file=("rows.jsonl", text.encode()), purpose="fine-tune").id


def names(client: httpx.Client) -> list[str]:
    """Of all jobs: others' may still be ending."""
    return [one["id"] for one in client.get(JOBS).json()["data"]]


def succeeded(client: httpx.Client) -> float:
    """Jobs that did, of all tests that share the server."""
    told = client.get("/metrics").text
    return float(re.findall(r'training_jobs\{.*status="succeeded"\} (\S+)', told)[0])


def ended(sdk: OpenAI, job_id: str, *statuses: str) -> Any:
    """The job once it is in one of `statuses`, or at its end."""
    end = time.monotonic() + PATIENCE
    while (job := sdk.fine_tuning.jobs.retrieve(job_id)).status not in (
        *statuses,
        "succeeded",
        "failed",
        "cancelled",
    ):
        assert time.monotonic() < end, job
        time.sleep(0.1)
    return job


def test_from_a_file_to_a_text(sdk: OpenAI, client: httpx.Client, file_id: str) -> None:
    """Upload, train, follow, generate: everything a user does, once, with the real training."""
    before = succeeded(client)
    template = client.post("/templates", json={"name": "asking", "user": "Now {{ input }}!"}).json()
    made = sdk.fine_tuning.jobs.create(
        model="tiny",
        training_file=file_id,
        validation_file=kept(sdk, ROWS[:4]),
        suffix="Words",
        seed=7,
        metadata={"team": "harbour"},
        method={"type": "dora", "dora": {"hyperparameters": {"rank": 2}}},  # type: ignore[typeddict-item]
        extra_body={"config": QUICK, "template": "asking"},
    )
    assert made.status == "validating_files"
    assert made.model_dump()["template"] == "asking@1"
    with client.stream("GET", f"{JOBS}/{made.id}/events", params={"stream": "true"}) as reply:
        lines = [line for line in reply.iter_lines() if line.startswith("data:")]
    told = [json.loads(line[5:]) for line in lines if "[DONE]" not in line]
    job = sdk.fine_tuning.jobs.retrieve(made.id)
    assert job.status == "succeeded", job.error
    assert (job.fine_tuned_model, job.seed, job.metadata) == ("words@1", 7, {"team": "harbour"})
    assert job.trained_tokens
    # The stream told everything, in order, and so do the pages.
    events = list(sdk.fine_tuning.jobs.list_events(made.id, limit=2))
    assert [event.id for event in events] == [event["id"] for event in told][::-1]
    metrics: list[Any] = [event.data for event in events[::-1] if event.type == "metrics"]
    assert [one["step"] for one in metrics] == [1, 2, 3]
    assert all(one["train_loss"] > 0 for one in metrics)
    kept_at = [one.step_number for one in sdk.fine_tuning.jobs.checkpoints.list(made.id)]
    assert kept_at == [3, 2]
    rows = sdk.files.content(job.result_files[0]).text.splitlines()
    assert rows[0].startswith("step,train_loss")
    assert len(rows) == 4
    # It serves, under its name, and says where it came from.
    body = {"inputs": "say 3", "parameters": {"adapter_id": "words@1", "max_new_tokens": 4}}
    reply = client.post("/generate", json=body)
    assert reply.status_code == 200
    shown = client.get("/adapters/words").json()
    assert (shown["kind"], shown["rank"]) == ("dora", 2)
    assert reply.headers["x-adapter-digest"].endswith(shown["digest"])
    assert shown["provenance"]["fine_tuning_job"] == made.id
    assert (
        shown["provenance"]["training_file"]["sha256"]
        == sdk.files.retrieve(file_id).model_extra["sha256"]
    )  # type: ignore[index]
    assert shown["provenance"]["config"]["optim"]["steps"] == 3
    # It learnt through the template, which stays for as long as the adapter does.
    assert shown["provenance"]["prompt_template"] == template["digest"]
    assert client.delete("/templates/asking").status_code == 409
    assert succeeded(client) == before + 1
    # What is published stays as it is.
    again = client.post(f"{JOBS}/{made.id}/publish")
    assert (again.status_code, again.json()["fine_tuned_model"]) == (200, "words@1")
    # The chat of OpenAI's API speaks through it too.
    chat = sdk.chat.completions.create(
        model="words", messages=[{"role": "user", "content": "say 3"}], max_tokens=3
    )
    assert chat.choices[0].message.role == "assistant"
    assert client.delete("/adapters/words").status_code == 200
    assert client.delete("/templates/asking").status_code == 200


@pytest.mark.parametrize("name", ["nowhere", "../x"])
def test_a_template_that_is_not_there_makes_no_job(sdk: OpenAI, file_id: str, name: str) -> None:
    with pytest.raises(NotFoundError, match="does not exist"):
        sdk.fine_tuning.jobs.create(
            model="tiny", training_file=file_id, extra_body={"template": name}
        )


@pytest.mark.slow
def test_bad_rows_are_the_job_s_error_with_their_line_and_field(sdk: OpenAI) -> None:
    file_id = kept(sdk, [*ROWS[:2], {"prompt": 3, "completion": "x"}])
    job = ended(sdk, sdk.fine_tuning.jobs.create(model="tiny", training_file=file_id).id)
    assert job.status == "failed"
    assert (job.error.code, job.error.param) == ("invalid_data", "training_file")
    assert f"{file_id}:3" in job.error.message
    assert "prompt" in job.error.message
    with pytest.raises(BadRequestError, match="nothing to cancel"):
        sdk.fine_tuning.jobs.cancel(job.id)


@pytest.mark.parametrize(
    ("body", "param", "said"),
    [
        ({"model": "gpt-5"}, "model", "'tiny' is"),
        ({"suffix": "a b"}, "suffix", "pattern"),
        ({"seed": -1}, "seed", "-1"),
        ({"metadata": {"a": "x" * 513}}, "metadata.a", "512"),
        ({"hyperparameters": {"n_epochs": 0}}, "hyperparameters.n_epochs", "0"),
        (
            {"method": {"type": "lora", "lora": {"hyperparameters": {"batch_size": 0}}}},
            "method.lora.hyperparameters.batch_size",
            "got '0'",
        ),
        ({"method": {"type": "dpo"}}, "method.type", "not trained here"),
        ({"method": {"type": "full"}}, "method.type", "not trained here"),
        ({"method": {"lora": {}}}, "method.type", "required"),
        ({"method": {"type": "lora", "dora": {}}}, "method.dora", "no such field"),
        ({"config": {"out": "/tmp/x"}}, "config.out", "over HTTP"),
        ({"config": {"data": {"train": "/etc/passwd"}}}, "config.data.train", "training_file"),
        ({"config": {"optim": {"steps": 0}}}, "config.optim.steps", "got '0'"),
        ({"config": {"optim": {"stepz": 1}}}, "config.optim.stepz", "no such field"),
        ({"method": {"type": "nope"}}, "method.type", "method.type: one of lora"),
        (
            {"hyperparameters": {"n_epochs": 2}, "config": {"optim": {"steps": 2}}},
            "hyperparameters.n_epochs",
            "one of them",
        ),
        ({"integrations": []}, "integrations", "no such field"),
    ],
)
def test_what_is_refused_at_once(
    client: httpx.Client, body: dict[str, Any], param: str, said: str
) -> None:
    before = names(client)
    whole = {"model": "tiny", "training_file": upload(client), **body}
    refused = client.post(JOBS, json=whole)
    error = refused.json()["error"]
    assert (refused.status_code, error["param"]) == (400, param), error
    assert said in error["message"]
    assert names(client) == before


def test_a_file_or_a_job_that_is_not_there(sdk: OpenAI) -> None:
    with pytest.raises(NotFoundError) as refused:
        sdk.fine_tuning.jobs.create(model="tiny", training_file="file-0")
    assert refused.value.param == "training_file"
    for ask in (sdk.fine_tuning.jobs.retrieve, sdk.fine_tuning.jobs.cancel):
        with pytest.raises(NotFoundError):
            ask("ftjob-0")


def test_as_many_jobs_as_may_wait(
    client: httpx.Client, server: Running, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert server.desk.serving is not None
    monkeypatch.setattr(server.desk.serving.jobs, "_max_jobs", 0)
    refused = client.post(JOBS, json={"model": "tiny", "training_file": upload(client)})
    assert (refused.status_code, refused.json()["error"]["code"]) == (503, "overloaded")
    assert "retry-after" in refused.headers


@pytest.mark.slow
def test_a_plan_instead_of_a_job(client: httpx.Client, sdk: OpenAI, file_id: str) -> None:
    before = client.get(JOBS).json()
    body = {"model": "tiny", "training_file": file_id, "config": QUICK, "dry_run": True}
    found = client.post(JOBS, json=body)
    assert found.status_code == 200, found.text
    plan = found.json()
    assert (plan["object"], plan["plan"]["steps"], plan["plan"]["fits"]) == (
        "fine_tuning.plan",
        3,
        True,
    )
    assert plan["data"][0]["examples"] == 24
    assert plan["data"][0]["path"] == f"training_file {file_id}"
    assert client.get(JOBS).json() == before
    body["training_file"] = kept(sdk, [{"prompt": "a"}])
    refused = client.post(JOBS, json=body)
    assert (refused.status_code, refused.json()["error"]["param"]) == (400, "training_file")


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_cancel_pause_and_resume_to_the_same_bits(
    sdk: OpenAI, client: httpx.Client, file_id: str
) -> None:
    config = {**QUICK, "optim": {"steps": 60, "batch_size": 8}, "method": {"dropout": 0.1}}

    def create(suffix: str) -> str:
        return sdk.fine_tuning.jobs.create(
            model="tiny", training_file=file_id, suffix=suffix, extra_body={"config": config}
        ).id

    def step(job_id: str) -> int:
        at = client.get(f"{JOBS}/{job_id}").json()["progress"]
        return int(at["step"]) if at else 0

    cut, whole, unwanted = create("cut"), create("whole"), create("unwanted")
    ended(sdk, cut, "running")
    while step(cut) < 5:
        time.sleep(0.02)
    assert sdk.fine_tuning.jobs.pause(cut).status in ("running", "paused")
    paused = ended(sdk, cut, "paused")
    assert (paused.status, paused.fine_tuned_model) == ("paused", None)
    assert 5 <= step(cut) < 60
    assert sdk.fine_tuning.jobs.cancel(unwanted).status == "cancelled"
    assert sdk.fine_tuning.jobs.resume(cut).status == "queued"
    assert [ended(sdk, job_id).status for job_id in (cut, whole)] == ["succeeded"] * 2
    digests = [client.get(f"/adapters/{name}").json()["digest"] for name in ("cut", "whole")]
    assert digests[0] == digests[1]
    running = create("running")
    ended(sdk, running, "running")
    sdk.fine_tuning.jobs.cancel(running)
    assert ended(sdk, running).status == "cancelled"
    assert client.get("/adapters/running").status_code == 404
