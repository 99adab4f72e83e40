"""Count what the device is asked to do for one layer of a batch by the shipped path, without a device.

    python -m tests.kernels.count_launches [--prompts 1 4 16] [--prompt-tokens 32768] [--method NAME]    # lines of JSON

On fake CUDA tensors, with Llama-3.1-8B's heads: every launch of a Triton kernel is recorded, and every operation of
torch counts as one launch unless it makes a view or new memory. Torch's sorts are several launches, counted as one.
"""

import argparse
import json
from collections import Counter

import pytest
import torch
from metasoft_kernels.probe.fused import attend
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode

from sglang_metasoft.compressor.soft_tokens import SoftTokens
from sglang_metasoft.config import MetaSoftConfig
from sglang_metasoft.consolidations.key_directions import KeyDirections
from sglang_metasoft.methods import load_method
from sglang_metasoft.pipeline.batch import FusedBatch
from sglang_metasoft.pipeline.probe import make_probe
from sglang_metasoft.types import Job, LayerPool, ModelShape, Plan, Prompt, Rope
from tests.kernels.launches import Launch, record

SHAPE = ModelShape("Llama-3.1-8B", 128, 4096, 2, 32, 8, 128)  # as far as a layer knows it: two layers, few ids
MEMORY_ONLY = ("aten::empty", "aten::detach", "aten::lift_fresh", "aten::_unsafe_view", "aten::new_empty")
WINDOW, RATIO, LAYER = 64, 4, 1


class Work(TorchDispatchMode):
    """Notes the operations that would run on the device, and the most bytes that what they made has held."""

    def __init__(self) -> None:
        super().__init__()
        self.names: Counter[str] = Counter()
        self.held: dict[StorageWeakRef, int] = {}
        self.peak_bytes = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        tensors = [leaf for leaf in torch.utils._pytree.tree_leaves(result) if isinstance(leaf, torch.Tensor)]
        name = func.name().split(".")[0]
        is_memory = func.is_view or name.startswith(MEMORY_ONLY)
        if not is_memory and any(tensor.device.type == "cuda" for tensor in tensors):
            self.names[name] += 1
        if not func.is_view:
            self.held |= {
                StorageWeakRef(x.untyped_storage()): x.untyped_storage().nbytes() for x in tensors if x.is_cuda
            }
        self.held = {storage: size for storage, size in self.held.items() if not storage.expired()}
        self.peak_bytes = max(self.peak_bytes, sum(self.held.values()))
        return result


def make_method(device: torch.device, name: str = "metasoft", scorer: int = 32):
    """A method with ``key_bias``, its weights and an entry scorer's empty."""
    method = load_method(name).__new__(load_method(name))
    method.config, method.shape, method.device = MetaSoftConfig(consolidation="key_bias"), SHAPE, device
    method.embed = lambda ids: torch.empty(ids.numel(), SHAPE.hidden_size, dtype=torch.bfloat16, device=device)
    with device:
        heads, d = (SHAPE.num_layers, SHAPE.num_kv_heads), SHAPE.head_dim
        soft_tokens = SoftTokens(SHAPE.hidden_size, 64, 32, *heads, scorer=scorer, head_dim=d)
    method.soft_tokens = soft_tokens.requires_grad_(False)
    unturned = torch.empty(SHAPE.num_layers, SHAPE.num_kv_heads, SHAPE.head_dim, device=device)
    rope = Rope(torch.empty(8, SHAPE.head_dim, device=device), True)
    method.consolidation.directions = KeyDirections(unturned, [(list(range(len(unturned))), rope)])
    return method


def make_jobs(method, prompts: int, tokens: int, device: torch.device) -> list[Job]:
    """Prompts of the same length; a quarter of the entries stays."""
    jobs = []
    for _ in range(prompts):
        ids, slots = (torch.empty(tokens, dtype=torch.int64, device=device) for _ in range(2))
        span, kept = tokens - WINDOW, -(-tokens // RATIO) - WINDOW
        probe = make_probe(method, Prompt(ids[:span], ids[span:], tokens, tokens))
        jobs.append(Job(Plan(0, span, kept, 4), probe, slots, slots[:span], slots[:kept]))
    return jobs


def layer_inputs(batch: FusedBatch, device: torch.device) -> tuple[list[torch.Tensor], LayerPool]:
    """The probe's queries, keys and values, and a pool."""
    d, rows, dtype = SHAPE.head_dim, batch.probe.total, torch.bfloat16
    pool = (torch.empty(64, SHAPE.num_kv_heads, d, dtype=dtype, device=device) for _ in range(2))
    heads = (SHAPE.num_heads, SHAPE.num_kv_heads, SHAPE.num_kv_heads)
    qkv = [torch.empty(rows, number, d, dtype=dtype, device=device) for number in heads]
    return qkv, LayerPool(*pool, d**-0.5, 1.0, 1.0)


def layer(batch: FusedBatch, qkv: list[torch.Tensor], pool: LayerPool) -> None:
    """One layer of the batch, its entries written."""
    _, consolidated, _ = batch.compress(*qkv, pool, 1.0, LAYER)
    batch.write(pool, consolidated)


def count(prompts: int, tokens: int, launches: list[Launch], name: str = "metasoft") -> dict:
    """Launches of one layer of such prompts, and those that are made once for all layers."""
    device = torch.device("cuda")
    method = make_method(device, name)
    jobs = make_jobs(method, prompts, tokens, device)
    with Work() as once:
        batch = FusedBatch(jobs, method, attend)
    launches.clear()
    inputs = layer_inputs(batch, device)
    with Work() as each:
        layer(batch, *inputs)
    kernels = Counter(launch.kernel.__name__.strip("_") for launch in launches)
    return {
        "prompts": prompts, "prompt_tokens": tokens, "launches_per_layer": len(launches) + each.names.total(),
        "kernels": dict(kernels), "torch": dict(each.names), "layer_mib": round(each.peak_bytes / 2**20, 1),
        "launches_per_batch": once.names.total(), "lists_bytes_per_token": once.peak_bytes // (prompts * tokens),
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--prompts", type=int, nargs="+", default=[1, 4, 16])
    parser.add_argument("--prompt-tokens", type=int, default=32_768)
    parser.add_argument("--method", default="metasoft", help="snapkv_keydiff: what is served without a compressor")
    args = parser.parse_args()
    with pytest.MonkeyPatch.context() as patch, FakeTensorMode():
        launches = record(patch, holds_args=False)
        for prompts in args.prompts:
            print(json.dumps(count(prompts, args.prompt_tokens, launches, args.method)), flush=True)


if __name__ == "__main__":
    main()
