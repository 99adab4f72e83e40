"""Attention on the CPU in plain torch, for the new rows alone.

SGLang's ``torch_native`` pads the queries of every extend to the whole sequence, so that a chunk or a next turn pays
for each row of its context again. Here new rows attend to the keys that they can see, in blocks of rows: no mask and no
matrix of scores grows with both lengths.
"""

import torch
from sglang.srt.layers.attention.torch_native_backend import TorchNativeAttnBackend
from sglang.srt.layers.radix_attention import AttentionType
from sglang.srt.mem_cache.memory_pool import KVWriteLoc
from torch.nn.functional import scaled_dot_product_attention

BLOCK_ROWS = 256
MASK_ELEMENTS = 1 << 22  # of a block: 21 MB, as booleans and as the float32 that torch makes of them
SCORE_ELEMENTS = 1 << 24  # of a block, all heads: 67 MB, where scores are written out


class TorchRowsBackend(TorchNativeAttnBackend):
    """As ``torch_native``, for the new rows alone; and with attention sinks, capped logits and pools of windows."""

    def forward_extend(self, q, k, v, layer, forward_batch, save_kv_cache=True, sinks=None):
        """Attention of each request's last ``extend_seq_lens`` tokens to what the request holds.

        Args:
            q: ``[tokens, q_heads * key_size]``, the requests one after the other.
            k, v: ``[tokens, kv_heads, size]``, written into the pool first; None where nothing is to be written.
            layer: SGLang's ``RadixAttention``.
            forward_batch: SGLang's.
            save_kv_cache: False if k and v are in the pool.
            sinks: ``[q_heads]`` logits that share in the softmax and have no value; None without.

        Returns:
            ``[tokens, q_heads * value_size]``.
        """
        new_lens = forward_batch.extend_seq_lens.tolist()
        return self._forward(q, k, v, layer, forward_batch, save_kv_cache, sinks, new_lens)

    def forward_decode(self, q, k, v, layer, forward_batch, save_kv_cache=True, sinks=None):
        """As :meth:`forward_extend`, with one new token for each request."""
        new_lens = [1] * len(forward_batch.seq_lens)
        return self._forward(q, k, v, layer, forward_batch, save_kv_cache, sinks, new_lens)

    def _forward(self, q, k, v, layer, forward_batch, save_kv_cache, sinks, new_lens: list[int]) -> torch.Tensor:
        cross = layer.is_cross_attention
        causal = not cross and layer.attn_type != AttentionType.ENCODER_ONLY
        window = layer.sliding_window_size if causal and (layer.sliding_window_size or -1) > -1 else None
        if save_kv_cache and k is not None and v is not None:
            written = forward_batch.encoder_out_cache_loc if cross else forward_batch.out_cache_loc
            self.token_to_kv_pool.set_kv_buffer(layer, KVWriteLoc(written, self.swa_out_cache_loc), k, v)
        keys = self.token_to_kv_pool.get_key_buffer(layer.layer_id)
        values = self.token_to_kv_pool.get_value_buffer(layer.layer_id)
        queries = q.reshape(-1, layer.tp_q_head_num, layer.qk_head_dim)
        out = q.new_empty(len(queries), layer.tp_q_head_num, layer.v_head_dim)
        start = 0
        for slots, new in zip(self._slots(forward_batch, cross), new_lens, strict=True):
            first = len(slots) - new
            if window is not None:  # what no new row can see is not read
                hidden = max(0, first - window)
                slots, first = slots[hidden:], first - hidden
            if self._in_pool_of_windows(layer):
                slots = self.token_to_kv_pool.translate_loc_from_full_to_swa(slots)
            key, value = (buffer.index_select(0, slots).to(q.dtype) for buffer in (keys, values))
            out[start : start + new] = attend(
                queries[start : start + new], key, value, first if causal else None,
                scale=layer.scaling, window=window, cap=layer.logit_cap, sinks=sinks,
            )  # fmt: skip
            start += new
        return out.view(len(queries), -1)

    def _slots(self, forward_batch, cross: bool) -> list[torch.Tensor]:
        """Each request's slots in order of position, ``[keys]``: its encoder's in cross-attention, else its own."""
        table = self.req_to_token_pool.req_to_token
        rows, lengths = forward_batch.req_pool_indices.tolist(), forward_batch.seq_lens.tolist()
        if forward_batch.encoder_lens is None:
            return [table[row, :length] for row, length in zip(rows, lengths, strict=True)]
        heads = forward_batch.encoder_lens.tolist()
        if cross:
            return [table[row, :head] for row, head in zip(rows, heads, strict=True)]
        return [table[row, head : head + length] for row, head, length in zip(rows, heads, lengths, strict=True)]

    def _in_pool_of_windows(self, layer) -> bool:
        return self.use_sliding_window_kv_pool and self.token_to_kv_pool.layers_mapping[layer.layer_id][1]


