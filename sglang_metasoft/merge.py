"""K, V, Routes -> MergedKV: the consolidated entries of one layer.

A consolidation is a function in :data:`sglang_metasoft.config.CONSOLIDATIONS`; the names of its parameters say what it
is given. It returns the kept entries' new values, ``[B, G, d]`` float32, or, if it is given ``key_directions``, what
their keys are moved by.
"""

import functools
import importlib
import inspect
from collections.abc import Callable
from typing import NamedTuple

import torch
from metasoft_kernels.merge import gather

from sglang_metasoft.config import CONSOLIDATIONS
from sglang_metasoft.types import LayerView, MergedKV, Routes, Scores


class Consolidation(NamedTuple):
    """What to do with dropped entries, and which of :func:`consolidate`'s tensors that takes."""

    function: Callable[..., torch.Tensor] | None
    inputs: tuple[str, ...]

    @property
    def refits(self) -> bool:
        """Whether it learns from the probe's queries."""
        return "q" in self.inputs

    @property
    def biases_keys(self) -> bool:
        """Whether it returns what is added to the kept keys, not new values."""
        return "key_directions" in self.inputs

    @property
    def needs_probe(self) -> bool:
        """Whether there has to be a probe, whatever the method."""
        return self.refits or self.biases_keys


@functools.cache
def load_consolidation(name: str) -> Consolidation:
    """The consolidation of this name.

    Raises:
        ValueError: there is none; the message lists those that exist.
    """
    if name not in CONSOLIDATIONS:
        raise ValueError(
            f"metasoft consolidation: {name!r} is not allowed; allowed: one of: {', '.join(CONSOLIDATIONS)}"
        )
    target = CONSOLIDATIONS[name]
    if target is None:
        return Consolidation(None, ())
    module, attribute = target.split(":")
    function = getattr(importlib.import_module(module), attribute)
    return Consolidation(function, tuple(inspect.signature(function).parameters))


def consolidate(
    consolidation: Consolidation,
    view: LayerView,
    keys: torch.Tensor,
    values: torch.Tensor,
    scores: Scores,
    routes: Routes,
    gate_scale: torch.Tensor | float,
    kernels: str = "auto",
) -> MergedKV:
    """Gather each head's kept entries, with what flowed into their values or is carried by their keys.

    Args:
        view: the layer's probe: ``q`` ``[t, H, d]``, ``lse`` ``[t, H]``, ``scale`` and ``seen_tokens``.
        keys, values: ``[S, G, d]`` of the span.
        scores: its mass ``[G, S]`` goes by the name ``importance``.
        routes: ``kept``, ``dropped``, ``targets``, ``weights``.
        gate_scale: factor on the gate, a number or ``[G, 1]``.
        kernels: the setting.

    Returns:
        ``[B, G, d]`` keys and values in the dtype of the input.
    """
    kept_keys = gather(keys, routes.kept)
    if consolidation.function is None or routes.dropped.shape[1] == 0:
        return MergedKV(kept_keys, gather(values, routes.kept))
    carrying = view.job.probe.carrying
    available = dict(
        keys=keys,
        values=values,
        importance=scores.mass,
        gate_scale=gate_scale,
        q=view.q,
        lse=view.lse,
        scale=view.pool.scale,
        kernels=kernels,
        seen_tokens=view.seen_tokens,
        sink_tokens=view.job.plan.sink_tokens,
        repeats=carrying and carrying.repeats,
        key_directions=carrying and carrying.directions[view.layer],
        **routes._asdict(),
    )
    merged = consolidation.function(**{name: available[name] for name in consolidation.inputs})
    if consolidation.biases_keys:
        return MergedKV((kept_keys.float() + merged).to(keys.dtype), gather(values, routes.kept))
    return MergedKV(kept_keys, merged.to(values.dtype))
