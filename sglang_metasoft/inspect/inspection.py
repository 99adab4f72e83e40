"""One prompt, compressed at several ratios, with all that the page shows of it."""

import gzip
from typing import NamedTuple

import numpy as np
import torch
from torch.nn.functional import pad

from sglang_metasoft.config import MetaSoftConfig
from sglang_metasoft.inspect.inspected_model import Answer, CompressedLayer, InspectedModel
from sglang_metasoft.inspect.prompt import InspectedPrompt
from sglang_metasoft.pipeline.plan import plan_span
from sglang_metasoft.types import Bypass, Plan

LOG2_FLOOR = -63.0  # importance below 2**-63 is shown as none
LOG2_STEPS = 1024  # codes per factor of 2
STEPS_PER_OCTAVE = 8
WEIGHT_STEPS = 255


class Result(NamedTuple):
    """The prompt at one ratio. LH counts layers times KV heads."""

    ratio: float
    plan: Plan
    targets: np.ndarray  # [LH, N, m] uint16 or uint32, index into the kept entries
    weights: np.ndarray  # [LH, N, m] uint8, in 1/255
    answer: Answer


class Inspection(NamedTuple):
    """What the page is made of."""

    title: str
    facts: dict  # name to text, for the head of the page
    prompt: InspectedPrompt
    num_layers: int
    num_kv_heads: int
    kv_bytes_per_entry: int
    importance: np.ndarray  # [LH, S] uint16: see encode_importance
    rank: np.ndarray  # [LH, S] uint16 or uint32: 0 is kept first; kept at B entries are the ranks below B
    gate_scale: np.ndarray  # [LH] float32
    steps: list[tuple[float, int]]  # ratios of the slider, and kept entries of the span there
    results: list[Result]
    plain: Answer
    answer_texts: list[str]  # of the results, then of the plain answer


def check_lengths(
    prompt: InspectedPrompt, config: MetaSoftConfig, ratios: list[float], limit: int | None,
    sliding_window_tokens: int | None,
) -> None:  # fmt: skip
    """Raise ValueError, with the policy's reason, unless the prompt is compressed at every ratio and fits the model.

    Args:
        limit: tokens that the model takes, the answer's already subtracted.
        sliding_window_tokens: of the model, as :func:`sglang_metasoft.pipeline.plan.plan_span` takes them.
    """
    count = len(prompt.ids)
    if limit is not None and count > limit:
        raise ValueError(f"the prompt has {count} tokens; the model takes {limit} beside the answer")
    for ratio in ratios:
        _plan(config, count, ratio, sliding_window_tokens)


def inspect(
    title: str, facts: dict, model: InspectedModel, config: MetaSoftConfig, prompt: InspectedPrompt,
    ratios: list[float], new_tokens: int, progress,
) -> Inspection:  # fmt: skip
    """Compress and answer at every ratio.

    Args:
        ratios: ascending, each more than 1; :func:`check_lengths` has passed.
        new_tokens: of an answer, at most.
        progress: called with a line of text before each long step.
    """
    method = model.make_method(config)
    facts = facts | {"method": f"{method.config.method}: {method.description}"}
    count, window = len(prompt.ids), model.sliding_window_tokens
    progress(f"prefill of {count} tokens")
    cache, first = model.prefill(prompt.ids)
    progress("answer without compression")
    plain = model.answer(cache, count, first, new_tokens, None)
    results: list[Result] = []
    ranking: _Ranking | None = None
    for ratio in ratios:
        progress(f"compression and answer at ratio {ratio:g}")
        plan = _plan(config, count, ratio, window)
        layers = model.compress(cache, prompt.ids, plan, method)
        ranking = ranking or _Ranking.of(layers, plan.sink_tokens)
        _check_nested(ranking.rank, plan, layers, ratio)
        answer = model.answer(model.compressed_cache(cache, plan, layers), count, first, new_tokens, plain.ids)
        results.append(_result(ratio, plan, layers, answer, ranking.rank.dtype))
    assert ranking is not None  # there is at least one ratio
    return Inspection(
        title=title,
        facts=facts,
        prompt=prompt,
        num_layers=model.shape.num_layers,
        num_kv_heads=model.shape.num_kv_heads,
        kv_bytes_per_entry=model.kv_bytes_per_entry,
        importance=encode_importance(ranking.importance),
        rank=ranking.rank,
        gate_scale=ranking.gate_scale,
        steps=_steps(config, count, ratios, window),
        results=results,
        plain=plain,
        answer_texts=[
            model.tokenizer.decode(answer.ids, skip_special_tokens=True).strip()
            for answer in (*(result.answer for result in results), plain)
        ],
    )


