"""Wrong calls of layers, models, inference, training options and the stand-ins for other libraries.

Each is a ValueError that names the argument, what was got and what is wanted; those of `keyspan.attention` and of masks
are in test_errors.py.
"""

from dataclasses import replace
from importlib.util import find_spec

import pytest
import torch
from torch import nn

import keyspan as S
from keyspan import inference, layers, models, parallel
from keyspan import ops as xops
from keyspan.core import masks
from keyspan.interop import flash_attn
from keyspan.interop import torch as stand_in
from keyspan.interop.flash_attn import bert_padding
from keyspan.interop.flash_attn.cute import interface as cute
from keyspan.ops import fmha
from keyspan.ops.fmha import attn_bias
from keyspan.training import checkpoint
from keyspan.training.config import TrainConfig
from keyspan.training.graph import CapturedStep
from keyspan.training.html import report
from keyspan.training.loop import load_run, train

x, w, w3 = torch.randn(2, 5, 16), torch.randn(8, 16), torch.randn(3, 4)
ints, meta = torch.zeros(2, 5, 16, dtype=torch.int64), torch.zeros(8, 16, device="meta")
q = torch.randn(1, 10, 4, 8)
table = torch.randn(4, 4), torch.randn(4, 4)
hidden, targets = torch.randn(5, 16), torch.zeros(5, dtype=torch.int64)
tokens = torch.zeros(6, dtype=torch.int64)
starts = torch.tensor([0, 4, 10], dtype=torch.int32)
SHAPE = dict(vocab_size=16, dim=16, layers=1, heads=2, kv_heads=1, hidden=16)
ENCODER = dict(vocab_size=16, dim=16, layers=1, heads=2, hidden=16, positions=16)
NAN = float("nan")


BLOCKS = attn_bias.BlockDiagonalMask.from_seqlens([3, 4])
PADDED = attn_bias.BlockDiagonalCausalWithOffsetPaddedKeysMask.from_seqlens([1, 2], 4, [2, 3])
PAGED = dict(
    block_tables=torch.tensor([[0], [1]]),
    page_size=4,
    paged_type=attn_bias.PagedBlockDiagonalCausalWithOffsetPaddedKeysMask,
)


def encoder():
    return models.Encoder(models.EncoderConfig(**ENCODER))


def gpt():
    return models.GPT(models.GPTConfig(**SHAPE))


def mha(*given, **kw):
    return layers.MultiheadAttention(8, 2)(*given, **kw)


def loss(**changed):
    given = dict(hidden=hidden, weight=w, targets=targets) | changed
    return layers.linear_cross_entropy(given.pop("hidden"), given.pop("weight"), given.pop("targets"), **given)


def heads_first(name, value):
    return stand_in.scaled_dot_product_attention(**dict(query=q, key=q, value=q) | {name: value})


