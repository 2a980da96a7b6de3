"""The tokenizers of adapters that have their own: read when first asked for, and kept."""

from __future__ import annotations

import threading
from collections import OrderedDict
from pathlib import Path
from typing import Any

from adapters.checks.tokenizer import read_tokenizer
from adapters.manifest import AdapterManifest
from adapters.store import AdapterStore
from service.engine.vocabulary import Vocabulary

KEPT = 16  # a large one takes tens of megabytes


class OwnTokenizers:
    """From a version's manifest to its vocabulary. Thread-safe; `of` may take a second."""

    def __init__(self, store: AdapterStore, base: Any, ends: frozenset[int]) -> None:
        """`base` is the base's tokenizer, `ends` the tokens that end its answers."""
        self._store = store
        self._base = base
        self._ends = ends
        self._known: OrderedDict[str, Vocabulary] = OrderedDict()  # least recently used first
        self._lock = threading.Lock()

    def of(self, manifest: AdapterManifest) -> Vocabulary | None:
        """None where it reads and writes with the base's. Raises StoreUnavailable."""
        address = manifest.tokenizer_sha256
        if address is None:
            return None
        with self._lock:
            if address in self._known:
                self._known.move_to_end(address)
                return self._known[address]
        path = self._store.tokenizer_path(manifest)
        assert path is not None
        made = self._read(path)
        with self._lock:
            self._known[address] = made
            if len(self._known) > KEPT:
                self._known.popitem(last=False)
        return made

    def _read(self, path: Path) -> Vocabulary:
        """The file's tokens with the base's roles (bos, eos, ...), template and clean-up."""
        from transformers import PreTrainedTokenizerFast

        backend = read_tokenizer(path.read_bytes())
        base = self._base
        made = PreTrainedTokenizerFast(
            tokenizer_object=backend,
            clean_up_tokenization_spaces=base.clean_up_tokenization_spaces,
            chat_template=base.chat_template,
            model_max_length=base.model_max_length,
            **{name: token for name, token in base.special_tokens_map.items() if token},
        )
        made("x")  # the first call may change its truncation; all later ones only read it
        # A new token that is marked as special has no text, like the base's own.
        new = {i for i, t in backend.get_added_tokens_decoder().items() if t.special}
        known = set(base.get_vocab().values())
        special = frozenset(base.all_special_ids) | self._ends | frozenset(new - known)
        return Vocabulary(made, special)
