"""HiCache's host pool on the CPU platform: what goes there lies where its layout says, and comes back bit for bit."""

from importlib.metadata import version

import pytest
import torch

if version("sglang") == "0.5.17":
    pytest.skip("HiCache is refused there", allow_module_level=True)

import sglang.srt.plugins  # noqa: E402, F401  (as a server does, first)
from metasoft_patches.cpu.host_pool import allow_host_pool  # noqa: E402
from sglang.srt.mem_cache.memory_pool import MHATokenToKVPool  # noqa: E402
from sglang.srt.mem_cache.pool_host import mha  # noqa: E402

LAYERS, HEADS, SIZE, SLOTS = 3, 2, 8, 256
# Layout, I/O backend: where the host buffer has the entry of a layer and a slot.
PLACES = {
    ("layer_first", "kernel"): lambda host, layer, slot, page: host[layer, slot],
    ("layer_first", "direct"): lambda host, layer, slot, page: host[layer, slot],
    ("page_first", "kernel"): lambda host, layer, slot, page: host[slot, layer],
    ("page_first_direct", "direct"): lambda host, layer, slot, page: host[slot // page, layer, slot % page],
    ("page_head", "kernel"): lambda host, layer, slot, page: host[slot // page, :, slot % page, layer],
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float8_e4m3fn], ids=str)
@pytest.mark.parametrize("page", [1, 16])
@pytest.mark.parametrize(("layout", "backend"), PLACES, ids=["-".join(key) for key in PLACES])
def test_entries_go_to_the_host_and_back(layout, backend, page, dtype):
    allow_host_pool()
    device = MHATokenToKVPool(SLOTS, page, dtype, HEADS, SIZE, LAYERS, "cpu", False)
    info = device.get_device_pool_infos()[0].buffer_info
    host = mha.get_mha_host_pool_cls(info)(
        info, 2.0, 0, page, layout, device_capacity_tokens=SLOTS, start_layer=0, end_layer=LAYERS - 1
    )
    buffers = [*device.k_buffer, *device.v_buffer]
    for buffer in buffers:
        buffer.view(torch.uint8).random_()
    pages = torch.randperm(SLOTS // page - 1)[: 32 // page + 1] + 1
    slots = (pages[:, None] * page + torch.arange(page)).flatten()
    host.alloc(3 * page)  # so that the two differ
    host_slots = host.alloc(len(slots))
    before = [buffer.view(torch.uint8).clone() for buffer in buffers]
    host.backup_from_device_all_layer(device, host_slots, slots, backend)
    for layer in range(LAYERS):
        for half, one in ((host.k_buffer, device.k_buffer), (host.v_buffer, device.v_buffer)):
            for slot, host_slot in zip(slots.tolist(), host_slots.tolist(), strict=True):
                entry = PLACES[layout, backend](half, layer, host_slot, page)
                assert torch.equal(entry.view(torch.uint8), one[layer][slot].view(torch.uint8))
    for buffer in buffers:
        buffer.view(torch.uint8)[slots] = 0
    for layer in range(LAYERS):
        host.load_to_device_per_layer(device, host_slots, slots, layer, backend)
    for buffer, expected in zip(buffers, before, strict=True):
        assert torch.equal(buffer.view(torch.uint8), expected)
