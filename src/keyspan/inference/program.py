"""A step of a decoder on a CPU as one call of the native library, so that a token does not pay for some 400 in Python.

All structs of all calls lie in one tensor of 8-byte words; a step writes the number of its tokens and the addresses
that changed into it. The results are, bit for bit, those of `GPT.forward`, whose kernels run on the same numbers.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, cast

import torch
from torch import Tensor

from keyspan.core.problem import make_problem
from keyspan.core.ranges import KeyRanges
from keyspan.inference.pages import PagedCache
from keyspan.layers import RMSNorm, SwiGLU
from keyspan.layers.gemm import Linear, PackedWeight
from keyspan.models.gpt import GPT, Attention, Block, Step

_DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
"""`Dtype` of native/params.h."""


@dataclass
class _Layers:
    """What changes from step to step in the calls of all layers with one window: indices of words."""

    attention: Attention
    """Of one of them."""
    keys: tuple[Tensor, Tensor]
    """Its storage."""
    params: list[int] = field(default_factory=list)
    """Where each layer's `Params` begin."""
    own: list[list[int]] = field(default_factory=list)
    """What is each layer's own in them: addresses of keys, values and sinks."""
    cosines: list[int] = field(default_factory=list)
    sines: list[int] = field(default_factory=list)
    slots: list[int] = field(default_factory=list)


