"""A paged key/value cache (Kwon et al., "PagedAttention", 2023): pages are allocated, shared by content and given back.

A page holds the keys and values of `page_size` consecutive tokens of one sequence. Layers with the same window share
pages: layers without one keep all tokens of a sequence, layers with a sliding window give pages behind it back. Full
pages are found again by what they hold (all tokens up to their end), so that a common prefix is computed and stored
once; a page that sequences share is full, and nobody writes to it.
"""

from __future__ import annotations

import hashlib
from array import array
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from keyspan import PagedKeys, quantize
from keyspan.core.checks import check_bool, check_device, check_int, check_type
from keyspan.core.problem import STORED, names
from keyspan.models.gpt import GPTConfig, Stored

Key = bytes
"""What a full page holds: SHA-256 of all tokens up to its end, so that nobody can make two texts share a page."""


class PagePool:
    """Pages of one kind of layers, by number. Knows which are free, how often each is used, and what full ones hold."""

    def __init__(self, pages: int) -> None:
        self.users = [0] * pages
        self._free = list(range(pages - 1, -1, -1))
        self._unused: OrderedDict[int, None] = OrderedDict()
        """Pages without a user whose content may still be wanted, the longest unused first."""
        self._by_key: dict[Key, int] = {}
        self._keys: dict[int, Key] = {}

    def available(self) -> int:
        """How many pages can be allocated now."""
        return len(self._free) + len(self._unused)

    def allocate(self) -> int:
        """A page of undefined content, with one user. There must be one."""
        if self._free:
            page = self._free.pop()
        else:
            page, _ = self._unused.popitem(last=False)
            del self._by_key[self._keys.pop(page)]
        self.users[page] = 1
        return page

    def find(self, key: Key) -> int | None:
        """The page that holds this, used or not."""
        return self._by_key.get(key)

    def use(self, page: int) -> None:
        """Count one more user."""
        self._unused.pop(page, None)
        self.users[page] += 1

    def release(self, page: int) -> None:
        """Count one user less. Content that is known stays until the page is needed."""
        self.users[page] -= 1
        if self.users[page] == 0:
            if page in self._keys:
                self._unused[page] = None
            else:
                self._free.append(page)

    def publish(self, page: int, key: Key) -> None:
        """Say what a full page holds; where another page holds the same, that one stays known."""
        if key not in self._by_key and page not in self._keys:
            self._by_key[key], self._keys[page] = page, key


@dataclass
class Held:
    """The pages of one sequence."""

    tokens: int = 0
    """Tokens whose keys and values are stored."""
    tables: dict[int | None, list[int]] = field(default_factory=dict)
    """By window, the sequence's pages in order; −1 for one that was given back."""
    keys: list[Key] = field(default_factory=list)
    """What its full pages hold, for as many as were published."""


@dataclass
class PagedStep:
    """Where the tokens of a forward pass stand; numbers on the host."""

    lengths: list[int] = field(default_factory=list)
    """New tokens of each sequence."""
    totals: list[int] = field(default_factory=list)
    """Tokens of each sequence, the new ones among them."""
    owners: list[int] = field(default_factory=list)
    """Of each new token, its sequence."""
    positions: list[int] = field(default_factory=list)
    """Of each new token, its place in its sequence."""
    pages: int = 0
    """Entries of a row of a table."""
    tables: dict[int | None, list[list[int]]] = field(default_factory=dict)
    """By window, the pages of each sequence in order; 0 for those given back and behind the last."""
    slots: dict[int | None, list[int]] = field(default_factory=dict)
    """By window, of each new token, where its keys and values go."""


