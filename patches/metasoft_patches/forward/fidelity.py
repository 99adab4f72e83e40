"""Live fidelity: how far a compression moves the distribution of a prompt's next token, on a sample of requests.

Between a compression and its commit both forms of a prompt lie in the pool. Its last token runs once more over each,
two rows of one forward, and what is compared is what the model says next. The request itself waits for nothing: the
forward is queued like a probe, and its answer is read when the device has come so far.
"""

import hashlib
from collections import deque
from collections.abc import Callable
from typing import Any

import torch
from metasoft_kernels.probe import attend

from metasoft_patches.adapter import Adapter
from metasoft_patches.cache.commit import Committer
from metasoft_patches.cache.request import RequestState
from metasoft_patches.forward.body import Body
from metasoft_patches.forward.probe import ProbeBackend, run_probe
from metasoft_patches.transfer import to_device
from sglang_metasoft.types import Job, Plan, Probe

SampledSpan = tuple[Any, Plan, torch.Tensor]  # SGLang's Req, what was compressed, [B] new slots


class FidelitySampler:
    """One per scheduler process.

    Args:
        scheduler: SGLang's.
        adapter: of this SGLang.
        committer: bound to the scheduler's pools.
        sample: share of the requests, from 0 to 1.
        secret: of the server, so that no client can choose to be sampled by its request id.
        body: of the served model.
        kernels: the setting.
        embed: ids to embeddings, ``[n]`` int64 to ``[n, D]``; on every rank at the same time.
        observe: called with each divergence in nats.
    """

    def __init__(
        self, scheduler, adapter: Adapter, committer: Committer, body: Body, sample: float, secret: str, kernels: str,
        embed: Callable[[torch.Tensor], torch.Tensor], observe: Callable[[float], None],
    ) -> None:  # fmt: skip
        self.runner, self.adapter, self.committer = scheduler.tp_worker.model_runner, adapter, committer
        self.body = body
        self.sample, self.secret, self.kernels = sample, secret, kernels
        self.embed, self.observe = embed, observe
        self._waiting: deque[tuple[torch.Tensor, Any]] = deque()

    def wants(self, rid: str) -> bool:
        """Whether a request is of the sample: the same on every rank."""
        if self.sample == 0:
            return False
        digest = hashlib.sha256(f"{self.secret} {rid}".encode(errors="surrogatepass")).digest()
        return int.from_bytes(digest[:7], "big") < self.sample * 2**56

    def compare(self, spans: list[SampledSpan]) -> None:
        """Queue the comparison; on the forward's stream, before anything of the spans is committed.

        Args:
            spans: of prompts whose last chunk has run. Each rank gets the same.
        """
        if not spans:
            return
        jobs = [job for span in spans for job in self._jobs(span)]

        def on_layer(number, layer, q, k, v, pool):
            rows = [
                attend(
                    q[i : i + 1], pool.key, pool.value, job.context_slots, k[i : i + 1], v[i : i + 1], pool.scale,
                    pool.key_scale, pool.value_scale, self.kernels, pool.window_tokens,
                )[0]
                for i, job in enumerate(jobs)
            ]  # fmt: skip
            return torch.cat(rows)

        pools = self.committer.req_to_token_pool, self.committer.pool
        backend = ProbeBackend(self.runner.model, *pools, jobs, on_layer)
        numbers = [self.adapter.row_index(req) for req, _, _ in spans for _ in range(2)]
        rows = to_device(numbers, torch.int64, self.runner.device)
        logits = run_probe(self.runner, self.body, backend, rows, self.adapter, wants_logits=True)
        self._read(divergence(logits[0::2], logits[1::2]))

    def _jobs(self, span: SampledSpan) -> list[Job]:
        """The prompt's last token over the entries before it: as they were, and as they are to be."""
        req, plan, new_slots = span
        state: RequestState = req.metasoft
        end = self.adapter.extend_end(req)
        last = end - 1
        row = self.committer.row(req)[:last].to(torch.int64)
        position = state.offset + last
        embeds = self.embed(to_device(state.logical_ids(req)[position : position + 1], torch.int64, row.device))
        compressed = torch.cat([row[: plan.start_slots], new_slots.to(torch.int64), row[plan.end_slots :]])
        return [
            Job(plan, Probe(embeds, len(slots), position), slots, slots[:0], slots[:0], req.lora_id)
            for slots in (row, compressed)
        ]

    def _read(self, values: torch.Tensor) -> None:
        if values.device.type == "cpu":
            self._waiting.append((values, None))
            return
        host = torch.empty(values.shape, dtype=values.dtype, pin_memory=True)
        host.copy_(values, non_blocking=True)
        event = torch.cuda.Event()
        event.record()
        self._waiting.append((host, event))

    def collect(self) -> None:
        """Report what the device has finished meanwhile."""
        while self._waiting and (self._waiting[0][1] is None or self._waiting[0][1].query()):
            for value in self._waiting.popleft()[0].tolist():
                self.observe(value)


def divergence(full: torch.Tensor, compressed: torch.Tensor) -> torch.Tensor:
    """Kullback-Leibler divergence of the next-token distribution, from the full cache's to the compressed one's.

    Args:
        full, compressed: ``[n, V]`` logits.

    Returns:
        ``[n]`` float32, in nats, never below 0.
    """
    wanted, found = (logits.float().log_softmax(-1) for logits in (full, compressed))
    return (wanted.exp() * (wanted - found)).nan_to_num(0.0, 0.0, 0.0).sum(-1).clamp(min=0)