class DecoderProgram:
    """`GPT.forward` and `GPT.logits` over a paged cache.

    Args:
        model: whose weights are copied, unless they are packed already; later changes are not seen.
        cache: where keys and values are.
        tokens: most of a step.

    Raises ValueError where `reason_against` has a reason.
    """

    def __init__(self, model: GPT, cache: PagedCache, tokens: int) -> None:
        from keyspan.backends.native import binding

        reason = self.reason_against(model)
        if reason is not None:
            raise ValueError(f"model: {reason}")
        self._model, self._cache, self._binding = model, cache, binding
        self._library: Any = binding.LIBRARY
        self._kept: list[Any] = []
        """What addresses refer to."""
        self._words: list[int] = []
        """While the program is made: all structs, one behind the other."""
        self._calls: list[tuple[int, int]] = []
        """(function, index of its struct's first word)."""
        self._token_counts: list[int] = []
        """Indices of words that are the number of tokens."""
        self._thread_counts: list[int] = []
        self._layers: dict[int | None, _Layers] = {}
        """By window."""
        self._make(tokens)
        head = model._packed_head if model.config.tie_embeddings else model.head.packed
        self._head = self._weight(model.head_weight, head)
        self._arena = torch.tensor(self._words, dtype=torch.int64)
        start = self._arena.data_ptr()
        self._list = torch.tensor([(function, start + 8 * at) for function, at in self._calls], dtype=torch.int64)
        self._own = torch.tensor([self._index("params", name) for name in ("k", "v", "sinks")])
        size = sum(map(_size, (kind for _, kind in self._fields("params"))))
        self._params = {
            window: torch.tensor(layers.params)[:, None] + torch.arange(size) for window, layers in self._layers.items()
        }
        """By window, where the words of all layers' `Params` are, a row for each layer."""
        self._tokens, self._threads = torch.tensor(self._token_counts), torch.tensor(self._thread_counts)

    @staticmethod
    def reason_against(model: GPT) -> str | None:
        """Why a model runs through `GPT.forward` instead, or None."""
        c = model.config
        if c.qk_norm or c.post_norms or c.activation != "silu" or c.embedding_scale != 1 or c.experts:
            return "norms of heads, norms behind layers, GELU, scaled embeddings and experts are not part of a program"
        if model.backend not in (None, "native") or type(model) is not GPT:
            return "a subclass of GPT, and one with another backend for attention, run as they say"
        plain = [x.weight for x in model.modules() if isinstance(x, Linear) and x.packed is None]
        reasons = map(PackedWeight.reason_against, [model.embedding.weight, *plain])
        return next((reason for reason in reasons if reason is not None), None)

    # Making it

    def _make(self, tokens: int) -> None:
        c, like = self._model.config, self._model.embedding.weight
        heads, width = c.heads + 2 * c.kv_heads, c.heads * c.head_dim
        self._x, self._h, normed, added = (like.new_empty((tokens, c.dim)) for _ in range(4))
        self._qkv, self._attended = like.new_empty((tokens, heads * c.head_dim)), like.new_empty((tokens, width))
        x12, gated = like.new_empty((tokens, 2 * c.hidden)), like.new_empty((tokens, c.hidden))
        self._inverse = torch.empty(tokens)
        size, row, keys = like.element_size(), heads * c.head_dim, c.kv_heads * c.head_dim
        dtype = _DTYPES[like.dtype]
        for n, module in enumerate(self._model.blocks):
            block = cast(Block, module)
            storage = self._cache.storage(n)
            layers = self._layers.setdefault(c.window(n), _Layers(block.attention, storage))
            self._norm(added if n else None, block.attention_norm, normed)
            self._linear(normed, block.attention.qkv, self._qkv)
            if c.positions == "rope":
                at = self._call(
                    "rotary", q=self._qkv, out=self._qkv, dtype=dtype, K=c.head_dim,
                    heads=(c.heads + c.kv_heads, 0, 0), stride=(row, 0, 0), out_stride=row,
                )  # fmt: skip
                layers.cosines.append(at + self._index("rotary", "cosine"))
                layers.sines.append(at + self._index("rotary", "sine"))
            for to, first in zip(storage, (width, width + keys), strict=True):
                source = {"from": self._qkv.data_ptr() + first * size}
                at = self._call(
                    "store", **source, to=to, bytes=keys * size, from_stride=row * size, to_stride=keys * size
                )
                layers.slots.append(at + self._index("store", "slots"))
            layers.params.append(self._call("params"))
            sinks = None if block.attention.sinks is None else block.attention.sinks.detach().float().contiguous()
            self._kept.append(sinks)
            layers.own.append([x.data_ptr() for x in storage] + [0 if sinks is None else sinks.data_ptr()])
            self._linear(self._attended, block.attention.out, added)
            self._norm(added, block.mlp_norm, normed)
            mlp = cast(SwiGLU, block.mlp)
            self._linear(normed, mlp.w12, x12)
            self._call("gate", x12=x12, out=gated, dtype=dtype, D=c.hidden)
            self._linear(gated, mlp.w3, added)
        self._norm(added, self._model.norm, self._h)

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
            if found in ("T", "rows"):
                self._token_counts.append(len(self._words))
            elif found == "threads":
                self._thread_counts.append(len(self._words))
            elif found == "isa":
                value = self._binding.isa_number()
            elif kind == "float":
                value = torch.tensor([value], dtype=torch.float64).view(torch.int64).item()
            self._words += value if isinstance(value, tuple) else (value,) + (0,) * (_size(kind) - 1)
        assert not values, values
        self._calls.append((self._binding.PROGRAM_FUNCTIONS.index(name), at))
        return at

    def _weight(self, weight: Tensor, packed: PackedWeight | None) -> PackedWeight:
        return PackedWeight(weight) if packed is None else packed

    def _linear(self, x: Tensor, layer: Linear, out: Tensor) -> None:
        weight = self._weight(layer.weight, layer.packed)
        bias = layer.bias
        self._call(
            "linear", x=x, weight=weight.words, scale=0 if weight.scale is None else weight.scale,
            bias=0 if bias is None else bias.detach().contiguous(), out=out, dtype=_DTYPES[x.dtype],
            storage=weight.storage, inputs=weight.inputs, outputs=weight.outputs, x_stride=x.stride(0),
        )  # fmt: skip

    def _norm(self, residual: Tensor | None, norm: RMSNorm, out: Tensor) -> None:
        """The residual stream becomes the sum, and `out` its norm."""
        dtype = _DTYPES[out.dtype]
        self._call(
            "rms_norm", x=self._x, residual=0 if residual is None else residual,
            weight=norm.weight.detach().float().contiguous(), total=self._x, out=out, inverse=self._inverse,
            total_dtype=dtype, residual_dtype=dtype, out_dtype=dtype, D=out.shape[1], eps=norm.eps,
        )  # fmt: skip

    # Running it

    def hidden(self, tokens: Tensor, lengths: list[int]) -> Tensor:
        """`GPT.forward` after `PagedCache.begin`. The result is overwritten by the next call."""
        T, most = tokens.numel(), len(self._x)
        if most < T:
            raise ValueError(f"tokens: got {T}, want at most the program's {most}")
        torch.index_select(self._model.embedding.weight, 0, tokens, out=self._x[:T])
        step = self._model._step(tokens, lengths, self._cache)
        kept: list[Any] = [step]
        words = self._arena
        words[self._tokens] = T
        words[self._threads] = torch.get_num_threads()
        for window, layers in self._layers.items():
            kept.append(self._attend(window, layers, step, T))
            words[layers.slots] = self._cache.slots(window).data_ptr()
            if step.turns is not None:
                cosine, sine = (x.contiguous() for x in step.turns[window])
                kept += [cosine, sine]
                words[layers.cosines], words[layers.sines] = cosine.data_ptr(), sine.data_ptr()
        self._library.keyspan_run(self._list.data_ptr(), len(self._list))
        del kept
        return self._h[:T]

    def _attend(self, window: int | None, layers: _Layers, step: Step, T: int) -> object:
        """Write the `Params` of all layers with this window; what must live until they have run."""
        from keyspan.backends.native import pack_forward

        attention, c = layers.attention, self._model.config
        mask = step.masks[window]
        assert isinstance(mask, KeyRanges)  # the engine cuts nothing across ranks
        query = self._qkv[:T].view(1, T, -1, c.head_dim)[:, :, : c.heads]
        problem, _ = make_problem(
            query, *layers.keys, mask=mask, bias=step.bias, scale=attention.scale,
            softcap=attention.softcap, sinks=None if attention.sinks is None else attention.sinks.detach(),
        )  # fmt: skip
        packed, kept = pack_forward(problem, self._attended[:T])
        self._arena[self._params[window]] = torch.frombuffer(bytearray(packed), dtype=torch.int64)
        self._arena[self._params[window][:, self._own]] = torch.tensor(layers.own)
        return kept

    def logits(self, hidden: Tensor) -> Tensor:
        """`GPT.logits`."""
        z, cap = self._head.multiply(hidden), self._model.config.logit_softcap
        return z if cap is None else cap * torch.tanh(z / cap)


def _size(kind: str) -> int:
    """Words of a field."""
    return int(kind[3:]) if kind.startswith("int") else 1
