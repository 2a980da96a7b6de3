"""Activated LoRA: the base's before the invocation, the adapter's from it on, as PEFT has it."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from adapters.errors import InvalidAdapter
from base.load import load_base
from service.engine.loop import Engine
from service.engine.request import NEVER
from tests.oracle import edit_adapter, make_adapter, make_base, random_tokens, read_manifest
from tests.zoo import Recorder, Zoo, assert_equals_oracle, collect, greedy, specimen, start

CALL = [7, 9]
HEAD, TAIL = random_tokens(30), random_tokens(70, 1)
PROMPTS = {
    "in the middle": [*HEAD, *CALL, *TAIL[:9]],
    "at the end": [*HEAD, *CALL],
    "at the start": [*CALL, *TAIL[:20]],
    "twice": [*HEAD, *CALL, *TAIL[:20], *CALL, *TAIL[:3]],
    "not at all": HEAD,
    "in a later chunk": [*TAIL, *HEAD, *CALL, *HEAD],  # a step has 64 tokens
}


@pytest.fixture(scope="module")
def zoo(tmp_path_factory: pytest.TempPathFactory) -> Zoo:
    home = tmp_path_factory.mktemp("zoo")
    source = make_base(home / "base", "qwen3")
    base = load_base(source, device="cpu", dtype="float32", cache_dir=home / "cache")
    zoo = Zoo(source, base)
    everywhere = ["q_proj", "v_proj", "down_proj", "lm_head"]
    for kind in ("alora", "lora"):
        made = make_adapter(home / kind, source, kind, targets=everywhere, seed=3)
        zoo.specimens.append(specimen(made, base))
    return zoo


@pytest.fixture(scope="module")
def engine(zoo: Zoo) -> Iterator[Engine]:
    running = start(zoo.base, zoo)
    yield running
    running.check_integrity()
    running.stop()


def test_a_mixed_batch_equals_peft(zoo: Zoo, engine: Engine) -> None:
    """In an order in which each prompt's beginning is known from another one before it."""
    recorder = Recorder(engine)
    ref = zoo.named("alora").ref()
    asked = [(name, greedy(name, prompt, ref)) for name, prompt in PROMPTS.items()]
    other = greedy("lora", PROMPTS["twice"], zoo.named("lora").ref())
    plain = greedy("base", PROMPTS["twice"])
    streams = [engine.submit(request) for request in (*(r for _, r in asked), other, plain)]
    outputs = [[token.id for token in collect(stream)[0]] for stream in streams]
    for name, request, output in zip(
        ["alora"] * len(asked) + ["lora", None],
        [*(r for _, r in asked), other, plain],
        outputs,
        strict=True,
    ):
        rows = recorder.rows(request.id)
        assert_equals_oracle(zoo.oracle(name), list(request.prompt), output, rows)


def test_where_it_begins(zoo: Zoo) -> None:
    ref = zoo.named("alora").ref()
    begins = {name: greedy(name, prompt, ref).active_from for name, prompt in PROMPTS.items()}
    assert begins == {
        "in the middle": 30,
        "at the end": 30,
        "at the start": 0,
        "twice": 52,
        "not at all": NEVER,
        "in a later chunk": 100,
    }


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("alora_invocation_tokens", []),
        ("alora_invocation_tokens", [7, "a"]),
        ("alora_invocation_tokens", [7, 100_000]),
        ("use_dora", True),
        ("bias", "all"),
        ("modules_to_save", ["lm_head"]),
        ("trainable_token_indices", [7]),
    ],
)
def test_what_would_hold_before_its_invocation_is_refused(
    field: str, value: object, zoo: Zoo, tmp_path: Path
) -> None:
    adapter = make_adapter(tmp_path / "a", zoo.source, "alora")
    edit_adapter(adapter, config={field: value})
    with pytest.raises(InvalidAdapter) as caught:
        read_manifest(adapter, zoo.base.spec)
    assert caught.value.where == field
