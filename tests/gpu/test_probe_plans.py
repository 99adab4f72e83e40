"""Probes that are planned while the plans before them have not reached the device: FlashInfer's own wrappers."""

import pytest
import torch
from metasoft_kernels.probe import fused
from metasoft_kernels.probe.flashinfer_probe import FlashInferProbe
from metasoft_kernels.ragged import ragged

from tests.gpu.conftest import DRY_RUN

pytestmark = pytest.mark.gpu

SLEEP_CYCLES = 2_000_000_000  # about a second: the prefill that lies before the probe on the stream
HEADS, GROUPS, HEAD_DIM, PROBE_TOKENS = (4, 2, 64, 4) if DRY_RUN else (32, 8, 128, 32)
# Plans differ in length and in tiles; the first is the longest, so that reading too far would show.
CONTEXT_TOKENS = (300, 40, 90) if DRY_RUN else (60_000, 9_000, 30_000)


@pytest.fixture
def attend():
    """On a CPU, where FlashInfer has no kernels, our own in Triton's interpreter: that checks the check."""
    if DRY_RUN:
        return fused.attend
    return FlashInferProbe(HEADS, GROUPS, HEAD_DIM, torch.bfloat16, torch.bfloat16, torch.device("cuda")).attend


def test_probes_behind_a_sleeping_stream_give_what_they_give_alone(attend):
    device, dtype = ("cpu", torch.float32) if DRY_RUN else ("cuda", torch.bfloat16)
    pool = [torch.randn(4 * CONTEXT_TOKENS[0], GROUPS, HEAD_DIM, dtype=dtype, device=device) for _ in range(2)]

    def prompt(tokens: int):
        q = torch.randn(PROBE_TOKENS, HEADS, HEAD_DIM, dtype=dtype, device=device)
        new = torch.randn(PROBE_TOKENS, GROUPS, HEAD_DIM, dtype=dtype, device=device)
        slots = torch.randperm(len(pool[0]), device=device)[:tokens]
        return q, *pool, slots, new, new, *ragged(torch.device(device), [PROBE_TOKENS], [tokens]), HEAD_DIM**-0.5

    prompts = [prompt(tokens) for tokens in CONTEXT_TOKENS]
    alone = []
    for arguments in prompts:
        alone.append([tensor.clone() for tensor in attend(*arguments)])
        if not DRY_RUN:
            torch.cuda.synchronize()
    if not DRY_RUN:
        torch.cuda._sleep(SLEEP_CYCLES)
    queued = [attend(*arguments) for arguments in prompts]
    if not DRY_RUN:
        assert not torch.cuda.current_stream().query(), "the stream did not sleep long enough to show anything"
        torch.cuda.synchronize()
    for (out, lse), (expected_out, expected_lse) in zip(queued, alone, strict=True):
        torch.testing.assert_close(lse, expected_lse, atol=0, rtol=0)
        torch.testing.assert_close(out, expected_out, atol=0, rtol=0)
