"""The configuration of one server: flat, frozen, and read once, at the door. No torch here.

A value comes from the command line, else from the environment (`NIBBLE_PORT`), else from a TOML
file (`nibble.toml` in the working directory, or `--config PATH`), else from its default.
"""

from __future__ import annotations

import ipaddress
import os
import re
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass
from difflib import get_close_matches
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated, Any, Literal
from urllib.parse import urlsplit

from pydantic import (
    BeforeValidator,
    ByteSize,
    Field,
    SecretStr,
    TypeAdapter,
    ValidationError,
    field_validator,
    model_validator,
)
from pydantic_settings import (
    BaseSettings,
    EnvSettingsSource,
    PydanticBaseSettingsSource,
    SettingsConfigDict,
)

from base.extras import install
from base.mini import MINI
from service.tracing.open import can_trace

PREFIX = "NIBBLE_"
FILE = "nibble.toml"
SECRETS = frozenset({"hf_token", "admin_key", "embedder_key", "reranker_key"})
MASK = "**********"
CATALOGS = ("sqlite", "postgresql", "postgresql+psycopg")
MAX_DRAFT_TOKENS = 64
KIB, MIB, GIB, TIB = 1 << 10, 1 << 20, 1 << 30, 1 << 40

# Variables that are read elsewhere: where a file or a server is, and which kernels to use.
OTHER_VARIABLES = frozenset(
    {"NIBBLE_CONFIG", "NIBBLE_URL", "NIBBLE_API_KEY", "NIBBLE_NATIVE", "NIBBLE_ISA"}
    | {"NIBBLE_CFLAGS"}
)

Source = Literal["flag", "env", "file", "default"]

# By path: the serving wing imports nothing of the training wing.
SAMPLES = Path(__file__).resolve().parents[1] / "training" / "samples"
_BYTE_SIZE = TypeAdapter(ByteSize)


class ConfigError(ValueError):
    """A setting is unknown or out of bounds; the message names it and where it came from."""


def _bytes(value: Any) -> Any:
    """`"512MiB"` -> 536870912; what is not text passes unchanged."""
    return int(_BYTE_SIZE.validate_python(value)) if isinstance(value, str) else value


Bytes = Annotated[int, BeforeValidator(_bytes)]


def _default_adapters(data: dict[str, Any]) -> Path | None:
    """The shipped samples belong to the embedded base; any other base starts without adapters."""
    return SAMPLES if data.get("base") == "mini" and SAMPLES.is_dir() else None


def _setting(description: str, panel: str, default: Any = ..., **rest: Any) -> Any:
    if default is not ...:
        rest["default"] = default
    return Field(description=description, json_schema_extra={"panel": panel}, **rest)


