"""Does this model compute under a probe what it computes for SGLang? Asked of every model at every start.

A few tokens run as SGLang runs them, through its own attention backend, into slots of their own. Then the last of them
run once more as a probe would, over the entries of those before: every layer has to come to the same. Windows, sinks,
capped logits, a factor on embeddings, a body that reads ids: whatever a probe would not know shows as a difference.

Then queries are seen at the first positions and at the last ones, for the same hidden states, which tells what a
position does to them; a key's bias lies along a direction that depends on it.
"""

import logging
import time
from typing import NamedTuple

import torch
from metasoft_kernels.probe import attend

from metasoft_patches.adapter import Adapter
from metasoft_patches.cache.commit import Committer
from metasoft_patches.forward import lora
from metasoft_patches.forward.body import Body, attention_modules
from metasoft_patches.forward.layers import find_ropes
from metasoft_patches.forward.probe import ProbeBackend, extend_batch, run_probe
from sglang_metasoft.rope import find_turning
from sglang_metasoft.types import AttentionLayer, Job, Plan, Probe, Turning

logger = logging.getLogger(__name__)

TOKENS, PROBED_TOKENS = 256, 32  # in all, at least, and of them the last ones, which run twice
# Largest difference of two computations, of the norm, by the type of the KV pool: entries are rounded to it.
TOLERANCE = {torch.float32: 5e-3, torch.float16: 2e-2, torch.bfloat16: 1e-1}
QUANTIZED_TOLERANCE = 2.5e-1  # of a pool of 8 bits
SEED = 2607


class Seen(NamedTuple):
    """What the tested tokens, the last ones, were in one run."""

    queries: list[torch.Tensor]  # of each layer, [t, H * d]
    outputs: list[torch.Tensor]  # of each layer's attention, [t, H * value size]
    hidden: torch.Tensor  # [t, D] after the last layer


