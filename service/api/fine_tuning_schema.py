"""The bodies of fine-tuning jobs on the wire, and the order that comes of one."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import ConfigDict, Field, ValidationError, model_validator

from adapters.prompts.shelf import MAX_REFERENCE
from service.api.wire import MAX_SEED, Incoming, Outgoing
from service.errors import InvalidRequest
from service.jobs.job import Job, Status
from service.jobs.order import (
    MAX_EPOCHS,
    MOST,
    FileStamp,
    Order,
    TemplateStamp,
    allowed,
    method_kind,
)

MAX_METADATA = 16
Epochs = Annotated[int, Field(ge=1, le=MAX_EPOCHS)]
BatchSize = Annotated[int, Field(ge=1, le=MOST["optim.batch_size"])]
Multiplier = Annotated[float, Field(gt=0, le=1000)]
Key = Annotated[str, Field(min_length=1, max_length=64)]
Value = Annotated[str, Field(max_length=512)]
FileId = Annotated[str, Field(min_length=1, max_length=80)]


class Hyperparameters(Incoming):
    """OpenAI's; "auto" is the schema's own default, as if it were left out."""

    n_epochs: Epochs | None = None
    batch_size: BatchSize | None = None
    learning_rate_multiplier: Multiplier | None = None

    @model_validator(mode="before")
    @classmethod
    def _drop_auto(cls, data: Any) -> Any:
        if isinstance(data, dict):
            return {key: value for key, value in data.items() if value != "auto"}
        return data


class JobBody(Incoming):
    """A fine-tuning job: OpenAI's fields, and ours for what its API has no word for."""

    model_config = ConfigDict(
        json_schema_extra={
            "examples": [
                {
                    "model": "mini",
                    "training_file": "file-0123456789abcdef01234567",
                    "method": {"type": "lora", "lora": {"hyperparameters": {"rank": 4}}},
                    "config": {"optim": {"steps": 2}, "data": {"max_length": 64}},
                    "suffix": "example",
                }
            ]
        }
    )

    model: str = Field(min_length=1, max_length=256, description="The base that is served here.")
    training_file: FileId
    validation_file: FileId | None = None
    hyperparameters: Hyperparameters = Hyperparameters()
    method: dict[Key, Any] | None = Field(
        default=None,
        max_length=2,
        description="{type: supervised} or {type: dora, dora: {hyperparameters: {rank: 4}}}: "
        "a method of `nibble train`, with its fields beside OpenAI's.",
    )
    suffix: str | None = Field(
        default=None,
        pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,63}$",
        description="The adapter's name, in small letters; a name that exists gets a new version, "
        "if a job made its newest one or the key has the scope adapters:write.",
    )
    template: str | None = Field(
        default=None,
        min_length=1,
        max_length=MAX_REFERENCE,
        description="A prompt template of this server around every question: `name`, "
        "`name@version` or `name@alias`, as it is now. Its variables are fields of the rows.",
    )
    seed: int | None = Field(default=None, ge=0, le=MAX_SEED)
    metadata: dict[Key, Value] = Field(default={}, max_length=MAX_METADATA)
    config: dict[Key, Any] = Field(
        default={},
        max_length=MAX_METADATA,
        description="Settings in the schema of `nibble train`: method, optim, eval, budget, "
        "data (but its files), checkpoint_every.",
    )
    publish: bool = Field(default=True, description="Serve the adapter once it is trained.")
    dry_run: bool = Field(default=False, description="Make no job; reply with its plan.")


class FaultView(Outgoing):
    code: str
    message: str
    param: str | None


class ProgressView(Outgoing):
    """Where a job is."""

    step: int
    steps: int
    tokens: int
    train_loss: float | None


class JobView(Outgoing):
    """One job, as OpenAI has it; `status` can be `paused` too."""

    id: str
    object: Literal["fine_tuning.job"] = "fine_tuning.job"
    created_at: int
    finished_at: int | None
    estimated_finish: int | None
    model: str
    fine_tuned_model: str | None = Field(description="An adapter_id, and OpenAI's `model`.")
    organization_id: str
    status: Status
    error: FaultView | None
    hyperparameters: dict[str, Any]
    method: dict[str, Any]
    training_file: str
    validation_file: str | None
    result_files: list[str]
    trained_tokens: int | None
    seed: int
    metadata: dict[str, str]
    integrations: list[Any]
    user_provided_suffix: str | None
    template: str | None = Field(description="`name@version` of the prompt template, if any.")
    publish: bool
    config: dict[str, Any] | None = Field(description="The run's, once its data is checked.")
    progress: ProgressView | None


class JobList(Outgoing):
    object: Literal["list"] = "list"
    data: list[JobView]
    has_more: bool
    first_id: str | None
    last_id: str | None


