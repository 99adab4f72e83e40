"""The index of compressed prefixes: raw prompt prefix -> the virtual token ids that stand for it in the radix tree.

A compressed span of S prompt tokens is, to SGLang, a run of B virtual tokens: content-derived int64 ids outside any
vocabulary. The index is a tree of prompt tokens, in which a prefix hangs where the last token lies that shaped it: what
its probe saw after its end included. Tokens are compared, never hashes, so a prefix only ever meets prompts that begin
with all of that.
"""

import dataclasses
import hashlib
from array import array
from collections import OrderedDict
from collections.abc import Hashable, Iterator
from typing import NamedTuple

import numpy as np

FIRST_VIRTUAL_ID = 1 << 61


@dataclasses.dataclass(frozen=True, eq=False)
class CompressedPrefix:
    """A compressed prefix: a segment and the prefix that it continues."""

    parent: "CompressedPrefix | None"
    segment_ids: array  # one virtual id per kept entry of the segment
    tokens: int  # prompt tokens that the prefix stands for
    slots: int  # entries held
    # First tokens that a prompt must have so that the prefix may serve it: those that any of its probes saw.
    required_tokens: int

    @classmethod
    def extend(
        cls, parent: "CompressedPrefix | None", segment_ids: array, tokens: int, seen_tokens: int
    ) -> "CompressedPrefix":
        """The prefix after one more segment.

        Args:
            parent: the prefix before it, if any.
            segment_ids: virtual ids of the segment.
            tokens: prompt tokens up to its end.
            seen_tokens: first tokens of the prompt that its probe saw.
        """
        slots, required = (parent.slots, parent.required_tokens) if parent else (0, 0)
        return cls(parent, segment_ids, tokens, slots + len(segment_ids), max(tokens, seen_tokens, required))

    @property
    def virtual_ids(self) -> array:
        """One id per kept entry, of all segments."""
        segments: list[array] = []
        prefix: CompressedPrefix | None = self
        while prefix is not None:
            segments.append(prefix.segment_ids)
            prefix = prefix.parent
        ids = array("q")
        for segment_ids in reversed(segments):
            ids += segment_ids
        return ids

    @property
    def offset(self) -> int:
        """What must be added to a row index after the prefix to get the logical position."""
        return self.tokens - self.slots


def make_virtual_ids(
    secret: str, namespace: Hashable, prefix: CompressedPrefix | None, span_ids: array, tail_ids: array, slots: int
) -> array:
    """Ids for a newly compressed span.

    They follow from all that shapes the entries, the namespace and a secret of this server alone: the same on every
    rank, different for other settings or tenants, and not to be guessed by a client.

    Args:
        secret: the server's, hexadecimal.
        namespace: everything that must separate prefixes; its ``repr`` is hashed.
        prefix: the prefix that the span continues, or None.
        span_ids: raw token ids of the span.
        tail_ids: those after it that its probe saw.
        slots: number of ids to make.
    """
    digest = hashlib.blake2b(digest_size=16, key=bytes.fromhex(secret))
    digest.update(repr((namespace, slots, len(span_ids), len(tail_ids), prefix.tokens if prefix else 0)).encode())
    # The ids of a segment stand for everything before it too.
    digest.update(memoryview(prefix.segment_ids if prefix else array("q")))
    digest.update(memoryview(span_ids))
    digest.update(memoryview(tail_ids))
    random = np.random.Generator(np.random.Philox(key=int.from_bytes(digest.digest(), "little")))
    ids = random.integers(FIRST_VIRTUAL_ID, FIRST_VIRTUAL_ID << 1, size=slots, dtype=np.int64)
    return array("q", ids.tobytes())


class Found(NamedTuple):
    """What the index knows of a prompt."""

    prefixes: list[CompressedPrefix]  # that may serve it, longest first
    seen_tokens: int  # first tokens that an earlier prompt had too
    parting_tokens: int  # the last point at which another prompt leaves this one; 0 if none is known


class _Node:
    """A run of tokens that all remembered prompts below have in common."""

    __slots__ = ("prefixes", "children", "ids", "parent")

    def __init__(self, ids: array, parent: "_Node | None") -> None:
        self.ids = ids
        self.parent = parent
        self.children: dict[int, _Node] = {}  # by first token
        self.prefixes: list[tuple[Hashable, CompressedPrefix]] = []  # whose required tokens end here