class Settings(BaseSettings):
    """Everything that can be set. Sizes are in bytes and accept `512MiB`; times are in seconds.

    Constructed with keyword arguments only: `configure` adds environment and file.
    """

    model_config = SettingsConfigDict(
        env_prefix=PREFIX,
        env_ignore_empty=True,
        frozen=True,
        extra="forbid",
        validate_default=True,
    )

    host: str = _setting("Address to listen on.", "Server", "127.0.0.1", min_length=1)
    port: int = _setting("Port to listen on; 0 takes a free one.", "Server", 8080, ge=0, le=65535)
    max_body_bytes: Bytes = _setting("Largest JSON body.", "Server", 4 * MIB, ge=KIB, le=GIB)
    drain_seconds: float = _setting(
        "How long a stopping server lets running requests finish.", "Server", 30.0, ge=0, le=3600
    )
    served_names: str = _setting(
        "Other names of the base for OpenAI's clients, parted by commas.",
        "Server",
        "dummy,tgi",  # what huggingface_hub and text-generation-inference's users fill in
        max_length=4096,
    )
    admin_key: SecretStr | None = _setting(
        "A key with every scope from outside the catalog: the first one of a container.",
        "Server",
        None,
        min_length=16,
        max_length=4096,
    )
    open: bool = _setting(
        "Serve without keys on an address that others reach; whoever reaches it may use it.",
        "Server",
        False,
    )
    protect_metrics: bool = _setting(
        "Ask for an admin's key at /metrics too: it names the adapters of all tenants.",
        "Server",
        False,
    )
    quota_store: str = _setting(
        "Where the requests and tokens of a tenant's minute are counted: here, or in a Redis that "
        "several servers share (async+redis://host:6379, or async+rediss:// over TLS).",
        "Server",
        "async+memory://",
        pattern=r"^async\+(memory|rediss?)://",
        repr=False,
    )
    max_audit_bytes: Bytes = _setting(
        "Largest audit log; beyond it the oldest part of 64 MiB goes.",
        "Server",
        GIB,
        ge=128 * MIB,
        le=TIB,
    )
    adapter_root: Path | None = _setting(
        "Directory that /v1/load_lora_adapter may load from; nothing outside of it.",
        "Server",
        None,
    )
    log_level: Literal["debug", "info", "warning", "error"] = _setting(
        "Least important line to log.", "Server", "info"
    )
    log_format: Literal["text", "json"] = _setting("How a log line looks.", "Server", "text")
    otlp_traces_endpoint: str | None = _setting(
        "URL of an OpenTelemetry collector for traces, http://collector:4318/v1/traces; also on "
        "where OTEL_EXPORTER_OTLP_ENDPOINT is set.",
        "Server",
        None,
        pattern=r"^https?://",
        max_length=4096,
    )

    base: str = _setting(
        "The base model: `mini` (embedded), a directory, or a hub id.", "Base", "mini", min_length=1
    )
    revision: str | None = _setting("Revision of a base from the hub.", "Base", None)
    device: str = _setting(
        "auto, cpu, cuda or cuda:N.", "Base", "auto", pattern=r"^(auto|cpu|cuda(:\d{1,3})?)$"
    )
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = _setting(
        "Compute dtype; auto takes what the device does well.", "Base", "auto"
    )
    precision: Literal["exact", "fast"] = _setting(
        "Products over NF4 on a CPU: exact is float32, fast is 8 bits (docs/LOG.md).",
        "Base",
        "fast",
    )
    double_quant: bool | None = _setting(
        "Quantise the NF4 scales too, as QLoRA does; unset, as the base says: yes, but for `mini` "
        "and for a base that is NF4 already. Training and serving must agree.",
        "Base",
        None,
    )
    keep_base: bool = _setting(
        "Keep the quantised base on disk for a quick next start (`nibble doctor` says where).",
        "Base",
        True,
    )
    always_probe: bool = _setting(
        "Repeat the base's trial run at a start for which it is known to pass.", "Base", False
    )
    hf_token: SecretStr | None = _setting("Token for a base behind a login.", "Base", None)

    home: Path = _setting(
        "Where adapters and their catalog are kept.",
        "Store",
        default_factory=lambda: Path("~/.local/share/nibble"),
    )
    blobs: str = _setting(
        "URL of the adapters' blobs; from home when unset.",
        "Store",
        default_factory=lambda data: (data["home"] / "blobs").as_uri(),
    )
    blob_cache_bytes: Bytes = _setting(
        "Copies kept in home of blobs that lie in a bucket; what was not asked for longest goes.",
        "Store",
        16 * GIB,
        ge=MIB,
        le=1024 * TIB,
    )
    catalog: str = _setting(
        "URL of the catalog's database, sqlite:/// or postgresql://; from home when unset.",
        "Store",
        default_factory=lambda data: f"sqlite:///{data['home'] / 'catalog.db'}",
        repr=False,
    )
    adapters: Path | None = _setting(
        "Directory of adapters to load at start, one directory each; `none` for nothing.",
        "Store",
        default_factory=_default_adapters,
    )
    templates: Path | None = _setting(
        "Directory of prompt templates (YAML) to load at start.", "Store", None
    )
    max_upload_bytes: Bytes = _setting("Largest adapter upload.", "Store", GIB, ge=KIB, le=TIB)
    max_rank: int = _setting("Largest rank of an adapter.", "Store", 256, ge=1, le=4096)

    fine_tuning: bool = _setting(
        "Take training jobs and their files over HTTP (/v1/fine_tuning, /v1/files).",
        "Training",
        True,
    )
    max_file_bytes: Bytes = _setting("Largest training file.", "Training", GIB // 2, ge=KIB, le=TIB)
    jobs_at_once: int = _setting("Training jobs that run at once.", "Training", 1, ge=1, le=16)
    max_jobs: int = _setting(
        "Training jobs that may wait, run or be paused; where several tenants have keys, one may "
        "have as many as it leaves.",
        "Training",
        100,
        ge=1,
        le=100_000,
    )
    job_nice: int = _setting(
        "How far training steps back behind serving; 19 is furthest.", "Training", 19, ge=0, le=19
    )
    job_threads: int | None = _setting(
        "Threads of one job; half of the cores when unset.", "Training", None, ge=1, le=1024
    )
    job_memory_bytes: Bytes | None = _setting(
        "Memory that one job may write to; half of the machine's when unset.",
        "Training",
        None,
        ge=64 * MIB,
        le=1024 * TIB,
    )
    max_job_minutes: float = _setting(
        "Longest training of one job; what it has learnt by then is kept.",
        "Training",
        24 * 60.0,
        gt=0,
        le=525_600,
    )

    collections: str = _setting(
        "URL of the collections for retrieval, file:// or s3://; from home when unset.",
        "Retrieval",
        default_factory=lambda data: (data["home"] / "collections").as_uri(),
        pattern=r"^(file:///|s3://[a-z0-9])",
    )
    embedder: str = _setting(
        "What embeds documents: `minilm` (of the extra rag), a directory in the layout of "
        "sentence-transformers, or the URL of a /v1/embeddings.",
        "Retrieval",
        "minilm",
        min_length=1,
    )
    embedder_model: str | None = _setting(
        "The model to ask an embedding server for.", "Retrieval", None
    )
    embedder_key: SecretStr | None = _setting("Key of an embedding server.", "Retrieval", None)
    reranker: str | None = _setting(
        "A cross-encoder: the URL of a reranking server (takes query and documents, answers "
        "relevance scores), or a directory in the layout of sentence-transformers.",
        "Retrieval",
        None,
        min_length=1,
    )
    reranker_model: str | None = _setting(
        "The model to ask a reranking server for.", "Retrieval", None
    )
    reranker_key: SecretStr | None = _setting("Key of a reranking server.", "Retrieval", None)
    max_documents_bytes: Bytes = _setting(
        "Largest request that brings documents.", "Retrieval", 64 * MIB, ge=KIB, le=GIB
    )

    max_model_len: int | None = _setting(
        "Longest prompt and output together; the base's own limit when unset.",
        "Engine",
        None,
        ge=16,
        le=1 << 20,
    )
    block_size: int = _setting(
        "Tokens in one KV block, a power of two.", "Engine", 16, ge=1, le=256
    )
    kv_cache_bytes: Bytes = _setting(
        "Size of the KV cache; never more than the sequences of one step could fill.",
        "Engine",
        GIB // 2,
        ge=MIB,
        le=TIB,
    )
    kv_dtype: Literal["auto", "float32", "bfloat16", "int8"] = _setting(
        "Keys and values in the cache: auto is the compute dtype; fewer bits hold more tokens in "
        "the same bytes (docs/LOG.md).",
        "Engine",
        "auto",
    )
    cuda_graphs: Literal["auto", "off"] = _setting(
        "On a GPU: auto captures steps of few tokens as CUDA graphs when the server starts.",
        "Engine",
        "auto",
    )
    max_num_seqs: int = _setting("Sequences in one step.", "Engine", 64, ge=1, le=4096)
    max_step_tokens: int = _setting(
        "Tokens in one step: longer prompts are prefilled in chunks.",
        "Engine",
        512,
        ge=16,
        le=65536,
    )
    prompt_lookup_num_tokens: int = _setting(
        "Speculative decoding by prompt lookup: most tokens that a step may guess for a sequence; "
        "0 is off. A request may say otherwise; outputs are the same to the bit.",
        "Engine",
        0,
        ge=0,
        le=MAX_DRAFT_TOKENS,
    )
    max_queue: int = _setting(
        "Requests that may wait; where several tenants have keys, one may have as many there as it "
        "leaves.",
        "Engine",
        1024,
        ge=1,
        le=100_000,
    )
    max_queue_tokens: int | None = _setting(
        "Tokens of the prompts that may wait, so that nobody waits long behind long ones: the "
        "seconds that a first token may take, times the prompt tokens a second. Unset: any.",
        "Engine",
        None,
        ge=1,
        le=1 << 40,
    )
    slot_bytes: Bytes = _setting(
        "Budget for adapters on the device.", "Engine", 2 * GIB, ge=MIB, le=TIB
    )
    host_cache_bytes: Bytes = _setting(
        "Budget for adapters kept ready in memory.", "Engine", 2 * GIB, ge=MIB, le=TIB
    )
    max_cold_loads: int = _setting(
        "Adapters that may be on their way to memory; requests for more are refused with 429.",
        "Engine",
        64,
        ge=1,
        le=100_000,
    )

    @classmethod
    def settings_customise_sources(
        cls,
        settings_cls: type[BaseSettings],
        init_settings: PydanticBaseSettingsSource,
        env_settings: PydanticBaseSettingsSource,
        dotenv_settings: PydanticBaseSettingsSource,
        file_secret_settings: PydanticBaseSettingsSource,
    ) -> tuple[PydanticBaseSettingsSource, ...]:
        return (init_settings,)

    @model_validator(mode="before")
    @classmethod
    def _read_none(cls, data: Any) -> Any:
        """Neither TOML nor the environment has a null: the word `none` unsets an optional field."""
        optional = {
            "adapter_root",
            "adapters",
            "admin_key",
            "hf_token",
            "job_memory_bytes",
            "job_threads",
            "max_model_len",
            "otlp_traces_endpoint",
            "revision",
            "templates",
            "embedder_model",
            "embedder_key",
            "reranker",
            "reranker_model",
            "reranker_key",
        }
        return {k: None if k in optional and v == "none" else v for k, v in dict(data).items()}

    @field_validator("home", "adapters", "adapter_root", "templates")
    @classmethod
    def _absolute(cls, path: Path | None) -> Path | None:
        return None if path is None else path.expanduser().absolute()

    @field_validator("adapters", "adapter_root", "templates")
    @classmethod
    def _exists(cls, path: Path | None) -> Path | None:
        if path is not None and not path.is_dir():
            raise ValueError("is not a directory; give one that is, or none")
        return path

    @field_validator("otlp_traces_endpoint")
    @classmethod
    def _traceable(cls, endpoint: str | None) -> str | None:
        if endpoint is not None and not can_trace():
            raise ValueError(f"needs OpenTelemetry: {install('otel')}")
        return endpoint

    @field_validator("catalog")
    @classmethod
    def _keeps_rows(cls, url: str) -> str:
        if "://" in url and urlsplit(url).scheme not in CATALOGS:
            raise ValueError("should begin with sqlite:/// or postgresql://")
        return url

    @field_validator("quota_store")
    @classmethod
    def _countable(cls, store: str) -> str:
        if store.startswith("async+redis") and find_spec("redis") is None:
            raise ValueError(f"needs a client of Redis: {install('redis')}")
        try:
            _ = urlsplit(store).port
        except ValueError:
            raise ValueError("its port is no number of 0 to 65535") from None
        return store

    @field_validator("block_size")
    @classmethod
    def _power_of_two(cls, size: int) -> int:
        if size & (size - 1):
            raise ValueError("must be a power of two, for example 16")
        return size

    @model_validator(mode="after")
    def _step_holds_all(self) -> Settings:
        if self.max_step_tokens < self.max_num_seqs:
            raise ValueError(
                f"max_step_tokens ({self.max_step_tokens}) must be at least max_num_seqs "
                f"({self.max_num_seqs}): every running sequence needs one token in a step"
            )
        return self

    @property
    def base_source(self) -> str:
        """What `base.load.load_base` takes: the embedded base by its directory."""
        return str(MINI) if self.base == "mini" else self.base

    @property
    def local(self) -> bool:
        """Whether only this machine reaches `host`."""
        try:
            return ipaddress.ip_address(self.host).is_loopback
        except ValueError:
            return self.host == "localhost"

    @property
    def base_names(self) -> tuple[str, ...]:
        """What the base is called, beside its id."""
        given = (name.strip() for name in self.served_names.split(","))
        return (self.base, *(name for name in given if name))

    def shown(self) -> dict[str, Any]:
        """Plain values by name, secrets and passwords inside URLs masked."""
        return {name: _masked(getattr(self, name)) for name in type(self).model_fields}


def _masked(value: Any) -> Any:
    if isinstance(value, SecretStr):
        return MASK
    if isinstance(value, Path):
        return str(value)
    if isinstance(value, str):
        return re.sub(r"(://[^:/@]*:)[^@/]*@", rf"\g<1>{MASK}@", value)
    return value


@dataclass(frozen=True, slots=True)
class Configuration:
    """The effective settings, and for each of them where its value came from."""

    settings: Settings
    sources: Mapping[str, Source]
    file: Path | None
    unknown: tuple[str, ...]  # NIBBLE_* variables that set nothing


def configure(flags: Mapping[str, Any] | None = None, file: Path | None = None) -> Configuration:
    """Flags over environment over file over defaults.

    `flags` holds what was given on the command line; a value of None was not given. `file` must
    exist when it is named (here or by NIBBLE_CONFIG); `nibble.toml` in the working directory is
    read when it is there. Raises ConfigError.
    """
    path = _file(file)
    layers: list[tuple[Source, Mapping[str, Any]]] = [
        ("file", _read(path)),
        ("env", EnvSettingsSource(Settings)()),
        ("flag", {k: v for k, v in (flags or {}).items() if v is not None}),
    ]
    values: dict[str, Any] = {}
    sources: dict[str, Source] = dict.fromkeys(Settings.model_fields, "default")
    for source, layer in layers:
        values.update(layer)
        sources.update(dict.fromkeys(layer, source))
    try:
        settings = Settings(**values)
    except ValidationError as error:
        raise ConfigError(_explain(error, sources, path)) from None
    return Configuration(settings, sources, path, _unknown_variables())


def _file(named: Path | None) -> Path | None:
    named = named or (Path(os.environ["NIBBLE_CONFIG"]) if os.getenv("NIBBLE_CONFIG") else None)
    if named is not None:
        if not named.is_file():
            raise ConfigError(f"configuration file {named} does not exist")
        return named
    return Path(FILE) if Path(FILE).is_file() else None


def _read(path: Path | None) -> dict[str, Any]:
    if path is None:
        return {}
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except (tomllib.TOMLDecodeError, UnicodeDecodeError, OSError) as error:
        raise ConfigError(f"configuration file {path}: {error}") from error


def _unknown_variables() -> tuple[str, ...]:
    known = {PREFIX + name.upper() for name in Settings.model_fields} | OTHER_VARIABLES
    return tuple(sorted(v for v in os.environ if v.startswith(PREFIX) and v not in known))


def _explain(error: ValidationError, sources: Mapping[str, Source], path: Path | None) -> str:
    # A default that could not be computed only follows from another error.
    lines = [dict(e) for e in error.errors() if e["type"] != "default_factory_not_called"]
    return "; ".join(_explain_one(line, sources, path) for line in lines)


def _explain_one(line: dict[str, Any], sources: Mapping[str, Source], path: Path | None) -> str:
    name = str(line["loc"][0]) if line["loc"] else ""
    message = str(line["msg"]).removeprefix("Value error, ")
    if not name:
        return message
    origin = {
        "flag": f"--{name.replace('_', '-')}",
        "env": PREFIX + name.upper(),
        "file": f"{name} in {path}",
        "default": f"default of {name}",
    }[sources.get(name, "flag")]
    if line["type"] == "extra_forbidden":
        near = get_close_matches(name, Settings.model_fields, n=1)
        return f"{origin}: there is no such setting" + (
            f"; did you mean {near[0]}?" if near else ""
        )
    # A secret's value stays out of messages, as does a password in a URL: they end up in logs.
    value = "" if name in SECRETS else f" (got {_masked(line['input'])!r})"
    return f"{origin}: {message}{value}"