class EventView(Outgoing):
    id: str
    object: Literal["fine_tuning.job.event"] = "fine_tuning.job.event"
    created_at: int
    level: Literal["info", "warn", "error"]
    message: str
    type: Literal["message", "metrics"]
    data: dict[str, Any]


class EventList(Outgoing):
    object: Literal["list"] = "list"
    data: list[EventView]
    has_more: bool
    first_id: str | None
    last_id: str | None


class CheckpointView(Outgoing):
    """A moment that a paused or killed job goes on from."""

    id: str
    object: Literal["fine_tuning.job.checkpoint"] = "fine_tuning.job.checkpoint"
    created_at: int
    fine_tuned_model_checkpoint: str | None = Field(
        description="The adapter, where the job has ended with this step; others do not serve."
    )
    fine_tuning_job_id: str
    step_number: int
    metrics: dict[str, float]


class CheckpointList(Outgoing):
    object: Literal["list"] = "list"
    data: list[CheckpointView]
    has_more: bool
    first_id: str | None
    last_id: str | None


class PlanView(Outgoing):
    """What a job would do and cost, found out by trying."""

    object: Literal["fine_tuning.plan"] = "fine_tuning.plan"
    model: str
    method: dict[str, Any]
    plan: dict[str, Any] = Field(description="Memory in bytes, times in seconds.")
    config: dict[str, Any]
    data: list[dict[str, Any]] = Field(description="What was found in each file.")


def order_of(
    body: JobBody,
    training: FileStamp,
    validation: FileStamp | None,
    job_name: str,
    template: TemplateStamp | None = None,
) -> Order:
    """The order. Raises InvalidRequest; `job_name` is the adapter's where there is no suffix."""
    kind, hyper, own = _method(body.method)
    asked = {**_given(body.hyperparameters), **hyper}
    config = allowed(body.config)
    if own:
        config["method"] = {**config.get("method", {}), **allowed({"method": own})["method"]}
    if "batch_size" in asked:
        optim = config.setdefault("optim", {})
        optim.setdefault("batch_size", asked["batch_size"])
    epochs = asked.get("n_epochs")
    if epochs is not None and "steps" in config.get("optim", {}):
        what = "n_epochs and config.optim.steps: one of them says how long it trains"
        raise InvalidRequest(what, "hyperparameters.n_epochs")
    return Order(
        model=body.model,
        name=(body.suffix or job_name).lower(),
        training=training,
        validation=validation,
        method=method_kind(kind),
        config=config,
        epochs=epochs,
        rate_multiplier=asked.get("learning_rate_multiplier"),
        seed=body.seed or 0,
        publish=body.publish,
        suffix=body.suffix,
        metadata=body.metadata,
        given_method=kind,
        template=template,
    )


def _method(given: Mapping[str, Any] | None) -> tuple[str, dict[str, Any], dict[str, Any]]:
    """method.type; OpenAI's hyperparameters under it; and the method's own fields there."""
    if given is None:
        return "supervised", {}, {}
    kind = given.get("type")
    if not isinstance(kind, str):
        raise InvalidRequest("method.type: is required, for example supervised", "method.type")
    if unknown := sorted(set(given) - {"type", kind}):
        what = f"method.{unknown[0]}: there is no such field; beside type there is {kind[:40]!r}"
        raise InvalidRequest(what, f"method.{unknown[0]}")
    where = f"method.{kind[:40]}"
    inner = given.get(kind) or {}
    if not isinstance(inner, Mapping) or set(inner) - {"hyperparameters"}:
        raise InvalidRequest(f"{where}: {{hyperparameters: {{…}}}} is needed", where)
    fields = inner.get("hyperparameters") or {}
    if not isinstance(fields, Mapping):
        raise InvalidRequest(f"{where}.hyperparameters: a mapping is needed", where)
    known = set(Hyperparameters.model_fields)
    hyper = {key: value for key, value in fields.items() if key in known}
    try:
        checked = Hyperparameters.model_validate(hyper)
    except ValidationError as error:
        detail = error.errors()[0]
        name = f"{where}.hyperparameters.{detail['loc'][0]}"
        got = str(detail["input"])[:40]
        raise InvalidRequest(f"{name}: {detail['msg']} (got {got!r})", name) from None
    return kind, _given(checked), {k: v for k, v in fields.items() if k not in known}


def _given(hyper: Hyperparameters) -> dict[str, Any]:
    return hyper.model_dump(exclude_none=True)


def hyperparameters_of(job: Job) -> dict[str, Any]:
    """OpenAI's three, as they were asked or came to be."""
    order = job.order
    optim: Any = (
        order.config.get("optim", {}) if job.checked is None else job.checked.config["optim"]
    )
    return {
        "n_epochs": order.epochs or "auto",
        "batch_size": optim.get("batch_size", "auto"),
        "learning_rate_multiplier": order.rate_multiplier or "auto",
    }
