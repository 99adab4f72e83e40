"""What the stages hand to each other: request -> policy -> probe -> score -> route -> merge -> commit -> radix.

Letters in shapes: S entries of the span that is compressed, B of them kept, N = S - B dropped, H query heads,
G KV heads, r = H / G, d head size, t probe tokens, C entries before the probe, m targets of a dropped entry.
"""

import enum
from collections.abc import Callable
from typing import Any, NamedTuple, Protocol

import torch

Embed = Callable[[torch.Tensor], torch.Tensor]  # [n] int64 token ids to [n, D]


class Bypass(enum.StrEnum):
    """Why a request is served uncompressed; the value is what ``metasoft_bypass`` reports, ``why`` its meaning."""

    why: str

    def __new__(cls, value: str, why: str):
        member = str.__new__(cls, value)
        member._value_ = value
        member.why = why
        return member

    TOO_SHORT = "too_short", "has fewer tokens to compress than min_tokens"
    NOTHING_TO_DROP = "nothing_to_drop", "may keep as many entries as it has"
    SLIDING_WINDOW = "sliding_window", "is not yet twice the model's sliding window, of which every entry stays"
    OPTED_OUT = "opted_out", "asked for metasoft_ratio or metasoft_budget 1"
    PROMPT_LOGPROBS = "prompt_logprobs", "asks for log-probabilities of prompt tokens that would be compressed"
    MULTIMODAL = "multimodal", "carries images, audio or video"
    INPUT_EMBEDS = "input_embeds", "gives embeddings in place of tokens"
    EMBED_OVERRIDES = "embed_overrides", "replaces embeddings at some positions"
    SESSION = "session", "belongs to an opened session, which keeps raw KV rows"
    LORA = "lora", "uses a LoRA adapter that changes the embedding table"
    BEAM_SEARCH = "beam_search", "decodes several beams over one row"
    CUSTOM_LOGIT_PROCESSOR = "custom_logit_processor", "has a processor that may read prompt ids"
    WATERMARK = "watermark", "is watermarked, which reads prompt ids"
    ROUTED_EXPERTS = "routed_experts", "asks for the experts or indices of each prompt token"
    SHARED_WINDOW = "shared_window", "found its own window in the tree already, so that its slots cannot move"
    WEIGHTS = "weights", "came while the model's weights, after an update, did not fit the trained compressor"
    NO_FREE_SLOTS = "no_free_slots", "came when the pool had no room for the consolidated entries"
    FAULT = "fault", "met a fault in a stage; the server's log has it"


class BypassLifetime(enum.IntEnum):
    """How long a bypass holds; of several the longest counts."""

    PLAN = 0  # until the next span is planned
    CHUNK = 1  # of one chunk of a prefill: the next one tries again
    SCHEDULE = 2  # until the request is scheduled anew
    REQUEST = 3


class ModelShape(NamedTuple):
    """The model, as far as a compressor has to know it. Counts are of the whole model, not of one rank."""

    name: str
    vocab_size: int
    hidden_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int


class Plan(NamedTuple):
    """What to compress of one request; follows from lengths alone, so the host knows it without the GPU.

    The request's row holds ``start_slots`` entries of earlier segments, then the span, then the raw tail.
    """

    start_slots: int  # entries before the span in the request's row
    span_tokens: int  # raw entries to compress (S), a multiple of the page
    kept_slots: int  # entries they become (B), a multiple of the page, B <= S
    sink_tokens: int  # first entries of the span that are always kept
    ends_at_boundary: bool = False  # the span is meant for other prompts too: nothing after it may shape it

    @property
    def end_slots(self) -> int:
        """Row index just past the span, before compression."""
        return self.start_slots + self.span_tokens

    @property
    def saved_slots(self) -> int:
        """Slots that the compression frees; also what the position offset grows by."""
        return self.span_tokens - self.kept_slots


class Prompt(NamedTuple):
    """One prompt to probe."""

    span_ids: torch.Tensor  # [S] int64, token ids of the span
    tail_ids: torch.Tensor  # [window] int64, token ids after it; [0] if the span ends at a boundary
    context_slots: int  # entries in the request's row
    context_tokens: int  # logical length they stand for

    def last_ids(self, window: int) -> torch.Tensor:
        """The last ``window`` tokens before the probe: of the tail, or of the span where that has none."""
        return (self.tail_ids if self.tail_ids.numel() else self.span_ids)[-window:]

    def last_raw_ids(self, tokens: int) -> torch.Tensor:
        """The last ``tokens`` tokens before the probe that are still raw: the tail and, before it, the span."""
        return torch.cat([self.span_ids, self.tail_ids])[-tokens:]


class Probe(NamedTuple):
    """The tokens that probe one prompt."""

    embeds: torch.Tensor  # [t, D]
    context_slots: int  # entries of the row that they see (C)
    first_position: int  # logical position of the first; the others follow
    ranking_tokens: int | None = None  # the first of them, which rank; the others are there for a refit. None: all
    consolidation_inputs: Any = None  # what the consolidation has noted of the prompt, for itself alone
    method_inputs: Any = None  # the same of the method


