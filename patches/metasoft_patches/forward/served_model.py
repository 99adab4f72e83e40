"""The loaded model, as far as a method may ask it: :class:`sglang_metasoft.types.ServedModel`."""

from typing import NamedTuple

import torch
from metasoft_kernels.probe import attend
from sglang.srt.runtime_context import get_parallel
from torch.nn.functional import scaled_dot_product_attention

from metasoft_patches.adapter import Adapter
from metasoft_patches.cache.commit import Committer
from metasoft_patches.forward.body import Body
from metasoft_patches.forward.layers import read_layers
from metasoft_patches.forward.model_shape import check_layers, check_pool
from metasoft_patches.forward.probe import ProbeBackend, run_probe
from metasoft_patches.forward.self_test import SelfTest
from sglang_metasoft.types import AttentionLayer, Job, ModelShape, Plan, Probe


class Served(NamedTuple):
    """What start-up has found out about the loaded model."""

    body: Body
    layers: list[AttentionLayer]
    kernels: str  # the setting


def examine(scheduler, adapter: Adapter, committer: Committer, shape: ModelShape, kernels: str) -> Served:
    """Find out what compression has to know of a model that was just loaded.

    Args:
        scheduler: SGLang's, fully constructed; nothing has run.
        adapter: of this SGLang.
        committer: bound to the scheduler's pools.
        shape: of the whole model.
        kernels: the setting.

    Raises:
        ValueError: the model or its KV pool cannot be served.
    """
    model = scheduler.tp_worker.model_runner.model
    check_pool(committer.pool)
    body, layers = Body(model), read_layers(model)
    check_layers(model, layers, shape, get_parallel().attn_tp_size)
    return Served(body, SelfTest(scheduler, adapter, committer, body, layers, kernels).run(), kernels)


class SGLangModel:
    """The model of one scheduler process, under one of its LoRA adapters or, with None, as it is."""

    def __init__(self, scheduler, adapter: Adapter, served: Served, embed, lora_id: str | None = None) -> None:
        self.scheduler = scheduler
        self.runner = scheduler.tp_worker.model_runner
        self.adapter = adapter
        self.served = served
        self.embed = embed
        self.lora_id = lora_id

    def layers(self) -> list[AttentionLayer]:
        return self.served.layers

    def encode(self, text: str) -> list[int]:
        if self.scheduler.tokenizer is None:
            raise ValueError("--enable-metasoft: the method reads a text at start-up and needs the server's tokenizer")
        return self.scheduler.tokenizer.encode(text, add_special_tokens=False)

    def queries(self, ids: torch.Tensor) -> list[torch.Tensor]:
        found = []

        def collect(number, layer, q, k, v, pool):
            found.append(q.clone())
            if pool.window_tokens is not None:
                seen = dict(kernels=self.served.kernels, window=pool.window_tokens)
                return attend(q, pool.key, pool.value, nowhere, k, v, pool.scale, **seen)[0]
            q_heads, k_heads, v_heads = (x.float().transpose(0, 1).unsqueeze(0) for x in (q, k, v))
            out = scaled_dot_product_attention(
                q_heads, k_heads, v_heads, is_causal=True, scale=pool.scale, enable_gqa=True
            )
            return out.squeeze(0).transpose(0, 1).to(q.dtype)

        nowhere = torch.empty(0, dtype=torch.int64, device=self.runner.device)
        job = Job(Plan(0, 0, 0, 0), Probe(self.embed(ids), 0, 0), nowhere, nowhere, nowhere, self.lora_id)
        cache = self.scheduler.tree_cache
        pool = cache.token_to_kv_pool_allocator.get_kvcache()
        backend = ProbeBackend(self.runner.model, cache.req_to_token_pool, pool, [job], collect)
        rows = torch.zeros(1, dtype=torch.int64, device=self.runner.device)
        run_probe(self.runner, self.served.body, backend, rows, self.adapter)
        return found
