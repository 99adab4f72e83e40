"""HiCache's host pool on a machine without an accelerator: ordinary memory, and the copies of SGLang's kernel library.

There "device" and "host" are two buffers of one memory, so that all but the overlap of copies with computing is what
it is on a GPU. Every layout of ``--hicache-mem-layout`` is served that stores keys and values apart.

Device buffers are ``[slots, heads, size]`` a layer. A host buffer, of keys or of values, is

- ``layer_first``: the same, layer after layer;
- ``page_first``: ``[slots, layers, heads, size]``;
- ``page_first_direct``: ``[pages, layers, page_size, heads, size]``;
- ``page_head``: ``[pages, heads, page_size, layers, size]``.

The functions have the names, parameters and meaning of ``sgl_kernel.kvcacheio``: ``lf``, ``pf`` and ``ph`` are the
first, second and last layout, and a "direct" ``pf`` the third. A table of layers is one of addresses.
"""

import ctypes

import torch
from sglang.srt.mem_cache.pool_host import base, common, mha

KEPT_FREE_BYTES = 1 << 30  # of the machine's memory; SGLang keeps ten times as much, which a laptop may not have


def allocate(dims, dtype, device, pin_memory, allocator, registration_granularity_bytes=None) -> torch.Tensor:
    """Memory for a host pool, not page-locked: there is no device that would read it by itself."""
    return allocator.allocate(dims, dtype=dtype, device=device)


def transfer_kv_per_layer(src_k, dst_k, src_v, dst_v, src_indices, dst_indices, item_size) -> None:
    dst_k[dst_indices] = src_k[src_indices]
    dst_v[dst_indices] = src_v[src_indices]


def transfer_kv_all_layer(
    src_k_layers, dst_k_layers, src_v_layers, dst_v_layers, src_indices, dst_indices, item_size, num_layers
) -> None:
    for src_layers, dst_layers in ((src_k_layers, dst_k_layers), (src_v_layers, dst_v_layers)):
        for src, dst in zip(src_layers.tolist(), dst_layers.tolist(), strict=True):
            rows_at(dst, dst_indices, item_size)[dst_indices] = rows_at(src, src_indices, item_size)[src_indices]


def transfer_kv_per_layer_pf_lf(
    src_k, dst_k, src_v, dst_v, src_indices, dst_indices, layer_id, item_size, src_layout_dim
) -> None:
    dst_k[dst_indices] = src_k[src_indices, layer_id]
    dst_v[dst_indices] = src_v[src_indices, layer_id]


def transfer_kv_all_layer_lf_pf(
    src_k_layers, dst_k, src_v_layers, dst_v, src_indices, dst_indices, item_size, dst_layout_dim, num_layers
) -> None:
    for src_layers, dst in ((src_k_layers, dst_k), (src_v_layers, dst_v)):
        for layer, entries in enumerate(entries_of(src_layers, src_indices, item_size, dst)):
            dst[dst_indices, layer] = entries


def transfer_kv_per_layer_ph_lf(
    src_k, dst_k, src_v, dst_v, src_indices, dst_indices, layer_id, item_size, src_layout_dim, page_size, head_num
) -> None:
    page, place = src_indices // page_size, src_indices % page_size
    dst_k[dst_indices] = src_k[page, :, place, layer_id]
    dst_v[dst_indices] = src_v[page, :, place, layer_id]


def transfer_kv_all_layer_lf_ph(
    src_k_layers, dst_k, src_v_layers, dst_v, src_indices, dst_indices, item_size, dst_layout_dim, num_layers,
    page_size, head_num,
) -> None:  # fmt: skip
    page, place = dst_indices // page_size, dst_indices % page_size
    for src_layers, dst in ((src_k_layers, dst_k), (src_v_layers, dst_v)):
        for layer, entries in enumerate(entries_of(src_layers, src_indices, item_size, dst)):
            dst[page, :, place, layer] = entries


def transfer_kv_direct(src_layers, dst_layers, src_indices, dst_indices, page_size) -> None:
    for src, dst in zip(src_layers, dst_layers, strict=True):
        dst[dst_indices] = src[src_indices]


def transfer_kv_per_layer_direct_pf_lf(src_ptrs, dst_ptrs, src_indices, dst_indices, layer_id, page_size) -> None:
    page, place = src_indices // page_size, src_indices % page_size
    for src, dst in zip(src_ptrs, dst_ptrs, strict=True):
        dst[dst_indices] = src[page, layer_id, place]


def transfer_kv_all_layer_direct_lf_pf(src_ptrs, dst_ptrs, src_indices, dst_indices, page_size) -> None:
    page, place = dst_indices // page_size, dst_indices % page_size
    layers = len(src_ptrs) // len(dst_ptrs)  # the layers' keys, then their values
    for number, src in enumerate(src_ptrs):
        dst_ptrs[number // layers][page, number % layers, place] = src[src_indices]


TRANSFERS = (
    transfer_kv_per_layer, transfer_kv_all_layer, transfer_kv_per_layer_pf_lf, transfer_kv_all_layer_lf_pf,
    transfer_kv_per_layer_ph_lf, transfer_kv_all_layer_lf_ph, transfer_kv_direct, transfer_kv_per_layer_direct_pf_lf,
    transfer_kv_all_layer_direct_lf_pf,
)  # fmt: skip


def rows_at(address: int, indices: torch.Tensor, row_bytes: int) -> torch.Tensor:
    """``[rows, row_bytes]`` bytes of a buffer, as far as the indices reach."""
    rows = int(indices.max()) + 1 if len(indices) else 0
    memory = (ctypes.c_uint8 * max(rows * row_bytes, 1)).from_address(address)
    return torch.frombuffer(memory, dtype=torch.uint8)[: rows * row_bytes].view(rows, row_bytes)


def entries_of(layers: torch.Tensor, indices: torch.Tensor, row_bytes: int, like: torch.Tensor):
    """Of each layer ``[n, heads, size]`` in the dtype of a host buffer, whose last size is an entry's."""
    for address in layers.tolist():
        rows = rows_at(address, indices, row_bytes)[indices]
        yield rows.view(like.dtype).view(len(indices), -1, like.shape[-1])


def allow_host_pool() -> None:
    """Let this process's host pools allocate and copy."""
    base.HICACHE_HOST_MEMORY_RESERVE_BYTES = KEPT_FREE_BYTES
    common.ALLOC_MEMORY_FUNCS["cpu"] = allocate
    for transfer in TRANSFERS:
        setattr(mha, transfer.__name__, transfer)
