"""Which cache block holds what: block tables, sharing of common prefixes, eviction.

This module deals in block ids only. A block is `block_size` consecutive positions of *every* cache group a model
declares (MLA latent, indexer keys, the MTP layer's rows): all groups share one block id, so whatever shares, frees,
moves or evicts a block does it to all groups at once. There is no way to treat one group alone.

A block is in one of three states:

    in use         references >= 1: so many block tables hold it; it may have a hash
    cached, free   references == 0, has a hash: evictable, but a request with the same prefix can have it back
    empty, free    references == 0, no hash: nothing worth keeping

Free blocks stand in one list, next to be taken first: empty ones, then cached ones, least recently used first. A
request gives its blocks back tail first, so eviction eats a cached prefix from its leaf and what remains can be found.

A full block is found again by its content hash, SHA-256 over (the parent block's hash, the block's token ids); a
chain starts at a root made of block size, deployment salt and request salt. Equal hashes therefore mean equal tokens
at equal positions under equal salts, and no token comparison is needed.
"""

from __future__ import annotations

import hashlib
import struct
from collections import Counter
from collections.abc import Iterable

from tilery.engine.request import Request


class BlockPool:
    """Reference counts, the free list and the hash index of `num_blocks` blocks. Every operation takes O(1)."""

    def __init__(self, num_blocks: int) -> None:
        if num_blocks < 1:
            raise ValueError(f"num_blocks must be at least 1, got {num_blocks}.")
        self.num_blocks = num_blocks
        self.num_free = num_blocks
        self.references = [0] * num_blocks
        self.hashes: list[bytes | None] = [None] * num_blocks
        self.block_of: dict[bytes, int] = {}
        # The free list is a ring through one extra node, `num_blocks`: its successor is the next block to take.
        ring = num_blocks + 1
        self._next = [(block + 1) % ring for block in range(ring)]
        self._previous = [(block - 1) % ring for block in range(ring)]

    def take(self) -> int:
        """Removes the first free block from the list, forgets what it held, and hands it out with one reference."""
        block = self._next[self.num_blocks]
        if block == self.num_blocks:
            raise RuntimeError("No block is free; ask num_free before taking one.")
        self._unlink(block)
        self._forget(block)
        self.references[block] = 1
        return block

    def share(self, block: int) -> None:
        """One more reference to a block that is in use or cached."""
        if self.references[block] == 0:
            self._unlink(block)
        self.references[block] += 1

    def release(self, block: int) -> None:
        """One reference less; without any, the block is free but keeps its hash until it is taken."""
        if self.references[block] < 1:
            raise RuntimeError(f"Block {block} was released more often than it was taken.")
        self.references[block] -= 1
        if self.references[block] == 0:
            if self.hashes[block] is None:
                self._link_after(self.num_blocks, block)
            else:
                self._link_after(self._previous[self.num_blocks], block)

    def register(self, block: int, block_hash: bytes) -> None:
        """Makes a block in use findable. The first block registered under a hash stays; duplicates remain unnamed."""
        if block_hash not in self.block_of:
            self.block_of[block_hash] = block
            self.hashes[block] = block_hash

    def forget_all(self) -> None:
        for block in list(self.block_of.values()):
            self._forget(block)

    def free_list(self) -> list[int]:
        """Free blocks in the order in which they will be taken; for checks and tests, O(num_blocks)."""
        blocks: list[int] = []
        block = self._next[self.num_blocks]
        while block != self.num_blocks and len(blocks) <= self.num_blocks:
            blocks.append(block)
            block = self._next[block]
        return blocks

    def check(self, tables: Iterable[list[int]]) -> None:
        """Verifies every invariant, given the block tables of all live requests. Raises `AssertionError`."""
        free = self.free_list()
        assert len(free) == len(set(free)) == self.num_free, "the free list and its length differ"
        backwards = [self._previous[self.num_blocks]]
        while backwards[-1] != self.num_blocks and len(backwards) <= self.num_blocks:
            backwards.append(self._previous[backwards[-1]])
        assert backwards[-2::-1] == free, "the free list reads differently backwards"
        held = Counter(block for table in tables for block in table)
        for block, references in enumerate(self.references):
            assert references == held[block], f"block {block}: {references} references, but {held[block]} tables"
        assert set(free) == {block for block in range(self.num_blocks) if not held[block]}, "a free block is in use"
        named = {name: block for block, name in enumerate(self.hashes) if name is not None}
        assert named == self.block_of, "the maps hash -> block and block -> hash disagree"
        assert len(named) == sum(name is not None for name in self.hashes), "two blocks have the same hash"
        empty_first = sorted(free, key=lambda block: self.hashes[block] is not None)
        assert free == empty_first, "an empty block stands behind a cached one"

    def _forget(self, block: int) -> None:
        block_hash = self.hashes[block]
        if block_hash is not None:
            del self.block_of[block_hash]
            self.hashes[block] = None

    def _unlink(self, block: int) -> None:
        before, after = self._previous[block], self._next[block]
        self._next[before], self._previous[after] = after, before
        self.num_free -= 1

    def _link_after(self, before: int, block: int) -> None:
        after = self._next[before]
        self._previous[block], self._next[block] = before, after
        self._next[before] = self._previous[after] = block
        self.num_free += 1


