from random import Random

import pytest
import torch
from tokenizers import Tokenizer

from base.mini import MINI, corpus, packing
from base.mini.dialogue import ANSWER, Turn, chat, listing
from base.mini.tokenizer import END_OF_TEXT, SPECIAL

TOKENIZER = Tokenizer.from_file(str(MINI / "tokenizer.json"))
TURNS = [Turn("Where does Tamo live?", "Belford"), Turn("무엇을 좋아합니까?", "사과 (3)")]


def _weighted(tokens: packing.Tokens) -> list[str]:
    """The runs of weighted tokens, decoded."""
    ids, weights = tokens
    runs: list[list[int]] = [[]]
    for token, weight in zip(ids, weights, strict=True):
        if weight:
            runs[-1].append(token)
        elif runs[-1]:
            runs.append([])
    return [TOKENIZER.decode(run, skip_special_tokens=False) for run in runs if run]


def test_weighted_tokens_are_exactly_the_answers() -> None:
    conversation, lines = packing.encode(
        TOKENIZER, [chat(TURNS, "Answer shortly."), listing("Tamo lives in Belford.", TURNS)]
    )
    assert _weighted(conversation) == ["Belford<|im_end|>", "사과 (3)<|im_end|>"]
    assert _weighted(lines) == ["Belford\n", "사과 (3)\n"]


def test_encoding_by_pieces_is_encoding_the_whole() -> None:
    for seed in range(40):
        stream = corpus.documents(str(seed), "train", 1.0)
        document = next(stream)
        text = "".join(piece.text for piece in document) + END_OF_TEXT
        (ids, _), *_ = packing.encode(TOKENIZER, [document])
        assert ids == TOKENIZER.encode(text, add_special_tokens=False).ids


def test_repeats_weigh_only_what_was_said_before() -> None:
    ids, weights = packing.repeated(Random(1), 3584, 64)
    first = weights.index(ANSWER)
    assert all(weights[i] == ANSWER and ids[i] == ids[i - first] for i in range(first, 64))
    assert min(ids) >= len(SPECIAL)


@pytest.mark.parametrize("progress", [0.0, 0.1, 0.4, 0.7, 0.99])
def test_a_batch_is_a_function_of_seed_and_step(progress: float) -> None:
    phase, _ = packing.phase_at(progress)
    step = packing.WARM_UP
    first = packing.batch(TOKENIZER, 1, step, progress)
    again = packing.batch(TOKENIZER, 1, step, progress)
    other = packing.batch(TOKENIZER, 1, step + 1, progress)
    assert first.ids.shape == first.weights.shape == (phase.rows, phase.length)
    assert torch.equal(first.ids, again.ids)
    assert torch.equal(first.weights, again.weights)
    assert not torch.equal(first.ids, other.ids)
    assert first.weights.sum() > 0


def test_the_first_steps_repeat_random_tokens_only() -> None:
    fixed = packing.batch(TOKENIZER, 1, 0, 0.0)
    half = fixed.ids.shape[1] // 2
    assert torch.equal(fixed.ids[:, :half], fixed.ids[:, half:])
    free = packing.batch(TOKENIZER, 1, packing.FIXED, 0.0)
    assert len({row.index(ANSWER) for row in free.weights.tolist()}) > 3


def test_difficulty_rises_to_one_and_the_last_rows_are_long() -> None:
    levels = [packing.phase_at(i / 100)[1] for i in range(101)]
    assert levels == sorted(levels)
    assert levels[-1] == 1.0
    assert packing.phase_at(1.0)[0].length >= 1024