class PagedCache:
    """Keys and values of all layers for `GPT.forward(..., cache=...)`, for inference.

    Args:
        config: of the model.
        pages: how many there are, for each window of the model.
        page_size: tokens a page.
        dtype: of keys and values; device: where they are. int8 and float8_e4m3fn store 8 bits a number, and a scale for
            each token and head (`keyspan.quantize`), so that what is stored of a token depends on that token alone.
        share: whether full pages are shared by content.
        spare: whether there is one more page, which no sequence gets; its number is then the attribute `spare`.
    """

    def __init__(
        self,
        config: GPTConfig,
        pages: int,
        page_size: int = 16,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
        *,
        share: bool = True,
        spare: bool = False,
    ) -> None:
        check_type("config", config, GPTConfig)
        check_int("pages", pages, bits=31)
        check_int("page_size", page_size, bits=31)
        check_bool("spare", spare)
        if not isinstance(dtype, torch.dtype) or not (dtype.is_floating_point or dtype in STORED):
            raise ValueError(f"dtype: got {dtype!r}, want a floating-point dtype or {names(*STORED)}")
        device = check_device("device", device)
        self.pages, self.page_size, self.share = pages, page_size, share
        self._window = [config.window(n) for n in range(config.layers)]
        self.pools = {window: PagePool(pages) for window in dict.fromkeys(self._window)}
        self.spare = pages if spare else None
        self._all_slots = (pages + spare) * page_size
        shape = (1, self._all_slots, config.kv_heads, config.head_dim)
        kinds = [(shape, dtype)] * 2 + [(shape[:3], torch.float32)] * (2 if dtype in STORED else 0)
        self._storage = [
            Stored(*(torch.zeros(size, dtype=kind, device=device) for size, kind in kinds)) for _ in self._window
        ]
        self.step = PagedStep()
        self._device = device
        self._layouts: dict[int | None, PagedKeys] = {}
        self._slots: dict[int | None, Tensor] = {}

    @staticmethod
    def bytes_per_page(config: GPTConfig, page_size: int, dtype: torch.dtype) -> int:
        """Memory that one page takes, over all layers."""
        scale = torch.float32.itemsize if dtype in STORED else 0
        return 2 * config.layers * page_size * config.kv_heads * (config.head_dim * dtype.itemsize + scale)

    # Pages of a sequence

    def needed(self, held: Held, tokens: int) -> int:
        """Pages of each kind that must be allocated before a sequence holds so many tokens."""
        return max(0, -(-tokens // self.page_size) - -(-held.tokens // self.page_size))

    def available(self) -> int:
        """Pages that can be allocated for a sequence, of the kind of which there are fewest."""
        return min(pool.available() for pool in self.pools.values())

    def adopt(self, held: Held, tokens: Sequence[int], keys: list[Key] | None = None) -> None:
        """Use what others stored of the beginning of these tokens, in full pages, for a sequence that holds nothing.

        At least one token is left to be computed, for its logits are wanted. `keys` is extended by what the pages of
        these tokens hold, and read by a later call for the same tokens.
        """
        if not self.share:
            return
        size, keys = self.page_size, [] if keys is None else keys
        keys = self._extend(keys, tokens, (len(tokens) - 1) // size)
        found = {w: [pool.find(key) for key in keys] for w, pool in self.pools.items()}
        # The most pages of which all that a kind's window still reaches are there: those behind its last missing one.
        count, first, missing = 0, dict.fromkeys(found, 0), dict.fromkeys(found, -1)
        for n in range(1, len(keys) + 1):
            missing |= {w: n - 1 for w, pages in found.items() if pages[n - 1] is None}
            begins = {w: 0 if w is None else max(0, (n * size - w + 1) // size) for w in found}
            if all(missing[w] < begin for w, begin in begins.items()):
                count, first = n, begins
        if not count:
            return
        for window, pool in self.pools.items():
            table = [-1 if n < first[window] else found[window][n] for n in range(count)]
            for page in table:
                if page is not None and page >= 0:
                    pool.use(page)
            held.tables[window] = [page for page in table if page is not None]
        held.tokens = count * size
        held.keys = keys[:count]

    def reserve(self, held: Held, tokens: int) -> None:
        """Allocate pages until the sequence has room for so many tokens. There must be enough."""
        want = -(-tokens // self.page_size)
        for window, pool in self.pools.items():
            table = held.tables.setdefault(window, [])
            while len(table) < want:
                table.append(pool.allocate())

    def stored(self, held: Held, tokens: Sequence[int], keys: list[Key] | None = None) -> None:
        """Say that these tokens, all of the sequence's so far, are stored now: full pages are published, pages behind a
        window are given back. `keys` is as for `adopt`."""
        held.tokens = len(tokens)
        known = len(held.keys)
        full = self._extend(list(held.keys) if keys is None else keys, tokens, len(tokens) // self.page_size)
        for n, key in enumerate(full[known:], known):
            for window, pool in self.pools.items():
                if self.share and held.tables[window][n] >= 0:
                    pool.publish(held.tables[window][n], key)
        held.keys = full
        for window, pool in self.pools.items():
            if window is None:
                continue
            table = held.tables[window]
            for n in range(min(len(table), max(0, held.tokens - window + 1) // self.page_size)):
                if table[n] >= 0:
                    pool.release(table[n])
                    table[n] = -1

    def truncate(self, held: Held, tokens: int) -> None:
        """Forget all but the first tokens of a sequence, and give the pages behind them back."""
        keep = -(-tokens // self.page_size)
        for window, pool in self.pools.items():
            table = held.tables.get(window, [])
            for page in reversed(table[keep:]):
                if page >= 0:
                    pool.release(page)
            del table[keep:]
        held.tokens = min(held.tokens, tokens)
        del held.keys[tokens // self.page_size :]

    def _extend(self, keys: list[Key], tokens: Sequence[int], count: int) -> list[Key]:
        """What the first `count` full pages of these tokens hold, of which `keys` has a beginning and gets the rest."""
        for n in range(len(keys), count):
            page = array("q", tokens[n * self.page_size : (n + 1) * self.page_size]).tobytes()
            keys.append(hashlib.sha256((keys[-1] if keys else b"") + page).digest())
        return keys[:count]

    # What the model asks for

    def begin(self, sequences: Sequence[Held], lengths: Sequence[int], device: torch.device) -> None:
        """Before a forward pass over `lengths[n]` new tokens of sequence n, for which there is room."""
        self._device, size = device, self.page_size
        ends = [held.tokens + new for held, new in zip(sequences, lengths, strict=True)]
        owners = [n for n, new in enumerate(lengths) for _ in range(new)]
        positions = [at for end, new in zip(ends, lengths, strict=True) for at in range(end - new, end)]
        tables = {window: [held.tables[window] for held in sequences] for window in self.pools}
        width = max(len(table) for rows in tables.values() for table in rows)
        padded = {
            window: [[max(page, 0) for page in table] + [0] * (width - len(table)) for table in rows]
            for window, rows in tables.items()
        }
        slots = {
            window: [rows[n][at // size] * size + at % size for n, at in zip(owners, positions, strict=True)]
            for window, rows in padded.items()
        }
        self.step = PagedStep(list(lengths), ends, owners, positions, width, padded, slots)
        self._layouts.clear()
        self._slots.clear()

    def begin_from(self, q: Tensor, before: Tensor, tables: dict[int | None, Tensor]) -> None:
        """`begin` for one new token of each sequence, from tensors that are not read on the host.

        Args:
            q: ones, int32 [sequences].
            before: tokens of each sequence that are stored, int32 [sequences].
            tables: by window, the pages of each sequence, int32 [sequences, width].
        """
        rows, before = torch.arange(len(q), device=q.device), before.long()
        for window, table in tables.items():
            self._layouts[window] = PagedKeys(q, (before + q).int(), table, self.page_size)
            self._slots[window] = (
                table[rows, before // self.page_size].long() * self.page_size + before % self.page_size
            )

    def extend(self, lengths: list[int] | Tensor, tokens: int, device: torch.device) -> None:
        """Nothing: `begin` has made room."""

    def layout(self, window: int | None) -> tuple[PagedKeys, int]:
        """Where the keys of layers with this window lie, and how many slots there are."""
        # Where all layers have a window, the model still asks without one: to learn which token stands where.
        window = window if window in self.pools else next(iter(self.pools))
        if window not in self._layouts:
            lengths, totals, table = (
                torch.tensor(x, dtype=torch.int32, device=self._device)
                for x in (self.step.lengths, self.step.totals, self.step.tables[window])
            )
            self._layouts[window] = PagedKeys(lengths, totals, table, self.page_size)
        return self._layouts[window], self._all_slots

    def storage(self, layer: int) -> Stored:
        """All keys and values of a layer, by slots."""
        return self._storage[layer]

    def slots(self, window: int | None) -> Tensor:
        """Where the new tokens' keys of layers with this window go, int64 [T]."""
        if window not in self._slots:
            self._slots[window] = torch.tensor(self.step.slots[window], device=self._device)
        return self._slots[window]

    def append(self, layer: int, key: Tensor, value: Tensor) -> Stored:
        """Stores the new tokens' keys and values [1, T, G, K] of a layer; returns its whole storage."""
        stored, slots = self._storage[layer], self.slots(self._window[layer])
        for to, scales, new in ((stored.key, stored.key_scale, key), (stored.value, stored.value_scale, value)):
            if scales is None:
                to.index_copy_(1, slots, new.to(to.dtype))
                continue
            bits, scale = quantize(new, to.dtype, 1)
            to.view(torch.uint8).index_copy_(1, slots, bits.view(torch.uint8))
            scales.index_copy_(1, slots, scale)
        return stored
