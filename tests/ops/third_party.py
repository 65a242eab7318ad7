"""Packages that import xformers, run as they are, small and with random weights: their xFormers path against their own.

Run by test_xformers_third_party.py in a process of its own, with the stand-in installed; knows nothing of keyspan.
"""

from __future__ import annotations

import itertools
import sys
from collections.abc import Callable, Iterable

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def same(got: Tensor, want: Tensor) -> None:
    """Equal to 1e-5 of the largest value, which fp32 over a few layers keeps."""
    assert float((got - want).detach().abs().max()) <= 1e-5 * float(want.detach().abs().max()), (got, want)


def same_with_gradients(run: Callable[[bool], Tensor], parameters: Iterable[Tensor]) -> None:
    """`run(True)` goes by xFormers, `run(False)` does not; outputs and gradients of the parameters agree."""
    parameters = list(parameters)
    got, want = run(True), run(False)
    same(got, want)
    cotangent = torch.randn_like(want)
    grads = [torch.autograd.grad(out, parameters, cotangent, allow_unused=True) for out in (got, want)]
    used = [(a.flatten(), b.flatten()) for a, b in zip(*grads, strict=True) if b is not None]
    same(*(torch.cat(side) for side in zip(*used, strict=True)))


def counting(module: object) -> list[int]:
    """The number of calls of a module's memory_efficient_attention from here on, in a list of one."""
    calls, original = [0], module.memory_efficient_attention

    def counted(*args, **kwargs):
        calls[0] += 1
        return original(*args, **kwargs)

    module.memory_efficient_attention = counted
    return calls