class PrefixIndex:
    """Prompts and their compressed prefixes, by tenant; bounded, least recently used first out.

    Args:
        max_tokens: prompt tokens remembered; what prompts have in common counts once.
    """

    def __init__(self, max_tokens: int) -> None:
        self.max_tokens = max_tokens
        self.clear()

    def clear(self) -> None:
        """Forget everything; called whenever the radix tree is emptied."""
        self.num_tokens = 0
        self._roots: dict[Hashable, _Node] = {}
        self._places: dict[CompressedPrefix, tuple[Hashable, _Node]] = {}
        # Least recently used first. A node is always more recent than those below it, so the first is a leaf.
        self._recency: OrderedDict[_Node, Hashable] = OrderedDict()

    def __len__(self) -> int:
        return len(self._places)

    def __iter__(self) -> Iterator[tuple[Hashable, CompressedPrefix]]:
        """All prefixes with their namespaces."""
        return ((namespace, prefix) for prefix, (namespace, _) in self._places.items())

    def match(self, tenant: Hashable, namespace: Hashable, ids: array, prompt_tokens: int, limit: int) -> Found:
        """What is known of a prompt.

        Args:
            tenant: what separates prompts.
            namespace: what separates prefixes, the tenant included.
            ids: the prompt, and the outputs of a request that continues.
            prompt_tokens: of these, the prompt's; one at least must be left after a prefix.
            limit: prefixes that are returned.
        """
        path, seen = self._descend(tenant, ids)
        prefixes, parting = [], 0
        for node, end in path:
            prefixes += [
                prefix for owner, prefix in node.prefixes if owner == namespace and prefix.tokens < prompt_tokens
            ]
            if len(node.children) > 1 and end < prompt_tokens:
                parting = end
        prefixes.sort(key=lambda prefix: -prefix.tokens)
        return Found(prefixes[:limit], seen, seen if seen < prompt_tokens else parting)

    def touch(self, prefix: CompressedPrefix) -> None:
        """Count the prefix as used now, if it is still known."""
        if prefix in self._places:
            self._touch(self._places[prefix][1])

    def add(self, tenant: Hashable, namespace: Hashable, prefix: CompressedPrefix, ids: array) -> CompressedPrefix:
        """Remember a prefix.

        Args:
            ids: of the prompt that was compressed, ``prefix.required_tokens`` at least.

        Returns:
            The indexed prefix, which may be an equal one that was there before.
        """
        node = self._remember(tenant, ids[: prefix.required_tokens])
        for owner, known in node.prefixes:
            # The ids of a segment stand for everything before it too.
            if owner == namespace and known.segment_ids == prefix.segment_ids:
                return known
        node.prefixes.append((namespace, prefix))
        self._places[prefix] = (namespace, node)
        return prefix

    def remember_prompt(self, tenant: Hashable, ids: array) -> None:
        """Note a prompt, so that it is known where later ones leave it, even after the tree has evicted it.

        That only decides where a segment ends, never what it holds.
        """
        self._remember(tenant, ids)

    def discard(self, prefix: CompressedPrefix) -> None:
        """Forget one prefix, if it is still known; those that continue it are of no use either, and go when tried."""
        place = self._places.pop(prefix, None)
        if place is not None:
            place[1].prefixes.remove((place[0], prefix))

    def _descend(self, tenant: Hashable, ids: array) -> tuple[list[tuple[_Node, int]], int]:
        """Follow ids from the root.

        Returns:
            The nodes that they contain whole, each with the tokens up to its end, and how many of the ids are known.
        """
        path: list[tuple[_Node, int]] = []
        node, seen = self._roots.get(tenant), 0
        while node is not None:
            path.append((node, seen))
            child = node.children.get(ids[seen]) if seen < len(ids) else None
            if child is None:
                break
            common = _common_tokens(child.ids, ids, seen)
            seen += common
            node = child if common == len(child.ids) else None
        return path, seen

    def _remember(self, tenant: Hashable, ids: array) -> _Node:
        """The node that ends with ``ids``; makes room for it."""
        root = self._roots.setdefault(tenant, _Node(array("q"), None))
        path, seen = self._descend(tenant, ids)
        node, end = path[-1]
        if seen > end:
            node = self._split(tenant, node.children[ids[end]], seen - end)
        if seen < len(ids):
            node.children[ids[seen]] = node = _Node(ids[seen:], node)
            self._recency[node] = tenant
            self.num_tokens += len(node.ids)
        on_path = self._touch(node)
        while self.num_tokens > self.max_tokens and len(self._recency) > on_path:
            self._forget(*self._recency.popitem(last=False))
        if not root.children:
            del self._roots[tenant]
        return node

    def _split(self, tenant: Hashable, node: _Node, tokens: int) -> _Node:
        """Cut a node after some tokens; returns the upper part."""
        assert node.parent is not None
        upper = _Node(node.ids[:tokens], node.parent)
        node.parent.children[upper.ids[0]] = upper
        node.ids, node.parent = node.ids[tokens:], upper
        upper.children[node.ids[0]] = node
        self._recency[upper] = tenant
        return upper

    def _touch(self, node: _Node) -> int:
        """Count a node and those above it as used now; returns how many they are."""
        number = 0
        while node.parent is not None:
            self._recency.move_to_end(node)
            node, number = node.parent, number + 1
        return number

    def _forget(self, node: _Node, tenant: Hashable) -> None:
        """Remove a leaf, with its prefixes."""
        assert node.parent is not None and not node.children
        self.num_tokens -= len(node.ids)
        for _, prefix in node.prefixes:
            del self._places[prefix]
        del node.parent.children[node.ids[0]]
        if node.parent.parent is None and not node.parent.children:
            del self._roots[tenant]


def _common_tokens(known: array, ids: array, start: int) -> int:
    """How many of the first ``known`` tokens are those of ``ids`` from ``start`` on."""
    length = min(len(known), len(ids) - start)
    ours = np.frombuffer(known, dtype=np.int64, count=length)
    differ = ours != np.frombuffer(ids, dtype=np.int64, count=length, offset=start * ids.itemsize)
    first = int(differ.argmax())
    return first if differ[first] else length
