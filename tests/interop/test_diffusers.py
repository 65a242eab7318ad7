"""Models of diffusers with random weights: Keyspan against diffusers' own attention, outputs and gradients."""

import diffusers
import pytest
import torch
from diffusers.models.attention_dispatch import dispatch_attention_fn
from diffusers.models.attention_processor import Attention

from keyspan.interop import diffusers as door


@pytest.fixture(autouse=True)
def native_again():
    torch.utils.deterministic.fill_uninitialized_memory = False  # weights are initialised from torch.empty in place
    yield
    door.uninstall()


def unet():
    return diffusers.UNet2DConditionModel(
        sample_size=8,
        block_out_channels=(16, 32),
        norm_num_groups=4,
        layers_per_block=1,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        cross_attention_dim=24,
        attention_head_dim=4,
    )


def unet_inputs():
    mask = torch.tensor([[1, 1, 1, 1, 1], [1, 1, 1, 0, 0]])
    return dict(
        sample=torch.randn(2, 4, 8, 8),
        timestep=torch.tensor([3, 7]),
        encoder_hidden_states=torch.randn(2, 5, 24),
        encoder_attention_mask=mask,
    )


def dit():
    return diffusers.DiTTransformer2DModel(
        num_attention_heads=2,
        attention_head_dim=8,
        in_channels=4,
        num_layers=2,
        sample_size=8,
        norm_num_groups=4,
        num_embeds_ada_norm=10,
    )


def dit_inputs():
    return dict(hidden_states=torch.randn(2, 4, 8, 8), timestep=torch.tensor([3, 7]), class_labels=torch.tensor([1, 2]))


def autoencoder():
    return diffusers.AutoencoderKL(block_out_channels=(8,), norm_num_groups=4, latent_channels=2)


def flux():
    return diffusers.FluxTransformer2DModel(
        in_channels=4,
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=24,
        pooled_projection_dim=24,
        axes_dims_rope=(4, 4, 8),
    )


def flux_inputs():
    return dict(
        hidden_states=torch.randn(2, 16, 4),
        encoder_hidden_states=torch.randn(2, 5, 24),
        pooled_projections=torch.randn(2, 24),
        timestep=torch.tensor([0.3, 0.7]),
        img_ids=torch.randn(16, 3),
        txt_ids=torch.zeros(5, 3),
    )


MODELS = {
    "unet": (unet, unet_inputs),
    "dit": (dit, dit_inputs),
    "autoencoder": (autoencoder, lambda: dict(sample=torch.randn(2, 3, 8, 8))),
    "flux": (flux, flux_inputs),
}


def results(model, inputs):
    model.zero_grad()
    out = model(**inputs).sample
    torch.manual_seed(1)
    out.backward(torch.randn_like(out))
    return out.detach(), {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("name", MODELS)
def test_equals_native(name, monkeypatch):
    torch.manual_seed(0)
    build, draw = MODELS[name]
    model, inputs = build().eval(), draw()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.1)
    want, want_grads = results(model, inputs)
    assert door.use_keyspan(model) is model
    calls = []
    monkeypatch.setattr(door, "attention", lambda *args, **kw: calls.append(1) or ATTENTION(*args, **kw))
    got, grads = results(model, inputs)
    layers = sum(isinstance(m, (Attention, door.AttentionModuleMixin)) for m in model.modules())
    assert len(calls) == layers
    assert (got - want).abs().max() <= 1e-5 * want.abs().max()
    largest = max(g.abs().max() for g in want_grads.values())
    assert grads.keys() == want_grads.keys()
    for n, grad in grads.items():
        assert (grad - want_grads[n]).abs().max() <= 1e-5 * largest, n


ATTENTION = door.attention
MASKS = {
    "none": {},
    "causal": {"is_causal": True},
    "scale": {"scale": 0.3},
    "keys": {"attn_mask": torch.tensor([[True] * 7, [True] * 4 + [False] * 3])},
    "keys, added": {"attn_mask": torch.randn(2, 7)},
    "pairs": {"attn_mask": torch.rand(5, 7) < 0.7},
    "4-D": {"attn_mask": torch.rand(2, 4, 5, 7) < 0.7},
    "4-D, added": {"attn_mask": torch.randn(2, 1, 5, 7)},
    "grouped": {"enable_gqa": True},
}


@pytest.mark.parametrize("form", MASKS.values(), ids=MASKS)
def test_backend(form):
    q = torch.randn(2, 5, 4, 8)
    k, v = (torch.randn(2, 7, 2 if "enable_gqa" in form else 4, 8) for _ in range(2))
    want = dispatch_attention_fn(q, k, v, **form)
    door.install()
    got = dispatch_attention_fn(q, k, v, **form)
    torch.testing.assert_close(got, want)


def test_installed_and_back(monkeypatch):
    x = torch.randn(1, 4, 2, 8)
    monkeypatch.setattr(door, "attention", lambda *args, **kwargs: "ours")
    door.install()
    assert dispatch_attention_fn(x, x, x) == "ours"
    door.install()
    door.uninstall()
    assert isinstance(dispatch_attention_fn(x, x, x), torch.Tensor)


@pytest.mark.parametrize("options", [{"qk_norm": "layer_norm"}, {"kv_heads": 2}, {"scale_qk": False}], ids=str)
def test_processor_on_a_layer(options):
    """Against the formula, for diffusers' own processor takes neither grouped heads nor another scale."""
    layer = Attention(16, heads=4, dim_head=4, **options)
    x = torch.randn(2, 6, 16)
    layer.set_processor(door.KeyspanAttnProcessor())
    q, k, v = (p(x).unflatten(-1, (-1, 4)) for p in (layer.to_q, layer.to_k, layer.to_v))
    if layer.norm_q is not None:
        q, k = layer.norm_q(q), layer.norm_k(k)
    k, v = (t.repeat_interleave(4 // t.shape[2], 2) for t in (k, v))
    weight = (torch.einsum("bmhk,bnhk->bhmn", q, k) * layer.scale).softmax(-1)
    want = layer.to_out[0](torch.einsum("bhmn,bnhv->bmhv", weight, v).flatten(2))
    torch.testing.assert_close(layer(x), want)


def test_what_is_refused():
    with pytest.raises(ValueError, match="model: got Linear without attention layers"):
        door.use_keyspan(torch.nn.Linear(2, 2))
    model = unet()

    class Mine:
        def __call__(self, attn, hidden_states, **kwargs):
            return hidden_states

    model.set_attn_processor(Mine())
    with pytest.raises(ValueError, match="model: got the processor Mine"):
        door.use_keyspan(model)
    with pytest.raises(ValueError, match="ip_adapter_masks: got a value"):
        door.KeyspanAttnProcessor()(None, torch.zeros(1), ip_adapter_masks=1)