def attend(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    first: int | None,
    *,
    scale: float,
    window: int | None = None,
    cap: float = 0.0,
    sinks: torch.Tensor | None = None,
) -> torch.Tensor:
    """Attention of rows to keys.

    Args:
        query: ``[rows, q_heads, key_size]``.
        key: ``[keys, kv_heads, key_size]``; q_heads is a multiple of kv_heads.
        value: ``[keys, kv_heads, value_size]``.
        first: the first row's own key: row i sees keys 0 to ``first + i``; None lets every row see all.
        scale: factor of the products.
        window: a row sees so many keys before its own; None for all of them.
        cap: logits are ``cap * tanh(logit / cap)``; 0 for none.
        sinks: ``[q_heads]`` logits that share in the softmax and have no value; None without.

    Returns:
        ``[rows, q_heads, value_size]`` in the dtype of query.
    """
    rows, heads, _ = query.shape
    out = query.new_empty(rows, heads, value.shape[2])
    written_out = bool(cap) or sinks is not None or key.shape[2] != value.shape[2]
    room = SCORE_ELEMENTS // heads if written_out else MASK_ELEMENTS
    step = max(1, min(BLOCK_ROWS, room // max(1, len(key))))
    for start in range(0, rows, step):
        stop = min(start + step, rows)
        low, high = 0, len(key)
        if first is not None:
            high = first + stop
            low = 0 if window is None else max(0, first + start - window)
        mask = None if first is None else visible(first + start - low, stop - start, high - low, window, query.device)
        block = query[start:stop], key[low:high], value[low:high], mask, scale
        out[start:stop] = attend_by_scores(*block, cap, sinks) if written_out else attend_fused(*block)
    return out


def visible(first: int, rows: int, keys: int, window: int | None, device: torch.device) -> torch.Tensor | None:
    """Which keys each row sees, ``[rows, keys]``; None if each sees all."""
    if rows == 1:  # no more keys than it sees were cut out
        return None
    own = torch.arange(first, first + rows, device=device)[:, None]
    position = torch.arange(keys, device=device)
    mask = position <= own
    return mask if window is None else mask & (position >= own - window)


def attend_fused(query, key, value, mask, scale) -> torch.Tensor:
    """By torch's fused kernel; shapes as in :func:`attend`."""
    rows, heads, size = query.shape
    key, value = key.movedim(0, 1)[None], value.movedim(0, 1)[None]
    if rows == 1:  # the query heads of a KV head are rows: the kernel reads each key once
        grouped = query.view(1, key.shape[1], -1, size)
        return scaled_dot_product_attention(grouped, key, value, scale=scale).reshape(1, heads, size)
    out = scaled_dot_product_attention(
        query.movedim(0, 1)[None], key, value, mask, scale=scale, enable_gqa=heads != key.shape[1]
    )
    return out[0].movedim(0, 1)


def attend_by_scores(query, key, value, mask, scale, cap, sinks) -> torch.Tensor:
    """With scores written out in float32; shapes as in :func:`attend`."""
    rows, heads, size = query.shape
    kv_heads = key.shape[1]
    grouped = query.float().view(rows, kv_heads, -1, size).permute(1, 2, 0, 3)  # [kv_heads, group, rows, size]
    scores = grouped.mul(scale) @ key.float().permute(1, 2, 0)[:, None]
    if cap:
        scores.div_(cap).tanh_().mul_(cap)
    if mask is not None:
        scores.masked_fill_(~mask, -torch.inf)
    if sinks is not None:
        column = sinks.float().view(kv_heads, -1, 1, 1).expand(-1, -1, rows, 1)
        scores = torch.cat([scores, column], dim=-1)
    weights = scores.softmax(-1)[..., : len(key)]
    out = weights @ value.float().movedim(0, 1)[:, None]
    return out.permute(2, 0, 1, 3).reshape(rows, heads, -1).to(query.dtype)
