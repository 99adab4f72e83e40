"""The KV pool's allocator without Triton, for SGLang 0.5.17; later versions choose that themselves."""

import torch
from sglang.srt.mem_cache.allocator.paged import PagedTokenToKVPoolAllocator, alloc_extend_naive
from sglang.srt.utils import get_num_new_pages


class TorchPagedAllocator(PagedTokenToKVPoolAllocator):
    """SGLang's paged allocator, handing pages out with torch operations in place of Triton kernels."""

    def alloc_extend(
        self, prefix_lens, prefix_lens_cpu, seq_lens, seq_lens_cpu, last_loc, extend_num_tokens, num_new_pages=None
    ) -> torch.Tensor | None:
        new_pages = get_num_new_pages(seq_lens=seq_lens_cpu, page_size=self.page_size, prefix_lens=prefix_lens_cpu)
        return self._alloc(prefix_lens, seq_lens, last_loc, extend_num_tokens, new_pages)

    def alloc_decode(self, seq_lens, seq_lens_cpu, last_loc) -> torch.Tensor | None:
        new_pages = get_num_new_pages(seq_lens=seq_lens_cpu, page_size=self.page_size, decode=True)
        return self._alloc(seq_lens - 1, seq_lens, last_loc, len(seq_lens), new_pages)

    free_pages: torch.Tensor  # of the base class

    def _alloc(self, prefix_lens, seq_lens, last_loc, num_tokens: int, new_pages: int) -> torch.Tensor | None:
        """Slots for ``seq_lens - prefix_lens`` further tokens of each request, or None if the pool has no room."""
        if new_pages > len(self.free_pages):
            self.merge_and_sort_free()
        if new_pages > len(self.free_pages):
            return None
        slots = torch.empty(num_tokens, dtype=torch.int64, device=self.device)
        alloc_extend_naive(prefix_lens, seq_lens, last_loc, self.free_pages, slots, self.page_size, self.device)
        self.free_pages = self.free_pages[new_pages:]
        return slots