def diffusers() -> None:
    from diffusers import (
        AutoencoderKL,
        FluxTransformer2DModel,
        SD3Transformer2DModel,
        UNet2DConditionModel,
        WanTransformer3DModel,
    )
    from diffusers.models import attention_processor as processors
    from diffusers.models.attention_dispatch import dispatch_attention_fn
    from diffusers.utils.import_utils import is_xformers_available, is_xformers_version
    from xformers import ops

    assert is_xformers_available()
    assert is_xformers_version(">=", "0.0.29")
    calls = counting(ops)

    def check(run: Callable[[bool], Tensor], parameters: Iterable[Tensor], expected: int) -> None:
        before = calls[0]
        same_with_gradients(run, parameters)
        assert calls[0] - before == expected

    unet = UNet2DConditionModel(
        sample_size=8, layers_per_block=1, block_out_channels=(16, 32), cross_attention_dim=24, attention_head_dim=2,
        norm_num_groups=8, down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
    )  # fmt: skip
    image, time, text = torch.randn(2, 4, 8, 8), torch.tensor([3, 7]), torch.randn(2, 9, 24)
    seen = torch.ones(2, 9)
    seen[1, 5:] = 0
    for op, mask in ((None, None), (ops.MemoryEfficientAttentionFlashAttentionOp, seen)):

        def denoise(by_xformers: bool, op=op, mask=mask) -> Tensor:
            own = processors.AttnProcessor2_0()
            unet.set_attn_processor(processors.XFormersAttnProcessor(attention_op=op) if by_xformers else own)
            return unet(image, time, text, encoder_attention_mask=mask).sample

        check(denoise, unet.parameters(), 8)

    vae = AutoencoderKL(
        block_out_channels=(16, 32), down_block_types=("DownEncoderBlock2D",) * 2, norm_num_groups=8, sample_size=8,
        up_block_types=("UpDecoderBlock2D",) * 2,
    )  # fmt: skip
    picture = torch.randn(1, 3, 8, 8)

    def encode(by_xformers: bool) -> Tensor:
        vae.set_attn_processor((processors.XFormersAttnProcessor if by_xformers else processors.AttnProcessor2_0)())
        return vae(picture).sample

    check(encode, vae.parameters(), 2)

    sd3 = SD3Transformer2DModel(
        sample_size=8, in_channels=4, num_layers=2, attention_head_dim=8, num_attention_heads=2, joint_attention_dim=16,
        caption_projection_dim=16, pooled_projection_dim=12, out_channels=4, pos_embed_max_size=16,
    )  # fmt: skip
    caption, pooled = torch.randn(2, 5, 16), torch.randn(2, 12)

    def joint(by_xformers: bool) -> Tensor:
        kind = processors.XFormersJointAttnProcessor if by_xformers else processors.JointAttnProcessor2_0
        sd3.set_attn_processor(kind())
        return sd3(image, caption, pooled, time).sample

    check(joint, sd3.parameters(), 2)

    flux = FluxTransformer2DModel(
        patch_size=1, in_channels=4, num_layers=1, num_single_layers=1, attention_head_dim=16, num_attention_heads=2,
        joint_attention_dim=32, pooled_projection_dim=32, axes_dims_rope=(4, 4, 8),
    )  # fmt: skip
    tokens = {
        "hidden_states": torch.randn(2, 16, 4), "encoder_hidden_states": torch.randn(2, 6, 32),
        "pooled_projections": torch.randn(2, 32), "timestep": torch.tensor([0.1, 0.7]),
        "img_ids": torch.randn(16, 3), "txt_ids": torch.zeros(6, 3),
    }  # fmt: skip
    wan = WanTransformer3DModel(
        num_attention_heads=2, attention_head_dim=12, in_channels=4, out_channels=4, text_dim=16, ffn_dim=32,
        num_layers=1, rope_max_seq_len=32,
    )  # fmt: skip
    video = {
        "hidden_states": torch.randn(1, 4, 2, 8, 8), "timestep": torch.tensor([5]),
        "encoder_hidden_states": torch.randn(1, 12, 16),
    }  # fmt: skip
    for model, given in ((flux, tokens), (wan, video)):

        def transform(by_xformers: bool, model=model, given=given) -> Tensor:
            model.set_attention_backend("xformers" if by_xformers else "native")
            return model(**given).sample

        check(transform, model.parameters(), 2)

    q, k, v = (torch.randn(2, n, 4, 8, requires_grad=True) for n in (10, 12, 12))
    few = [torch.randn(2, 12, 2, 8, requires_grad=True) for _ in range(2)]
    keep = torch.ones(2, 12, dtype=torch.bool)
    keep[1, 7:] = False
    additive = torch.where(keep, 0.0, -1e4)[:, None, None]
    for key, value, options in (
        (k, v, {}),
        (k, v, {"attn_mask": additive}),
        (k, v, {"attn_mask": keep}),  # the torch path wants four dimensions
        (k, v, {"is_causal": True}),
        (*few, {"enable_gqa": True, "scale": 0.3}),
        (*few, {"enable_gqa": True, "attn_mask": additive}),  # 5-D queries with a 4-D bias
    ):

        def attend(by_xformers: bool, key=key, value=value, options=options) -> Tensor:
            if not by_xformers and options.get("attn_mask") is keep:
                options = {"attn_mask": keep[:, None, None]}
            return dispatch_attention_fn(q, key, value, backend="xformers" if by_xformers else "native", **options)

        check(attend, (q, key, value), 1)


