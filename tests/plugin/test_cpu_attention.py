"""The CPU platform's attention: equal to ``torch_native`` where that serves, and to the definition elsewhere."""

import importlib
import random
from importlib.metadata import version
from types import SimpleNamespace

import pytest
import sglang.srt.plugins as plugins
import torch
from metasoft_patches import cpu as cpu_platform
from metasoft_patches.adapter import folder_of
from metasoft_patches.cpu import attention as cpu_attention
from metasoft_patches.cpu.attention import TorchRowsBackend, attend
from sglang.srt.arg_groups.overrides import attention_backends_of, resolved_view
from sglang.srt.layers.attention.attention_registry import ATTENTION_BACKENDS
from sglang.srt.layers.attention.torch_native_backend import TorchNativeAttnBackend
from sglang.srt.layers.radix_attention import AttentionType, RadixAttention
from sglang.srt.layers.rotary_embedding import mrope
from sglang.srt.mem_cache import allocation
from sglang.srt.mem_cache.memory_pool import MHATokenToKVPool, ReqToTokenPool
from sglang.srt.mem_cache.swa_memory_pool import SWAKVPool
from sglang.srt.model_executor import forward_batch_info
from sglang.srt.model_executor.forward_batch_info import ForwardBatch, ForwardMode
from sglang.srt.server_args import ATTENTION_BACKEND_CHOICES, prepare_server_args

plugins.load_plugins()

SIZE, PAGE, CONTEXT = 16, 16, 256
PREFIXES, NEWS = (0, 1, 15, 16, 17, 70), (1, 1, 2, 6, 15, 16, 17, 40)


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch):
    monkeypatch.setattr(cpu_attention, "BLOCK_ROWS", 6)


def by_definition(query, key, value, first, *, scale, window=None, cap=0.0, sinks=None):
    """Attention in float64, row by row; arguments as of ``attend``."""
    group = query.shape[1] // key.shape[1]
    key, value = (part.double().repeat_interleave(group, dim=1) for part in (key, value))
    rows = []
    for row, one in enumerate(query.double()):
        seen = range(len(key))
        if first is not None:
            seen = range(0 if window is None else max(0, first + row - window), first + row + 1)
        scores = torch.einsum("hd,khd->hk", one, key[seen.start : seen.stop]) * scale
        scores = cap * torch.tanh(scores / cap) if cap else scores
        weights = scores.exp()
        total = weights.sum(-1) + (0 if sinks is None else sinks.double().exp())
        rows.append(torch.einsum("hk,khd->hd", weights, value[seen.start : seen.stop]) / total[:, None])
    return torch.stack(rows).to(query.dtype)


@pytest.mark.parametrize("seed", range(150))
def test_any_rows_attend_as_defined(seed, monkeypatch):
    draw = random.Random(seed)
    monkeypatch.setattr(cpu_attention, "BLOCK_ROWS", draw.choice([1, 6, 256]))
    kv_heads, group, value_size = draw.choice([1, 2, 3]), draw.choice([1, 2, 3]), draw.choice([SIZE, SIZE, 4])
    first, rows = draw.choice(PREFIXES), draw.choice(NEWS)
    query, key = torch.randn(rows, kv_heads * group, SIZE), torch.randn(first + rows, kv_heads, SIZE)
    value = torch.randn(first + rows, kv_heads, value_size)
    sinks = draw.choice([None, None, torch.randn(kv_heads * group)])
    options = {"scale": 0.3, "cap": draw.choice([0.0, 0.0, 2.0]), "sinks": sinks}
    options["window"] = draw.choice([None, None, 0, 1, 5, 16, 300])
    if draw.random() < 0.15:
        first = options["window"] = None
    expected = by_definition(query, key, value, first, **options)
    torch.testing.assert_close(attend(query, key, value, first, **options), expected)


@pytest.mark.parametrize("special", [{}, {"cap": 2.0}], ids=["fused", "by scores"])
def test_no_matrix_grows_with_both_lengths(special, monkeypatch):
    bound = 3000
    monkeypatch.setattr(cpu_attention, "MASK_ELEMENTS", bound)
    monkeypatch.setattr(cpu_attention, "SCORE_ELEMENTS", bound)
    sizes = []
    for name in ("attend_fused", "attend_by_scores"):
        inner = getattr(cpu_attention, name)

        def spy(query, key, *rest, inner=inner, heads=2 if special else 1):
            sizes.append(heads * len(query) * len(key))
            return inner(query, key, *rest)

        monkeypatch.setattr(cpu_attention, name, spy)
    query, key, value = torch.randn(90, 2, SIZE), torch.randn(700, 1, SIZE), torch.randn(700, 1, SIZE)
    out = attend(query, key, value, 610, scale=0.3, **special)
    torch.testing.assert_close(out, by_definition(query, key, value, 610, scale=0.3, **special))
    assert max(sizes) <= bound < 90 * 700


