"""What ``--metasoft-method`` comes to on a model: a compressor that is found, or what is served without one."""

import dataclasses
import shlex
from collections.abc import Callable
from typing import NamedTuple

import torch

from sglang_metasoft.compressor.find import Compressor, candidates, find_compressors, given_compressor
from sglang_metasoft.config import AUTO, MetaSoftConfig, shown
from sglang_metasoft.methods import load_method
from sglang_metasoft.methods.base import Method
from sglang_metasoft.types import Embed, ModelShape, ServedModel

# Without a compressor: what needs no training.
WITHOUT_COMPRESSOR = {"method": "snapkv_keydiff", "consolidation": "key_bias"}
# Of the full cache's score, RULER's needles at 2,048 tokens, nine cases: docs/lab/2026-11-training-free.md.
WITHOUT_COMPRESSOR_KEPT = "65 % of look-ups at 4x with the question inside the prompt, 34 % with it after the document"

Choose = Callable[[list[Compressor]], Compressor | None]


class Served(NamedTuple):
    """A method that is prepared for its model; its ``config`` names the method and path that were found."""

    method: Method
    kind: str  # given, fitted, shipped, untrained, training_free; chosen: a method was named that needs none
    compressor: Compressor | None
    warnings: list[str]

    @property
    def origin(self) -> str:
        """For the start-up line."""
        return self.compressor.description if self.compressor else f"no compressor ({self.kind})"

    @property
    def state(self) -> dict:
        """For ``/server_info``, as JSON has it."""
        report = self.compressor.report if self.compressor else None
        return {
            "kind": self.kind,
            "path": self.compressor.path if self.compressor else None,
            "kept": {f"{ratio:g}": places for ratio, places in report.kept.items()} if report else None,
            "limit_ratio": report.limit_ratio if report else None,
        }


def first(found: list[Compressor]) -> Compressor | None:
    """The best of those found: where there is one process alone."""
    return found[0] if found else None


def check(config: MetaSoftConfig, shape: ModelShape, tp_size: int) -> None:
    """Refuse settings before any model loads, whatever is found then.

    Raises:
        ValueError: one sentence with the setting and what is allowed.
    """
    for possible in _possible(config, shape):
        load_method(possible.method).check(possible, shape, tp_size)


def serve(
    config: MetaSoftConfig,
    shape: ModelShape,
    embed: Embed,
    device: torch.device,
    model: ServedModel,
    choose: Choose = first,
) -> Served:
    """The method that the settings come to on a loaded model, prepared.

    Args:
        embed, device: as a method takes them.
        choose: of the compressors that fit, best first; called on every rank at the same time.

    Raises:
        ValueError: the settings, or the compressor at the given path, cannot serve this model.
    """
    compressor = find(config, shape, embed, device, choose)
    resolved = with_compressor(config, compressor) if compressor else without_compressor(config)

    def make() -> Method:
        method = load_method(resolved.method)(resolved, shape, embed, device)
        method.prepare(model)
        return method

    warnings = []
    try:
        method = make()
    except ValueError as error:
        if config.method != AUTO or config.consolidation is not None or compressor is not None:
            raise
        warnings.append(f"MetaSoft: this model cannot have {resolved.consolidation}, entries are dropped: {error}")
        resolved = dataclasses.replace(resolved, consolidation="none")
        method = make()
    if compressor is not None:
        kind = compressor.origin
    elif not searches(config):
        kind = "chosen"
    else:
        kind = "untrained" if method.reads_path else "training_free"
    if compressor is None and searches(config):
        warnings.append(_not_found(method, shape))
    if beyond := beyond_report(config, compressor):
        warnings.append(f"MetaSoft: {beyond}")
    return Served(method, kind, compressor, warnings)


def find(
    config: MetaSoftConfig, shape: ModelShape, embed: Embed | None, device: torch.device, choose: Choose = first
) -> Compressor | None:
    """The compressor that is served: the given one, or the best that is found; None: none is, or none is needed.

    Args:
        embed: None: the shape alone is compared.

    Raises:
        ValueError: the given one cannot be used.
    """
    if config.path is not None:
        return choose([given_compressor(config.path, shape, _wanted(config))])
    if not searches(config):
        return None
    if embed is None:
        return choose(candidates(shape, _wanted(config)))
    return choose(find_compressors(shape, embed, device, _wanted(config)))


def with_compressor(config: MetaSoftConfig, compressor: Compressor) -> MetaSoftConfig:
    """The settings with a compressor's path and method."""
    return dataclasses.replace(config, method=compressor.method, path=compressor.path)


def without_compressor(config: MetaSoftConfig) -> MetaSoftConfig:
    """The settings where no compressor was found: a method that was named stays."""
    if config.method != AUTO:
        return config
    consolidation = config.consolidation or WITHOUT_COMPRESSOR["consolidation"]
    return dataclasses.replace(config, method=WITHOUT_COMPRESSOR["method"], consolidation=consolidation)


def _wanted(config: MetaSoftConfig) -> str | None:
    return None if config.method == AUTO else config.method


def searches(config: MetaSoftConfig) -> bool:
    """Whether a compressor is looked for, since none is given."""
    return config.path is None and (config.method == AUTO or load_method(config.method).reads_path)


def _possible(config: MetaSoftConfig, shape: ModelShape) -> list[MetaSoftConfig]:
    """The settings that may come out once the weights are there."""
    if config.path is not None and config.method == AUTO:
        return [with_compressor(config, given_compressor(config.path, shape))]
    if not searches(config):
        return [config]
    found = [with_compressor(config, compressor) for compressor in candidates(shape, _wanted(config))]
    return found if found and config.method != AUTO else [*found, without_compressor(config)]


def _not_found(method: Method, shape: ModelShape) -> str:
    name = method.config.method
    if method.reads_path:
        served = "untrained soft tokens are served, which lose much of what prompts say"
    else:
        served = f"{name} with consolidation {method.consolidation_name}, which needs no training, takes its place"
        if WITHOUT_COMPRESSOR == {"method": name, "consolidation": method.consolidation_name}:
            served += f"; on the demo model it keeps {WITHOUT_COMPRESSOR_KEPT}"
    return (
        f"MetaSoft: NO COMPRESSOR was found for {shown(shape.name)}: {served}. One that is fitted to the model keeps "
        f"more of its answers; this command makes it, once: {fit_command(shape)} (or start with --metasoft-fit)"
    )


def fit_command(shape: ModelShape) -> str:
    """What the user types to have a compressor for this model."""
    return f"sglang-metasoft fit {shlex.quote(shape.name)}"


def beyond_report(config: MetaSoftConfig, compressor: Compressor | None) -> str | None:
    """A sentence if the ratio is higher than the compressor's own report vouches for."""
    report = compressor.report if compressor else None
    if compressor is None or report is None or config.budget is not None or config.ratio <= (report.limit_ratio or 1):
        return None
    highest = f"{report.limit_ratio:g}, the highest" if report.limit_ratio is not None else "all"
    return (
        f"ratio {config.ratio:g} lies above {highest} that the report of {compressor.path} vouches for: "
        "answers may lose what the prompt says"
    )
