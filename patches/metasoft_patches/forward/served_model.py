"""The loaded model, as far as a method may ask it: :class:`sglang_metasoft.types.ServedModel`."""

import torch
from metasoft_kernels.probe import attend

from metasoft_patches.adapter import Adapter
from metasoft_patches.forward.probe import ProbeBackend, run_probe
from sglang_metasoft.types import Job, Plan, Probe, Rope


class SGLangModel:
    """The model of one scheduler process, under one of its LoRA adapters or, with None, as it is."""

    def __init__(self, scheduler, adapter: Adapter, embed, lora_id: str | None = None) -> None:
        self.scheduler = scheduler
        self.runner = scheduler.tp_worker.model_runner
        self.adapter = adapter
        self.embed = embed
        self.lora_id = lora_id

    def rope(self) -> Rope:
        modules = {id(m): m for m in self.runner.model.modules() if hasattr(m, "cos_sin_cache")}
        if len(modules) != 1:
            raise ValueError(
                f"--enable-metasoft: model class {type(self.runner.model).__name__} has {len(modules)} rotary "
                "embeddings; the method needs one"
            )
        (module,) = modules.values()
        return Rope(module.cos_sin_cache, module.is_neox_style)

    def encode(self, text: str) -> list[int]:
        if self.scheduler.tokenizer is None:
            raise ValueError("--enable-metasoft: the method reads a text at start-up and needs the server's tokenizer")
        return self.scheduler.tokenizer.encode(text, add_special_tokens=False)

    def queries(self, ids: torch.Tensor) -> list[torch.Tensor]:
        found = []

        def collect(layer, q, k, v, pool):
            found.append(q.clone())
            out, _ = attend(q, pool.key, pool.value, job.context_slots, k, v, pool.scale)
            return out

        nowhere = torch.empty(0, dtype=torch.int64, device=self.runner.device)
        job = Job(Plan(0, 0, 0, 0), Probe(self.embed(ids), 0, 0), nowhere, nowhere, nowhere, self.lora_id)
        pool = self.scheduler.tree_cache.token_to_kv_pool_allocator.get_kvcache()
        backend = ProbeBackend(self.scheduler.tree_cache.req_to_token_pool, pool, [job], collect)
        run_probe(self.runner, backend, torch.zeros(1, dtype=torch.int64, device=self.runner.device), self.adapter)
        return found