def mistral_inference() -> None:
    from mistral_inference import transformer_layers as layers
    from mistral_inference.args import TransformerArgs
    from mistral_inference.cache import BufferCache
    from mistral_inference.transformer import Transformer

    model = Transformer(
        TransformerArgs(
            dim=32, n_layers=2, head_dim=8, hidden_dim=64, n_heads=4, n_kv_heads=2, norm_eps=1e-5, vocab_size=50,
            max_batch_size=3,
        )
    )  # fmt: skip
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.2)
    lengths = [11, 4, 8]
    texts = [torch.randint(50, (n,)) for n in lengths]
    efficient = layers.memory_efficient_attention

    def dense(q: Tensor, k: Tensor, v: Tensor, mask) -> Tensor:
        bias = mask.materialize((1, 1, q.shape[1], k.shape[1]))
        return F.scaled_dot_product_attention(*(x.transpose(1, 2) for x in (q, k, v)), attn_mask=bias).transpose(1, 2)

    for window in (5, None):

        def cache(batch: int, window=window) -> BufferCache:
            return BufferCache(2, batch, 20, 2, 8, window)

        with torch.no_grad():
            whole = model(torch.cat(texts), lengths, cache(3))
            layers.memory_efficient_attention = dense
            same(whole, model(torch.cat(texts), lengths, cache(3)))
            layers.memory_efficient_attention = efficient
            # A prompt in two chunks, then token by token: past the window the cache rolls.
            rolling, text = cache(1), texts[0]
            cuts = [0, 4, 7, 8, 9, 10, 11]
            steps = [model(text[a:b], [b - a], rolling) for a, b in itertools.pairwise(cuts)]
            same(torch.cat(steps), whole[:11])
            # Three prompts at once, then two tokens of each.
            three, prompts = cache(3), [n - 2 for n in lengths]
            model(torch.cat([t[:n] for t, n in zip(texts, prompts, strict=True)]), prompts, three)
            for step in range(2):
                logits = model(torch.stack([t[n + step] for t, n in zip(texts, prompts, strict=True)]), [1] * 3, three)
                same(logits, torch.stack([w[n + step] for w, n in zip(whole.split(lengths), prompts, strict=True)]))


def toto() -> None:
    from toto.model import attention, transformer

    assert attention.XFORMERS_AVAILABLE
    assert transformer.XFORMERS_SWIGLU_AVAILABLE
    sizes = {
        "num_layers": 4, "embed_dim": 32, "num_heads": 4, "mlp_hidden_dim": 48, "dropout": 0.0,
        "spacewise_every_n_layers": 2, "spacewise_first": True,
    }  # fmt: skip
    by_xformers = transformer.Transformer(**sizes, use_memory_efficient_attention=True)
    transformer.XFORMERS_SWIGLU_AVAILABLE = False
    own = transformer.Transformer(**sizes, use_memory_efficient_attention=False)
    # The one checkpoint under the names of both feed-forward layers.
    state = {name.replace(".w12.", ".").replace("0.w3.", "2."): x for name, x in by_xformers.state_dict().items()}
    own.load_state_dict(state)
    series = torch.randn(2, 8, 6, 32, requires_grad=True)
    groups = torch.arange(8).div(4, rounding_mode="floor").reshape(1, 8, 1).expand(2, 8, 6)
    same_with_gradients(lambda chosen: (by_xformers if chosen else own)(series, groups), [series])


def lgatr() -> None:
    from lgatr.primitives.attention_backends import native
    from lgatr.primitives.attention_backends import xformers as efficient
    from xformers.ops.fmha.attn_bias import BlockDiagonalMask

    q, k, v = (torch.randn(1, 4, 9, 14, requires_grad=True) for _ in range(3))
    mask = BlockDiagonalMask.from_seqlens([2, 3, 4])
    for bias in (None, mask, mask.make_causal(), mask.make_causal_from_bottomright()):
        for heads in (4, 1):

            def attend(by_xformers: bool, bias=bias, heads=heads) -> Tensor:
                key, value = k[:, :heads], v[:, :heads]
                if by_xformers:
                    return efficient.attention(q, key, value, attn_bias=bias)
                dense = None if bias is None else bias.materialize((9, 9))
                return native.attention(q, key.expand_as(k), value.expand_as(v), attn_mask=dense)

            same_with_gradients(attend, (q, k, v))


if __name__ == "__main__":
    torch.manual_seed(0)
    {f.__name__: f for f in (diffusers, mistral_inference, toto, lgatr)}[sys.argv[1]]()
    print("done")
