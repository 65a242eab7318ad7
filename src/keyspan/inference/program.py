"""A step of a model on a CPU as one call of the native library, so that a token does not pay for some 400 in Python.

All structs of all calls lie in one tensor of 8-byte words, and what they point to stays where it is: a step writes its
tokens' positions and slots there, and numbers that differ from the last step's into the structs. A decoder's results
are, bit for bit, those of `GPT.forward`, whose kernels run on the same numbers.
"""

from __future__ import annotations

import struct
from array import array
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from itertools import accumulate, chain, repeat
from operator import add
from typing import Any, cast

import torch
from torch import Tensor, nn

from keyspan.core.problem import Problem, make_problem
from keyspan.core.ranges import KeyRanges
from keyspan.inference.pages import PagedCache
from keyspan.layers import RMSNorm, SwiGLU
from keyspan.layers.gemm import Linear, PackedWeight
from keyspan.models.encoder import Encoder, EncoderBlock
from keyspan.models.gpt import GPT, Attention, Block, Stored

_DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
"""`Dtype` of native/params.h."""


_ANSWERS = 64
"""Most tokens of a step whose logits are part of the program."""


class _Numbers:
    """Host numbers at an address that stays until there are more of them than ever before.

    Args:
        code: `i` for int32, `q` for int64.
        count: for how many there is room at first.
    """

    def __init__(self, code: str, count: int) -> None:
        self._all = array(code, bytes(array(code).itemsize * count))

    @property
    def address(self) -> int:
        return self._all.buffer_info()[0]

    def read(self, count: int) -> list[int]:
        """The first numbers."""
        return self._all[:count].tolist()

    def write(self, numbers: Iterable[int]) -> bool:
        """Whether the address has changed."""
        new = array(self._all.typecode, numbers)
        moved = len(new) > len(self._all)
        if moved:
            self._all = array(new.typecode, bytes(2 * len(new) * new.itemsize))
        self._all[: len(new)] = new
        return moved


class _Turns:
    """RoPE's cosines and sines for the layers with some windows, of all positions so far."""

    def __init__(self, model: GPT, window: int | None, tokens: int) -> None:
        self._model, self._window = model, window
        self._table = tuple(x.contiguous() for x in model.turn(torch.arange(1), window))
        self.step = tuple(x.new_empty((tokens, x.shape[1])) for x in self._table)
        """Of the tokens of a step."""
        self.words: list[int] = []
        """Those in which the tables' addresses stand."""

    def reach(self, end: int, arena: Tensor) -> None:
        """Have all positions below `end`."""
        if end > len(self._table[0]):
            self._table = tuple(x.contiguous() for x in self._model.turn(torch.arange(2 * end), self._window))
            for word, table in zip(self.words, self._table, strict=True):
                arena[word] = table.data_ptr()


@dataclass
class _Window:
    """What is the same in all layers with one window, and changes from step to step."""

    first: _Numbers
    """Of each token, the first key that it sees."""
    slots: _Numbers
    table: _Numbers
    tables: list[int] = field(default_factory=list)
    """Words in which the table's address stands."""


