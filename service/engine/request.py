"""What a user asked, and what comes back: the only nouns that HTTP and engine share. No torch."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal, NamedTuple

from adapters.manifest import DEFAULT_TENANT, AdapterManifest, MergedDtype, Placement
from service.errors import ServiceError

if TYPE_CHECKING:
    from service.engine.guide import Guide
    from service.engine.vocabulary import Vocabulary

NEVER = 1 << 62  # a place that no sequence reaches

FinishReason = Literal["eos_token", "length", "stop_sequence", "cancelled", "error"]


@dataclass(frozen=True, slots=True)
class Sampling:
    """How the next token is chosen. Bounds are checked at the wire, not here."""

    do_sample: bool = False
    temperature: float = 1.0
    top_k: int = 0  # 0: off
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    seed: int | None = None
    stop: tuple[str, ...] = ()
    stop_token_ids: tuple[int, ...] = ()
    max_new_tokens: int = 128
    min_new_tokens: int = 0
    ignore_eos: bool = False
    top_logprobs: int = 0  # how many alternatives to report beside the chosen token
    logit_bias: tuple[tuple[int, float], ...] = ()  # (token, added to its logit)
    guide: Guide | None = None  # what the output must look like


def full_name(name: str, tenant: str) -> str:
    """What metrics and logs call an adapter: names are a tenant's own."""
    return name if tenant == DEFAULT_TENANT else f"{tenant}/{name}"


class AdapterKey(NamedTuple):
    """What an adapter is for the engine: one slot, and one namespace of the prefix cache.

    Two names of one digest share it; two placements, or two dtypes of merged weights, do not,
    since each gives other logits.
    """

    digest: str
    placement: str
    merged_dtype: str  # "" when unmerged


@dataclass(frozen=True, slots=True)
class AdapterRef:
    """The adapter that a request is pinned to: a digest, never a name."""

    digest: str
    name: str
    placement: Placement = "unmerged"
    merged_dtype: MergedDtype = "bfloat16"  # read when merged
    parts: tuple[tuple[str, float], ...] = ()  # of a sum: the digest and weight of each part
    virtual_tokens: int = 0  # that stand before every prompt
    vocabulary: int = 0  # tokens that it knows; 0: the base's
    invocation: tuple[int, ...] = ()  # tokens that activate it; none: it is from the start

    @classmethod
    def of(cls, manifest: AdapterManifest, tenant: str = DEFAULT_TENANT) -> AdapterRef:
        """What the engine is asked for when a request of `tenant` names this version."""
        return cls(
            manifest.digest,
            full_name(manifest.name, tenant),
            manifest.placement,
            manifest.merged_dtype,
            virtual_tokens=manifest.virtual_tokens,
            vocabulary=manifest.vocabulary,
            invocation=manifest.invocation,
        )

    @property
    def key(self) -> AdapterKey:
        merged = self.merged_dtype if self.placement == "merged" else ""
        return AdapterKey(self.digest, self.placement, merged)


@dataclass(frozen=True, slots=True)
class Request:
    """One generation. `n` > 1 makes n sequences over one prompt (seeds seed, seed+1, …)."""

    id: str
    prompt: tuple[int, ...]  # token ids
    sampling: Sampling = field(default_factory=Sampling)
    adapter: AdapterRef | None = None
    n: int = 1
    tenant: str = ""  # salt of the cache key
    prompt_logprobs: bool = False  # with `sampling.top_logprobs` alternatives each
    pooled: bool = False  # reply the last token's hidden state
    prompt_lookup_num_tokens: int = 0  # most tokens of a draft; 0: no speculation
    vocabulary: Vocabulary | None = None  # of an adapter with a tokenizer of its own
    streamed: bool = True  # are its tokens wanted as they come?

    @property
    def active_from(self) -> int:
        """The first token that its adapter sees: where its invocation stands last in the prompt
        (aLoRA: Greenewald et al. 2025, arXiv 2504.12397). What comes before is the base's."""
        wanted = self.adapter.invocation if self.adapter else ()
        if not wanted:
            return 0
        for start in range(len(self.prompt) - len(wanted), -1, -1):
            if self.prompt[start : start + len(wanted)] == wanted:
                return start
        return NEVER


@dataclass(frozen=True, slots=True)
class Token:
    """One generated token of sequence `index`. `text` may be empty while a character or a
    possible stop string is incomplete; the texts of a sequence join to its whole output."""

    index: int
    id: int
    text: str
    logprob: float
    special: bool = False
    top: tuple[tuple[int, str, float], ...] = ()  # (id, text, logprob), best first
    last: bool = False  # its sequence's `Finished` follows at once


@dataclass(frozen=True, slots=True)
class Finished:
    """The end of sequence `index`; `text` is its whole output, stop string removed."""

    index: int
    reason: FinishReason
    text: str
    prompt_tokens: int
    cached_tokens: int  # prompt tokens that came from the prefix cache
    generated_tokens: int
    error: ServiceError | None = None
    queue_seconds: float = 0.0
    prefill_seconds: float = 0.0
    decode_seconds: float = 0.0
    tail: str = ""  # text held back until now, when no last token carries it (cancelled, error)
    prompt_logprobs: tuple[float, ...] = ()  # of prompt tokens 1, 2, …, when they were asked for
    seed: int = 0
    draft_tokens: int = 0  # that were guessed and computed
    accepted_tokens: int = 0  # of these, that are in the output
    # As many as prompt_logprobs: (id, logprob), best first, when alternatives were asked for.
    prompt_top: tuple[tuple[tuple[int, float], ...], ...] = ()
    hidden: tuple[float, ...] = ()  # of the prompt's last token, behind the last norm, if pooled


Event = Token | Finished
