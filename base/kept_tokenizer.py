"""A tokenizer as transformers made it, kept on disk: the next start reads it without transformers.

transformers builds many tokenizers anew from several files, so what it made is kept, not what lies
beside the checkpoint. Whatever is wrong with the file costs time and never an answer.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import tempfile
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import cached_property
from importlib import metadata
from pathlib import Path
from typing import Any

from base.fingerprint import hashes_of

FORMAT = 1
_FOLDER = "tokenizers"
_FILES = ("*.json", "tokenizer*", "*.model", "*.txt", "*.jinja", "additional_chat_templates/*")
_MADE_OF_WEIGHTS = ".index.json"  # lists of shards; no tokenizer reads them
_PLAIN = ("__call__", "encode", "decode", "_encode_plus", "_decode", "get_vocab")
_ROLES = ("bos", "eos", "unk", "pad")

log = logging.getLogger(__name__)


class KeptTokenizer:
    """What serving asks of a tokenizer of transformers, over the tokenizers library alone.

    The same names and the same answers; batches, padding and truncation are not among them.
    """

    def __init__(self, backend: Any, facts: Mapping[str, Any]) -> None:
        """`backend` is a `tokenizers.Tokenizer`; `facts` as `_facts` takes them."""
        self.backend_tokenizer = backend
        self.chat_template: str | dict[str, str] | None = facts["chat_template"]
        self.special_tokens_map: dict[str, str] = facts["special_tokens_map"]
        self.all_special_ids: list[int] = facts["all_special_ids"]
        self.clean_up_tokenization_spaces: bool = facts["clean_up_tokenization_spaces"]
        self.model_max_length: int = facts["model_max_length"]
        self.bos_token_id: int | None = facts["bos"]
        self.eos_token_id: int | None = facts["eos"]
        self.unk_token_id: int | None = facts["unk"]
        self.pad_token_id: int | None = facts["pad"]

    def __len__(self) -> int:
        return int(self.backend_tokenizer.get_vocab_size(with_added_tokens=True))

    def __call__(
        self, text: str, add_special_tokens: bool = True, return_offsets_mapping: bool = False
    ) -> dict[str, Any]:
        """`input_ids`, and with `return_offsets_mapping` each token's [start, stop) in the text."""
        found = self.backend_tokenizer.encode(text, add_special_tokens=add_special_tokens)
        offsets = {"offset_mapping": found.offsets} if return_offsets_mapping else {}
        return {"input_ids": found.ids, **offsets}

    def encode(self, text: str, add_special_tokens: bool = True, verbose: bool = True) -> list[int]:
        """Nothing is said of a text longer than the model, `verbose` or not."""
        del verbose
        ids: list[int] = self.backend_tokenizer.encode(
            text, add_special_tokens=add_special_tokens
        ).ids
        return ids

    def decode(
        self,
        ids: Sequence[int],
        skip_special_tokens: bool = False,
        clean_up_tokenization_spaces: bool | None = None,
    ) -> str:
        """No clean-up: a tokenizer that does one is not kept."""
        return str(self.backend_tokenizer.decode(list(ids), skip_special_tokens))

    def get_vocab(self) -> dict[str, int]:
        vocabulary: dict[str, int] = self.backend_tokenizer.get_vocab(with_added_tokens=True)
        return vocabulary

    @property
    def added_tokens_decoder(self) -> dict[int, Any]:
        """Added tokens by id, each with its `content` and whether it is `special`."""
        added: dict[int, Any] = self.backend_tokenizer.get_added_tokens_decoder()
        return added


