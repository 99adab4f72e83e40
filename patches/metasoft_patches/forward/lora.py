"""LoRA: under which adapter each probe runs, and what of an adapter a probe cannot follow.

SGLang's LoRA layers read one routing, which is prepared for a batch before its forward and outlives it. A probe has
other rows than the batch before it, so it brings its own; and after it there is none, so that whoever runs the model
without preparing one gets the base model, never rows of another batch.
"""

import contextlib
from collections.abc import Callable, Sequence

from sglang_metasoft.consolidations import Consolidation


def _manager_of(model_runner):
    return getattr(model_runner, "lora_manager", None)


@contextlib.contextmanager
def routing(model_runner, batch, lora_ids: Sequence[str | None]):
    """In which the model's layers apply to each request of ``batch`` its own adapter.

    Everything is enqueued on the current stream. Buffers that SGLang shares with its CUDA graphs are therefore written
    behind the forward that reads them, and its next forward, which prepares its own, writes them behind the probe.

    Args:
        batch: SGLang's ``ForwardBatch`` of an extend; gets the ids.
        lora_ids: one for each request of the batch; None is the base model.

    Raises:
        RuntimeError: an adapter's weights are not in the adapter pool.
    """
    manager = _manager_of(model_runner)
    if manager is None:
        yield
        return
    batch.lora_ids = list(lora_ids)
    wanted = set(lora_ids)
    # SGLang would run a request whose adapter is missing under whatever lies in slot 0.
    if wanted != {None} and (missing := wanted - manager.memory_pool.uid_to_buffer_id.keys()):
        raise RuntimeError(f"metasoft: LoRA adapters {missing} are not in the adapter pool")
    manager.prepare_lora_batch(batch)
    try:
        yield
    finally:
        manager.reset_lora_batch()


def hold_back_loads(scheduler) -> None:
    """Let adapters that load beside the forward (``--enable-lora-overlap-loading``) wait for what is enqueued here.

    They may take the slot of an adapter whose last request has ended, while its probe still waits for its turn.
    """
    loader = getattr(scheduler, "lora_overlap_loader", None)
    if loader is not None:
        loader.load_stream.wait_stream(loader.device_module.current_stream())


def changes_embedding(model_runner, lora_id: str | None) -> bool:
    """Whether an adapter has an embedding table of its own, which probe tokens would have to be looked up in."""
    manager = _manager_of(model_runner)
    if lora_id is None or manager is None:
        return False
    adapter = manager.loras[lora_id]
    return bool(adapter.added_tokens_embeddings) or any("embed_tokens" in name for name in adapter.embedding_layers)


class AdapterConsolidations:
    """The consolidation as prepared for each adapter when its first prompt is compressed: queries differ by adapter.

    Args:
        model_runner: SGLang's.
        prepare: from an adapter's id; may run the model once and wait for it.
    """

    def __init__(self, model_runner, prepare: Callable[[str], Consolidation]) -> None:
        self._manager = _manager_of(model_runner)
        self._prepare = prepare
        self._prepared: dict[str, Consolidation] = {}

    def of(self, lora_id: str) -> Consolidation:
        """On every rank at the same time."""
        if lora_id not in self._prepared:
            # Adapters that were unloaded never come back under the same id.
            self._prepared = {known: kept for known, kept in self._prepared.items() if known in self._manager.loras}
            self._prepared[lora_id] = self._prepare(lora_id)
        return self._prepared[lora_id]
