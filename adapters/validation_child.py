"""Validation in a process of its own: short of memory, of time and of rights.

What a stranger uploaded is read here first. If it makes the process swell, spin or crash, the
upload is refused and nobody else notices.
"""

from __future__ import annotations

import base64
import dataclasses
import json
import logging
import os
import resource
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

from adapters import errors
from adapters.errors import InvalidAdapter, StoreUnavailable
from adapters.limits import Limits
from adapters.validate import Validated, validate
from adapters.vocabulary import Tokens
from base.spec import BaseSpec, EmbeddingShape, LinearShape

log = logging.getLogger(__name__)

ROOT = Path(__file__).resolve().parents[1]
# -I: neither PYTHON* variables nor the working directory decide what is imported.
COMMAND = (
    sys.executable,
    "-I",
    "-c",
    "import sys; sys.path.insert(0, sys.argv[1]);"
    " from adapters.validation_child import main; main()",
    str(ROOT),
)
VERDICTS = {
    kind.__name__: kind
    for kind in (errors.InvalidAdapter, errors.UnsupportedMedia, errors.TooLarge)
}


def validate_in_child(
    config: bytes,
    weights: Path,
    spec: BaseSpec,
    limits: Limits,
    template: str | None = None,
    tokens: Tokens | None = None,
) -> Validated:
    """`validate`, and a trial of the template, in a child under `limits`.

    Raises InvalidAdapter, UnsupportedMedia or TooLarge; a child that crashes or runs out of
    processor time or memory is an InvalidAdapter too. StoreUnavailable where no process can be
    started, or the machine does not give it that time: nothing in an upload can make a child wait.
    """
    question = {
        "config": base64.b64encode(config).decode(),
        "weights": os.fspath(weights.absolute()),
        "spec": _spec_fields(spec),
        "limits": dataclasses.asdict(limits),
        "template": template,
        "tokens": None if tokens is None else _token_fields(tokens),
    }
    if len(config) > limits.max_config_bytes:
        raise errors.TooLarge(f"{len(config)} bytes, limit {limits.max_config_bytes}", "config")
    try:
        done = subprocess.run(
            COMMAND,
            input=json.dumps(question).encode(),
            capture_output=True,
            timeout=limits.child_seconds,
            cwd="/",
            env={"PATH": os.defpath, "LC_ALL": "C.UTF-8", "OPENBLAS_NUM_THREADS": "1"},
            check=False,
        )
    except OSError as error:
        raise StoreUnavailable(f"the checks could not be started: {error.strerror}") from error
    except subprocess.TimeoutExpired as error:
        raise StoreUnavailable(
            f"the checks did not end within {limits.child_seconds:g} s, and not for want of "
            "processor time: this machine is too busy, or its disk does not answer; try again"
        ) from error
    return _verdict(done, limits)


def validate_here(
    config: bytes,
    weights: Path,
    spec: BaseSpec,
    limits: Limits,
    template: str | None = None,
    tokens: Tokens | None = None,
) -> Validated:
    """The same checks in this process: only for files that are the caller's own, since nothing
    bounds the memory and the time that they take. Raises as `validate_in_child`."""
    found = validate(config, weights, spec, limits, tokens)
    if template is not None:
        from adapters.template import check_template  # jinja2: only where there is a template

        check_template(template, limits)
    return found


def _token_fields(tokens: Tokens) -> dict[str, Any]:
    own = tokens.own
    last = max(tokens.base.items(), key=lambda item: item[1], default=("", 0))
    return {
        # Without a tokenizer to compare it with, only where the base's ends is asked.
        "base": dict([last]) if own is None else dict(tokens.base),
        "parts": dict(tokens.parts),
        "own": None if own is None else base64.b64encode(own).decode(),
    }


def _tokens(fields: dict[str, Any] | None) -> Tokens | None:
    if fields is None:
        return None
    own = fields["own"]
    return Tokens(fields["base"], fields["parts"], None if own is None else base64.b64decode(own))


def _spec_fields(spec: BaseSpec) -> dict[str, Any]:
    fields = {field.name: getattr(spec, field.name) for field in dataclasses.fields(spec)}
    return fields | {
        "linears": {path: dataclasses.astuple(shape) for path, shape in spec.linears.items()},
        "embeddings": {path: dataclasses.astuple(shape) for path, shape in spec.embeddings.items()},
        "norms": dict(spec.norms),
    }


def _verdict(done: subprocess.CompletedProcess[bytes], limits: Limits) -> Validated:
    if done.returncode != 0:
        log.warning("validation ended with %s: %s", done.returncode, done.stderr[-2000:].decode())
        raise InvalidAdapter(_death(done.returncode, limits))
    answer = json.loads(done.stdout)
    if "error" in answer:
        raise VERDICTS[answer["error"]](answer["reason"], answer["where"])
    return Validated(**{**answer, "targets": tuple(answer["targets"])})


def _death(returncode: int, limits: Limits) -> str:
    if returncode == -signal.SIGXCPU:
        return f"the checks used more than {limits.child_cpu_seconds} s of processor time"
    if returncode == MEMORY_EXIT:
        return f"the checks needed more than {limits.child_memory_bytes} bytes of memory"
    return f"the checks crashed (exit {returncode})"


# In the child -----------------------------------------------------------------------------------

MEMORY_EXIT = 77


def main() -> None:
    """Read one question from stdin, write one verdict to stdout."""
    question = json.load(sys.stdin.buffer)
    limits = Limits(**question["limits"])
    _confine(limits)
    try:
        answer = _answer(question, limits)
    except MemoryError:
        os._exit(MEMORY_EXIT)
    json.dump(answer, sys.stdout)


def _confine(limits: Limits) -> None:
    """Nothing of the upload has been looked at when this runs."""
    _cap(resource.RLIMIT_AS, limits.child_memory_bytes)
    # One second more at the hard limit: there comes SIGKILL, which says nothing.
    _cap(resource.RLIMIT_CPU, limits.child_cpu_seconds, more=1)
    _cap(resource.RLIMIT_FSIZE, 0)
    _cap(resource.RLIMIT_NOFILE, 64)
    _cap(resource.RLIMIT_CORE, 0)


def _cap(what: int, amount: int, more: int = 0) -> None:
    """Set a limit, never above the one that is there already."""
    hard = resource.getrlimit(what)[1]
    most = sys.maxsize if hard == resource.RLIM_INFINITY else hard
    resource.setrlimit(what, (min(amount, most), min(amount + more, most)))


def _answer(question: dict[str, Any], limits: Limits) -> dict[str, Any]:
    try:
        found = validate_here(
            base64.b64decode(question["config"]),
            Path(question["weights"]),
            _spec(question["spec"]),
            limits,
            question["template"],
            _tokens(question["tokens"]),
        )
    except InvalidAdapter as error:
        return {"error": type(error).__name__, "reason": error.reason, "where": error.where}
    return dataclasses.asdict(found)


def _spec(fields: dict[str, Any]) -> BaseSpec:
    return BaseSpec(
        **{
            **fields,
            "linears": {path: LinearShape(*shape) for path, shape in fields["linears"].items()},
            "embeddings": {
                path: EmbeddingShape(*shape) for path, shape in fields["embeddings"].items()
            },
        }
    )
