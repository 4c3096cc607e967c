"""Which blocks hold which tokens, so that a new sequence finds what an earlier one has computed."""

from __future__ import annotations

import itertools
from collections import OrderedDict
from typing import NamedTuple

import numpy as np

NO_BLOCK = -1
"""In a table, a block that was given back because it fell out of the sequence's window; elsewhere none at all."""

TOKEN_DTYPE = np.dtype(np.int64)
"""Of tokens, everywhere: keys are their bytes."""


class Key(NamedTuple):
    """What a full block is found by: everything before it, as the number of an entry, and its own tokens.

    The dictionary compares whole keys, so two blocks are the same only if their tokens, and by induction all
    tokens before them, are equal. Its hash need not be trusted.
    """

    parent: int | str  # the number of the entry before; of a first block, the salt
    tokens: bytes


class Entry:
    """A full block of known tokens. Its number is never given again; `block` is -1 once it is forgotten."""

    __slots__ = ("block", "key", "number")

    def __init__(self, key: Key, number: int, block: int) -> None:
        self.key = key
        self.number = number
        self.block = block


class Chain:
    """The tokens of one sequence, from the first on, as far as they are known."""

    __slots__ = ("entries", "length", "salt", "tail")

    def __init__(self, salt: str, entries: list[Entry], tail: bytes = b"", length: int = 0) -> None:
        self.salt = salt
        self.entries = entries  # of its full blocks
        self.tail = tail  # tokens after these
        self.length = length  # tokens in all

    def truncate(self, length: int, block_size: int) -> None:
        """Forget the tokens from `length` on."""
        if length >= self.length:
            return
        full, rest = divmod(length, block_size)
        if full < len(self.entries):
            self.tail = self.entries[full].key.tokens
            del self.entries[full:]
        self.tail = self.tail[: rest * TOKEN_DTYPE.itemsize]
        self.length = length

    def copy(self) -> Chain:
        """The same tokens, for another sequence."""
        return Chain(self.salt, self.entries.copy(), self.tail, self.length)


class PrefixIndex:
    """The findable blocks, and the order in which those that no sequence holds are evicted.

    Attributes
    ----------
    findable : (num_blocks,) bool
        Whether a block is in the index.
    idle : OrderedDict
        Findable blocks that no sequence holds, the one to evict first in front.
    queries, hits : int
        Tokens that were looked up, and those of them that were found.
    evictions : int
        Blocks that were forgotten to make room.
    """

    def __init__(self, num_blocks: int, block_size: int) -> None:
        self.block_size = block_size
        self._block_bytes = block_size * TOKEN_DTYPE.itemsize
        self.findable = np.zeros(num_blocks, bool)
        self.idle: OrderedDict[int, None] = OrderedDict()
        self.queries = self.hits = self.evictions = 0
        self._entries: dict[Key, Entry] = {}
        self._of_block: dict[int, Entry] = {}
        self._numbers = itertools.count()

    def __len__(self) -> int:
        return len(self._entries)

    def entries(self) -> list[Entry]:
        """All that can be found, parents before children."""
        return sorted(self._entries.values(), key=lambda entry: entry.number)

    def find(self, token_ids: np.ndarray, salt: str) -> Chain:
        """The longest run of known full blocks with these tokens; at least the last token is left to compute."""
        data = token_ids.tobytes()
        width = self._block_bytes
        found: list[Entry] = []
        parent: int | str = salt
        for begin in range(0, (len(token_ids) - 1) // self.block_size * width, width):
            entry = self._entries.get(Key(parent, data[begin : begin + width]))
            if entry is None:
                break
            found.append(entry)
            parent = entry.number
        self.queries += len(token_ids)
        self.hits += len(found) * self.block_size
        return Chain(salt, found, length=len(found) * self.block_size)

    def extend(self, chain: Chain, token_ids: np.ndarray, table: np.ndarray) -> None:
        """Append tokens to the chain of a sequence with this block table, whose full blocks become findable."""
        data = chain.tail + token_ids.tobytes()
        chain.length += len(token_ids)
        width = self._block_bytes
        full = len(data) // width
        if full:
            first = len(chain.entries)
            parent = chain.entries[-1].number if chain.entries else chain.salt
            for n, block in enumerate(table[first : first + full].tolist()):
                entry = self.insert(Key(parent, data[n * width : (n + 1) * width]), block)
                chain.entries.append(entry)
                parent = entry.number
            data = data[full * width :]
        chain.tail = data

    def insert(self, key: Key, block: int) -> Entry:
        """Make a block findable, unless another one is under the same key; returns the entry of the key."""
        entry = self._entries.get(key)
        if entry is None:
            entry = Entry(key, next(self._numbers), block)
            if block >= 0:
                self._entries[key] = self._of_block[block] = entry
                self.findable[block] = True
        return entry

    def forget(self, block: int) -> None:
        """Make a block unfindable: what it holds will change."""
        entry = self._of_block.pop(block)
        del self._entries[entry.key]
        entry.block = -1
        self.findable[block] = False

    def evict(self) -> int:
        """Forget the idle block that was used longest ago; returns it."""
        block, _ = self.idle.popitem(last=False)
        self.forget(block)
        self.evictions += 1
        return block

    def check(self) -> None:
        """Raise RuntimeError unless the parts of the index agree."""
        listed = np.flatnonzero(self.findable).tolist()
        if sorted(self._of_block) != listed or len(self._entries) != len(listed):
            raise RuntimeError("prefix index: its tables list different blocks")
        for key, entry in self._entries.items():
            if entry.key != key or self._of_block.get(entry.block) is not entry:
                raise RuntimeError(
                    f"prefix index: block {entry.block} is listed under tokens that it does not hold"
                )