class _Program:
    """Calls of the library's functions, made once and run again and again.

    Args:
        counts: names of numbers that steps change, beside `tokens` and `threads`.
        per_token: fields of structs that are the number of tokens.
    """

    def __init__(self, counts: Sequence[str] = (), per_token: Sequence[str] = ("T", "rows", "M")) -> None:
        from keyspan.backends.native import binding

        self._binding, self._library, self._per_token = binding, cast(Any, binding.LIBRARY), per_token
        self._kept: list[Any] = []
        """What addresses refer to."""
        self._words: list[int] = []
        """While the program is made: all structs, one behind the other."""
        self._calls: list[tuple[int, int]] = []
        """(function, index of its struct's first word)."""
        self._counts: dict[str, list[int]] = {name: [] for name in ("tokens", "threads", *counts)}
        """Indices of words that are these numbers."""
        self._now = dict.fromkeys(self._counts, 0)
        """What stands there."""

    def _finish(self) -> None:
        """Write down all calls."""
        self._arena = torch.tensor(self._words, dtype=torch.int64)
        start = self._arena.data_ptr()
        self._list = torch.tensor([(function, start + 8 * at) for function, at in self._calls], dtype=torch.int64)
        self._where = {name: torch.tensor(words, dtype=torch.int64) for name, words in self._counts.items()}

    def _run(self, calls: int | None = None, **now: int) -> None:
        """Make all calls, or so many of the first, with these numbers."""
        threads = torch.get_num_threads()
        for name, number in {**now, "threads": threads}.items():
            if number != self._now[name]:
                self._arena[self._where[name]] = self._now[name] = number
        self._library.keyspan_run(self._list.data_ptr(), len(self._list) if calls is None else calls, threads)

    def _fields(self, name: str) -> tuple[tuple[str, str], ...]:
        """(field, type) of a struct."""
        binding = self._binding
        known: dict[str, tuple[tuple[str, str], ...]]
        known = {"params": binding.PARAMS_FIELDS, "linear": binding.LINEAR_FIELDS, **binding.LAYER_FIELDS}
        return known[name]

    def _index(self, name: str, wanted: str) -> int:
        """The word of a struct at which a field begins."""
        fields = self._fields(name)
        before = [found for found, _ in fields].index(wanted)
        return sum(_size(kind) for _, kind in fields[:before])

    def _call(self, name: str, **values: Any) -> int:
        """Add a call; the index of its struct's first word. Fields without a value are 0."""
        at = len(self._words)
        for found, kind in self._fields(name):
            value = values.pop(found, 0)
            if isinstance(value, Tensor):
                self._kept.append(value)
                value = value.data_ptr()
            count = "tokens" if found in self._per_token else found
            if count in self._counts:
                self._counts[count].append(len(self._words))
            elif found == "isa":
                value = self._binding.isa_number()
            elif kind == "float" and isinstance(value, float):
                (value,) = struct.unpack("q", struct.pack("d", value))
            self._words += value if isinstance(value, tuple) else (value,) + (0,) * (_size(kind) - 1)
        assert not values, values
        self._calls.append((self._binding.PROGRAM_FUNCTIONS.index(name), at))
        return at

    def _attention(self, problem: Problem, out: Tensor, **steps: int) -> int:
        """A call of a problem of two tokens, of which the numbers that steps change are written over."""
        from keyspan.backends.native import pack_forward

        packed, kept = pack_forward(problem, out)
        self._kept.append(kept)
        values: dict[str, Any] = {}
        words = struct.unpack(f"{len(packed) // 8}q", packed)
        for name, kind in self._fields("params"):
            at = self._index("params", name)
            values[name] = words[at] if _size(kind) == 1 else words[at : at + _size(kind)]
        return self._call("params", **(values | steps))

    def _gather(self, table: Tensor, index: _Numbers, to: Tensor) -> int:
        size = table.shape[1] * table.element_size()
        return self._call("gather", **{"from": table}, to=to, index=index.address, size=size)

    def _weight(self, weight: Tensor, packed: PackedWeight | None) -> PackedWeight:
        return PackedWeight(weight) if packed is None else packed

    def _linear(self, x: Tensor, layer: Linear, out: Tensor, applied: int = 0) -> None:
        """`applied`: a function of the result, `Applied` of native/linear.h."""
        self._product(x, self._weight(layer.weight, layer.packed), layer.bias, out, applied)

    def _product(self, x: Tensor, weight: PackedWeight, bias: Tensor | None, out: Tensor, applied: int = 0) -> None:
        self._call(
            "linear", x=x, weight=weight.words, scale=0 if weight.scale is None else weight.scale,
            bias=0 if bias is None else bias.detach().contiguous(), out=out, dtype=_DTYPES[x.dtype],
            storage=weight.storage, applied=applied, inputs=weight.inputs, outputs=weight.outputs, x_stride=x.stride(0),
        )  # fmt: skip

    @staticmethod
    def _float(weight: Tensor) -> Tensor:
        return weight.detach().float().contiguous()


