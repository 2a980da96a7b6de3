"""Log-probabilities as OpenAI's two families show them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from service.engine.request import Token

Json = dict[str, Any]
Decode = Callable[[Sequence[int]], list[str]]


def chat_logprobs(tokens: Sequence[Token], decode: Decode) -> Json:
    """`choices[].logprobs` of a chat: an entry for each token, with its own text."""
    texts = decode([token.id for token in tokens])
    return {
        "content": [
            _entry(text, token.logprob)
            | {"top_logprobs": [_entry(other, value) for _, other, value in token.top]}
            for token, text in zip(tokens, texts, strict=True)
        ],
        "refusal": None,
    }


def _entry(text: str, logprob: float) -> Json:
    return {"token": text, "logprob": logprob, "bytes": list(text.encode())}


class TextLogprobs:
    """`choices[].logprobs` of a completion: parallel lists, growing with the text."""

    def __init__(self, top: int, decode: Decode) -> None:
        self._top = top
        self._decode = decode
        self._offset = 0

    def of_prompt(
        self,
        prompt: Sequence[int],
        logprobs: Sequence[float],
        alternatives: Sequence[Sequence[tuple[int, float]]],
    ) -> Json:
        """The prompt's own tokens; nothing comes before the first, so it has none."""
        texts = self._decode(prompt)
        tops: list[Json | None] = [None]
        for place, found in enumerate(alternatives, start=1):
            others = self._decode([token for token, _ in found])
            pairs = zip(others, (value for _, value in found), strict=True)
            tops.append(dict(pairs) | {texts[place]: logprobs[place - 1]})
        if not alternatives:
            tops += [{}] * (len(prompt) - 1) if self._top else [None] * (len(prompt) - 1)
        return self._lists(texts, [None, *logprobs], tops)

    def of(self, tokens: Sequence[Token]) -> Json:
        texts = self._decode([token.id for token in tokens])
        tops = [
            {other: value for _, other, value in token.top} | {text: token.logprob}
            if self._top
            else None
            for token, text in zip(tokens, texts, strict=True)
        ]
        return self._lists(texts, [token.logprob for token in tokens], tops)

    def _lists(
        self, texts: list[str], logprobs: Sequence[float | None], tops: Sequence[Json | None]
    ) -> Json:
        offsets = []
        for text in texts:
            offsets.append(self._offset)
            self._offset += len(text)
        return {
            "tokens": texts,
            "token_logprobs": list(logprobs),
            "top_logprobs": list(tops) if self._top else None,
            "text_offset": offsets,
        }


def joined(first: Json, second: Json) -> Json:
    """Two stretches of `TextLogprobs` as one."""
    return {
        name: None if value is None else [*value, *second[name]] for name, value in first.items()
    }
