"""What the hook of a decode step takes of the scheduler's thread: microseconds a step, by the number of requests.

SGLang is not run: the hook that shifts positions is called on requests whose prompts are compressed, as each decode
step calls it, on a CPU. On a GPU it launches one addition.

    python benchmarks/decode_hooks.py [--requests 1 64 256] [--steps 2000] [--output hooks.json]
"""

import argparse
import array
import time
from pathlib import Path
from types import SimpleNamespace

import torch
from metasoft_patches.adapter import load_adapter
from metasoft_patches.cache.prefix_index import FIRST_VIRTUAL_ID, CompressedPrefix
from metasoft_patches.cache.request import RequestState
from metasoft_patches.scheduler.positions import PositionShift
from sglang.srt.model_executor.forward_batch_info import ForwardMode

from sglang_metasoft.bench import result_file

PROMPT_TOKENS = 4096


def make_request(number: int) -> SimpleNamespace:
    """What the hooks read of one of SGLang's requests."""
    req = SimpleNamespace(rid=str(number), origin_input_ids=array.array("q", range(PROMPT_TOKENS)), output_ids=[])
    req.metasoft = RequestState(req, {})
    ids = array.array("q", range(FIRST_VIRTUAL_ID, FIRST_VIRTUAL_ID + PROMPT_TOKENS // 4 - number))
    req.metasoft.compressed = CompressedPrefix.extend(None, ids, PROMPT_TOKENS - 64, PROMPT_TOKENS)
    return req


def microseconds(requests: int, steps: int) -> float:
    """Of one decode step, the mean of ``steps``."""
    batch = SimpleNamespace(
        reqs=[make_request(number) for number in range(requests)], forward_mode=ForwardMode.DECODE, beam_tail=None
    )
    shift = PositionShift(load_adapter())
    positions = torch.arange(requests)
    began = time.perf_counter()
    for _ in range(steps):
        shift.apply(SimpleNamespace(positions=positions, mrope_positions=None), batch)
    return 1e6 * (time.perf_counter() - began) / steps


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--requests", type=int, nargs="+", default=[1, 64, 256])
    parser.add_argument("--steps", type=int, default=2000)
    parser.add_argument("--output", type=Path, help="also write the result as JSON")
    args = parser.parse_args()
    result = {requests: round(microseconds(requests, args.steps), 1) for requests in args.requests}
    for requests, found in result.items():
        print(f"{requests:4} requests: {found:.1f} us a step")
    if args.output:
        result_file.write(args.output, result)


if __name__ == "__main__":
    main()