class LayerPool(NamedTuple):
    """One layer of the token-to-KV pool."""

    key: torch.Tensor  # [slots, G, d]
    value: torch.Tensor  # [slots, G, d]
    scale: float  # factor on q.k
    key_scale: float  # what quantized entries are multiplied by on reading
    value_scale: float
    window_tokens: int | None = None  # a token of this layer sees itself and so many less one before it; None: all


class Rope(NamedTuple):
    """The model's rotary position embedding."""

    cos_sin: torch.Tensor  # [positions, rotated] cosines, then sines
    is_neox: bool  # a dimension turns with the one half the rotated width away, else with its neighbour


class LayerKind(enum.StrEnum):
    """What a layer's tokens attend to."""

    FULL = "full"  # every earlier token, by plain softmax
    WINDOW = "window"  # the last few tokens alone
    OTHER = "other"


class Turning(enum.StrEnum):
    """How a layer's queries depend on their position."""

    ROPE = "rope"  # turned by the layer's rotary embedding, and by nothing else
    NONE = "none"  # not at all (NoPE)
    OTHER = "other"  # scaled by it, or changed after they were turned


class AttentionLayer(NamedTuple):
    """One attention layer of a model, as it was built; a model's layers are counted by their order among these."""

    kind: LayerKind
    num_heads: int  # of this rank
    num_kv_heads: int  # of this rank
    head_dim: int
    value_dim: int
    window_tokens: int | None = None  # a token sees itself and so many less one before it
    soft_cap: float = 0.0  # logits are capped by a tanh; 0: they are not
    has_sinks: bool = False  # logits of its own share in the softmax
    turning: Turning = Turning.ROPE
    rope: Rope | None = None  # of queries that are turned by it

    @property
    def peculiarity(self) -> str | None:
        """In words, what is not plain causal attention of equal heads, in a window or not; None: nothing."""
        if self.kind is LayerKind.OTHER:
            return "is not causal self-attention"
        if self.soft_cap:
            return f"caps its logits at {self.soft_cap:g}"
        if self.has_sinks:
            return "has attention sinks of its own"
        if self.value_dim != self.head_dim:
            return f"has keys of size {self.head_dim} and values of size {self.value_dim}"
        return None


def longest_window(layers: list[AttentionLayer]) -> int | None:
    """Tokens of the longest window; None: every layer sees all tokens."""
    return max((layer.window_tokens for layer in layers if layer.window_tokens is not None), default=None)


class ServedModel(Protocol):
    """What a method or a consolidation may ask of the loaded model before the first prompt."""

    def layers(self) -> list[AttentionLayer]:
        """The attention layers in order, and how the queries of each were seen to depend on their position."""

    def encode(self, text: str) -> list[int]:
        """Token ids of a text. Raises ValueError if the server has no tokenizer."""

    def queries(self, ids: torch.Tensor) -> list[torch.Tensor]:
        """Run ``[n]`` token ids through the model: for each layer ``[n, H, d]`` queries after RoPE, of this rank."""


class Job(NamedTuple):
    """One request's compression: where its entries lie and where the consolidated ones go."""

    plan: Plan
    probe: Probe
    context_slots: torch.Tensor  # [C] int64, the slots that the probe sees
    span_slots: torch.Tensor  # [S] int64
    new_slots: torch.Tensor  # [B] int64
    lora_id: str | None = None  # the adapter that the probe runs under; None: the base model


class LayerView(NamedTuple):
    """What a method may look at to score one layer of a span."""

    job: Job
    pool: LayerPool
    q: torch.Tensor  # [t, H, d] of the probe tokens, RoPE included; t = 0 if nothing probes
    lse: torch.Tensor  # [t, H] float32, log-sum-exp over everything that a probe token sees
    layer: int
    first_kv_head: int = 0  # of this rank, among the model's

    @property
    def seen_tokens(self) -> int:
        """Span entries before the first probe token; probe token j sees ``seen_tokens + j + 1`` of them, at most S."""
        return self.job.probe.context_slots - self.job.plan.start_slots


class Scores(NamedTuple):
    """What a layer's span entries are worth."""

    importance: torch.Tensor  # [G, S] float32: the best are kept
    mass: torch.Tensor | None = None  # [G, S] float32 >= 0: attention an entry stands for; None: its importance


class Routes(NamedTuple):
    """Which entries stay and where the rest flows; indices count from the start of the span."""

    kept: torch.Tensor  # [G, B] int64, ascending
    dropped: torch.Tensor  # [G, N] int64, ascending
    targets: torch.Tensor  # [G, N, m] int64, index into the B kept entries
    weights: torch.Tensor  # [G, N, m] float32, rows sum to 1


class MergedKV(NamedTuple):
    """The consolidated entries of one layer, in the pool's layout: ``[B, G, d]`` each."""

    key: torch.Tensor
    value: torch.Tensor
