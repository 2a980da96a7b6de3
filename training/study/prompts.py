"""An item as token ids: its question, asked as `questions` says, and its answer."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from base.load import Base
from training.data import Encoding, Example, encode
from training.errors import DataError
from training.evaluation.prompts import find_template
from training.study.config import Reference, TaskConfig
from training.study.material import Material
from training.study.questions import Found, Questions
from training.tasks import Item


class Prompts:
    """Renders a task's items for the base, in the way that `reference` names."""

    def __init__(
        self,
        base: Base,
        config: TaskConfig,
        material: Material,
        reference: Reference = "zero_shot",
        found: Found | None = None,
    ) -> None:
        self._tokenizer: Any = base.tokenizer
        limit = min(base.spec.max_positions, 1 << 20)
        self._encoding = Encoding(base.tokenizer, limit, "completion")
        if reference == "template":
            assert config.template is not None, "the study checks it"
            self._encoding = replace(self._encoding, prompt=find_template(str(config.template)))
        self._config, self._reference = config, reference
        self._questions = Questions(config, material, reference, found)

    def example(self, item: Item, answer: str | None = None) -> Example:
        """Prompt and answer: the item's own, or another label of its choices."""
        said = item.answer if answer is None else answer
        if not item.question:
            return self._document(item, said)
        messages = [*self._questions.messages(item), {"role": "assistant", "content": said}]
        place = f"task {self._config.name}"
        return self._encoding.examples(place, {"messages": messages}).examples[-1]

    def _document(self, page: Item, text: str) -> Example:
        """The page's tokens but the first, which has nothing before it in the plain arm."""
        lead = self._questions.lead(page)
        before = encode(self._tokenizer, "".join(f"{part}\n\n" for part in lead if part))
        tokens = (*before, *encode(self._tokenizer, text))
        if len(tokens) > self._encoding.max_length:
            raise DataError(
                f"task {self._config.name}: {len(tokens)} tokens with {self._reference}, the base "
                f"takes {self._encoding.max_length}; ask for fewer shots or passages"
            )
        return Example(tokens, len(before) + 1)
