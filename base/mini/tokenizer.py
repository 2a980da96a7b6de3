"""The byte-level BPE tokenizer of mini and its files."""

from __future__ import annotations

import json
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from random import Random

from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

from base.mini import corpus, korean, python_docs

VOCABULARY = 3584
POSITIONS = 2048
END_OF_TEXT, START, END, PAD = SPECIAL = (
    "<|endoftext|>",
    "<|im_start|>",
    "<|im_end|>",
    "<|pad|>",
)
# A word carries the space after it, not before: so a name is the same tokens at the start of an
# answer as in the middle of a passage, and copying needs no table. Every digit stands alone.
_SPLIT = r"[\p{L}\p{M}]+ ?|\p{N}|[^\s\p{L}\p{M}\p{N}]+ ?|\s*[\r\n]+|\s+"
CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>\\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)


def sample(seed: int, documents: int) -> Iterator[str]:
    """The text the merges are learnt from: the corpus, Python's documentation, Hangul."""
    stream = corpus.documents(f"{seed}/tokenizer", "train", 1.0)
    for document in islice(stream, documents):
        yield "".join(piece.text for piece in document)
    yield from python_docs.paragraphs("train")
    rng = Random(f"{seed}/syllables")
    for _ in range(documents // 4):
        yield korean.syllables(rng)
        yield korean.story(rng, "train")


def train(seed: int, documents: int = 20_000) -> Tokenizer:
    """A tokenizer of `VOCABULARY` tokens that round-trips any Unicode text."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(_SPLIT), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=list(SPECIAL),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(sample(seed, documents), trainer)
    return tokenizer


def save(tokenizer: Tokenizer, directory: Path) -> None:
    """Write the files `AutoTokenizer` reads, chat template included."""
    directory.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(directory / "tokenizer.json"))
    (directory / "chat_template.jinja").write_text(CHAT_TEMPLATE, encoding="utf-8")
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_max_length": POSITIONS,
        "bos_token": None,
        "eos_token": END,
        "pad_token": PAD,
        "additional_special_tokens": [END_OF_TEXT, START],
        "add_prefix_space": False,
        "clean_up_tokenization_spaces": False,
    }
    text = json.dumps(config, indent=2) + "\n"
    (directory / "tokenizer_config.json").write_text(text, encoding="utf-8")
