"""TrainConfig: what one training run is. The YAML file and the command's flags are this schema."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar, get_args

import yaml  # type: ignore[import-untyped]
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from training.errors import ConfigError

ALL_LINEAR = "all-linear"
Column = Literal[
    "messages",
    "conversations",
    "prompt",
    "completion",
    "instruction",
    "input",
    "output",
    "system",
    "history",
    "text",
]
TrackerName = Literal["tensorboard", "mlflow", "wandb"]


class _Frozen(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class DataConfig(_Frozen):
    """.jsonl, .json, .csv, .tsv, .parquet, .txt, .md, a folder of these, or a saved dataset.

    `training.data.shape` says what a row may be.
    """

    train: Path
    eval: Path | None = None
    split: float | None = Field(
        default=None,
        gt=0.0,
        lt=1.0,
        description="the part of data.train that is held out for evaluation, by a hash of the row",
    )
    max_length: int = Field(
        default=512, ge=2, description="tokens of one example, its answer included"
    )
    too_long: Literal["refuse", "cut"] = Field(
        default="refuse", description="cut: take off the beginning of the prompt"
    )
    loss: Literal["assistant", "completion", "all"] = Field(
        default="assistant",
        description="on every assistant turn, on the last one, or on the prompt too; all of a text",
    )
    template: Path | None = Field(
        default=None,
        description="a chat template for this adapter, which is saved beside it; or (.yaml) a "
        "prompt template around every question, whose variables the rows have",
    )
    columns: dict[Column, str] = Field(
        default_factory=dict,
        description="which columns of the file to take, {prompt: question, completion: answer}; "
        "the others are left out",
    )
    deduplicate: bool = Field(default=False, description="leave out rows that were there before")
    max_bad_rows: int = Field(default=0, ge=0, description="of each file; more refuse the run")
    raw: bool = Field(
        default=False,
        description="texts alone, for more pretraining: a folder is read to any depth, its .txt, "
        ".md and .jsonl together",
    )
    packing: bool = Field(
        default=False,
        description="several examples in one row of max_length tokens, none seeing another; "
        "optim.batch_size then counts rows",
    )


class _OnLinears(_Frozen):
    targets: tuple[str, ...] = Field(
        default=(ALL_LINEAR,),
        min_length=1,
        description="last parts of module paths, or all-linear: every quantised linear layer",
    )


class MethodConfig(_OnLinears):
    """LoRA, rsLoRA or DoRA: the layers are our own (`training.layers`)."""

    kind: Literal["lora", "rslora", "dora"] = "lora"
    rank: int = Field(default=8, ge=1, le=256)
    alpha: int = Field(default=16, ge=1)
    dropout: float = Field(default=0.0, ge=0.0, lt=1.0)
    init: Literal["zero", "pissa", "olora"] = Field(
        default="zero",
        description="pissa, olora: start at the base's own main directions, and save the "
        "difference as a LoRA of twice the rank",
    )


class AdaLora(_OnLinears):
    """ "AdaLoRA", arXiv:2303.10512: ranks are taken from layers that need them least."""

    kind: Literal["adalora"]
    rank: int = Field(default=8, ge=1, le=256, description="mean rank at the end")
    initial_rank: int = Field(default=12, ge=1, le=256)
    alpha: int = Field(default=16, ge=1)
    dropout: float = Field(default=0.0, ge=0.0, lt=1.0)
    orthogonality: float = Field(default=0.5, ge=0.0, description="weight of the penalty")


class VbLora(_OnLinears):
    """ "VB-LoRA", arXiv:2405.15179: factors mixed from a bank of vectors that all layers share."""

    kind: Literal["vblora"]
    rank: int = Field(default=4, ge=1, le=256)
    vectors: int = Field(default=256, ge=2)
    vector_length: int = Field(default=64, ge=1, description="must divide every target's widths")
    topk: int = Field(default=2, ge=1)


class Vera(_OnLinears):
    """ "VeRA", arXiv:2310.11454: two scales for each layer, around matrices that all share."""

    kind: Literal["vera"]
    rank: int = Field(default=64, ge=1, le=4096)
    d_initial: float = Field(default=0.1)
    dropout: float = Field(default=0.0, ge=0.0, lt=1.0)


class Ia3(_OnLinears):
    """ "(IA)³", arXiv:2205.05638: one scale for each output, of feed-forward layers each input."""

    kind: Literal["ia3"]
    targets: tuple[str, ...] = ("k_proj", "v_proj", "down_proj")
    feedforward: tuple[str, ...] = ("down_proj",)


class BitFit(_OnLinears):
    """ "BitFit", arXiv:2106.10199: biases alone, added where the base has none (PEFT's BEFT)."""

    kind: Literal["bitfit"]


class LnTuning(_Frozen):
    """ "LayerNorm tuning", arXiv:2312.11420: the scales of the norms."""

    kind: Literal["ln_tuning"]
    targets: tuple[str, ...] = ("input_layernorm", "post_attention_layernorm")


class Oft(_OnLinears):
    """ "OFT", arXiv:2306.07280: the input of a layer is rotated, block by block."""

    kind: Literal["oft"]
    block_size: int = Field(default=32, ge=2, description="must divide every target's input")
    dropout: float = Field(default=0.0, ge=0.0, lt=1.0)


class WaveFt(_OnLinears):
    """ "WaveFT", arXiv:2505.12532: a few wavelet coefficients of the weight's change."""

    kind: Literal["waveft"]
    coefficients: int = Field(default=2592, ge=1)
    scaling: float = Field(default=25.0, gt=0.0)


class Bottleneck(_Frozen):
    """Adapters behind a block's parts: "Parameter-Efficient Transfer Learning" (Houlsby),
    arXiv:1902.00751, and "AdapterFusion" (Pfeiffer), arXiv:2005.00247."""

    kind: Literal["bottleneck"]
    variant: Literal["pfeiffer", "houlsby"] = Field(
        default="pfeiffer", description="houlsby: behind the attention too"
    )
    reduction: float = Field(
        default=16.0, gt=0.0, description="the hidden size over the bottleneck's"
    )
    activation: str | None = Field(
        default=None, description="unset: relu for pfeiffer, swish for houlsby"
    )


class PromptTuning(_Frozen):
    """ "Prompt tuning", arXiv:2104.08691: embeddings of tokens that stand before every prompt."""

    kind: Literal["prompt_tuning"]
    virtual_tokens: int = Field(default=16, ge=1, le=1024)
    init_text: str | None = Field(default=None, description="its tokens' embeddings, repeated")


class PTuning(_Frozen):
    """ "P-tuning", arXiv:2103.10385: the same, made by a small network that is thrown away."""

    kind: Literal["p_tuning"]
    virtual_tokens: int = Field(default=16, ge=1, le=1024)
    hidden: int = Field(default=128, ge=1)


class PrefixTuning(_Frozen):
    """ "Prefix-tuning", arXiv:2101.00190: keys and values before the prompt, in every layer."""

    kind: Literal["prefix_tuning"]
    virtual_tokens: int = Field(default=16, ge=1, le=1024)
    projection: bool = False
    hidden: int = Field(default=128, ge=1, description="width of the projection")


class FullTuning(_Frozen):
    """Every weight of the base in floating point: what comes out is a new base, no adapter."""

    kind: Literal["full"]
    embeddings: bool = Field(default=True, description="train the embedding table and head too")
    store: Literal["float32", "bfloat16"] = Field(
        default="float32", description="how the new base's weights are written"
    )


AnyMethod = Annotated[
    MethodConfig
    | AdaLora
    | VbLora
    | Vera
    | Ia3
    | BitFit
    | LnTuning
    | Oft
    | WaveFt
    | Bottleneck
    | PromptTuning
    | PTuning
    | PrefixTuning
    | FullTuning,
    Field(discriminator="kind"),
]


class OptimConfig(_Frozen):
    """AdamW; the rate rises linearly, then goes as `schedule` says."""

    kind: Literal["adamw", "adamw_8bit", "paged_adamw", "paged_adamw_8bit"] = Field(
        default="adamw", description="8bit: moments of a byte; paged: on a GPU, out of its memory"
    )
    learning_rate: float = Field(default=2e-3, gt=0.0)
    b_rate_ratio: float = Field(
        default=1.0, gt=0.0, description="LoRA+, arXiv:2402.12354: the rate of B over that of A"
    )
    schedule: Literal["cosine", "linear", "constant"] = Field(
        default="cosine",
        description="of the rate after the warm-up; the first two end at a tenth",
    )
    steps: int = Field(default=300, ge=1)
    epochs: float | None = Field(
        default=None, gt=0.0, description="times that the data is seen: in place of steps"
    )
    batch_size: int = Field(default=16, ge=1, description="rows of a step")
    micro_batch_size: int | None = Field(
        default=None,
        ge=1,
        description="rows that are computed at once, for less memory: their gradients are added up "
        "to those of the whole batch",
    )
    warmup: float = Field(default=0.05, ge=0.0, lt=1.0, description="part of the steps")
    weight_decay: float = Field(default=0.0, ge=0.0)
    max_grad_norm: float = Field(default=1.0, gt=0.0)
    checkpointing: bool = Field(
        default=False, description="compute each layer twice, for less memory: the same weights"
    )


class EvalConfig(_Frozen):
    """The loss on `data.eval` while training; the adapter that is kept is the best one seen."""

    every: int | None = Field(default=None, ge=1, description="steps; without it, at the end")
    patience: int | None = Field(
        default=None, ge=1, description="stop after so many evaluations without a better loss"
    )


class BudgetConfig(_Frozen):
    """Where a run ends even if steps are left; what it has learnt by then is kept."""

    minutes: float | None = Field(default=None, gt=0.0)
    tokens: int | None = Field(default=None, ge=1)


class PublishConfig(_Frozen):
    """Where the adapter goes once the run has ended: to a running server, or into a store."""

    name: str = Field(pattern=r"^[a-z0-9][a-z0-9._-]{0,63}$", description="to serve it under")
    url: str | None = Field(
        default=None, pattern=r"^https?://", description="of a server: http://127.0.0.1:8080"
    )
    store: Path | None = Field(
        default=None, description="the home of a server that is not running, as NIBBLE_HOME"
    )

    @model_validator(mode="after")
    def _one_place(self) -> PublishConfig:
        if (self.url is None) == (self.store is None):
            raise ValueError("one of url and store is needed: where does it go?")
        return self


class TrainConfig(_Frozen):
    """One run. A run with the same config on the same machine gives the same weights."""

    base: str = Field(default="mini", description="the embedded base, a directory, or a hub id")
    double_quant: bool | None = Field(
        default=None,
        description="quantise the NF4 scales too, as QLoRA does; unset, as the base says: yes, but "
        "for mini and for a base that is NF4 already. As the server that the adapter is for, since "
        "it is another base",
    )
    data: DataConfig
    method: AnyMethod = MethodConfig()
    optim: OptimConfig = OptimConfig()
    eval: EvalConfig = EvalConfig()
    budget: BudgetConfig = BudgetConfig()
    logs: tuple[TrackerName, ...] | None = Field(
        default=None,
        description="beside run/log.jsonl: tensorboard, mlflow, wandb; without it, tensorboard "
        "where it is installed. Nothing is sent to another machine unless their variables say so",
    )
    checkpoint_every: int = Field(default=100, ge=1, description="steps between checkpoints")
    seed: int = Field(default=0, ge=0)
    out: Path = Path("adapter")
    publish: PublishConfig | None = None


class MeasureConfig(_Frozen):
    """What a new base is measured on before and after, beside the held-out part of its data."""

    general: Path | None = Field(
        default=None,
        description="what the base knew, as data: the loss on it shows what is forgotten. The "
        "embedded base is asked what it was built for",
    )
    tasks: dict[str, Path] = Field(
        default_factory=dict, description="name: questions with their right answers"
    )
    items: int = Field(default=200, ge=1, le=100_000, description="of each task, from the first on")
    max_new_tokens: int = Field(default=64, ge=1, le=4096)


class BuildConfig(TrainConfig):
    """One run that makes a new base, and the table that it is described by."""

    measure: MeasureConfig = MeasureConfig()


Schema = TypeVar("Schema", bound=TrainConfig)


def read_config(path: Path | None, overrides: Mapping[str, Any]) -> TrainConfig:
    """The YAML file at `path`, then `overrides` ("optim.steps" -> 300), which win; None is unset.

    Raises ConfigError naming each field that is wrong, its value and what would be right.
    """
    return read_schema(TrainConfig, path, overrides)


def read_schema(
    schema: type[Schema],
    path: Path | None,
    overrides: Mapping[str, Any],
    defaults: Mapping[str, Any] | None = None,
) -> Schema:
    """The same for any kind of run; `defaults` are what the file and `overrides` win over, and a
    data.split among them gives way to a data.eval too."""
    given = _read_yaml(path) if path else {}
    if overrides.get("optim.steps") is not None:
        if overrides.get("optim.epochs") is not None:
            what = "optim.steps and optim.epochs: one of them says how long the run is"
            raise ConfigError(what, "optim.epochs")
        if isinstance(given.get("optim"), dict):
            given["optim"].pop("epochs", None)
    for dotted, value in overrides.items():
        if value is not None:
            _put(given, dotted.split("."), value)
    values: dict[str, Any] = {}
    for dotted, value in (defaults or {}).items():
        _put(values, dotted.split("."), value)
    data = given.get("data")
    if isinstance(data, dict) and data.get("eval") is not None:
        values.get("data", {}).pop("split", None)
    _merge(values, given)
    if isinstance(values.get("method"), dict):
        values["method"].setdefault("kind", "lora")
    try:
        config = schema.model_validate(values)
    except ValidationError as error:
        raise _wrong(error, schema) from None
    wanted = [f for f in ("every", "patience") if getattr(config.eval, f) is not None]
    if config.publish is not None and config.method.kind == "full":
        raise ConfigError("publish: method full makes a base, no adapter to serve", "publish")
    if config.data.eval is not None and config.data.split is not None:
        what = "data.eval and data.split: one of them says what is held out"
        raise ConfigError(what, "data.split")
    if wanted and config.data.eval is None and config.data.split is None:
        raise ConfigError(
            f"eval.{wanted[0]} needs data.eval, the file to evaluate on, or data.split",
            f"eval.{wanted[0]}",
        )
    return config


def as_now(fields: Mapping[str, Any]) -> TrainConfig | None:
    """A config that an earlier version wrote, with the defaults of what has come since; None where
    it has a field that is gone."""
    try:
        return TrainConfig.model_validate(fields)
    except ValidationError:
        return None


def _wrong(error: ValidationError, schema: type[BaseModel]) -> ConfigError:
    """Each field that is wrong, its value, and what would be right."""
    lines, fields = [], []
    for one in error.errors(include_url=False):
        parts, given = [str(part) for part in one["loc"]], one["input"]
        message = str(one["msg"]).removeprefix("Value error, ")
        if one["type"] == "extra_forbidden":
            message = f"there is no such field; {', '.join(_known(schema, parts))} are known"
        if one["type"] == "union_tag_invalid":
            tags = one["ctx"]["expected_tags"].replace("'", "")
            parts, given, message = [*parts, "kind"], one["ctx"]["tag"], f"one of {tags} is needed"
        elif parts[:1] == ["method"] and len(parts) > 1:
            del parts[1]  # the tag of the union: no field of the file
        fields.append(".".join(parts))
        scalar = given is None or isinstance(given, str | int | float | Path)
        shown = f" (got {str(given)[:80]!r})" if scalar and one["type"] != "missing" else ""
        lines.append(f"{fields[-1] or 'config'}: {message}{shown}")
    return ConfigError("\n".join(lines), fields[0])


def _known(schema: type[BaseModel], parts: Sequence[str]) -> list[str]:
    """The fields that there are where `parts` names one that there is not."""
    model = schema
    for part in parts[:-1]:
        if part in model.model_fields:
            annotation: Any = model.model_fields[part].annotation
            choices = [c for c in (annotation, *get_args(annotation)) if hasattr(c, "model_fields")]
            model = choices[0]
        else:  # the tag of the union
            model = next(c for c in choices if part in get_args(c.model_fields["kind"].annotation))
    return list(model.model_fields)


def assignments(settings: list[str]) -> dict[str, Any]:
    """["eval.every=50", …] -> {"eval.every": 50, …}; a value is read as YAML.

    Raises ConfigError where one has no "=".
    """
    found: dict[str, Any] = {}
    for setting in settings:
        field, equals, value = setting.partition("=")
        if not equals or not field:
            raise ConfigError(f"{setting!r}: field=value is needed, as in optim.steps=100")
        try:
            found[field] = yaml.safe_load(value)
        except yaml.YAMLError as error:
            raise ConfigError(f"{setting!r} is not YAML: {error}") from None
    return found


def _read_yaml(path: Path) -> dict[str, Any]:
    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"{path}: {error.strerror}") from None
    except yaml.YAMLError as error:
        raise ConfigError(f"{path} is not YAML: {error}") from None
    if not isinstance(values, dict):
        raise ConfigError(f"{path} holds a {type(values).__name__}; a mapping is needed")
    return values


def flat(fields: Mapping[str, Any], under: str = "") -> dict[str, Any]:
    """{"optim": {"steps": 3}} as {"optim.steps": 3}."""
    found: dict[str, Any] = {}
    for key, value in fields.items():
        inner = isinstance(value, Mapping)
        found |= flat(value, f"{under}{key}.") if inner else {f"{under}{key}": value}
    return found


def _merge(values: dict[str, Any], over: Mapping[str, Any]) -> None:
    for key, value in over.items():
        inner = values.get(key)
        if isinstance(inner, dict) and isinstance(value, dict):
            _merge(inner, value)
        else:
            values[key] = value


def _put(values: dict[str, Any], keys: list[str], value: Any) -> None:
    for depth, key in enumerate(keys[:-1], start=1):
        inner = values.setdefault(key, {})
        if not isinstance(inner, dict):
            place = ".".join(keys[:depth])
            raise ConfigError(f"{place} is {inner!r}: it has no field {keys[depth]}")
        values = inner
    values[keys[-1]] = value
