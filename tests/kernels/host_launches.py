"""What a layer's stages take of the scheduler's thread: milliseconds, for prompts that finish together.

Without a GPU: the code that serves runs on tensors of a CPU, with Llama-3.1-8B's heads, and Triton does all that it
does for a launch but the driver's call, which takes some microseconds more each. Nothing is computed. The times are CPU
times of the thread, the least of the batches.

    python -m tests.kernels.host_launches [--prompts 1 4 16] [--prompt-tokens 8192] [--repeats 20] [--output host.json]
"""

import argparse
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from metasoft_kernels.probe.fused import attend
from triton.backends.compiler import GPUTarget
from triton.runtime import driver
from triton.runtime.jit import JITFunction

from sglang_metasoft.bench import result_file
from sglang_metasoft.pipeline.batch import FusedBatch
from tests.kernels.count_launches import layer, layer_inputs, make_jobs, make_method

LAYERS = 32
CPU = torch.device("cpu")


class Launcher:
    """In the place of a compiled kernel, and of the driver: counts."""

    function = packed_metadata = None

    def __init__(self) -> None:
        self.launches = 0

    def launch_metadata(self, *args) -> None:
        return None

    def run(self, *args) -> None:
        self.launches += 1


def launch_nothing(patch: pytest.MonkeyPatch) -> Launcher:
    """From here on Triton's launches end where the driver's begin."""
    launcher = Launcher()

    def take(kernel: JITFunction, key, signature, device, *args) -> Launcher:
        kernel.device_caches[device][0][key] = launcher
        return launcher

    no_gpu = SimpleNamespace(
        get_current_device=lambda: 0,
        get_current_stream=lambda device: 0,
        get_current_target=lambda: GPUTarget("cuda", 90, 32),
    )
    patch.setattr(driver, "_active", no_gpu)
    patch.setattr(JITFunction, "_do_compile", take)
    patch.setattr(torch.Tensor, "pin_memory", lambda tensor: tensor)
    patch.setattr(FusedBatch, "_finite", lambda *args: [])  # looked at on a CPU alone
    return launcher


def measure(prompts: int, tokens: int, repeats: int, launcher: Launcher) -> dict:
    """CPU time of this thread, the least of ``repeats`` batches."""
    method, own, layers = make_method(CPU), [], []
    for _ in range(repeats + 1):
        jobs = make_jobs(method, prompts, tokens, CPU)
        began = time.thread_time()
        batch = FusedBatch(jobs, method, attend)
        prepared = time.thread_time()
        inputs = layer_inputs(batch, CPU)
        launcher.launches, starts = 0, time.thread_time()
        layer(batch, *inputs)
        layers.append(time.thread_time() - starts)
        own.append(prepared - began)
    layer_ms = 1e3 * min(layers)
    return {
        "prompts": prompts, "prompt_tokens": tokens, "launches_per_layer": launcher.launches,
        "layer_ms": round(layer_ms, 3), "layers_ms": round(LAYERS * layer_ms, 1),
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--prompts", type=int, nargs="+", default=[1, 4, 16])
    parser.add_argument("--prompt-tokens", type=int, default=8192)
    parser.add_argument("--repeats", type=int, default=20)
    parser.add_argument("--output", type=Path, help="also write the result as JSON")
    args = parser.parse_args()
    with pytest.MonkeyPatch.context() as patch:
        launcher = launch_nothing(patch)
        results = [measure(prompts, args.prompt_tokens, args.repeats, launcher) for prompts in args.prompts]
    for result in results:
        print(result)
    if args.output:
        result_file.write(args.output, results)


if __name__ == "__main__":
    main()
