"""The checks: what each kind must do on one base, over the running application."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from adapters.manifest import AdapterManifest
from service.conformance.live import Live
from service.conformance.oracle import PeftOracle, relative_error
from service.conformance.recipes import RECIPES, make_adapter
from service.conformance.result import BOUND, Cell
from service.conformance.steps import Answered, Asked, Steps
from service.engine.request import AdapterRef

ROWS = 16  # of a mixed batch
TOKENS = 4  # of each output
_TEXT = "Once there was a "


@dataclass(slots=True)
class Subject:
    """One adapter of one kind on one base: saved by PEFT, uploaded over HTTP."""

    kind: str
    directory: Path
    base: Path
    manifest: AdapterManifest
    prompt: tuple[int, ...]
    mixed: Answered | None = None  # what it gave in a mixed batch

    @property
    def ref(self) -> AdapterRef:
        return AdapterRef.of(self.manifest)

    @property
    def asked(self) -> Asked:
        return Asked(self.prompt, self.ref)

    def oracle(self, merged: str | None = None) -> PeftOracle:
        return PeftOracle(self.base, self.directory, merged=merged)


def saved(live: Live, base: Path, home: Path, kind: str, number: int) -> Subject:
    """Let PEFT save a random adapter, and upload it."""
    directory = home / kind
    make_adapter(directory, base, kind, seed=number)
    manifest = live.upload(kind.replace("_", "-"), directory)
    generator = torch.Generator().manual_seed(number)
    vocabulary = manifest.vocabulary or live.serving.spec.vocab_size
    prompt = torch.randint(6, vocabulary, (3 + number * 5 % 17,), generator=generator)
    if RECIPES[kind].new_tokens:
        prompt[1] = vocabulary - 1
    if manifest.invocation:
        prompt = torch.cat([prompt[:3], torch.tensor(manifest.invocation), prompt[3:]])
    return Subject(kind, directory, base, manifest, tuple(prompt.tolist()))


def run_mixed(subjects: Sequence[Subject], live: Live, steps: Steps) -> None:
    """Batches of 16 rows of different kinds, until each kind has been in one. One row is the
    base's; where there are fewer kinds than rows, some come again with another prompt."""
    plain = of_base(subjects[0].prompt, live)
    for start in range(0, len(subjects), ROWS - 1):
        own = list(subjects[start : start + ROWS - 1])
        others = [s for s in subjects if s not in own] + own * ROWS
        fill = [replace(s.asked, prompt=s.prompt[::-1]) for s in others[: ROWS - 1 - len(own)]]
        answers = steps.together([*(s.asked for s in own), plain, *fill], TOKENS)
        assert steps.widest == ROWS, f"{steps.widest} of {ROWS} rows ran together"
        for subject, answer in zip(own, answers, strict=False):
            subject.mixed = answer


def of_base(prompt: Sequence[int], live: Live) -> Asked:
    """The prompt without an adapter; new tokens of one are others there."""
    vocabulary = live.serving.spec.vocab_size
    return Asked(tuple(token % vocabulary for token in prompt), None)


def isolation(subject: Subject, live: Live, steps: Steps) -> dict[str, Cell]:
    """`isolation` and `reload`: the row alone, from memory and after it has left memory."""
    assert subject.mixed is not None
    live.engine.forget(subject.manifest.digest)  # with the cached blocks of its prompt
    first = steps.alone(subject.asked, TOKENS)
    live.engine.forget(subject.manifest.digest)
    again = steps.alone(subject.asked, TOKENS)
    same = torch.equal(first.logits, again.logits) and first.tokens == again.tokens
    reload = Cell("pass" if same else "fail", relative_error(again.logits, first.logits))
    return {"isolation": _compared(subject.mixed, first), "reload": reload}


def _compared(got: Answered, want: Answered) -> Cell:
    if torch.equal(got.logits, want.logits):
        return Cell("pass", 0.0, "to the bit")
    if got.tokens != want.tokens:
        return Cell("fail", None, f"tokens {got.tokens}, alone {want.tokens}")
    return Cell.bounded(relative_error(got.logits, want.logits))


def equals_peft(subject: Subject, oracle: PeftOracle) -> Cell:
    """The mixed batch's row against PEFT alone, logits and greedy tokens."""
    assert subject.mixed is not None
    return against(oracle, subject.prompt, subject.mixed.tokens, subject.mixed.logits)


def against(
    oracle: PeftOracle,
    prompt: Sequence[int],
    tokens: Sequence[int],
    logits: torch.Tensor | None = None,
) -> Cell:
    """One forward pass of PEFT over prompt and output: by induction its own greedy loop.

    Where PEFT's two best logits are closer than the bound, either of them is right.
    """
    want = oracle.logits([*prompt, *tokens])[len(prompt) - 1 : -1]
    error = None if logits is None else relative_error(logits, want)
    for row, token in zip(want, tokens, strict=True):
        if float(row.max() - row[token]) > BOUND * float(row.abs().max()):
            return Cell("fail", error, f"token {token}, PEFT has {int(row.argmax())}")
    return Cell("pass") if error is None else Cell.bounded(error)


def merged(subject: Subject, live: Live, steps: Steps) -> Cell:
    """Merged in float32 against unmerged; the note says what bfloat16 costs, stated and found."""
    assert subject.mixed is not None
    if subject.manifest.virtual_tokens:
        return Cell.nothing("virtual tokens have no weights to merge")
    if subject.manifest.invocation:
        return Cell.nothing("it holds for a part of a sequence, which no merged weight does")
    own = replace(subject.ref, placement="merged", merged_dtype="float32")
    cell = _compared(steps.alone(Asked(subject.prompt, own), TOKENS), subject.mixed)
    half = replace(own, merged_dtype="bfloat16")
    stated = live.engine.load(half).notes.get("requantisation_error")
    if stated is None or cell.status == "fail":
        return cell
    first = steps.alone(Asked(subject.prompt, half), 1).logits
    found = relative_error(first, subject.mixed.logits[:1])
    note = f"in bfloat16 the weights are {stated:.1e} off, the logits {found:.1e}"
    return replace(cell, note=note)


def begins_as_base(kind: str, live: Live, steps: Steps, base: Path, home: Path) -> Cell:
    """An adapter as PEFT initialises it."""
    if why := RECIPES[kind].begins_random:
        return Cell.nothing(why)
    directory = make_adapter(home / f"{kind}-zero", base, kind, zero=True, over_nf4=True)
    manifest = live.upload(f"{kind.replace('_', '-')}-zero", directory)
    prompt = tuple(range(7, 18))
    pair = [Asked(prompt, AdapterRef.of(manifest)), Asked(prompt, None)]
    ours, plain = steps.together(pair, TOKENS)
    return _compared(ours, plain)


def round_trip(subject: Subject, live: Live, oracle: PeftOracle) -> Cell:
    """Over HTTP, from text to text."""
    text = _TEXT + subject.kind
    if RECIPES[subject.kind].new_tokens:
        text += " <new1> of"
    prompt, tokens, digest = live.generate(subject.manifest.name, text, TOKENS)
    if RECIPES[subject.kind].new_tokens and max(prompt) < live.serving.spec.vocab_size:
        return Cell("fail", None, "no new token in the prompt")
    if digest != subject.manifest.digest:
        return Cell("fail", None, f"the reply names {digest[:12]}")
    return against(oracle, prompt, tokens)
