"""How ten public projects call xFormers, end to end, compared with dense attention."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn
from xformers_definitions import dense_attention, leaves, random

import keyspan.ops as xops
import keyspan.ops.fmha as xformers
from keyspan.ops import fmha

exact = {"rtol": 1e-10, "atol": 1e-11}


def full(M: int, N: int) -> torch.Tensor:
    return torch.ones(M, N, dtype=torch.bool)


def test_dinov2_nested_tensors():
    """Crops of two sizes in one packed row, a random half of each batch, residuals added in place."""
    C, H = 8, 2
    qkv_weight, gamma = random(3 * C, C), random(C)
    xs = [random(4, 5, C), random(6, 3, C)]
    branges, keep = [torch.tensor([2, 0]), torch.tensor([5, 1, 3])], 0.5
    cache = {}

    def attention(x, bias):
        B, N, _ = x.shape
        q, k, v = xops.unbind(F.linear(x, qkv_weight).reshape(B, N, 3, H, C // H), 2)
        return xops.memory_efficient_attention(q, k, v, attn_bias=bias).reshape(B, N, C)

    sizes = tuple((len(b), x.shape[1]) for b, x in zip(branges, xs, strict=True))
    if sizes not in cache:
        lengths = [n for count, n in sizes for _ in range(count)]
        bias = fmha.BlockDiagonalMask.from_seqlens(lengths)
        bias._batch_sizes = [count for count, _ in sizes]
        cache[sizes] = bias
    flat = [x.flatten(1) for x in xs]
    packed = xops.index_select_cat(flat, branges).view(1, -1, C)
    residuals = cache[sizes].split(attention(packed, cache[sizes]))
    outputs = [
        xops.scaled_index_add(x.clone(), b, residual.to(x.dtype), scaling=gamma, alpha=1 / keep)
        for x, b, residual in zip(xs, branges, residuals, strict=True)
    ]
    for x, brange, got in zip(xs, branges, outputs, strict=True):
        want = x.clone()
        for i in brange.tolist():
            q, k, v = F.linear(x[i : i + 1], qkv_weight).unflatten(-1, (3, H, C // H)).unbind(2)
            attended, _ = dense_attention(q, k, v, full(x.shape[1], x.shape[1]))
            want[i] += attended.flatten(2)[0] * gamma / keep
        torch.testing.assert_close(got, want, **exact)


def test_unsloth_grouped_queries():
    """5-D queries over expanded keys without gradients, expanded and reshaped heads with them; a sliding window."""
    lengths, W, G, per, K = [4, 3], 2, 2, 3, 4
    mask = xformers.attn_bias.BlockDiagonalCausalMask.from_seqlens(lengths).make_local_attention(window_size=W)
    assert isinstance(mask, xformers.attn_bias.BlockDiagonalCausalMask)
    Q, kv = random(1, 7, G, per, K), [random(1, 7, G, 1, K) for _ in range(2)]
    visible = torch.block_diag(*(full(n, n).tril() & ~full(n, n).tril(-W) for n in lengths)).bool()
    want, _ = dense_attention(Q.flatten(2, 3), *(x[:, :, :, 0] for x in kv), visible)
    expanded = [x.expand(1, 7, G, per, K) for x in kv]
    with torch.no_grad():
        got = xformers.memory_efficient_attention(Q, *expanded, attn_bias=mask)
    torch.testing.assert_close(got.flatten(2, 3), want, **exact)

    inputs, reference = leaves(Q, *kv), leaves(Q.flatten(2, 3), *(x[:, :, :, 0] for x in kv))
    q, k, v = inputs[0].reshape(1, 7, G * per, K), *(x.expand(1, 7, G, per, K).reshape(1, 7, -1, K) for x in inputs[1:])
    got, want = xformers.memory_efficient_attention(q, k, v, attn_bias=mask), dense_attention(*reference, visible)[0]
    cotangent = torch.randn_like(want)
    for a, b in zip(
        torch.autograd.grad(got, inputs, cotangent), torch.autograd.grad(want, reference, cotangent), strict=True
    ):
        torch.testing.assert_close(a.reshape(b.shape), b, **exact)


def test_vllm_prefill_and_decode():
    """Packed prefill, ALiBi per prompt, decoding from a padded and a paged cache: each token as computed alone."""
    lengths, H, K, scale = [5, 3], 4, 8, 0.2
    T = sum(lengths)
    q, k, v = random(T, H, K), random(T, 2, K), random(T, 2, K)
    mask = fmha.attn_bias.BlockDiagonalCausalMask.from_seqlens(lengths)
    grouped = q.unflatten(1, (2, 2))[None], *(x[None, :, :, None].expand(1, T, 2, 2, K) for x in (k, v))
    got = xops.memory_efficient_attention_forward(*grouped, attn_bias=mask, p=0.0, scale=scale).flatten(2, 3)
    causal = torch.block_diag(*(full(n, n).tril() for n in lengths)).bool()
    torch.testing.assert_close(got, dense_attention(q[None], k[None], v[None], causal, scale=scale)[0], **exact)

    # ALiBi: a slice of a longer bias, per prompt.
    slopes, padded_len = torch.tensor([0.5, 0.25, 0.125, 0.0625], dtype=torch.float64), 8
    distance = torch.arange(padded_len)[None] - torch.arange(padded_len)[:, None]
    alibi = torch.empty(1, H, padded_len, padded_len, dtype=torch.float64).copy_(slopes[:, None, None] * distance)
    for start, n in ((0, 5), (5, 3)):
        rows = slice(start, start + n)
        bias = fmha.attn_bias.LowerTriangularMaskWithTensorBias(alibi[:, :, :n, :n])
        one = q[None, rows], k[None, rows], v[None, rows]
        got_one = xops.memory_efficient_attention_forward(*one, attn_bias=bias, scale=scale)
        want, _ = dense_attention(*one, full(n, n).tril(), alibi[:, :, :n, :n], scale)
        torch.testing.assert_close(got_one, want, **exact)

    # Decoding: the last query of each prompt again, from caches whose unused slots hold NaN.
    last = q[[4, 7]][None]
    want = torch.stack([got[0, 4], got[0, 7]])[None]
    padding, page = 6, 2
    cache = [torch.full((2, padding, 2, K), torch.nan, dtype=torch.float64) for _ in range(2)]
    for target, x in zip(cache, (k, v), strict=True):
        target[0, :5], target[1, :3] = x[:5], x[5:]
    padded = fmha.attn_bias.BlockDiagonalCausalWithOffsetPaddedKeysMask.from_seqlens(
        q_seqlen=[1, 1], kv_padding=padding, kv_seqlen=lengths
    )
    flat = [x.flatten(0, 1)[None] for x in cache]
    torch.testing.assert_close(fmha.memory_efficient_attention_forward(last, *flat, padded, scale=scale), want, **exact)
    tables = torch.tensor([[4, 1, 3], [0, 5, 2]], dtype=torch.int32)
    paged = fmha.attn_bias.PagedBlockDiagonalCausalWithOffsetPaddedKeysMask.from_seqlens(
        q_seqlen=[1, 1], kv_seqlen=lengths, page_size=page, block_tables=tables, device="cpu"
    )
    pages = [torch.full((1, 12, 2, K), torch.nan, dtype=torch.float64) for _ in range(2)]
    for target, x in zip(pages, cache, strict=True):
        for b in range(2):
            for n in range(3):
                first = int(tables[b, n]) * page
                target[0, first : first + page] = x[b, n * page : (n + 1) * page]
    torch.testing.assert_close(fmha.memory_efficient_attention_forward(last, *pages, paged, scale=scale), want, **exact)


def test_diffusers_heads_in_the_batch():
    """[B·H, M, D] with a mask repeated for the heads and expanded over queries, an operator, a VAE with one head."""
    B, H, M, N, D = 2, 3, 5, 7, 4
    op = xops.MemoryEfficientAttentionFlashAttentionOp
    q, k, v = random(B * H, M, D), random(B * H, N, D), random(B * H, N, D)
    mask = torch.where(torch.rand(B, 1, N) < 0.3, -10000.0, 0.0).double()
    mask = mask.repeat_interleave(H, 0).expand(-1, M, -1)
    assert fmha.flash.FwOp.supports(fmha.Inputs(q, k, v, attn_bias=mask))
    got = xops.memory_efficient_attention(
        q.contiguous(), k.contiguous(), v.contiguous(), attn_bias=mask, op=op, scale=D**-0.5
    )
    want, _ = dense_attention(q[:, :, None], k[:, :, None], v[:, :, None], full(M, N), mask[:, None])
    torch.testing.assert_close(got, want[:, :, 0], **exact)
    # AUTOMATIC1111 and ComfyUI: a bias padded to a multiple of 8 and sliced.
    x, bias = random(B, M, H, D), torch.zeros(B, H, M, 8, dtype=torch.float64)
    bias[..., :M] = random(B, H, M, M)
    sliced = bias[..., :M]
    got = xops.memory_efficient_attention(x, x, x, attn_bias=sliced)
    torch.testing.assert_close(got, dense_attention(x, x, x, full(M, M), sliced)[0], **exact)
    vae = random(1, 9, 1, 512)
    torch.testing.assert_close(
        xops.memory_efficient_attention(vae, vae, vae), dense_attention(vae, vae, vae, full(9, 9))[0], **exact
    )


def test_audiocraft_streaming_layer():
    """'b t h d', causal or not, dropout by position."""
    packed = random(2, 6, 3, 2, 4)
    q, k, v = xops.unbind(packed, dim=2)
    for mask, visible in ((xops.LowerTriangularMask(), full(6, 6).tril()), (None, full(6, 6))):
        got = xops.memory_efficient_attention(q, k, v, mask, p=0.0)
        torch.testing.assert_close(got, dense_attention(q, k, v, visible)[0], **exact)
    assert not torch.equal(xops.memory_efficient_attention(q, k, v, None, p=0.5), got)


def test_embedder_unpadded_on_the_cpu_in_fp32():
    """The encoder of gte and stella: unpadded tokens give the results of padded ones with a mask."""
    torch.manual_seed(0)
    mask = torch.tensor([[1, 1, 1, 0, 0], [1, 1, 1, 1, 1], [1, 0, 0, 0, 0]], dtype=torch.bool)
    hidden = torch.randn(3, 5, 8)
    qkv = nn.Linear(8, 24)
    unpadded = hidden[mask].unsqueeze(0)
    lengths = mask.sum(-1).tolist()
    bias = xops.fmha.attn_bias.BlockDiagonalMask.from_seqlens(lengths)

    def attend(x, bias):
        q, k, v = qkv(x).unflatten(-1, (3, 2, 4)).unbind(2)
        return xops.memory_efficient_attention(q, k, v, attn_bias=bias, p=0.0).flatten(2)

    additive = torch.zeros(3, 1, 1, 5).masked_fill(~mask[:, None, None], torch.finfo(torch.float32).min)
    padded = attend(hidden, additive.expand(3, 2, 5, 5))
    torch.testing.assert_close(attend(unpadded, bias)[0], padded[mask], rtol=1e-5, atol=1e-6)


def test_mistral_rolling_cache():
    """Chunked prefill and decoding with a rolling cache of W slots: equal to attention over the whole sequence."""
    W, T, H, K = 4, 11, 2, 4
    q, k, v = random(1, T, H, K), random(1, T, H, K), random(1, T, H, K)
    window = full(T, T).tril() & ~full(T, T).tril(-W)
    want, _ = dense_attention(q, k, v, window)
    first = fmha.attn_bias.BlockDiagonalCausalMask.from_seqlens([5]).make_local_attention(W)
    torch.testing.assert_close(
        fmha.memory_efficient_attention(q[:, :5], k[:, :5], v[:, :5], first), want[:, :5], **exact
    )
    # The next chunk sees the last W cached tokens and itself, aligned bottom-right.
    chunk = fmha.attn_bias.BlockDiagonalMask.from_seqlens([3], [W + 3]).make_local_attention_from_bottomright(W)
    torch.testing.assert_close(
        fmha.memory_efficient_attention(q[:, 5:8], k[:, 1:8], v[:, 1:8], chunk), want[:, 5:8], **exact
    )
    # Decoding: the cache rolls; without biases the order of its keys does not matter.
    cache = [torch.empty(1, W, H, K, dtype=torch.float64) for _ in range(2)]
    for t in range(8):
        for target, x in zip(cache, (k, v), strict=True):
            target[:, t % W] = x[:, t]
    for t in range(8, T):
        for target, x in zip(cache, (k, v), strict=True):
            target[:, t % W] = x[:, t]
        decode = fmha.attn_bias.BlockDiagonalCausalWithOffsetPaddedKeysMask.from_seqlens(
            q_seqlen=[1], kv_padding=W, kv_seqlen=[min(t + 1, W)]
        ).to("cpu")
        torch.testing.assert_close(
            fmha.memory_efficient_attention(q[:, t : t + 1], *cache, decode), want[:, t : t + 1], **exact
        )


def test_pixart_cross_attention_to_ragged_text():
    """N image tokens for each of B captions of different lengths."""
    B, N, H, D, kv_lens = 3, 4, 2, 4, [5, 1, 3]
    q, k, v = random(B, N, H, D), random(1, sum(kv_lens), H, D), random(1, sum(kv_lens), H, D)
    mask_class = xops.fmha.BlockDiagonalMask if hasattr(xops.fmha, "BlockDiagonalMask") else None
    bias = mask_class.from_seqlens([N] * B, kv_lens, device=q.device)
    out = xops.memory_efficient_attention(q.reshape(1, B * N, H, D), k, v, p=0.0, attn_bias=bias, scale=0.4)
    for b, got in enumerate(out.view(B, N, H, D)):
        keys = slice(sum(kv_lens[:b]), sum(kv_lens[: b + 1]))
        want, _ = dense_attention(q[b : b + 1], k[:, keys], v[:, keys], full(N, kv_lens[b]), scale=0.4)
        torch.testing.assert_close(got[None], want, **exact)


def test_tinyllama_and_neobert_weights():
    """Checkpoints of both layouts load and equal the formula; and fairseq2's bottom-right mask."""
    state = {"w1.weight": random(6, 4), "w2.weight": random(6, 4), "w3.weight": random(4, 6)}
    tiny = xops.SwiGLU(4, 6, bias=False, _pack_weights=False).double()
    tiny.load_state_dict(state)
    x = random(2, 3, 4)
    want = (F.silu(x @ state["w1.weight"].t()) * (x @ state["w2.weight"].t())) @ state["w3.weight"].t()
    torch.testing.assert_close(tiny(x), want, **exact)
    neo = xops.SwiGLU(4, 6, 4, bias=False).double()
    w12 = torch.cat([state["w1.weight"], state["w2.weight"]])
    neo.load_state_dict({"w12.weight": w12, "w3.weight": state["w3.weight"]})
    torch.testing.assert_close(neo(x), want, **exact)

    class SwiGLUFFNFused(xops.SwiGLU):  # DINOv2
        def __init__(self, in_features, hidden_features):
            hidden = (int(hidden_features * 2 / 3) + 7) // 8 * 8
            super().__init__(in_features=in_features, hidden_features=hidden, out_features=in_features, bias=True)

    assert {name: tuple(p.shape) for name, p in SwiGLUFFNFused(4, 12).named_parameters()} == {
        "w12.weight": (16, 4), "w12.bias": (16,), "w3.weight": (4, 8), "w3.bias": (4,),
    }  # fmt: skip
    mask = fmha.BlockDiagonalMask.from_seqlens([2, 1], [3, 2], device="cpu").make_causal_from_bottomright()
    q, kv = random(1, 3, 1, 4), random(1, 5, 1, 4)
    visible = torch.tensor([[1, 1, 0, 0, 0], [1, 1, 1, 0, 0], [0, 0, 0, 1, 1]], dtype=torch.bool)
    torch.testing.assert_close(
        fmha.memory_efficient_attention(q, kv, kv, mask), dense_attention(q, kv, kv, visible)[0], **exact
    )