@dataclass(frozen=True)
class TokenizerFile:
    """Where the tokenizer of one directory is kept."""

    cache_dir: Path
    directory: Path  # of the checkpoint

    def read(self) -> KeptTokenizer | None:
        """None where there is no good file of these tokenizer files and versions."""
        from tokenizers import Tokenizer

        try:
            digest, _, content = self._file.read_bytes().partition(b"\n")
            if digest != _digest(content):
                raise ValueError("it is not, byte for byte, what was written")
            head, _, backend = content.partition(b"\n")
            facts = json.loads(head)
            if facts["key"] != self._key:
                raise ValueError("it is not what was written for this tokenizer")
            return KeptTokenizer(Tokenizer.from_buffer(backend), facts)
        except FileNotFoundError:
            return None
        except Exception as error:  # the tokenizers library raises bare ones
            log.warning("the kept tokenizer %s is made anew: %s", self._file, error)
            return None

    def save(self, tokenizer: Any) -> None:
        """Keep a tokenizer of transformers; nothing, where ours would not do all that it does."""
        facts = _facts(tokenizer)
        if facts is None:
            return
        backend = type(tokenizer.backend_tokenizer).from_str(tokenizer.backend_tokenizer.to_str())
        backend.no_truncation()
        backend.no_padding()
        head = json.dumps({**facts, "key": self._key})
        content = f"{head}\n{backend.to_str()}".encode()
        try:
            self._file.parent.mkdir(parents=True, exist_ok=True)
            handle, name = tempfile.mkstemp(suffix=".tmp", dir=self._file.parent)
            try:
                with os.fdopen(handle, "wb") as file:
                    file.write(_digest(content) + b"\n" + content)
                os.replace(name, self._file)
            except BaseException:
                with suppress(OSError):
                    os.unlink(name)
                raise
        except OSError as error:
            log.warning("the tokenizer is not kept for the next start: %s", error)

    @property
    def _file(self) -> Path:
        return self.cache_dir / _FOLDER / f"{self._key[:32]}.json"

    @cached_property
    def _key(self) -> str:
        """Of all that transformers reads to make it, and of the libraries that do."""
        files = {
            path
            for pattern in _FILES
            for path in self.directory.glob(pattern)
            if path.is_file() and not path.name.endswith(_MADE_OF_WEIGHTS)
        }
        names = sorted(files)
        hashes = hashes_of(names, self.cache_dir)
        made_of = {
            "format": FORMAT,
            "files": [
                [str(p.relative_to(self.directory)), h] for p, h in zip(names, hashes, strict=True)
            ],
            "versions": [metadata.version(name) for name in ("transformers", "tokenizers")],
        }
        return hashlib.sha256(json.dumps(made_of).encode()).hexdigest()


def _facts(tokenizer: Any) -> dict[str, Any] | None:
    """What is not in the backend; None for a tokenizer that does more than its backend."""
    from transformers import TokenizersBackend

    if not isinstance(tokenizer, TokenizersBackend) or tokenizer.split_special_tokens:
        return None
    kind = type(tokenizer)
    if any(getattr(kind, name) is not getattr(TokenizersBackend, name) for name in _PLAIN):
        return None
    if _cleans_up(tokenizer):
        return None
    special = tokenizer.special_tokens_map
    facts = {
        "chat_template": tokenizer.chat_template,
        "special_tokens_map": dict(special),
        "all_special_ids": list(tokenizer.all_special_ids),
        "clean_up_tokenization_spaces": bool(tokenizer.clean_up_tokenization_spaces),
        "model_max_length": int(tokenizer.model_max_length),
        **{
            role: getattr(tokenizer, f"{role}_token_id") if f"{role}_token" in special else None
            for role in _ROLES
        },
    }
    try:
        return facts if json.loads(json.dumps(facts)) == facts else None
    except (TypeError, ValueError):
        return None


def _digest(content: bytes) -> bytes:
    return hashlib.sha256(content).hexdigest().encode()


def _cleans_up(tokenizer: Any) -> bool:
    """Does decoding take blanks away? Not for BPE, whatever its configuration says."""
    forced = "clean_up_tokenization_spaces_for_bpe_even_though_it_will_corrupt_output"
    bpe = type(tokenizer.backend_tokenizer.model).__name__ == "BPE"
    return bool(tokenizer.clean_up_tokenization_spaces) and (
        not bpe or bool(getattr(tokenizer, forced, False))
    )
