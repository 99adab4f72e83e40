"""The settings of one server: their defaults, allowed values and help texts, in one table.

Command-line flags, ``sgl.Engine`` keywords, ``--metasoft-config`` JSON and the per-request fields are all
generated from :class:`MetaSoftConfig`, so a setting is described and checked in one place.
"""

import dataclasses
import json
import math
import multiprocessing.context
import secrets
from collections.abc import Callable
from typing import Any

BACKEND_NAME = "metasoft"  # of the radix cache, among SGLang's
AUTO = "auto"  # a method that depends on what is found for the model: sglang_metasoft.methods.auto
METHODS = {  # loaded lazily by sglang_metasoft.methods.load_method
    "metasoft": "sglang_metasoft.methods.metasoft:MetaSoft",
    "judge_q": "sglang_metasoft.methods.judge_q:JudgeQ",
    "snapkv": "sglang_metasoft.methods.snapkv:SnapKV",
    "h2o": "sglang_metasoft.methods.h2o:H2O",
    "streaming_llm": "sglang_metasoft.methods.streaming_llm:StreamingLLM",
    "chunkkv": "sglang_metasoft.methods.chunkkv:ChunkKV",
    "q_filters": "sglang_metasoft.methods.q_filters:QFilters",
    "kvcompose": "sglang_metasoft.methods.kvcompose:KVCompose",
    "nestedkv": "sglang_metasoft.methods.nestedkv:NestedKV",
    "expected_attention": "sglang_metasoft.methods.expected_attention:ExpectedAttention",
    "keydiff": "sglang_metasoft.methods.keydiff:KeyDiff",
    "snapkv_keydiff": "sglang_metasoft.methods.snapkv_keydiff:SnapKVKeyDiff",
    "random": "sglang_metasoft.methods.random_choice:RandomChoice",
}
CONSOLIDATIONS = {  # loaded lazily by sglang_metasoft.consolidations.load_consolidation
    "none": "sglang_metasoft.consolidations.none:Drop",
    "attention_flow": "sglang_metasoft.consolidations.attention_flow:AttentionFlow",
    "key_bias": "sglang_metasoft.consolidations.key_bias:KeyBias",
    "zeromerge": "sglang_metasoft.consolidations.zeromerge:ZeroMerge",
    "tome": "sglang_metasoft.consolidations.tome:ToMe",
    "least_squares": "sglang_metasoft.consolidations.least_squares:LeastSquares",
}
KERNELS = ("auto", "torch", "triton")
NO_COMPRESSION = 1
NUMBER_LIMIT = 2**63  # what a request carries must fit SGLang's messages between processes
SHOWN_CHARS = 200


def setting(default: Any, *, flag: str | None, allowed: str, check: Callable[[Any], bool], help: str) -> Any:
    """A field with its command-line flag (None: JSON only), the allowed values in words, and their check."""
    metadata = {"flag": flag, "allowed": allowed, "check": check, "help": help}
    return dataclasses.field(default=default, metadata=metadata)