class DecoderProgram(_Program):
    """`GPT.forward` and `GPT.logits` over a paged cache.

    Args:
        model: whose weights are copied, unless they are packed already; later changes are not seen.
        cache: where keys and values are.
        tokens: most of a step.

    Raises ValueError where `reason_against` has a reason.
    """

    def __init__(self, model: GPT, cache: PagedCache, tokens: int) -> None:
        reason = self.reason_against(model)
        if reason is not None:
            raise ValueError(f"model: {reason}")
        super().__init__(("sequences", "pages"))
        self._model, self._cache = model, cache
        self._tokens, self._ends, self._positions, self._owners = (_Numbers("i", tokens) for _ in range(4))
        """Of each token of a step: its number, one past the last key that it sees, its position, its sequence."""
        self._windows: dict[int | None, _Window] = {}
        self._turns: dict[int | None, _Turns] = {}
        """By window; windows with the same angles share them."""
        scale = model.config.embedding_scale
        self._scale = None if scale == 1 else torch.tensor(scale, dtype=model.embedding.weight.dtype)
        self._make(tokens)
        head = model._packed_head if model.config.tie_embeddings else model.head.packed
        self._head = self._weight(model.head_weight, head)
        self._body = len(self._calls)
        self._make_answers(min(tokens, _ANSWERS))
        self._finish()

    @staticmethod
    def reason_against(model: GPT) -> str | None:
        """Why a model runs through `GPT.forward` instead, or None."""
        c = model.config
        if c.experts:
            return "mixtures of experts are not part of a program"
        if model.backend not in (None, "native") or type(model) is not GPT:
            return "a subclass of GPT, and one with another backend for attention, run as they say"
        plain = [x.weight for x in model.modules() if isinstance(x, Linear) and x.packed is None]
        reasons = map(PackedWeight.reason_against, [model.embedding.weight, *plain])
        return next((reason for reason in reasons if reason is not None), None)

    # Making it

    def _make(self, tokens: int) -> None:
        from keyspan.backends.native import STORED
        from keyspan.layers.native_kernels import ACTIVATIONS

        c, like = self._model.config, self._model.embedding.weight
        heads, width, K = c.heads + 2 * c.kv_heads, c.heads * c.head_dim, c.head_dim
        self._x, self._h, normed, added = (like.new_empty((tokens, c.dim)) for _ in range(4))
        # Two rows at least, of which `_params` makes its pattern.
        self._qkv, self._attended = (like.new_empty((max(2, tokens), n)) for n in (heads * K, width))
        x12, gated = like.new_empty((tokens, 2 * c.hidden)), like.new_empty((tokens, c.hidden))
        self._inverse = torch.empty(tokens * (c.heads if c.qk_norm else 1))
        size, row, keys = like.element_size(), heads * K, c.kv_heads * K
        dtype = _DTYPES[like.dtype]
        if self._scale is None:
            self._gather(like.detach(), self._tokens, self._x)
        for n, module in enumerate(self._model.blocks):
            block, window = cast(Block, module), c.window(n)
            attention, storage = block.attention, self._cache.storage(n)
            if window not in self._windows:
                pages = _Numbers("i", self._cache.pages)
                self._windows[window] = _Window(_Numbers("i", tokens), _Numbers("q", tokens), pages)
            shared = self._windows[window]
            self._norm(block.attention_norm, normed, added if n else None)
            self._linear(normed, attention.qkv, self._qkv)
            for norm, first, count in ((attention.q_norm, 0, c.heads), (attention.k_norm, width, c.kv_heads)):
                if norm is not None:
                    self._call(
                        "head_norm", x=self._qkv.data_ptr() + first * size, weight=self._float(norm.weight),
                        inverse=self._inverse, dtype=dtype, D=K, heads=count, stride=row, eps=norm.eps,
                    )  # fmt: skip
            if c.positions == "rope":
                cosine, sine = self._turns_of(window, tokens).step
                self._call(
                    "rotary", q=self._qkv, cosine=cosine, sine=sine, out=self._qkv, dtype=dtype, K=K,
                    heads=(c.heads + c.kv_heads, 0, 0), stride=(row, 0, 0), out_stride=row,
                )  # fmt: skip
            for to, scale, first in (
                (storage.key, storage.key_scale, width), (storage.value, storage.value_scale, width + keys)
            ):  # fmt: skip
                source = {"from": self._qkv.data_ptr() + first * size}
                self._call(
                    "store", **source, to=to, scale=0 if scale is None else scale, slots=shared.slots.address,
                    dtype=dtype, stored=STORED.get(to.dtype, 0), heads=c.kv_heads, D=K, from_stride=row * size,
                )  # fmt: skip
            self._attend(attention, storage, window, shared)
            self._linear(self._attended, attention.out, added)
            if c.post_norms:
                self._norm_in_place(block.attention_post_norm, added)
            self._norm(block.mlp_norm, normed, added)
            mlp = cast(SwiGLU, block.mlp)
            self._linear(normed, mlp.w12, x12)
            self._call("gate", x12=x12, out=gated, dtype=dtype, activation=ACTIVATIONS.index(c.activation), D=c.hidden)
            self._linear(gated, mlp.w3, added)
            if c.post_norms:
                self._norm_in_place(block.mlp_post_norm, added)
        self._norm(self._model.norm, self._h, added)

    def _turns_of(self, window: int | None, tokens: int) -> _Turns:
        """Windows of one table of angles share it."""
        kind = window if self._model.config.local_rope_theta is None else None if window is None else 1
        if kind not in self._turns:
            found = self._turns[kind] = _Turns(self._model, window, tokens)
            for table, to in zip(found._table, found.step, strict=True):
                at = self._gather(table, self._positions, to)
                found.words.append(at + self._index("gather", "from"))
        return self._turns[kind]

    def _make_answers(self, most: int) -> None:
        """The logits of all tokens of a step, and the likeliest tokens."""
        c, dtype = self._model.config, _DTYPES[self._h.dtype]
        self._logits, self._best = self._h.new_empty((most, c.vocab_size)), _Numbers("i", most)
        self._product(self._h, self._head, None, self._logits)
        best = self._best.address
        self._call("largest", z=self._logits, best=best, dtype=dtype, C=c.vocab_size)

    def _attend(self, layer: Attention, storage: Stored, window: int | None, shared: _Window) -> None:
        """Attention of one layer, as `GPT` calls it."""
        c, two = self._model.config, torch.zeros(2, dtype=torch.int32)
        rows = two.view(1, 1, 2)
        mask = KeyRanges(rows, rows, rows, two, two[None], self._cache.page_size)
        query = self._qkv[:2].view(1, 2, -1, c.head_dim)[:, :, : c.heads]
        sinks = None if layer.sinks is None else layer.sinks.detach()
        problem, _ = make_problem(
            query, storage.key, storage.value, mask=mask, bias=self._model.bias, scale=layer.scale,
            softcap=layer.softcap, sinks=sinks, key_scale=storage.key_scale, value_scale=storage.value_scale,
        )  # fmt: skip
        at = self._attention(
            problem, self._attended[:2], lo=shared.first.address, hi=self._ends.address,
            diagonal=self._positions.address, sequence=self._owners.address, block_table=shared.table.address,
        )  # fmt: skip
        shared.tables.append(at + self._index("params", "block_table"))

    def _norm(self, norm: RMSNorm, out: Tensor, residual: Tensor | None) -> None:
        """The residual stream becomes the sum, and `out` its norm."""
        dtype = _DTYPES[out.dtype]
        self._call(
            "rms_norm", x=self._x, residual=0 if residual is None else residual, weight=self._float(norm.weight),
            total=self._x, out=out, inverse=self._inverse, total_dtype=dtype, residual_dtype=dtype, out_dtype=dtype,
            D=out.shape[1], eps=norm.eps,
        )  # fmt: skip

    def _norm_in_place(self, norm: nn.Module, x: Tensor) -> None:
        assert isinstance(norm, RMSNorm)
        dtype = _DTYPES[x.dtype]
        self._call(
            "rms_norm", x=x, weight=self._float(norm.weight), out=x, inverse=self._inverse, total_dtype=dtype,
            residual_dtype=dtype, out_dtype=dtype, D=x.shape[1], eps=norm.eps,
        )  # fmt: skip

    # Running it

    def hidden(self, tokens: Sequence[int]) -> Tensor:
        """`GPT.forward` after `PagedCache.begin`. The result is overwritten by the next call."""
        self._step(tokens, self._body)
        return self._h[: len(tokens)]

    def likeliest(self, tokens: Sequence[int]) -> list[int]:
        """Where `GPT.logits` of each token of a step is largest, for at most `most_answers` tokens, in one call.

        It is −1 − that where the largest is infinite or NaN.
        """
        self._step(tokens, None)
        return self._best.read(len(tokens))

    def answers(self, count: int) -> Tensor:
        """The logits of the last `likeliest`, [count, C]; overwritten by the next."""
        return self._logits[:count]

    @property
    def most_answers(self) -> int:
        """Most tokens of `likeliest`; none where logits are capped."""
        return len(self._logits) if self._model.config.logit_softcap is None else 0

    def _step(self, tokens: Sequence[int], calls: int | None) -> None:
        T, most, step = len(tokens), len(self._x), self._cache.step
        if most < T:
            raise ValueError(f"tokens: got {T}, want at most the program's {most}")
        if self._scale is None:
            self._tokens.write(tokens)
        else:
            torch.index_select(self._model.embedding.weight, 0, torch.tensor(tokens), out=self._x[:T]).mul_(self._scale)
        ends = [at + 1 for at in step.positions]
        self._ends.write(ends)
        self._positions.write(step.positions)
        self._owners.write(step.owners)
        for window, shared in self._windows.items():
            shared.first.write([0] * T if window is None else [max(0, end - window) for end in ends])
            shared.slots.write(step.slots[window])
            if shared.table.write(chain.from_iterable(step.tables[window])):
                self._arena[torch.tensor(shared.tables)] = shared.table.address
        for turns in self._turns.values():
            turns.reach(max(ends), self._arena)
        self._run(calls, tokens=T, sequences=len(step.lengths), pages=step.pages)

    def logits(self, hidden: Tensor) -> Tensor:
        """`GPT.logits`."""
        z, cap = self._head.multiply(hidden), self._model.config.logit_softcap
        return z if cap is None else cap * torch.tanh(z / cap)