class _Ranking(NamedTuple):
    """What is the same at every ratio. LH counts layers times KV heads."""

    importance: np.ndarray  # [LH, S] float32
    rank: np.ndarray  # [LH, S] uint16 or uint32
    gate_scale: np.ndarray  # [LH] float32

    @classmethod
    def of(cls, layers: list[CompressedLayer], sink_tokens: int) -> "_Ranking":
        importance = torch.cat([layer.importance for layer in layers]).cpu()
        gate_scale = torch.cat([layer.gate_scale for layer in layers])
        sinks = torch.tensor([0 if layer.is_window else sink_tokens for layer in layers])
        ranks = _rank(importance, sinks.repeat_interleave(len(importance) // len(layers)))
        return cls(importance.numpy(), ranks, gate_scale.numpy())


def _plan(config: MetaSoftConfig, prompt_tokens: int, ratio: float, sliding_window_tokens: int | None) -> Plan:
    plan = _plan_or_reason(config, prompt_tokens, ratio, sliding_window_tokens)
    if plan is Bypass.TOO_SHORT:
        raise ValueError(
            f"the prompt has {prompt_tokens} tokens and is not compressed: {plan.value} (the {prompt_tokens} less the "
            f"window of {config.window} must be at least min_tokens, {config.min_tokens})"
        )
    if plan is Bypass.SLIDING_WINDOW:
        raise ValueError(
            f"the prompt has {prompt_tokens} tokens and is not compressed: {plan.value} (the {prompt_tokens} less the "
            f"window of {config.window} must be at least twice the model's sliding window of {sliding_window_tokens})"
        )
    if not isinstance(plan, Plan):
        raise ValueError(f"the prompt of {prompt_tokens} tokens is not compressed at ratio {ratio:g}: {plan.value}")
    return plan


def _plan_or_reason(
    config: MetaSoftConfig, prompt_tokens: int, ratio: float, sliding_window_tokens: int | None
) -> Plan | Bypass:
    return plan_span(
        config, prompt_tokens=prompt_tokens, page_size=1, options={"ratio": ratio},
        sliding_window_tokens=sliding_window_tokens,
    )  # fmt: skip


def _steps(
    config: MetaSoftConfig, prompt_tokens: int, ratios: list[float], sliding_window_tokens: int | None
) -> list[tuple[float, int]]:
    """Ratios of the slider, the computed ones among them, with what the policy keeps of the span."""
    top = int(np.log2(max(ratios)) * STEPS_PER_OCTAVE)
    between = {2 ** (step / STEPS_PER_OCTAVE) for step in range(1, top + 1)}
    plans = {
        ratio: _plan_or_reason(config, prompt_tokens, ratio, sliding_window_tokens)
        for ratio in sorted(between | set(ratios))
    }
    return [(ratio, plan.kept_slots) for ratio, plan in plans.items() if isinstance(plan, Plan)]


def encode_importance(importance: np.ndarray) -> np.ndarray:
    """uint16: 0 is none, else ``1 + 1024 * (log2(a) + 63)``; the largest error is a factor of ``2**(1/2048)``."""
    exponents = np.log2(np.maximum(importance, np.float32(2.0**LOG2_FLOOR)), dtype=np.float32)
    codes = 1 + np.rint((exponents - LOG2_FLOOR) * LOG2_STEPS)
    return np.where(importance < 2.0**LOG2_FLOOR, 0, np.minimum(codes, 65535)).astype(np.uint16)


def _rank(importance: torch.Tensor, sink_tokens: torch.Tensor) -> np.ndarray:
    is_sink = torch.arange(importance.shape[1]) < sink_tokens[:, None]
    ranked = importance.masked_fill(is_sink, float("inf"))
    order = ranked.sort(dim=1, descending=True, stable=True).indices
    dtype = np.uint16 if importance.shape[1] <= 65536 else np.uint32
    return order.argsort(dim=1).numpy().astype(dtype)


def _check_nested(rank: np.ndarray, plan: Plan, layers: list[CompressedLayer], ratio: float) -> None:
    """The slider's kept sets come from one ranking; refuse a method that keeps others."""
    kept = torch.cat([layer.routes.kept for layer in layers]).cpu().numpy()
    if not (np.take_along_axis(rank, kept, axis=1) < plan.kept_slots).all():
        raise ValueError(f"inspect takes methods that keep the entries of highest importance; at {ratio:g} others stay")


def _result(ratio: float, plan: Plan, layers: list[CompressedLayer], answer: Answer, dtype) -> Result:
    most = max(layer.routes.targets.shape[2] for layer in layers)  # none in a window, where nothing flows
    targets, weights = (
        torch.cat([pad(part, (0, most - part.shape[2])) for part in parts]).cpu().numpy()
        for parts in zip(*((layer.routes.targets, layer.routes.weights) for layer in layers), strict=True)
    )
    targets = targets.astype(dtype)
    return Result(ratio, plan, targets, np.rint(weights * WEIGHT_STEPS).astype(np.uint8), answer)


def pack(array: np.ndarray) -> bytes:
    """Compressed bytes of an array, all lowest bytes first, then the next: alike bytes lie together."""
    planes = np.ascontiguousarray(array).reshape(-1).view(np.uint8).reshape(-1, array.itemsize).T
    return gzip.compress(np.ascontiguousarray(planes).tobytes(), compresslevel=6, mtime=0)
