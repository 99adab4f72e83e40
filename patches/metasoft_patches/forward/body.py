"""The decoder body of a loaded model: the module that runs tokens through all layers, however it is named.

It is found by what it holds, all attention layers and an embedding table, and given embeddings in the table's place:
what a body does to the table's output (a factor, a norm, a table of positions) it then does to ours, and it need not
take embeddings as a parameter.
"""

import contextlib
import inspect
from collections.abc import Iterator

import torch
from sglang.srt.layers.radix_attention import RadixAttention
from sglang.srt.layers.vocab_parallel_embedding import ParallelLMHead, VocabParallelEmbedding
from sglang.srt.lora.layers import BaseLayerWithLoRA

POSITIONS = {"positions", "position_ids"}  # names of that parameter
ARGUMENTS = {"input_ids", "forward_batch"} | POSITIONS


class Body:
    """The decoder body of a model.

    Args:
        model: loaded, of any of SGLang's classes.

    Raises:
        ValueError: the model has no such module, or one that cannot be called with tokens alone.
    """

    def __init__(self, model: torch.nn.Module) -> None:
        self.model = model
        found = [module for module in model.modules() if _tables(module) and _holds_all_layers(module, model)]
        if not found:
            raise _refusal(model, "no module holds an embedding table and all attention layers")
        self.module = found[-1]  # the innermost
        if (tables := len(_tables(self.module))) > 1:
            raise _refusal(model, f"its body {type(self.module).__name__} has {tables} embedding tables")
        self.head = _head_around(self.module, model)
        self._names = {module: _arguments(module, model) for module in (self.module, self.head)}
        # With M-RoPE, what stands around a body hands it the batch's three rows of positions in place of the one.
        self.takes_rows = any(
            getattr(module, "is_mrope_enabled", False)
            for module in model.modules()
            if any(inner is self.module for inner in module.modules())
        )

    @property
    def table(self) -> torch.nn.Module:
        """The base model's embedding, which compressors are trained on and recognize."""
        (table,) = _tables(self.module)
        return table.base_layer if isinstance(table, BaseLayerWithLoRA) else table

    def hidden_states(
        self, input_ids: torch.Tensor, positions: torch.Tensor, batch, embeds: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Run a batch through all layers.

        Args:
            input_ids: ``[n]`` int64.
            positions: ``[n]`` int64.
            batch: SGLang's ``ForwardBatch``.
            embeds: ``[n, D]`` in place of what the table has for the ids.

        Returns:
            ``[n, D]`` after the last layer.
        """
        if self.takes_rows and batch.mrope_positions is not None:
            positions = batch.mrope_positions
        return _hidden(self._call(self.module, input_ids, positions, batch, embeds))

    def hidden_states_as_served(self, input_ids: torch.Tensor, positions: torch.Tensor, batch) -> torch.Tensor:
        """The same, but what stands around the body calls it, as it does for a request; the head runs as well."""
        seen: list[torch.Tensor] = []
        handle = self.module.register_forward_hook(lambda module, args, out: seen.append(_hidden(out)))
        try:
            self._call(self.head, input_ids, positions, batch, None)
        finally:
            handle.remove()
        (hidden,) = seen
        return hidden

    def logits(
        self, input_ids: torch.Tensor, positions: torch.Tensor, batch, embeds: torch.Tensor | None = None
    ) -> torch.Tensor:
        """The same, and then the model's head: ``[requests, V]`` after each request's last token."""
        return self._call(self.head, input_ids, positions, batch, embeds).next_token_logits

    def _call(self, module: torch.nn.Module, input_ids, positions, batch, embeds):
        given = {"input_ids": input_ids, "forward_batch": batch} | dict.fromkeys(POSITIONS, positions)
        with self._embedding_is(embeds):
            return module(**{name: given[name] for name in self._names[module]})

    @contextlib.contextmanager
    def _embedding_is(self, embeds: torch.Tensor | None) -> Iterator[None]:
        """In which the body's table answers with these embeddings, whatever the ids."""
        if embeds is None:
            yield
            return
        (table,) = _tables(self.module)  # the wrapper of an adapter, where there is one
        handle = table.register_forward_hook(lambda module, args, out: embeds)
        try:
            yield
        finally:
            handle.remove()


def _hidden(out) -> torch.Tensor:
    return out[0] if isinstance(out, tuple) else out


def attention_modules(model: torch.nn.Module) -> list[RadixAttention]:
    """The model's attention layers, in order."""
    return [module for module in model.modules() if isinstance(module, RadixAttention)]


def _holds_all_layers(module: torch.nn.Module, model: torch.nn.Module) -> bool:
    return len(attention_modules(module)) == len(attention_modules(model)) > 0


def _tables(module: torch.nn.Module) -> list[torch.nn.Module]:
    """Embedding tables of the vocabulary that are the module's own, not those of modules inside of it.

    SGLang's own kind; without one, torch's, which is a table of positions otherwise.
    """
    found: dict[type, list[torch.nn.Module]] = {VocabParallelEmbedding: [], torch.nn.Embedding: []}
    for child in module.children():
        base = child.base_layer if isinstance(child, BaseLayerWithLoRA) else child
        for kind, tables in found.items():
            if isinstance(base, kind) and not isinstance(base, ParallelLMHead):
                tables.append(child)
    return found[VocabParallelEmbedding] or found[torch.nn.Embedding]


def _head_around(body: torch.nn.Module, model: torch.nn.Module) -> torch.nn.Module:
    """The innermost module around the body that makes logits."""
    around = [
        module
        for module in model.modules()
        if hasattr(module, "logits_processor") and any(inner is body for inner in module.modules())
    ]
    return around[-1] if around else model


def _arguments(module: torch.nn.Module, model: torch.nn.Module) -> list[str]:
    """Names of the parameters that are given; raises ValueError: it needs others."""
    kinds = inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY
    taken = {name: given for name, given in inspect.signature(module.forward).parameters.items() if given.kind in kinds}
    needed = {name for name, given in taken.items() if given.default is inspect.Parameter.empty}
    if unknown := needed - ARGUMENTS:
        raise _refusal(model, f"its {type(module).__name__} needs {', '.join(sorted(unknown))}")
    return [name for name in taken if name in ARGUMENTS]


def _refusal(model: torch.nn.Module, why: str) -> ValueError:
    return ValueError(f"--enable-metasoft: model class {type(model).__name__} is not supported: {why}")
