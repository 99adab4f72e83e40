"""The index of compressed prefixes: raw prompt prefix -> the virtual token ids that stand for it in the radix tree.

A compressed span of S prompt tokens is, to SGLang, a run of B virtual tokens: content-derived int64 ids outside any
vocabulary. The index finds the indexed prefixes of a prompt. Hashes only narrow the search; the tokens
themselves are compared, so a hash collision can never hand one prompt another's entries.
"""

import hashlib
from array import array
from collections import OrderedDict
from collections.abc import Hashable
from typing import NamedTuple

import numpy as np

BLOCK_TOKENS = 64
FIRST_VIRTUAL_ID = 1 << 61


class Chain(NamedTuple):
    """A compressed prefix."""

    raw_ids: array  # the prompt tokens it stands for
    virtual_ids: array  # one id per kept entry

    @property
    def tokens(self) -> int:
        """Logical length."""
        return len(self.raw_ids)

    @property
    def slots(self) -> int:
        """Entries held."""
        return len(self.virtual_ids)

    @property
    def offset(self) -> int:
        """What must be added to a row index after the chain to get the logical position."""
        return self.tokens - self.slots


def prefix_digests(ids: array) -> list[bytes]:
    """Digest of every prefix of whole blocks: ``result[n]`` covers the first ``n * BLOCK_TOKENS`` ids."""
    state = hashlib.blake2b(digest_size=16)
    digests = [b""]
    view = memoryview(ids)
    for start in range(0, len(ids) - BLOCK_TOKENS + 1, BLOCK_TOKENS):
        state.update(view[start : start + BLOCK_TOKENS])
        digests.append(state.copy().digest())
    return digests


def make_virtual_ids(secret: str, namespace: Hashable, chain: Chain | None, span_ids: array, slots: int) -> array:
    """Ids for a newly compressed span.

    They follow from the content, the namespace and a secret of this server alone: the same on every rank, different
    for other settings or tenants, and not to be guessed by a client.

    Args:
        secret: the server's, hexadecimal.
        namespace: everything that must separate chains; its ``repr`` is hashed.
        chain: the chain that the span continues, or None.
        span_ids: raw token ids of the span.
        slots: number of ids to make.
    """
    digest = hashlib.blake2b(digest_size=16, key=bytes.fromhex(secret))
    digest.update(repr((namespace, slots, len(span_ids))).encode())
    digest.update(memoryview(chain.virtual_ids if chain else array("q")))
    digest.update(memoryview(span_ids))
    random = np.random.Generator(np.random.Philox(key=int.from_bytes(digest.digest(), "little")))
    ids = random.integers(FIRST_VIRTUAL_ID, FIRST_VIRTUAL_ID << 1, size=slots, dtype=np.int64)
    return array("q", ids.tobytes())


class ChainIndex:
    """Compressed prefixes by namespace, bounded, least recently used first out.

    It also remembers the digests of whole prompts, so that it is known where a new prompt leaves earlier ones, even
    after the tree has evicted those. That only decides where a segment ends, never what it holds.

    Args:
        max_tokens: raw tokens remembered over all chains, and again over all prompts.
    """

    def __init__(self, max_tokens: int) -> None:
        self.max_tokens = max_tokens
        self.num_tokens = 0
        self._seen: OrderedDict[tuple[Hashable, bytes], None] = OrderedDict()
        self._buckets: dict[Hashable, list[Chain]] = {}
        self._recency: OrderedDict[int, tuple[Hashable, Chain]] = OrderedDict()

    def __len__(self) -> int:
        return len(self._recency)

    def clear(self) -> None:
        """Forget everything; called whenever the radix tree is emptied."""
        self.num_tokens = 0
        self._buckets.clear()
        self._recency.clear()
        self._seen.clear()

    def remember_prompt(self, tenant: Hashable, digests: list[bytes]) -> None:
        """Note a prompt by its ``prefix_digests``."""
        for digest in digests[1:]:
            self._seen[tenant, digest] = None
            self._seen.move_to_end((tenant, digest))
        while len(self._seen) > max(self.max_tokens // BLOCK_TOKENS, 1):
            self._seen.popitem(last=False)

    def seen_tokens(self, tenant: Hashable, digests: list[bytes]) -> int:
        """How many first tokens, in whole blocks, an earlier prompt of this tenant had too."""
        for blocks in range(len(digests) - 1, 0, -1):
            if (tenant, digests[blocks]) in self._seen:
                return blocks * BLOCK_TOKENS
        return 0

    def candidates(self, namespace: Hashable, ids: array, digests: list[bytes], limit: int) -> list[Chain]:
        """Chains that are proper prefixes of ``ids``, whose ``prefix_digests`` are given; longest first."""
        found: list[Chain] = []
        for blocks in range(len(ids) // BLOCK_TOKENS, -1, -1):
            fitting = [
                chain
                for chain in self._buckets.get((namespace, blocks, digests[blocks]), ())
                if chain.tokens < len(ids) and ids[: chain.tokens] == chain.raw_ids
            ]
            found += sorted(fitting, key=lambda chain: -chain.tokens)
            if len(found) >= limit:
                break
        return found[:limit]

    def touch(self, chain: Chain) -> None:
        """Count the chain as used now."""
        self._recency.move_to_end(id(chain))

    def add(self, namespace: Hashable, chain: Chain, digests: list[bytes]) -> Chain:
        """Remember a chain; ``digests`` are those of a prompt that starts with it. Returns the indexed chain."""
        blocks = chain.tokens // BLOCK_TOKENS
        key = (namespace, blocks, digests[blocks])
        bucket = self._buckets.setdefault(key, [])
        for known in bucket:
            if known == chain:
                self.touch(known)
                return known
        bucket.append(chain)
        self._recency[id(chain)] = (key, chain)
        self.num_tokens += chain.tokens
        while self.num_tokens > self.max_tokens and len(self._recency) > 1:
            self.discard(next(iter(self._recency.values()))[1])
        return chain

    def discard(self, chain: Chain) -> None:
        """Forget one chain, if it is still known."""
        entry = self._recency.pop(id(chain), None)
        if entry is None:
            return
        key, _ = entry
        bucket = self._buckets[key]
        bucket[:] = [known for known in bucket if known is not chain]
        if not bucket:
            del self._buckets[key]
        self.num_tokens -= chain.tokens
