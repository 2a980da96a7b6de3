from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch.nn import functional as F

from base.load import Base
from tests.training.runs import run_of
from training.config import DataConfig, MethodConfig, OptimConfig, TrainConfig
from training.data import Example
from training.data.batches import collate
from training.evaluate import exact_match
from training.loss import batch_loss
from training.methods import attach
from training.methods.low_rank import LowRankAdapter
from training.recipe import Run, Step, Trained, mean_loss, rate, train, with_steps

STOP = 2
PAIRS = [Example((10 + i, 50 + 3 * i, 90 + i, STOP), 1) for i in range(12)]


def _config(kind: str, steps: int = 150, seed: int = 0) -> TrainConfig:
    return TrainConfig(
        data=DataConfig(train=Path("none")),
        method=MethodConfig.model_validate({"kind": kind, "rank": 8}),
        optim=OptimConfig(learning_rate=1e-2, steps=steps, batch_size=6),
        seed=seed,
    )


def _run(base: Base, config: TrainConfig) -> tuple[Trained, list[Step], dict[str, torch.Tensor]]:
    torch.manual_seed(config.seed)
    adapter = attach(base, config)
    assert isinstance(adapter, LowRankAdapter)
    steps: list[Step] = []
    done = train(base, adapter, PAIRS, PAIRS[:4], config, steps.append)
    weights = {
        f"{path}.{name}": parameter.detach().clone()
        for path, layer in adapter.layers.items()
        for name, parameter in layer.named_parameters()
    }
    adapter.detach()
    return done, steps, weights


@pytest.mark.parametrize("kind", ["lora", "rslora", "dora"])
def test_an_adapter_learns_by_heart_and_the_base_stays_as_it_was(base: Base, kind: str) -> None:
    frozen = {name: tensor.clone() for name, tensor in base.model.state_dict().items()}
    config = _config(kind)
    torch.manual_seed(0)
    adapter = attach(base, config)
    done = train(base, adapter, PAIRS, PAIRS, config, lambda step: None)
    assert done.eval_loss is not None
    assert done.eval_loss < 2.0  # from 6.3; the head is random and small, so it cannot be sure
    prompts = [pair.tokens[:1] for pair in PAIRS]
    answers = [base.tokenizer.decode(pair.tokens[1:3]) for pair in PAIRS]
    assert exact_match(base, prompts, answers, max_new_tokens=4, batch_size=5).rate == 1.0
    adapter.detach()
    assert exact_match(base, prompts, answers, max_new_tokens=4).rate < 0.2
    for name, tensor in base.model.state_dict().items():
        assert torch.equal(tensor, frozen[name]), name


def test_the_same_seed_gives_the_same_weights(base: Base) -> None:
    first, again, other = (_run(base, _config("dora", 5, seed))[2] for seed in (1, 1, 2))
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert any(not torch.equal(first[name], other[name]) for name in first)


def test_every_step_is_reported_and_tokens_are_counted(base: Base) -> None:
    done, steps, _ = _run(base, _config("lora", 4))
    assert [step.number for step in steps] == [1, 2, 3, 4]
    assert done.tokens == steps[-1].tokens == 4 * 6 * 4
    assert done.loss == steps[-1].loss


def test_loss_is_the_mean_over_the_answers_alone(base: Base) -> None:
    data = [Example((5, 6, 7, 8, STOP), 3), Example((9, 10, STOP), 2)]
    want = []
    with torch.no_grad():
        for example in data:
            tokens = torch.tensor([example.tokens])
            logits = base.model(input_ids=tokens).logits[0]
            answer = slice(example.answer_start - 1, len(example.tokens) - 1)
            said = tokens[0, example.answer_start :]
            want += F.cross_entropy(logits[answer], said, reduction="none").tolist()
        got = batch_loss(base, collate(data, pad_id=0)).item()
    assert got == pytest.approx(sum(want) / len(want), rel=1e-5)
    assert mean_loss(base, data, batch_size=1) == pytest.approx(got, rel=1e-5)


def test_the_rate_rises_then_falls_to_a_tenth() -> None:
    optim = OptimConfig(steps=100, warmup=0.1)
    rates = [rate(step, optim) for step in range(100)]
    assert rates[:10] == sorted(rates[:10])
    assert rates[9] == 1.0
    assert rates[10:] == sorted(rates[10:], reverse=True)
    assert rates[-1] == pytest.approx(0.1, abs=0.01)


@pytest.mark.parametrize(("schedule", "half"), [("linear", 0.55), ("constant", 1.0)])
def test_other_schedules(schedule: str, half: float) -> None:
    optim = OptimConfig.model_validate({"steps": 101, "warmup": 0.0, "schedule": schedule})
    assert rate(51, optim) == pytest.approx(half, abs=0.01)
    assert rate(101, optim) == pytest.approx(0.1 if schedule == "linear" else 1.0)


def test_epochs_are_the_steps_that_they_come_to() -> None:
    config = _config("lora")
    assert with_steps(config, PAIRS) is config
    optim = config.optim.model_copy(update={"epochs": 2.5, "batch_size": 5})
    wanted = config.model_copy(update={"optim": optim})
    assert with_steps(wanted, PAIRS).optim.steps == 8  # three batches of 12 pairs, 2.5 times
    packed = wanted.model_copy(
        update={"data": wanted.data.model_copy(update={"packing": True, "max_length": 8})}
    )
    assert with_steps(packed, PAIRS).optim.steps == 5  # two pairs to a row: two batches


@pytest.mark.parametrize("kind", ["lora", "adalora"])
@pytest.mark.parametrize("packing", [False, True])
def test_the_gradients_of_parts_are_those_of_the_batch(
    base: Base, kind: str, packing: bool
) -> None:
    data = [
        Example((*pair.tokens[:3], *range(20, 20 + i), STOP), 2) for i, pair in enumerate(PAIRS)
    ]

    def gradients(micro: int | None) -> tuple[float, list[torch.Tensor]]:
        config = run_of(kind, optim={"micro_batch_size": micro, "batch_size": 5}, rank=2)
        packed = config.data.model_copy(update={"packing": packing, "max_length": 24})
        config = config.model_copy(update={"data": packed})
        torch.manual_seed(0)
        adapter = attach(base, config)
        run = Run(base, adapter, data, config)
        found: list[torch.Tensor] = []
        run.optimizer.register_step_pre_hook(
            lambda *_: found.extend(p.grad.clone() for p in run.parameters if p.grad is not None)
        )
        loss = run.step().loss
        adapter.detach()
        return loss, found

    whole, parts = gradients(None), gradients(2)
    assert parts[0] == pytest.approx(whole[0], rel=1e-5)
    assert len(whole[1]) == len(parts[1]) > 0
    for one, other in zip(whole[1], parts[1], strict=True):
        assert torch.allclose(one, other, rtol=1e-3, atol=1e-6)