def _is_ratio(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and 1 <= value < NUMBER_LIMIT


def _is_number_from(low: float, high: float) -> Callable[[Any], bool]:
    return lambda value: isinstance(value, int | float) and not isinstance(value, bool) and low <= value <= high


_is_share = _is_number_from(0, 1)


def is_int_from(low: int, below: float = math.inf) -> Callable[[Any], bool]:
    return lambda value: isinstance(value, int) and not isinstance(value, bool) and low <= value < below


def _or_none(check: Callable[[Any], bool]) -> Callable[[Any], bool]:
    return lambda value: value is None or check(value)


def _is_text(value: Any) -> bool:
    return isinstance(value, str) and value != ""


def _is_bool(value: Any) -> bool:
    return isinstance(value, bool)


@dataclasses.dataclass(frozen=True)
class MetaSoftConfig:
    """Settings of the compressor, validated on construction.

    Raises:
        ValueError: a value is outside its allowed range; the message names both.
    """

    ratio: float = setting(
        4.0,
        flag="--metasoft-ratio",
        allowed="a number >= 1 and < 2**63 (1 keeps every entry)",
        check=_is_ratio,
        help="Prompt tokens per kept KV entry, the raw window counted as kept.",
    )
    budget: int | None = setting(
        None,
        flag="--metasoft-budget",
        allowed="an integer >= 1 and < 2**63",
        check=_or_none(is_int_from(1, NUMBER_LIMIT)),
        help="Kept KV entries per prompt, what stays raw included, but at least 16 of each span, and a model's "
        "sliding window; overrides the ratio.",
    )
    min_tokens: int = setting(
        512,
        flag="--metasoft-min-tokens",
        allowed="an integer >= 1",
        check=is_int_from(1),
        help="A span shorter than this many tokens stays raw.",
    )
    window: int = setting(
        64,
        flag="--metasoft-window",
        allowed="an integer >= 1",
        check=is_int_from(1),
        help="Last prompt tokens that always stay raw.",
    )
    sink: int = setting(
        4,
        flag="--metasoft-sink",
        allowed="an integer >= 0",
        check=is_int_from(0),
        help="First prompt tokens that are always kept.",
    )
    method: str = setting(
        AUTO,
        flag="--metasoft-method",
        allowed=f"one of: {', '.join((AUTO, *METHODS))}",
        check=lambda value: isinstance(value, str) and value in (AUTO, *METHODS),
        help="How the importance of a KV entry is measured; auto: as the model's compressor was trained for, and where "
        "none is found by a method that needs no training.",
    )
    path: str | None = setting(
        None,
        flag="--metasoft-path",
        allowed="a directory or a hub id (name or name@revision)",
        check=_or_none(_is_text),
        help="Trained compressor: a directory or hub id with config.json and model.safetensors; name@revision pins a "
        "branch, tag or commit of the hub. "
        "Without it one that was fitted on this machine is taken, else one that ships, if it was made for this model.",
    )
    fit: bool = setting(
        False,
        flag="--metasoft-fit",
        allowed="true or false",
        check=_is_bool,
        help="Where no compressor is found for the model, fit one before the server starts (sglang-metasoft fit), at "
        "most in an hour; later starts find it.",
    )
    keep_raw: bool = setting(
        True,
        flag="--metasoft-keep-raw",
        allowed="true or false",
        check=_is_bool,
        help="Leave the raw KV of a compressed span in the radix tree, unlocked and first to be evicted, "
        "so that another prompt over the same document still hits it.",
    )
    during_prefill: bool = setting(
        False,
        flag="--metasoft-during-prefill",
        allowed="true or false",
        check=_is_bool,
        help="With chunked prefill, compress after each chunk, so that a prompt may be longer than the free "
        "pool, and admit prompts at their compressed size.",
    )
    fidelity_sample: float = setting(
        0.0,
        flag="--metasoft-fidelity-sample",
        allowed="a number from 0 to 1",
        check=_is_share,
        help="Share of the requests of which the next token's distribution over the compressed prompt is compared with "
        "that over the full one, for the metric sglang:metasoft_fidelity_kl (with --enable-metrics).",
    )
    consolidation: str | None = setting(
        None,
        flag=None,
        allowed=f"one of: {', '.join(CONSOLIDATIONS)}",
        check=_or_none(lambda value: isinstance(value, str) and value in CONSOLIDATIONS),
        help="What happens to dropped entries. Default: the method's own.",
    )
    soft_tokens: int = setting(
        32,
        flag=None,
        allowed="an integer from 1 to 1024",
        check=lambda value: is_int_from(1)(value) and value <= 1024,
        help="Soft tokens of the untrained probe; a trained compressor brings its own number.",
    )
    route_targets: int = setting(
        4,
        flag=None,
        allowed="an integer from 1 to 64",
        check=lambda value: is_int_from(1)(value) and value <= 64,
        help="Kept entries that each dropped entry flows into (m).",
    )
    route_band: int = setting(
        4096,
        flag=None,
        allowed="an integer >= 1",
        check=is_int_from(1),
        help="Kept entries, the nearest in position, among which a dropped one finds those that it flows into.",
    )
    reread_tokens: int = setting(
        128,
        flag=None,
        allowed="an integer from 0 to 65536",
        check=lambda value: is_int_from(0)(value) and value <= 65536,
        help="Prompt tokens that run through the model once more behind the probe, for a consolidation that refits "
        "values (least_squares; others read none): whole runs of 64, one at least, else an eighth of the span at most.",
    )
    gate_scale: float | None = setting(
        None,
        flag=None,
        allowed="a number from 0 to 1",
        check=_or_none(_is_share),
        help="Factor on the attention flow's gate in every layer and head. Default: the method's own.",
    )
    pool_kernel: int = setting(
        5,
        flag=None,
        allowed="an odd integer from 1 to 63",
        check=lambda value: is_int_from(1)(value) and value % 2 == 1 and value <= 63,
        help="Width of SnapKV's average pooling over neighbouring entries.",
    )
    observed_tokens: int = setting(
        1024,
        flag=None,
        allowed="an integer from 1 to 65536",
        check=lambda value: is_int_from(1)(value) and value <= 65536,
        help="Last prompt tokens that h2o, kvcompose and expected_attention run through the model once more.",
    )
    index_tokens: int = setting(
        16_777_216,
        flag=None,
        allowed="an integer >= 1",
        check=is_int_from(1),
        help="Prompt tokens that the index of compressed prefixes remembers, what several have in common once (8 bytes "
        "each, and 8 for each kept entry; least recently used first out).",
    )
    kernels: str = setting(
        "auto",
        flag=None,
        allowed=f"one of: {', '.join(KERNELS)}",
        check=lambda value: isinstance(value, str) and value in KERNELS,
        help="What runs the stages: fused kernels on CUDA and torch elsewhere (auto), torch everywhere, or our own "
        "Triton kernels alone (on a CPU only with TRITON_INTERPRET=1, for tests).",
    )
    fit_minutes: float = setting(
        25.0,
        flag=None,
        allowed="a number from 2 to 60",
        check=_is_number_from(2, 60),
        help="Time that --metasoft-fit uses, the loading of the model not counted.",
    )
    trace_dir: str | None = setting(
        None,
        flag=None,
        allowed="a directory",
        check=_or_none(_is_text),
        help="Write kept indices and compressed KV of every compression there. For verification only: slow.",
    )
    secret: str = dataclasses.field(default_factory=lambda: secrets.token_hex(16), repr=False)

    def __post_init__(self) -> None:
        for name, field in settings_of(type(self)).items():
            check_setting(name, getattr(self, name), field)

    def __getstate__(self) -> dict[str, Any]:
        """Pickled, as in SGLang's crash dumps, it has no secret; a process that we are starting gets it."""
        is_spawning = multiprocessing.context.get_spawning_popen() is not None
        return self.__dict__ if is_spawning else self.__dict__ | {"secret": ""}

    def __copy__(self) -> "MetaSoftConfig":
        return self  # it is frozen

    def __deepcopy__(self, memo: dict) -> "MetaSoftConfig":
        return self

    def describe(self) -> str:
        """One line of ``name=value`` for the start-up log; the secret stays out of it."""
        return " ".join(f"{name}={getattr(self, name)}" for name in settings_of(type(self)))


def settings_of(cls: type = MetaSoftConfig) -> dict[str, dataclasses.Field]:
    """The user-visible fields by name."""
    return {field.name: field for field in dataclasses.fields(cls) if field.metadata}


def shown(value: Any) -> str:
    """``repr(value)`` for an error message: of bounded length, and without an exception of its own."""
    try:
        text = repr(value)
    except (ValueError, RecursionError):  # more digits or deeper nesting than Python prints
        return f"<{type(value).__name__}>"
    return text if len(text) <= SHOWN_CHARS else f"{text[:SHOWN_CHARS]}..."


def check_setting(name: str, value: Any, field: dataclasses.Field) -> None:
    """Raise ValueError, naming the value and the allowed ones, unless ``value`` suits the setting."""
    if not field.metadata["check"](value):
        raise ValueError(f"metasoft {name}: {shown(value)} is not allowed; allowed: {field.metadata['allowed']}")


def read_config_json(text: str) -> dict[str, Any]:
    """Parse ``--metasoft-config``.

    Args:
        text: a JSON object with the setting names as keys.

    Raises:
        ValueError: not a JSON object, an unknown key, or a value out of range.
    """
    try:
        values = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ValueError(
            f"--metasoft-config: {shown(text)} is not JSON ({error}); allowed: an object with the keys "
            f"{', '.join(settings_of())}"
        ) from None
    return check_config(values)


def check_config(values: Any) -> dict[str, Any]:
    """Return the object of ``--metasoft-config``, checked.

    Raises:
        ValueError: not a dictionary, an unknown key, or a value out of range.
    """
    settings = settings_of()
    if not isinstance(values, dict):
        raise ValueError(
            f"--metasoft-config must be a JSON object, got {shown(values)}; allowed: the keys {', '.join(settings)}"
        )
    for name, value in values.items():
        if name not in settings:
            raise ValueError(f"--metasoft-config: unknown key {shown(name)}; allowed: {', '.join(settings)}")
        check_setting(name, value, settings[name])
    return values