class KVCache:
    """Block tables for requests, and the prefix index that lets them share blocks.

    A request's stay: `start` (shared prefix), `allocate` before each step, `commit` after it, `free` at the end or
    when it is preempted. Nothing here ever takes a block away from a request.
    """

    def __init__(self, num_blocks: int, block_size: int, salt: str = "", enable_prefix: bool = True) -> None:
        if block_size < 1:
            raise ValueError(f"block_size must be at least 1, got {block_size}.")
        self.pool = BlockPool(num_blocks)
        self.num_blocks = num_blocks
        self.block_size = block_size
        self.enable_prefix = enable_prefix
        self._pack_tokens = struct.Struct(f"<{block_size}i").pack
        self._root = hashlib.sha256(struct.pack("<q", block_size) + salt.encode()).digest()

    @property
    def num_free(self) -> int:
        """Blocks that no request holds; those that are cached count as free."""
        return self.pool.num_free

    @property
    def num_used(self) -> int:
        return self.num_blocks - self.pool.num_free

    @property
    def capacity(self) -> int:
        """Tokens that fit when one request has the whole cache."""
        return self.num_blocks * self.block_size

    def blocks_for(self, num_tokens: int) -> int:
        return -(-num_tokens // self.block_size)

    def match(self, request: Request) -> list[int]:
        """Blocks of the longest cached prefix, whole blocks only, without taking them.

        At least one token remains to be computed, because only computing gives logits. A request that wants prompt
        logprobs matches nothing: it needs the logits of every position.
        """
        if not self.enable_prefix or request.wants_prompt_logprobs:
            return []
        matched = []
        block_of = self.pool.block_of
        for block_hash in self._chain(request, (request.num_tokens - 1) // self.block_size):
            block = block_of.get(block_hash)
            if block is None:
                break
            matched.append(block)
        return matched

    def fits(self, request: Request, spare: int = 0) -> bool:
        """Whether a request without blocks could start now and get blocks for all its tokens, `spare` staying free."""
        matched = self.match(request)
        revived = sum(self.pool.references[block] == 0 for block in matched)
        missing = self.blocks_for(request.num_tokens) - len(matched)
        return missing + revived + spare <= self.num_free

    def start(self, request: Request) -> int:
        """Gives a request without blocks its cached prefix and returns how many tokens that is; `free` undoes it."""
        if request.block_table:
            raise RuntimeError(f"Request {request.request_id} already holds {len(request.block_table)} blocks.")
        matched = self.match(request)
        for block in matched:
            self.pool.share(block)
        request.block_table = matched
        request.num_committed = len(matched)
        request.num_computed = len(matched) * self.block_size
        return request.num_computed

    def allocate(self, request: Request, num_tokens: int) -> bool:
        """Extends the block table to cover `num_tokens`; False, and no change, when too few blocks are free."""
        missing = -(-num_tokens // self.block_size) - len(request.block_table)
        if missing > self.pool.num_free:
            return False
        for _ in range(missing):
            request.block_table.append(self.pool.take())
        return True

    def commit(self, request: Request) -> None:
        """Makes the blocks that are full of computed tokens findable by other requests.

        Drafts never get in: `num_computed` counts verified tokens. A block whose content another block already offers
        is left unnamed; both go on being used.
        """
        full = request.num_computed // self.block_size
        if full <= request.num_committed or not self.enable_prefix:
            return
        chain = self._chain(request, full)
        for i in range(request.num_committed, full):
            self.pool.register(request.block_table[i], chain[i])
        request.num_committed = full

    def free(self, request: Request) -> None:
        """Takes all blocks from a request, tail first; nothing of it counts as computed any more.

        What was committed stays cached until the space is needed.
        """
        for block in reversed(request.block_table):
            self.pool.release(block)
        request.block_table = []
        request.num_committed = request.num_computed = 0

    def discard(self, request: Request) -> None:
        """`free`, and nobody finds what the request held: for one whose rows may be wrong."""
        for block in request.block_table:
            self.pool._forget(block)
        self.free(request)

    def reset_prefix_cache(self) -> bool:
        """Forgets all cached content, as new weights require; False, and no change, while a request holds blocks."""
        if self.num_used:
            return False
        self.pool.forget_all()
        return True

    def check(self, live: Iterable[Request]) -> None:
        """Verifies every invariant, given all requests that may hold blocks. Raises `AssertionError`."""
        live = list(live)
        self.pool.check([request.block_table for request in live])
        for request in live:
            name, table = request.request_id, request.block_table
            assert len(set(table)) == len(table), f"{name}: a block stands twice in its table"
            assert request.num_computed <= len(table) * self.block_size, f"{name}: computed tokens without a block"
            assert request.num_committed <= request.num_computed // self.block_size, f"{name}: committed too much"
            cached, request.block_hashes = request.block_hashes, []
            chain = list(self._chain(request, request.num_tokens // self.block_size))
            request.block_hashes = cached
            assert cached == chain[: len(cached)], f"{name}: its hash chain is not that of its tokens"
            for i, block in enumerate(table):
                block_hash = self.pool.hashes[block]
                if i >= request.num_committed:
                    assert block_hash is None, f"{name}: block {block} is findable but not full"
                elif self.enable_prefix:
                    assert block_hash in (None, chain[i]), f"{name}: block {block} has the hash of other tokens"

    def _chain(self, request: Request, count: int) -> list[bytes]:
        """The request's first `count` block hashes, those not yet known computed and kept on the request."""
        chain, size = request.block_hashes, self.block_size
        for i in range(len(chain), count):
            parent = chain[-1] if chain else self._root_of(request)
            tokens = request.token_ids(i * size, (i + 1) * size)
            chain.append(hashlib.sha256(parent + self._pack_tokens(*tokens)).digest())
        return chain[:count]

    def _root_of(self, request: Request) -> bytes:
        salt = b"" if request.cache_salt is None else b"+" + request.cache_salt.encode(errors="surrogatepass")
        return hashlib.sha256(self._root + salt).digest()