LAYERS = [
    ("in_features", lambda: layers.Linear(-1, 3)),
    ("out_features", lambda: layers.Linear(3, 2.5)),
    ("in_features", lambda: layers.Linear(2**63, 3)),
    *(
        (name, lambda name=name, value=value: layers.Linear(3, 3, **{name: value}))
        for name, value in (("device", "nowhere"), ("device", []), ("dtype", "bf16"), ("dtype", torch.int32))
    ),
    ("x", lambda: layers.linear("x", w)),
    ("x", lambda: layers.linear(ints, w)),
    ("x", lambda: layers.linear(torch.tensor(1.0), w)),
    ("x", lambda: layers.Linear(16, 3)([1.0])),
    ("weight", lambda: layers.linear(x, None)),
    ("weight", lambda: layers.linear(x, meta)),
    ("weight", lambda: layers.linear(x, w[:, :15])),
    ("weight", lambda: layers.linear(x, w[0])),
    ("weight", lambda: layers.linear(x, w.half())),
    ("bias", lambda: layers.linear(x, w, w[0])),
    ("hidden_features", lambda: layers.SwiGLU(16, -2)),
    ("hidden_features", lambda: layers.GeGLU(16, 0)),
    ("out_features", lambda: layers.SwiGLU(16, 4, 0)),
    ("x", lambda: layers.SwiGLU(16, 4)("x")),
    ("w12", lambda: layers.SwiGLU(16, 4)(x[..., :5])),
    ("w12", lambda: layers.swiglu(x, None, None, w3, None)),
    ("w12", lambda: layers.swiglu(x, meta, None, w3, None)),
    ("b12", lambda: layers.swiglu(x, w, "b", w3, None)),
    ("w3", lambda: layers.swiglu(x, w, None, torch.zeros(3, 4, dtype=torch.int8), None)),
    ("dim", lambda: layers.RMSNorm(-1)),
    ("eps", lambda: layers.RMSNorm(4, -1.0)),
    ("eps", lambda: layers.rms_norm(x, x[0, 0], NAN)),
    ("x", lambda: layers.rms_norm(ints, x[0, 0])),
    ("weight", lambda: layers.rms_norm(x, None)),
    ("weight", lambda: layers.rms_norm(x, meta[0])),
    ("dtype", lambda: layers.rms_norm(x, x[0, 0], dtype="bf16")),
    ("dtype", lambda: layers.rms_norm(x, x[0, 0], dtype=torch.int32)),
    ("residual", lambda: layers.add_rms_norm(x, None, x[0, 0])),
    ("norm", lambda: layers.norm_linear(hidden, None, "n", layers.Linear(16, 3))),
    ("layer", lambda: layers.norm_linear(hidden, None, layers.RMSNorm(16), "l")),
    ("positions", lambda: layers.rotary_table([1, 2], 8)),
    ("positions", lambda: layers.rotary(q, torch.ones(10, dtype=torch.bool))),
    ("dim", lambda: layers.rotary_table(tokens, "8")),
    ("theta", lambda: layers.rotary_table(tokens, 8, 0.0)),
    ("scaling", lambda: layers.rotary_table(tokens, 8, 1.0, "yarn")),
    ("x", lambda: layers.rotary("x", tokens)),
    ("x", lambda: layers.rotate(w, table)),
    ("table", lambda: layers.rotate(q[:, :4], None)),
    ("table", lambda: layers.rotate(q, table)),
    ("heads", lambda: layers.rotate_qkv(torch.randn(4, 32), table, (2, 1))),
    ("heads", lambda: layers.rotate_qkv(torch.randn(4, 32), table, (0, 0, 0))),
    ("heads", lambda: layers.rotate_qkv(torch.randn(4, 32), table, 3)),
    ("interleaved", lambda: layers.rotate_qkv(torch.randn(4, 32), table, (2, 1, 1), interleaved="x")),
    ("qkv", lambda: layers.rotate_qkv(torch.randn(4, 33), table, (2, 1, 1))),
    ("hidden", lambda: loss(hidden="h")),
    ("hidden", lambda: loss(hidden=ints[0])),
    ("weight", lambda: loss(weight=None)),
    ("weight", lambda: loss(weight=meta)),
    ("bias", lambda: loss(bias="b")),
    ("targets", lambda: loss(targets="t")),
    ("targets", lambda: loss(targets=targets.to("meta"))),
    ("softcap", lambda: loss(softcap="a")),
    ("z_loss", lambda: loss(z_loss="a")),
    ("ignore_index", lambda: loss(ignore_index="a")),
    ("ignore_index", lambda: loss(ignore_index=2**63)),
    ("invariant", lambda: loss(invariant="x")),
    ("chunk", lambda: loss(chunk=2.5)),
    ("chunk", lambda: loss(chunk=2**63)),
    ("logits", lambda: layers.log_softmax("z")),
    ("logits", lambda: layers.log_softmax(torch.tensor(1.0))),
    ("embed_dim", lambda: layers.MultiheadAttention(9, 2)),
    ("num_heads", lambda: layers.MultiheadAttention(8, 0)),
    ("dtype", lambda: layers.MultiheadAttention(8, 2, dtype="x")),
    ("key", lambda: mha(torch.randn(3, 1, 8), torch.randn(3, 1, 8).half(), torch.randn(3, 1, 8))),
    ("bias", lambda: mha(*[torch.randn(3, 1, 8)] * 3, attn_mask=torch.zeros(3, 3), bias="b")),
    ("mask", lambda: mha(*[torch.randn(3, 1, 8)] * 3, is_causal=True, mask="m")),
    ("query", lambda: mha("q", "k", "v")),
    ("query", lambda: mha(*[torch.randn(3, 1, 9)] * 3)),
    ("key", lambda: mha(torch.randn(3, 1, 8), torch.zeros(3, 1, 8).long(), torch.randn(3, 1, 8))),
    ("attn_mask", lambda: mha(*[torch.randn(3, 1, 8)] * 3, attn_mask=torch.randn(3, 3, 3))),
    ("key_padding_mask", lambda: mha(*[torch.randn(3, 1, 8)] * 3, key_padding_mask="m")),
]
MODELS = [
    *((name, lambda name=name, value=value: models.GPTConfig(**SHAPE | {name: value})) for name, value in (
        ("dim", "a"), ("rope_theta", "a"), ("windows", 3), ("windows", (1.5,)), ("norm_eps", NAN), ("dropout", "a"),
        ("logit_softcap", "a"), ("attention_scale", "a"), ("rope_scaling", "linear"), ("tie_embeddings", "yes"))),
    *((name, lambda name=name, value=value: models.EncoderConfig(**ENCODER | {name: value})) for name, value in (
        ("dim", 0), ("first_position", "a"), ("norm_eps", "a"))),
    *((name, lambda name=name, value=value: TrainConfig(**{name: value})) for name, value in (
        ("max_length", 0), ("dim", "a"), ("tokens", 2.5), ("steps", True), ("lr", "a"), ("beta2", "a"), ("data", 3),
        ("seed", "a"), ("device", 3), ("out", "runs/a"), ("spike", "a"))),
    ("config", lambda: models.GPT(SHAPE)),
    ("tokens", lambda: gpt()([1, 2], [2])),
    ("tokens", lambda: gpt()(tokens + 16, [6])),
    ("tokens", lambda: gpt()(tokens - 1, [6])),
    ("cache", lambda: gpt()(tokens, [6], cache="c")),
    ("context", lambda: gpt()(tokens, [6], context="c")),
    ("cache", lambda: gpt()(tokens, [6], cache=[])),
    ("tokens", lambda: gpt()(tokens.to("meta"), [6])),
    *((name, lambda name=name, value=value: models.RopeScaling(**{"kind": "yarn", "factor": 2.0, name: value}))
      for name, value in (("kind", "x"), ("factor", "x"), ("original_length", None), ("low_turns", []),
                          ("magnitude", 0.0))),
    ("config", lambda: models.Encoder(SHAPE)),
    ("tokens", lambda: encoder()([1, 2], [2])),
    ("tokens", lambda: encoder()(tokens + 16, [6])),
    ("lengths", lambda: encoder()(tokens, None)),
    ("lengths", lambda: encoder()(tokens, ["6"])),
    ("folder", lambda: models.save(gpt(), 3)),
    ("path", lambda: models.load(3)),
    ("dtype", lambda: models.load("nowhere", dtype="bf16")),
    ("device", lambda: models.load("nowhere", device="nowhere")),
    ("model", lambda: models.save("m", "nowhere")),
    ("folder", lambda: models.load_encoder(3)),
    ("run", lambda: load_run(3)),
    ("config", lambda: train("c")),
    ("run", lambda: checkpoint.latest(3)),
    ("checkpoint", lambda: checkpoint.load_model(3, gpt())),
    ("model", lambda: checkpoint.load_model("nowhere", "m")),
    ("runs", lambda: report("runs/a", "report.html")),
    ("runs", lambda: report([3], "report.html")),
    ("out", lambda: report(["runs/a"], 3)),
    ("model", lambda: CapturedStep("m", None, None)),
    ("heads", lambda: models.alibi_slopes(0)),
    ("heads", lambda: models.alibi_slopes(torch.tensor(4))),
]  # fmt: skip
INFERENCE = [
    *((name, lambda name=name, value=value: inference.Sampling(**{name: value})) for name, value in (
        ("max_tokens", 2.5), ("temperature", "a"), ("top_k", "a"), ("min_p", "a"), ("seed", 2.5), ("stop", ("",)),
        ("stop_tokens", ("a",)), ("logprobs", True), ("ignore_end", "a"), ("presence_penalty", "a"))),
    *((name, lambda name=name, value=value: inference.Engine(gpt(), **{name: value})) for name, value in (
        ("memory", "1G"), ("page_size", 0), ("running", None), ("draft", -1), ("max_model_len", "a"),
        ("cache_dtype", "fp8"))),
    ("model", lambda: inference.Engine("m")),
    ("model", lambda: inference.Embedder("m", "t")),
    ("prompt", lambda: inference.Engine(gpt()).add(3)),
    ("prompts", lambda: inference.Engine(gpt()).generate(3)),
    ("graphs", lambda: inference.Engine(gpt(), graphs=None)),
    ("memory", lambda: inference.Engine(gpt(), memory=torch.tensor(2**20))),
    ("prompt", lambda: inference.Engine(gpt()).add([1.5])),
    ("sampling", lambda: inference.Engine(gpt()).add([1], "greedy")),
    ("model", lambda: inference.generate("m", [[1]], 3)),
    ("prompts", lambda: inference.generate(gpt(), "abc", 3)),
    ("prompts", lambda: inference.generate(gpt(), None, 3)),
    ("prompts", lambda: inference.generate(gpt(), [1, 2], 3)),
    ("prompts", lambda: inference.generate(gpt(), [[1.5]], 3)),
    ("max_tokens", lambda: inference.generate(gpt(), [[1]], "a")),
    ("stop", lambda: inference.generate(gpt(), [[1]], 3, stop="a")),
    ("generator", lambda: inference.generate(gpt(), [[1]], 3, generator="a")),
    ("logits", lambda: inference.sample("l")),
    ("logits", lambda: inference.sample(torch.randn(2, 0))),
    ("logits", lambda: inference.sample(torch.randn(1, 2, 8))),
    *(("logits", lambda t=t, value=value: inference.sample(torch.full((2, 8), value), t))
      for t in (0.0, 1.0) for value in (NAN, float("inf"), -float("inf"))),
    ("generator", lambda: inference.sample(w, 1.0, generator="g")),
    ("temperature", lambda: inference.probabilities(w, "a")),
    ("top_k", lambda: inference.sample(w, 1.0, 1.5)),
    ("top_p", lambda: inference.sample(w, 1.0, None, "a")),
    ("sequences", lambda: inference.KVCache("a")),
    ("capacity", lambda: inference.KVCache(2, 2**31)),
    ("lengths", lambda: inference.KVCache(2).extend(3, 3, torch.device("cpu"))),
    ("device", lambda: inference.KVCache(1).extend([3], 3, "nowhere")),
    ("spare", lambda: inference.PagedCache(models.GPTConfig(**SHAPE), 3, spare="x")),
    ("tokenizer", lambda: inference.Embedder(encoder(), "t")),
    ("text", lambda: inference.ByteTokenizer().encode(3)),
    ("folder", lambda: inference.FolderTokenizer(3)),
    ("path", lambda: inference.GgufTokenizer(3)),
    ("folder", lambda: inference.load_embedder(3)),
    ("tokens", lambda: inference.ByteTokenizer().decode([-1])),
    ("tokens", lambda: inference.ByteTokenizer().decode(3)),
    ("config", lambda: inference.PagedCache("c", 3)),
    ("pages", lambda: inference.PagedCache(models.GPTConfig(**SHAPE), "a")),
    ("dtype", lambda: inference.PagedCache(models.GPTConfig(**SHAPE), 3, 16, torch.int32)),
    ("device", lambda: inference.PagedCache(models.GPTConfig(**SHAPE), 3, device="nowhere")),
]  # fmt: skip
OTHERS = [
    ("batch", lambda: S.Causal().lower("a", 2, 3)),
    *(
        ("device", lambda device=device, call=call: call(device))
        for device in ("nowhere", 2.5, [], 2**63)
        for call in (
            lambda d: S.Causal().lower(1, 2, 3, d),
            lambda d: S.Causal().materialize(2, 3, device=d),
            lambda d: (S.Causal() & S.Window(1)).to(d),
            lambda d: S.Causal().lower(1, 2, 3).to(d),
            lambda d: attn_bias.LowerTriangularMask().materialize((3, 3), device=d),
            lambda d: attn_bias.BlockDiagonalMask.from_seqlens([3], device=d),
            lambda d: BLOCKS.to(d),
        )
    ),
    ("M", lambda: S.Documents([3]).materialize("a")),
    ("M", lambda: S.Causal().lower(1, None, 3)),
    ("N", lambda: S.Causal().lower(1, 2, 3).materialize("a")),
    ("N", lambda: S.Causal().lower(1, 2, 3).materialize(-1)),
    ("path", lambda: S.Causal().draw(2, 3, path=3)),
    ("members", lambda: masks.Union("x")),
    ("members", lambda: masks.Union((S.Causal(), 3))),
    ("keys", lambda: replace(S.Causal().lower(1, 2, 3), keys="x")),
    ("parts", lambda: S.merge(3)),
    (r"parts\[0\] out", lambda: S.merge([("a", "b")])),
    ("pieces", lambda: parallel.Partition("p")),
    ("pieces", lambda: parallel.Partition(None)),
    ("length", lambda: parallel.Partition.contiguous("a", 2)),
    ("mask", lambda: parallel.Partition.balanced("m", 8, 2)),
    ("partition", lambda: parallel.ContextMask(None, "p")),
    ("keys", lambda: parallel.ContextMask(None, parallel.Partition.contiguous(4, 1), keys="k")),
    ("x", lambda: parallel.Partition.contiguous(4, 2).take("x", 0)),
    ("rank", lambda: parallel.Partition.contiguous(4, 2).take(w, 2)),
    ("dim", lambda: parallel.Partition.contiguous(8, 2).take(w, 1, 5)),
    ("query", lambda: heads_first("query", "q")),
    ("mask_mod", lambda: stand_in.find_ranges("m", 1, 2, 3, 3)),
    ("KV_LEN", lambda: stand_in.find_ranges(lambda *_: True, 1, 2, 3, "a")),
    ("Q_LEN", lambda: stand_in.find_ranges(lambda *_: True, 1, 2, 2**63, 3)),
    ("B", lambda: stand_in.find_ranges(lambda *_: True, -1, 2, 3, 3)),
    ("H", lambda: stand_in.find_ranges(lambda *_: True, 1, "a", 3, 3)),
    ("q", lambda: flash_attn.flash_attn_func("q", q, q)),
    ("k", lambda: flash_attn.flash_attn_func(q, None, q)),
    ("v", lambda: flash_attn.flash_attn_func(q, q, q[0])),
    ("q", lambda: flash_attn.flash_attn_varlen_func(None, q[0], q[0], starts, starts)),
    ("cu_seqlens_q", lambda: flash_attn.flash_attn_varlen_func(q[0], q[0], q[0], starts[0], starts)),
    ("alibi_slopes", lambda: flash_attn.flash_attn_varlen_func(q[0], q[0], q[0], starts, starts, alibi_slopes="a")),
    ("q", lambda: cute.flash_attn_varlen_func("q", q, q)),
    ("cu_seqlens", lambda: cute.flash_attn_varlen_func(torch.tensor(1.0), q, q)),
    ("q", lambda: flash_attn.flash_attn_with_kvcache(None, q, q)),
    ("k", lambda: flash_attn.flash_attn_with_kvcache(q, q, q, q[0], q)),
    ("k", lambda: flash_attn.flash_attn_with_kvcache(q[:, :1], q, q, q[:, :1, :, :7], q[:, :1], cache_seqlens=3)),
    *(
        (name, lambda name=name, value=value: flash_attn.flash_attn_with_kvcache(q[:, :1], q, q, **{name: value}))
        for name, value in (
            ("cache_seqlens", "a"),
            ("cache_seqlens", tokens),
            ("cache_batch_idx", 0),
            ("cache_leftpad", "a"),
            ("block_table", tokens),
            ("alibi_slopes", 1.0),
        )
    ),
    ("attention_mask", lambda: bert_padding.unpad_input(x, None)),
    ("attention_mask", lambda: bert_padding.unpad_input(x, tokens)),
    ("hidden_states", lambda: bert_padding.unpad_input("x", tokens)),
    ("indices", lambda: bert_padding.pad_input(x[0], tokens[:5] + 10, 2, 5)),
    ("indices", lambda: bert_padding.pad_input(x[0], tokens[:4], 2, 5)),
    ("batch", lambda: bert_padding.pad_input(x[0], tokens[:5], -1, 5)),
    ("indices", lambda: bert_padding.index_first_axis(x, tokens + 2)),
    ("window_size", lambda: flash_attn.flash_attn_func(q, q, q, window_size=(1,))),
    ("cu_seqlens_q", lambda: flash_attn.flash_attn_varlen_func(q[0], q[0], q[0], "c", "c", 10, 10)),
    ("qkv", lambda: flash_attn.flash_attn_qkvpacked_func(q)),
    ("k_cache", lambda: flash_attn.flash_attn_with_kvcache(q, "k", q)),
    ("scale", lambda: xops.memory_efficient_attention(q, q, q, scale="a")),
    ("query", lambda: xops.memory_efficient_attention(q[0, 0], q, q)),
    *(("p", lambda p=p: xops.memory_efficient_attention(q, q, q, p=p)) for p in ("x", None, -1, NAN)),
    ("grad", lambda: xops.memory_efficient_attention_backward("g", q, q, q, q, q)),
    ("output", lambda: xops.memory_efficient_attention_backward(q, None, q[..., 0], q, q, q)),
    ("lse", lambda: xops.memory_efficient_attention_backward(q, q, None, q, q, q)),
    ("key", lambda: xops.memory_efficient_attention_backward(q, q, q[..., 0], q, "k", q)),
    ("attn_split", lambda: fmha.merge_attentions("a", "b")),
    (r"attn_split\[0\]", lambda: fmha.merge_attentions(["a"], ["b"])),
    ("output_dtype", lambda: fmha.merge_attentions([q], [q[..., 0]], output_dtype="x")),
    ("dim", lambda: xops.RMSNorm("a")),
    ("hidden_features", lambda: xops.SwiGLU(16, -2)),
    ("w1", lambda: xops.swiglu(x, None, None, w, None, w, None)),
    ("b1", lambda: xops.swiglu(x, w, "b", w, None, w3, None)),
    ("b2", lambda: xops.swiglu(x, w, None, w, x[0], w3, None)),
    ("b1b2", lambda: xops.swiglu_packed(x, torch.stack([w, w]), "b", w3, None)),
    ("y", lambda: xops.RMSNorm(16).increment_and_forward_(x, "y")),
    ("y", lambda: xops.RMSNorm(16).increment_and_forward_(x, x[:1])),
    ("sources", lambda: xops.index_select_cat(None, [tokens])),
    (r"indices\[0\]", lambda: xops.index_select_cat([w], ["i"])),
    (r"indices\[0\]", lambda: xops.index_select_cat([w], [tokens + 8])),
    (r"indices\[0\]", lambda: xops.index_select_cat([w], [tokens - 1])),
    (r"indices\[0\]", lambda: xops.index_select_cat([w], [tokens.to("meta")])),
    ("input", lambda: xops.scaled_index_add("x", "i", "s")),
    ("index", lambda: xops.scaled_index_add(x, torch.tensor([0.0]), x[:1])),
    ("index", lambda: xops.scaled_index_add(x, torch.tensor([2]), x[:1])),
    ("scaling", lambda: xops.scaled_index_add(x, torch.tensor([0]), x[:1], w[0, :3])),
    ("alpha", lambda: xops.scaled_index_add(x, torch.tensor([0]), x[:1], alpha="a")),
    ("dim", lambda: xops.unbind(x, 7)),
    ("tensors", lambda: xops.stack_or_none([], 0)),
    ("tensors", lambda: xops.stack_or_none(None, 0)),
    ("dim", lambda: xops.stack_or_none([x, x], "a")),
    ("a", lambda: xops.tiled_matmul(["a"], ["b"])),
    ("a", lambda: xops.tiled_matmul(3, [[w]])),
    ("b", lambda: xops.tiled_matmul([[w]], [[w]])),
    ("mask", lambda: xops.masked_matmul(w, w.t(), "m")),
    ("mask", lambda: xops.masked_matmul(w, w.t(), torch.ones(3, 3, dtype=torch.bool))),
    ("a", lambda: xops.masked_matmul(torch.tensor(1.0), w)),
    ("b", lambda: xops.masked_matmul(w, w.t().double())),
    ("xq", lambda: xops.rope_padded("q", q, q, q, q, None)),
    ("q_seqlen", lambda: attn_bias.BlockDiagonalMask.from_seqlens(None)),
    ("window_left", lambda: attn_bias.LocalAttentionFromBottomRightMask("a", 3)),
    ("window_size", lambda: attn_bias.BlockDiagonalCausalMask.from_seqlens([3]).make_local_attention("a")),
    ("padding", lambda: attn_bias.BlockDiagonalCausalWithOffsetPaddedKeysMask.from_seqlens([1], "a", [1])),
    ("tensors_q", lambda: attn_bias.BlockDiagonalMask.from_tensor_list([])),
    ("tensors_q", lambda: attn_bias.BlockDiagonalMask.from_tensor_list(3)),
    ("shape", lambda: attn_bias.LowerTriangularMask().materialize("s")),
    ("dtype", lambda: attn_bias.LowerTriangularMask().materialize((3, 3), "f")),
    *(
        (name, lambda name=name, value=value: PADDED.make_paged(**PAGED | {name: value}))
        for name, value in (
            ("block_tables", "x"),
            ("block_tables", tokens),
            ("page_size", None),
            ("page_size", 0),
            ("paged_type", "x"),
            ("paged_type", int),
        )
    ),
    ("x", lambda: attn_bias.BlockDiagonalMask.from_seqlens([1, 2]).split("x")),
    ("bias", lambda: attn_bias.LowerTriangularMaskWithTensorBias("b")),
]