def make_batch(draw: random.Random, mode: str, requests: int) -> tuple[ForwardBatch, ReqToTokenPool]:
    """Requests whose pages lie anywhere in the pool, in rows in any order."""
    prefixes = [draw.choice(PREFIXES) for _ in range(requests)]
    news = [1 if mode == "decode" else draw.choice(NEWS) for _ in range(requests)]
    table = ReqToTokenPool(requests + 3, CONTEXT, "cpu", False)
    rows = draw.sample(range(1, requests + 4), requests)
    pages = draw.sample(range(1, 8 * requests + 1), 8 * requests)
    written = []
    for row, prefix, new in zip(rows, prefixes, news, strict=True):
        own = torch.tensor([pages.pop() for _ in range(-(-(prefix + new) // PAGE))])
        slots = (own[:, None] * PAGE + torch.arange(PAGE)).flatten()[: prefix + new]
        table.req_to_token[row, : prefix + new] = slots.int()
        written.append(slots[prefix:])
    lengths = torch.tensor([prefix + new for prefix, new in zip(prefixes, news, strict=True)])
    batch = ForwardBatch(
        forward_mode=ForwardMode.DECODE if mode == "decode" else ForwardMode.EXTEND,
        batch_size=requests, input_ids=torch.zeros(sum(news), dtype=torch.int64), req_pool_indices=torch.tensor(rows),
        seq_lens=lengths, out_cache_loc=torch.cat(written), seq_lens_sum=int(lengths.sum()),
    )  # fmt: skip
    batch.extend_prefix_lens = torch.tensor(prefixes, dtype=torch.int32)
    batch.extend_seq_lens = torch.tensor(news, dtype=torch.int32)
    return batch, table


def make_layer(kv_heads: int, group: int, value_size: int = SIZE, **kwargs) -> RadixAttention:
    return RadixAttention(kv_heads * group, SIZE, 0.3, kv_heads, 0, v_head_dim=value_size, **kwargs)


def make_pool(requests: int, kv_heads: int, dtype, value_size: int = SIZE) -> MHATokenToKVPool:
    pool = MHATokenToKVPool(8 * requests * PAGE, PAGE, dtype, kv_heads, SIZE, 1, "cpu", False, v_head_dim=value_size)
    for buffer in (pool.k_buffer[0], pool.v_buffer[0]):
        buffer.copy_(torch.randn(buffer.shape))
    return pool


def run(backend_class, layer, batch, table, pool, q, k, v, **kwargs):
    backend = backend_class(SimpleNamespace(device="cpu", req_to_token_pool=table, token_to_kv_pool=pool))
    backend.init_forward_metadata(batch)
    return backend.forward(q.clone(), k.clone(), v.clone(), layer, batch, **kwargs)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("mode", ["extend", "decode", "encoder"])
@pytest.mark.parametrize("seed", range(25))
def test_a_batch_is_served_as_by_torch_native(seed, mode, dtype):
    draw = random.Random(seed)
    kv_heads, group, requests = draw.choice([1, 2, 3]), draw.choice([1, 2, 3]), draw.choice([1, 2, 5])
    value_size = draw.choice([SIZE, SIZE, 4])
    window = draw.choice([-1, -1, 1, 16, 300])
    kind = AttentionType.ENCODER_ONLY if mode == "encoder" else AttentionType.DECODER
    layer = make_layer(kv_heads, group, value_size, sliding_window_size=window, attn_type=kind)
    batch, table = make_batch(draw, mode, requests)
    pool = make_pool(requests, kv_heads, dtype, value_size)
    tokens = len(batch.input_ids)
    q = torch.randn(tokens, kv_heads * group * SIZE, dtype=dtype)
    k, v = (torch.randn(tokens, kv_heads, size, dtype=dtype) for size in (SIZE, value_size))
    before = [buffer.clone() for buffer in (pool.k_buffer[0], pool.v_buffer[0])]
    expected = run(TorchNativeAttnBackend, layer, batch, table, pool, q, k, v)
    written = [buffer.clone() for buffer in (pool.k_buffer[0], pool.v_buffer[0])]
    for buffer, old in zip((pool.k_buffer[0], pool.v_buffer[0]), before, strict=True):
        buffer.copy_(old)
    out = run(TorchRowsBackend, layer, batch, table, pool, q, k, v)
    assert out.shape == expected.shape and out.dtype == expected.dtype
    torch.testing.assert_close(out, expected, **({"atol": 0.02, "rtol": 0.02} if dtype == torch.bfloat16 else {}))
    assert torch.equal(pool.k_buffer[0], written[0]) and torch.equal(pool.v_buffer[0], written[1])


def test_what_is_not_to_be_written_is_not():
    batch, table = make_batch(random.Random(3), "extend", 2)
    pool = make_pool(2, 1, torch.float32)
    before = pool.k_buffer[0].clone()
    q, k = torch.randn(len(batch.input_ids), SIZE), torch.randn(len(batch.input_ids), 1, SIZE)
    expected = run(TorchNativeAttnBackend, make_layer(1, 1), batch, table, pool, q, k, k, save_kv_cache=False)
    out = run(TorchRowsBackend, make_layer(1, 1), batch, table, pool, q, k, k, save_kv_cache=False)
    torch.testing.assert_close(out, expected)
    assert torch.equal(pool.k_buffer[0], before)


@pytest.mark.parametrize("cross", [True, False], ids=["cross-attention", "behind an encoder"])
@pytest.mark.parametrize("mode", ["extend", "decode"])
def test_an_encoder_s_slots_come_first(mode, cross):
    batch, table = make_batch(random.Random(5), mode, 3)
    batch.encoder_lens = torch.tensor([4, 1, 9])
    table.req_to_token[:, 80:] = torch.randint(PAGE, 8 * 3 * PAGE, (len(table.req_to_token), CONTEXT - 80)).int()
    pool, layer = make_pool(3, 2, torch.float32), make_layer(2, 2, is_cross_attention=cross)
    q, k = torch.randn(len(batch.input_ids), 4 * SIZE), torch.randn(len(batch.input_ids), 2, SIZE)
    expected = run(TorchNativeAttnBackend, layer, batch, table, pool, q, k, k, save_kv_cache=False)
    out = run(TorchRowsBackend, layer, batch, table, pool, q, k, k, save_kv_cache=False)
    torch.testing.assert_close(out, expected)


@pytest.mark.parametrize("mode", ["extend", "decode"])
def test_a_pool_of_windows_is_read_in_its_own_slots(mode):
    """What has left every window has no slot there any more: it maps to slot 0, which holds NaN here."""
    window, requests = 20, 4
    batch, table = make_batch(random.Random(7), mode, requests)
    size = 8 * requests * PAGE
    pool = SWAKVPool(
        size, size, PAGE, torch.float32, 1, SIZE, swa_attention_layer_ids=[0], full_attention_layer_ids=[1],
        device="cpu",
    )  # fmt: skip
    mapping = torch.zeros(size + PAGE + 1, dtype=torch.int64)
    keys, values = pool.swa_kv_pool.k_buffer[0].fill_(torch.nan), pool.swa_kv_pool.v_buffer[0].fill_(torch.nan)
    free = torch.randperm(size) + 1
    news = batch.extend_seq_lens.tolist()
    q, k = torch.randn(sum(news), 2 * SIZE), torch.randn(sum(news), 1, SIZE)
    sinks, rows, start = torch.randn(2), [], 0
    for row, length, new in zip(batch.req_pool_indices, batch.seq_lens.tolist(), news, strict=True):
        first = max(0, length - new - window)
        slots = table.req_to_token[row, first:length].long()
        mapping[slots], free = free[: len(slots)], free[len(slots) :]
        past = torch.randn(length - new - first, 1, SIZE)
        keys[mapping[slots[: len(past)]]] = values[mapping[slots[: len(past)]]] = past
        key = torch.cat([past, k[start : start + new]])
        query = q[start : start + new].view(new, 2, SIZE)
        rows.append(by_definition(query, key, key, len(past), scale=0.3, window=window, sinks=sinks))
        start += new
    pool.register_mapping(mapping)
    layer = make_layer(1, 2, sliding_window_size=window)
    out = run(TorchRowsBackend, layer, batch, table, pool, q, k, k, sinks=sinks)
    torch.testing.assert_close(out.view(-1, 2, SIZE), torch.cat(rows))


def test_the_platform_offers_and_registers_it(monkeypatch):
    platform = importlib.import_module(f"metasoft_patches.{folder_of(version('sglang'))}.cpu_platform").CpuPlatform()
    name = platform.get_default_attention_backend()
    monkeypatch.setattr("sglang.srt.platforms._current_platform", platform)
    monkeypatch.setitem(ATTENTION_BACKENDS, name, None)
    monkeypatch.setattr(allocation, "get_last_loc_triton", allocation.get_last_loc_triton)
    for module in (allocation, forward_batch_info, mrope):
        monkeypatch.setattr(module, "support_triton", module.support_triton)
    cpu_platform.offer_attention_backend()
    cpu_platform.offer_attention_backend()
    assert ATTENTION_BACKEND_CHOICES.count(name) == 1
    platform.init_backend()
    runner = SimpleNamespace(device="cpu", req_to_token_pool=None, token_to_kv_pool=None)
    assert isinstance(ATTENTION_BACKENDS[name](runner), TorchRowsBackend)
    assert allocation.get_last_loc_triton is allocation.get_last_loc_torch
    assert not any(module.support_triton(name) for module in (allocation, forward_batch_info, mrope))


@pytest.mark.parametrize(
    ("flags", "backends"),
    [
        ([], ("torch_rows", "torch_rows")),
        (["--attention-backend", "torch_rows"], ("torch_rows", "torch_rows")),
        (["--attention-backend", "torch_native"], ("torch_native", "torch_native")),
        (["--decode-attention-backend", "torch_native"], ("torch_rows", "torch_native")),
    ],
)
def test_servers_take_it_unless_told_otherwise(model_dir, flags, backends):
    args = prepare_server_args(["--model-path", str(model_dir), *flags])
    getattr(args, "resolve_once", lambda: None)()  # as the entry points do from 0.5.23 on
    assert attention_backends_of(resolved_view(args)) == backends