class SelfTest:
    """Of one scheduler process.

    Args:
        scheduler: SGLang's, fully constructed; nothing has run.
        adapter: of this SGLang.
        committer: bound to the scheduler's pools.
        body: of the model.
        layers: as they were built.
        kernels: the setting.
    """

    def __init__(
        self, scheduler, adapter: Adapter, committer: Committer, body: Body, layers: list[AttentionLayer], kernels: str
    ) -> None:
        self.runner, self.adapter, self.committer = scheduler.tp_worker.model_runner, adapter, committer
        self.body, self.layers, self.kernels = body, layers, kernels
        config = self.runner.model_config
        page = scheduler.page_size
        window = max((layer.window_tokens or 0 for layer in layers), default=0)
        wanted = max(TOKENS, window + 2 * PROBED_TOKENS)  # so many that a window has an effect
        self.tokens = min(wanted, config.context_len, self.committer.allocator.available_size()) // page * page
        self.probed = min(PROBED_TOKENS, self.tokens // 2)
        generator = torch.Generator().manual_seed(SEED)
        ids = torch.randint(config.vocab_size, (self.tokens,), generator=generator)
        self.ids = ids.to(self.runner.device)
        self.device = self.ids.device

    def run(self) -> list[AttentionLayer]:
        """The layers, with what was seen of their positions.

        Raises:
            ValueError: a layer does not compute under a probe what it computes for SGLang.
        """
        if self.probed == 0:
            logger.warning("MetaSoft: the KV pool holds too few tokens for the self-test of the model")
            return self.layers
        began = time.perf_counter()
        slots = self.committer.reserve(self.tokens)
        assert slots is not None  # nothing has taken any yet
        try:
            difference = self._compare(self._run_as_sglang(slots), self._run_as_probe(slots))
        finally:
            self.committer.release(slots)
        layers = self._see_positions()
        logger.info(
            "MetaSoft: self-test of %s passed: difference %.1e of %.1e allowed, %s, %.2f s",
            type(self.runner.model).__name__, difference, self.tolerance, _turnings(layers),
            time.perf_counter() - began,
        )  # fmt: skip
        return layers

    @property
    def tolerance(self) -> float:
        """Of the pool's type, or of the model's if that is the coarser one."""
        types = self.committer.pool.dtype, self.runner.dtype
        return max(TOLERANCE.get(dtype, QUANTIZED_TOLERANCE) for dtype in types)

    def _run_as_sglang(self, slots: torch.Tensor) -> Seen:
        """All tokens through SGLang's own attention backend; their K and V lie in the slots then."""
        pool = self.committer.req_to_token_pool
        row = pool.free_slots[-1]
        pool.req_to_token[row, : self.tokens] = slots.to(pool.req_to_token.dtype)
        rows = torch.tensor([row], dtype=torch.int64, device=self.device)
        positions = torch.arange(self.tokens, device=self.device)
        batch = extend_batch(self.runner, self.ids, positions, rows, slots, [0], [self.tokens])
        self.adapter.plan_attention(self.runner, batch)
        with (
            torch.no_grad(),
            Recording(self.runner.model, self.probed) as record,
            lora.routing(self.runner, batch, [None]),
            self.adapter.forward_scope(self.runner.model, self.runner.attn_backend, batch),
        ):
            hidden = self.body.hidden_states_as_served(self.ids, positions, batch)
        return record.seen(hidden)

    def _run_as_probe(self, slots: torch.Tensor) -> Seen:
        """The last tokens over the entries of those before, as a probe."""
        context = slots[: self.tokens - self.probed].to(torch.int64)
        with torch.no_grad():
            embeds = self.body.table(self.ids[-self.probed :])
        job = Job(Plan(0, 0, 0, 0), Probe(embeds, len(context), len(context)), context, context[:0], context[:0])

        def on_layer(number, layer, q, k, v, pool):
            return attend(
                q, pool.key, pool.value, context, k, v, pool.scale, pool.key_scale, pool.value_scale, self.kernels,
                pool.window_tokens,
            )[0]  # fmt: skip

        with Recording(self.runner.model, self.probed) as record:
            hidden = self._probe(job, on_layer)
        return record.seen(hidden)

    def _probe(self, job: Job, on_layer) -> torch.Tensor:
        pools = self.committer.req_to_token_pool, self.committer.pool
        backend = ProbeBackend(self.runner.model, *pools, [job], on_layer)
        rows = torch.zeros(1, dtype=torch.int64, device=self.device)
        return run_probe(self.runner, self.body, backend, rows, self.adapter)

    def _compare(self, real: Seen, probe: Seen) -> float:
        """The largest difference; raises ValueError: a layer's is too large."""
        name = f"--enable-metasoft: model class {type(self.runner.model).__name__} is not supported"
        largest = 0.0
        for number, pairs in enumerate(zip(real.queries, probe.queries, real.outputs, probe.outputs, strict=True)):
            for what, expected, found in (("queries", *pairs[:2]), ("attention", *pairs[2:])):
                largest = max(largest, difference := median_difference(found, expected))
                if not difference <= self.tolerance:  # which a number that is none would not be either
                    raise ValueError(
                        f"{name}: under a probe the {what} of attention layer {number} differs by {difference:.2g} of "
                        f"its norm from SGLang's own; allowed: {self.tolerance:g}"
                    )
        largest = max(largest, difference := median_difference(probe.hidden, real.hidden))
        if not difference <= self.tolerance:
            raise ValueError(
                f"{name}: under a probe the hidden states after the last layer differ by {difference:.2g} of their "
                f"norm from SGLang's own; allowed: {self.tolerance:g}"
            )
        return largest

    def _see_positions(self) -> list[AttentionLayer]:
        """Queries of the same hidden states at the first positions and at the last."""
        context_tokens = self.runner.model_config.context_len
        ropes = find_ropes(self.body.module, context_tokens)
        longest = min([context_tokens, *(len(rope.cos_sin) for rope in ropes)])
        first_far = longest - self.probed
        with torch.no_grad():
            embeds = self.body.table(self.ids[-self.probed :])
        near: list[torch.Tensor] = []
        far: list[torch.Tensor] = []
        outputs: list[torch.Tensor] = []
        nowhere = torch.empty(0, dtype=torch.int64, device=self.device)

        def on_layer(number, layer, q, k, v, pool):
            near.append(q.clone())
            out, _ = attend(
                q, pool.key, pool.value, nowhere, k, v, pool.scale, kernels=self.kernels, window=pool.window_tokens
            )
            outputs.append(out)
            return outputs[-1]

        def on_layer_far(number, layer, q, k, v, pool):
            far.append(q.clone())
            return outputs[number]  # what comes after it is the same, so that only this layer's own doing is seen

        for first, answer in ((0, on_layer), (first_far, on_layer_far)):
            self._probe(Job(Plan(0, 0, 0, 0), Probe(embeds, 0, first), nowhere, nowhere, nowhere), answer)
        ropes = find_ropes(self.body.module, context_tokens)  # a run may have moved a table to another type
        found = [find_turning(*pair, first_far, ropes) for pair in zip(near, far, strict=True)]
        return [layer._replace(turning=kind, rope=rope) for layer, (kind, rope) in zip(self.layers, found, strict=True)]


class Recording:
    """In which queries and outputs of all attention layers are kept, those of the last tokens."""

    def __init__(self, model: torch.nn.Module, tokens: int) -> None:
        self.model, self.tokens = model, tokens
        self.queries: list[torch.Tensor] = []
        self.outputs: list[torch.Tensor] = []
        self._hooks: list = []

    def __enter__(self) -> "Recording":
        self._hooks = [
            layer.register_forward_hook(self._keep, with_kwargs=True) for layer in attention_modules(self.model)
        ]
        return self

    def __exit__(self, *exception) -> None:
        for hook in self._hooks:
            hook.remove()

    def _keep(self, layer, args, kwargs, out) -> None:
        queries = (args[0] if args else kwargs["q"]).reshape(-1, layer.tp_q_head_num * layer.qk_head_dim)
        self.queries.append(queries[-self.tokens :].clone())
        self.outputs.append(out.reshape(-1, layer.tp_q_head_num * layer.v_head_dim)[-self.tokens :].clone())

    def seen(self, hidden: torch.Tensor) -> Seen:
        """What was kept, and ``[n, D]`` hidden states after the last layer."""
        return Seen(self.queries, self.outputs, hidden[-self.tokens :])


def median_difference(found: torch.Tensor, expected: torch.Tensor) -> float:
    """Of a token's difference, of its norm: one token that takes another expert, by rounding alone, decides nothing."""
    each = (found.float() - expected.float()).norm(dim=-1) / expected.float().norm(dim=-1).clamp_min(1e-30)
    return each.median().item()


def _turnings(layers: list[AttentionLayer]) -> str:
    """For the log."""
    words = {
        Turning.ROPE: "turned by RoPE",
        Turning.NONE: "not turned",
        Turning.OTHER: "turned in a way that no key_bias can follow",
    }
    numbers = {kind: [number for number, layer in enumerate(layers) if layer.turning is kind] for kind in words}
    parts = [
        f"layers {numbers[kind]} {word}" if len(numbers[kind]) < len(layers) else f"all layers {word}"
        for kind, word in words.items()
        if numbers[kind]
    ]
    return ", ".join(parts)