@pytest.mark.parametrize(
    ("name", "call"), [*LAYERS, *MODELS, *INFERENCE, *OTHERS], ids=lambda x: x if isinstance(x, str) else ""
)
def test_the_argument_is_named(name, call):
    with pytest.raises(ValueError, match=rf"(?s)^{name}: got .*want "):
        call()


@pytest.mark.skipif(find_spec("transformers") is None, reason="transformers is not installed")
@pytest.mark.parametrize("name", ["unpadded", "replace_linears", "use_keyspan"])
def test_what_is_no_model_of_transformers(name):
    from keyspan.interop import transformers

    with pytest.raises(ValueError, match=r"^model: got str, want Module"):
        getattr(transformers, name)("bert")
    if name != "replace_linears":
        with pytest.raises(ValueError, match=r"^model: got Linear, want a"):
            getattr(transformers, name)(nn.Linear(2, 2))


@pytest.mark.skipif(find_spec("transformers") is None, reason="transformers is not installed")
@pytest.mark.parametrize("config", ["x", 3, nn.Linear(2, 2)])
def test_what_is_no_config_of_transformers(config):
    from keyspan.interop.transformers import GrowingCache

    with pytest.raises(ValueError, match=r"^config: got \w+, want PreTrainedConfig"):
        GrowingCache(config)