def test_ring_attention():
    """Keys in four shards: partial results merged; and backward, shard by shard, from the merged output and lse."""
    M, H, K, shards = 8, 2, 4, 4
    q, k, v, grad = random(1, M, H, K), random(1, M, H, K), random(1, M, H, K), random(1, M, H, K)
    reference = leaves(q, k, v)
    want, want_lse = dense_attention(*reference, full(M, M).tril())
    step = M // shards
    cu = torch.tensor([0, step], dtype=torch.int32)
    info = fmha.attn_bias._SeqLenInfo(seqstart=cu, max_seqlen=step, min_seqlen=step, seqstart_py=None)
    own = fmha.attn_bias.BlockDiagonalCausalMask(q_seqinfo=info, k_seqinfo=info)

    def shard(x, n):
        return x[:, n * step : (n + 1) * step]

    results = []
    for rank in range(shards):
        parts = [
            fmha.memory_efficient_attention_partial(
                shard(q, rank), shard(k, source), shard(v, source), own if source == rank else None, op=fmha.flash.FwOp
            )
            for source in range(rank + 1)
        ]
        results.append(fmha.merge_attentions(*map(list, zip(*parts, strict=True))))
    out, lse = torch.cat([o for o, _ in results], 1), torch.cat([s for _, s in results], -1)
    torch.testing.assert_close(out, want, **exact)
    torch.testing.assert_close(lse, want_lse, **exact)

    dq, dk, dv = (torch.zeros_like(x) for x in (q, k, v))
    for rank in range(shards):
        for source in range(rank + 1):
            grads = fmha.memory_efficient_attention_backward(
                shard(grad, rank), shard(out, rank), lse[..., rank * step : (rank + 1) * step],
                shard(q, rank), shard(k, source), shard(v, source), own if source == rank else None, op=fmha.flash.BwOp,
            )  # fmt: skip
            for total, part, at in zip((dq, dk, dv), grads, (rank, source, source), strict=True):
                shard(total, at).add_(part)
    for got, expected in zip((dq, dk, dv), torch.autograd.grad(want, reference, grad), strict=True):
        torch.testing.assert_close(got, expected, **exact)
    # A window across shards, as users of LocalAttentionFromBottomRightMask write it.
    W = 3
    local = fmha.attn_bias.LocalAttentionFromBottomRightMask(window_left=W - 1, window_right=0)
    window = full(M, M).tril() & ~full(M, M).tril(-W)
    got = fmha.memory_efficient_attention(q, k, v, local)
    torch.testing.assert_close(got, dense_attention(q, k, v, window)[0], **exact)
