"""Compile every Triton kernel for NVIDIA GPUs without one, for the arguments that a real launch would pass.

    python -m tests.kernels.compile_ahead            # one line of JSON per kernel, shape and GPU

The interpreter accepts code that the compiler refuses, and knows nothing of registers and shared memory. Launches are
recorded on fake tensors, so the arguments are those of a server.
"""

import argparse
import json
import re
import subprocess
import tempfile
from pathlib import Path

import pytest
import torch
import triton
from torch._subclasses.fake_tensor import FakeTensorMode
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from tests.kernels.launches import Launch, record
from tests.kernels.layer import launch_a_layer

CAPABILITIES = (80, 90, 100)
# Shared memory that one block may take (CUDA programming guide, table of compute capabilities).
SHARED_LIMIT_BYTES = {80: 163 * 1024, 90: 227 * 1024, 100: 227 * 1024}
TYPES = {
    torch.float32: "*fp32", torch.float16: "*fp16", torch.bfloat16: "*bf16", torch.float8_e4m3fn: "*fp8e4nv",
    torch.float8_e5m2: "*fp8e5", torch.int64: "*i64", torch.int32: "*i32", torch.uint8: "*u8", torch.bool: "*i1",
    torch.int8: "*i8", torch.int16: "*i16",
}  # fmt: skip
SHAPES = (  # query heads, KV heads, head size, model type, pool type
    (32, 8, 128, torch.bfloat16, torch.bfloat16),
    (32, 8, 128, torch.float16, torch.float16),
    (32, 8, 128, torch.bfloat16, torch.float8_e5m2),
    (32, 8, 128, torch.bfloat16, torch.float8_e4m3fn),
    (9, 3, 64, torch.float32, torch.float32),
    (32, 32, 80, torch.bfloat16, torch.bfloat16),
    (8, 4, 256, torch.bfloat16, torch.bfloat16),
    (8, 4, 256, torch.float32, torch.float32),
)
PRODUCTS = {"tcgen05": "tcgen05.mma", "wgmma": "wgmma.mma", "mma": "mma.sync"}  # on tensor cores, in PTX
CUOBJDUMP = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"


def record_layer(shape) -> list[Launch]:
    with pytest.MonkeyPatch.context() as patch, FakeTensorMode():
        launches = record(patch)
        launch_a_layer(*shape, device=torch.device("cuda"))
    return launches


def source_of(launch: Launch) -> tuple[ASTSource, dict]:
    """What Triton would compile for this launch, and its options."""
    kernel = launch.kernel
    values = dict(zip(kernel.arg_names, launch.args, strict=False)) | launch.kwargs
    options = {name: values.pop(name) for name in ("num_warps", "num_stages") if name in values}
    signature, constants, attributes = {}, {}, {}
    for position, parameter in enumerate(kernel.params):
        value = values[parameter.name]
        if parameter.is_constexpr:
            signature[parameter.name], constants[parameter.name] = "constexpr", value
        elif isinstance(value, torch.Tensor):
            signature[parameter.name] = TYPES[value.dtype]
            is_aligned = value.storage_offset() * value.itemsize % 16 == 0  # as memory itself is
            if is_aligned and not parameter.do_not_specialize_on_alignment:
                attributes[(position,)] = [["tt.divisibility", 16]]
        elif isinstance(value, float):
            signature[parameter.name] = "fp32"
        elif value == 1 and not parameter.do_not_specialize:
            signature[parameter.name], constants[parameter.name] = "constexpr", 1
        else:
            signature[parameter.name] = "i32" if abs(value) < 2**31 else "i64"
            if value % 16 == 0 and not parameter.do_not_specialize:
                attributes[(position,)] = [["tt.divisibility", 16]]
    return ASTSource(fn=kernel, signature=signature, constexprs=constants, attrs=attributes), options


def distinct(launches: list[Launch]) -> list[Launch]:
    """Without those that would compile to the same code."""
    return list({str((source_of(launch)[0].hash(), source_of(launch)[1])): launch for launch in launches}.values())


def compile_launch(launch: Launch, capability: int) -> dict:
    """Compile and report what the kernel takes of a multiprocessor."""
    source, options = source_of(launch)
    compiled = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)
    with tempfile.NamedTemporaryFile(suffix=".cubin") as cubin:
        cubin.write(compiled.asm["cubin"])
        cubin.flush()
        usage = subprocess.run([CUOBJDUMP, "-res-usage", cubin.name], capture_output=True, text=True, check=True).stdout
    ptx = compiled.asm["ptx"]
    return {
        "kernel": launch.kernel.__name__.strip("_"),
        "sm": capability,
        "registers": int(re.search(r"REG:(\d+)", usage)[1]),
        "local_bytes": int(re.search(r"LOCAL:(\d+)", usage)[1]) + int(re.search(r"STACK:(\d+)", usage)[1]),
        "shared_bytes": compiled.metadata.shared,
        "threads": 32 * compiled.metadata.num_warps,
        "tensor_core": next((name for name, words in PRODUCTS.items() if words in ptx), ""),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", type=int, nargs="*", default=range(len(SHAPES)), help="numbers in SHAPES")
    parser.add_argument("--kernels", nargs="*", help="names; default: all")
    parser.add_argument("--capabilities", type=int, nargs="*", default=CAPABILITIES)
    args = parser.parse_args()
    for number in args.shapes:
        heads, groups, d, dtype, pool_dtype = SHAPES[number]
        names = {"heads": heads, "kv_heads": groups, "head_dim": d, "pool": str(pool_dtype)[6:]}
        for launch in distinct(record_layer(SHAPES[number])):
            if args.kernels and launch.kernel.__name__.strip("_") not in args.kernels:
                continue
            for capability in args.capabilities:
                if capability < 89 and pool_dtype == torch.float8_e4m3fn:
                    continue  # refused there: see metasoft_kernels.backend
                print(json.dumps(names | compile_launch(launch, capability)), flush=True)


if __name__ == "__main__":
    main()