_FIRST_ROW, _ROWS, _FIRST_DOCUMENT, _DOCUMENTS = range(4)
"""The numbers of a part, in the order of `_parts`."""
_PART_TOKENS = 128
"""Most tokens of a part, if they are of more than one document. From 64 to 256 all take as long."""


def _size(kind: str) -> int:
    """Words of a field."""
    return int(kind[3:]) if kind.startswith("int") else 1


class EncoderProgram(_Program):
    """`Encoder.forward` without autograd; its results are rounded less often, so their bits are others.

    Documents are computed in parts of some 128 tokens, layer by layer: each part by one thread, whose memory for what
    does not outlive a layer stays in its cache. Where there are too few parts for the threads, they share each product.

    Args:
        model: whose weights are packed; later changes of others are not seen.
        tokens: most of a step.

    Raises ValueError where `reason_against` has a reason.
    """

    def __init__(self, model: Encoder, tokens: int) -> None:
        reason = self.reason_against(model)
        if reason is not None:
            raise ValueError(f"model: {reason}")
        super().__init__(("count",), per_token=("T", "rows", "M", "N"))
        c, like, self._model = model.config, model.tokens.weight, model
        self.tokens = tokens
        """Most of a step."""
        self._x = like.new_empty((tokens, c.dim))
        # Two rows at least, of which the pattern of attention is made.
        self._qkv, attended = (like.new_empty((max(2, tokens), n)) for n in (3 * c.dim, c.dim))
        self._added, hidden = like.new_empty((tokens, c.dim)), like.new_empty((tokens, c.hidden))
        self._of_a_layer = (self._qkv, attended, self._added, hidden)
        self._means = torch.empty(tokens, c.dim)
        self._kept_rows = ((self._x, _FIRST_ROW), (self._means, _FIRST_DOCUMENT))
        positions = (model.positions.weight + model.types.weight[0]).detach()
        self._tokens, self._positions, self._first, self._end, self._own, self._ends = (
            _Numbers("i", tokens) for _ in range(6)
        )
        """Of each token, its number, its position, the first key of its document, one past the last, and itself; and
        of each document, one past its last token, all counted from the first token of the part."""
        self._by_token = (self._tokens, self._positions, self._first, self._end, self._own)
        self._stages = [0]
        """Where the calls of each layer begin, and those after the last."""
        for table, index, to in (
            (like.detach(), self._tokens, self._x), (positions, self._positions, self._added)
        ):  # fmt: skip
            self._gather(table, index, to)
        self._norm(model.norm)
        for module in model.blocks:
            block = cast(EncoderBlock, module)
            self._linear(self._x, block.qkv, self._qkv)
            q, k, v = self._qkv[:2].view(1, 2, 3 * c.heads, -1).split(c.heads, dim=2)
            two = torch.zeros(1, 1, 2, dtype=torch.int32)
            problem, _ = make_problem(q, k, v, mask=KeyRanges(two, two, two))
            self._attention(
                problem, attended[:2], lo=self._first.address, hi=self._end.address, diagonal=self._own.address,
                origin=self._first.address,
            )  # fmt: skip
            self._linear(attended, block.out, self._added)
            self._norm(block.attention_norm)
            self._linear(self._x, block.up, hidden, applied=1)
            self._linear(hidden, block.down, self._added)
            self._norm(block.norm)
            self._stages.append(len(self._calls))
        ends, dtype = self._ends.address, _DTYPES[like.dtype]
        self._call("segment_mean", x=self._x, ends=ends, out=self._means, dtype=dtype, D=c.dim)
        self._stages.append(len(self._calls))
        self._finish()
        self._stage_begins = torch.tensor(self._stages)
        self._threads = 0
        """For which there are structs to compute parts with."""

    def _make_parts(self, threads: int) -> None:
        """Structs of so many threads; where in them a part's numbers stand."""
        shared = [(x.address, 4 * self.tokens, 4, _FIRST_ROW) for x in self._by_token]
        shared += [(self._ends.address, 4 * self.tokens, 4, _FIRST_DOCUMENT)]
        shared += [(x.data_ptr(), x.nbytes, x.stride(0) * x.element_size(), of) for x, of in self._kept_rows]
        changes = [(word, 0, 1, _ROWS) for word in self._counts["tokens"]]
        changes += [(word, 0, 1, _DOCUMENTS) for word in self._counts["count"]]
        self._structs = self._arena.repeat(threads, 1)
        self._structs[:, self._where["threads"]] = 1
        rows = torch.arange(threads) * (self.tokens // threads)
        for function, at in self._calls:
            kinds = [kind for _, kind in self._fields(self._binding.PROGRAM_FUNCTIONS[function])]
            for word, kind in zip(accumulate(map(_size, kinds), initial=at), kinds, strict=False):
                address = self._words[word] if kind == "pointer" else 0
                changes += [
                    (word, address, step, of) for start, size, step, of in shared if 0 <= address - start < size
                ]
                for x in self._of_a_layer:
                    if 0 <= address - x.data_ptr() < x.nbytes:
                        self._structs[:, word] += rows * x.stride(0) * x.element_size()
        functions, starts = torch.tensor(self._calls).unbind(1)
        of_thread = [self._structs[n].data_ptr() + 8 * starts for n in range(threads)]
        self._part_calls = torch.stack([torch.stack((functions, at), 1) for at in of_thread])
        self._changes, self._threads = torch.tensor(changes), threads

    @staticmethod
    def reason_against(model: Encoder) -> str | None:
        """Why a model runs through `Encoder.forward` instead, or None."""
        if any(isinstance(x, Linear) and x.packed is None for x in model.modules()):
            return "its weights are not packed"
        if model.backend not in (None, "native") or type(model) is not Encoder:
            return "a subclass of Encoder, and one with another backend for attention, run as they say"
        return None

    def _norm(self, norm: nn.LayerNorm) -> None:
        """The stream becomes the norm of its sum with what was added."""
        self._call(
            "layer_norm", x=self._x, residual=self._added, weight=self._float(norm.weight), bias=self._float(norm.bias),
            out=self._x, dtype=_DTYPES[self._x.dtype], D=self._x.shape[1], eps=norm.eps,
        )  # fmt: skip

    def hidden(self, tokens: Sequence[int], lengths: Sequence[int]) -> Tensor:
        """`Encoder.forward`. The result is overwritten by the next call."""
        self._step(tokens, lengths, len(self._stages) - 2)
        return self._x[: len(tokens)]

    def means(self, tokens: Sequence[int], lengths: Sequence[int]) -> Tensor:
        """Means of the hidden states of each document, fp32 [documents, D]; overwritten by the next call.

        Args:
            tokens: of all documents, as `Encoder.forward`; below the size of the vocabulary, which is not checked.
            lengths: tokens per document, at least 1.
        """
        self._step(tokens, lengths, len(self._stages) - 1)
        return self._means[: len(lengths)]

    @torch.inference_mode()
    def _step(self, tokens: Sequence[int], lengths: Sequence[int], stages: int) -> None:
        T, most, first = len(tokens), self.tokens, self._model.config.first_position
        if sum(lengths) != T or most < T or max(lengths, default=0) > self._model.config.longest:
            raise ValueError(
                f"lengths: got {sum(lengths)} tokens in all and {max(lengths, default=0)} in the longest document, "
                f"want {T} in all, at most {most}, and at most {self._model.config.longest} in one"
            )
        threads = torch.get_num_threads()
        parts = _parts(lengths, threads)
        starts: list[int] = []
        for _, _, document, count in parts:
            starts += accumulate(lengths[document : document + count - 1], initial=0)
        ends = [*map(add, starts, lengths)]
        self._tokens.write(tokens)
        self._positions.write(chain.from_iterable(range(first, first + n) for n in lengths))
        self._first.write(chain.from_iterable(map(repeat, starts, lengths)))
        self._end.write(chain.from_iterable(map(repeat, ends, lengths)))
        self._own.write(chain.from_iterable(range(rows) for _, rows, _, _ in parts))
        self._ends.write(ends)
        if len(parts) == 1:
            self._run(self._stages[stages], tokens=T, count=len(lengths))
            return
        if self._threads != threads:
            self._make_parts(threads)
        numbers = torch.tensor(parts)
        self._library.keyspan_run_parts(
            self._part_calls.data_ptr(), len(self._calls), self._stage_begins.data_ptr(), stages,
            self._structs.data_ptr(), self._structs.shape[1], self._changes.data_ptr(), len(self._changes),
            numbers.data_ptr(), len(parts), threads,
        )  # fmt: skip


def _parts(lengths: Sequence[int], threads: int) -> list[tuple[int, int, int, int]]:
    """(first row, rows, first document, documents) of parts that threads can compute each alone, or of all in one."""
    most = sum(lengths) // (2 * threads)
    parts = [(0, 0, 0, 0)]
    for n, length in enumerate(lengths):
        row, rows, document, count = parts[-1]
        if rows and rows + length > min(most, _PART_TOKENS):
            parts.append((row + rows, length, n, 1))
        else:
            parts[-1] = row, rows + length, document, count + 1
    return parts if max(rows for _, rows, _, _ in parts) <= most else [(0, sum(lengths), 0, len(lengths))]
