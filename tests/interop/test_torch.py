"""torch's interfaces computed by Keyspan, each against torch itself."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.attention.bias import causal_lower_right, causal_upper_left
from torch.nn.attention.flex_attention import create_block_mask, flex_attention

import keyspan
from keyspan.interop import torch as door
from keyspan.layers import MultiheadAttention

ORIGINAL = F.scaled_dot_product_attention


def draw(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, dtype=torch.float64, requires_grad=True)


def same(ours, theirs, inputs):
    """Equal outputs, and equal gradients of all inputs, to fp64's rounding."""
    torch.testing.assert_close(ours, theirs)
    cotangent = torch.randn_like(theirs)
    for got, want in zip(
        torch.autograd.grad(ours, inputs, cotangent), torch.autograd.grad(theirs, inputs, cotangent), strict=True
    ):
        torch.testing.assert_close(got, want)


SHAPES = {
    "4-D": ((2, 3, 5, 8), (2, 3, 7, 8), (2, 3, 7, 6)),
    "3-D": ((4, 5, 8), (4, 7, 8), (4, 7, 6)),
    "2-D": ((5, 8), (7, 8), (7, 6)),
    "5-D": ((2, 3, 2, 5, 8), (2, 3, 2, 7, 8), (2, 3, 2, 7, 6)),
    "batches broadcast": ((2, 3, 5, 8), (1, 3, 7, 8), (2, 3, 7, 6)),
    "fewer dimensions": ((2, 3, 5, 8), (3, 7, 8), (3, 7, 6)),
    "one key head": ((2, 3, 5, 8), (2, 1, 7, 8), (2, 1, 7, 6)),
}


@pytest.mark.parametrize("shapes", SHAPES.values(), ids=SHAPES)
@pytest.mark.parametrize("kind", ["plain", "causal", "scale", "bool", "float"])
def test_sdpa(shapes, kind):
    inputs = [draw(*shape) for shape in shapes]
    M, N = shapes[0][-2], shapes[1][-2]
    kwargs = {
        "plain": {},
        "causal": {"is_causal": True},
        "scale": {"scale": 0.3},
        "bool": {"attn_mask": torch.rand(M, N) < 0.6},
        "float": {"attn_mask": draw(M, N)},
    }[kind]
    if kind == "float":
        inputs.append(kwargs["attn_mask"])
    same(door.scaled_dot_product_attention(*inputs[:3], **kwargs), ORIGINAL(*inputs[:3], **kwargs), inputs)


@pytest.mark.parametrize("shape", [(2, 3, 1, 5, 7), (1, 1, 2, 5, 7), (2, 1, 1, 1, 7)])
def test_sdpa_mask_with_more_leading_dimensions(shape):
    q, k, v = (draw(2, 3, 2, n, 8) for n in (5, 7, 7))
    bias = draw(*shape)
    ours = door.scaled_dot_product_attention(q, k, v, attn_mask=bias)
    same(ours, ORIGINAL(q, k, v, attn_mask=bias), (q, k, v, bias))


@pytest.mark.parametrize("heads", [(6, 2, 2), (6, 1, 1), (6, 3, 2)])
def test_sdpa_grouped_heads(heads):
    q, k, v = (draw(2, h, n, 8) for h, n in zip(heads, (5, 7, 7), strict=True))
    ours = door.scaled_dot_product_attention(q, k, v, enable_gqa=True)
    same(ours, ORIGINAL(q, k, v, enable_gqa=True), (q, k, v))


@pytest.mark.parametrize("variant", [causal_upper_left, causal_lower_right])
@pytest.mark.parametrize("sizes", [(5, 7), (5, 5)])
def test_sdpa_causal_bias(variant, sizes):
    M, N = sizes
    q, k, v = (draw(2, 3, n, 8) for n in (M, N, N))
    ours = door.scaled_dot_product_attention(q, k, v, attn_mask=variant(M, N))
    diagonal = N - M if variant is causal_lower_right else 0
    dense = torch.ones(M, N, dtype=torch.bool).tril(diagonal)
    same(ours, ORIGINAL(q, k, v, attn_mask=dense), (q, k, v))


def test_sdpa_rows_that_see_nothing_are_zero():
    q, k, v = (draw(1, 2, 4, 8) for _ in range(3))
    mask = torch.tensor([True, False, True, False])[:, None].expand(4, 4)
    same(door.scaled_dot_product_attention(q, k, v, mask), ORIGINAL(q, k, v, mask), (q, k, v))


@pytest.mark.parametrize("form", ["ranges", "holes", "expanded", "one for the batch", "nothing"])
def test_sdpa_padding(form, monkeypatch):
    """A padding mask becomes key ranges where it can, which skip what is hidden."""
    q, k, v = (draw(3, 2, n, 8) for n in (5, 7, 7))
    visible = torch.arange(7) < torch.tensor([7, 3, 5])[:, None]
    if form == "holes":
        visible[0, 2] = False
    if form == "nothing":
        visible[1] = False
    mask = visible[:1, None, None] if form == "one for the batch" else visible[:, None, None]
    if form == "expanded":
        mask = mask.expand(3, 2, 5, 7)
    seen = []
    monkeypatch.setattr(
        door, "attention", lambda *args, **kw: seen.append(kw["mask"]) or keyspan.attention(*args, **kw)
    )
    same(door.scaled_dot_product_attention(q, k, v, mask), ORIGINAL(q, k, v, mask), (q, k, v))
    assert isinstance(seen[0], keyspan.KeyLengths) == (form != "holes")


def test_sdpa_dropout_is_applied_and_unbiased():
    q, k = torch.zeros(1, 1, 2000, 8), torch.zeros(1, 1, 50, 8)
    v = torch.ones(1, 1, 50, 4)
    out = door.scaled_dot_product_attention(q, k, v, dropout_p=0.5)
    assert out.std() > 0.05
    assert abs(out.mean() - 1) < 0.02


def test_sdpa_takes_a_mask_of_keyspan():
    q, k, v = (draw(1, 2, 6, 8) for _ in range(3))
    mask = keyspan.Documents([2, 4]) & keyspan.Causal()
    ours = door.scaled_dot_product_attention(q, k, v, mask)
    same(ours, ORIGINAL(q, k, v, mask.materialize()), (q, k, v))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (dict(is_causal=True, attn_mask=torch.ones(4, 4, dtype=torch.bool)), "is_causal: got True and an attn_mask"),
        (dict(key=torch.zeros(1, 2, 4, 8)), "key: got 2 heads, want 4 as in query; enable_gqa=True"),
        (dict(key=torch.zeros(1, 3, 4, 8), enable_gqa=True), "key: got 3 heads, want a divisor of query's 4"),
        (dict(query=torch.zeros(4)), r"query: got shape \[4\]"),
    ],
)
def test_sdpa_says_what_is_wrong(arguments, message):
    x = torch.zeros(1, 4, 4, 8)
    with pytest.raises(ValueError, match=message):
        door.scaled_dot_product_attention(**(dict(query=x, key=x, value=x) | arguments))


def test_sdpa_compiles_without_a_graph_break():
    def function(q, k, v):
        return door.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)

    q, k, v = (draw(2, h, 5, 8) for h in (4, 2, 2))
    same(torch.compile(function, fullgraph=True, backend="aot_eager")(q, k, v), function(q, k, v), (q, k, v))


class TestReplaceSdpa:
    def test_calls_inside_the_block_go_through_keyspan_and_back(self):
        q = torch.randn(1, 2, 4, 8)
        # A mask of Keyspan is something that only the replacement takes.
        with door.replace_sdpa():
            F.scaled_dot_product_attention(q, q, q, keyspan.Causal())
            torch.testing.assert_close(F.scaled_dot_product_attention(q, q, q), ORIGINAL(q, q, q))
        assert F.scaled_dot_product_attention is ORIGINAL

    def test_put_back_after_an_error(self):
        with pytest.raises(RuntimeError, match="mine"), door.replace_sdpa():
            raise RuntimeError("mine")
        assert F.scaled_dot_product_attention is ORIGINAL

    def test_blocks_nest(self):
        with door.replace_sdpa():
            with door.replace_sdpa():
                pass
            assert F.scaled_dot_product_attention is door.scaled_dot_product_attention
        assert F.scaled_dot_product_attention is ORIGINAL

    def test_a_module_that_imported_the_function_by_name(self, monkeypatch):
        import sys
        import types

        user = types.ModuleType("user_of_sdpa")
        exec("from torch.nn.functional import scaled_dot_product_attention", user.__dict__)
        monkeypatch.setitem(sys.modules, "user_of_sdpa", user)
        with door.replace_sdpa():
            assert user.scaled_dot_product_attention is door.scaled_dot_product_attention
        assert user.scaled_dot_product_attention is ORIGINAL

    def test_a_module_of_torch_in_training(self):
        layer = nn.TransformerEncoderLayer(16, 2, 32, dropout=0.0, batch_first=True, dtype=torch.float64)
        x = torch.randn(2, 5, 16, dtype=torch.float64)
        padding = torch.tensor([[False] * 5, [False] * 3 + [True] * 2])
        want = layer(x, src_key_padding_mask=padding)
        with door.replace_sdpa():
            got = layer(x, src_key_padding_mask=padding)
        same(got, want, list(layer.parameters()))


MODULES = {
    "plain": {},
    "batch first": {"batch_first": True},
    "no bias": {"bias": False},
    "other sizes": {"kdim": 12, "vdim": 20, "batch_first": True},
    "added keys": {"add_bias_kv": True, "add_zero_attn": True},
    "zero key": {"add_zero_attn": True, "batch_first": True},
}


class TestMultiheadAttention:
    @staticmethod
    def pair(**options):
        theirs = nn.MultiheadAttention(16, 4, dtype=torch.float64, **options)
        ours = MultiheadAttention(16, 4, dtype=torch.float64, **options)
        for parameter in theirs.parameters():  # the biases begin as zeros, which would hide them
            nn.init.normal_(parameter, std=0.3)
        ours.load_state_dict(theirs.state_dict())
        return ours, theirs

    @pytest.mark.parametrize("options", MODULES.values(), ids=MODULES)
    @pytest.mark.parametrize("kind", ["plain", "causal", "padding", "both", "float", "by head"])
    def test_equals_torch(self, options, kind):
        ours, theirs = self.pair(**options)
        B, M, N = 3, 5, 5 if kind == "causal" else 7
        shapes = [(M, B, 16), (N, B, options.get("kdim", 16)), (N, B, options.get("vdim", 16))]
        if options.get("batch_first"):
            shapes = [(b, m, e) for m, b, e in shapes]
        inputs = [draw(*shape) for shape in shapes]
        padding = torch.arange(N) >= torch.tensor([7, 3, 5])[:, None]
        masks = {
            "plain": {},
            "causal": {"attn_mask": torch.ones(M, N, dtype=torch.bool).triu(1)},
            "padding": {"key_padding_mask": padding},
            "both": {"key_padding_mask": padding, "attn_mask": torch.rand(M, N) < 0.3},
            "float": {"attn_mask": torch.randn(M, N, dtype=torch.float64)},
            "by head": {"attn_mask": torch.randn(B * 4, M, N, dtype=torch.float64)},
        }[kind]
        if kind == "both":
            masks["attn_mask"][:, 0] = False  # torch gives NaN to a row that sees nothing
        # torch lets is_causal hide the added keys as well; what the hint stands for is asked for without it.
        hint = {"is_causal": True} if kind == "causal" else {}
        got, weights = ours(*inputs, **masks, **hint)
        want, _ = theirs(*inputs, need_weights=False, **masks)
        assert weights is None
        same(got, want, [*inputs])
        got, want = (module(*inputs, need_weights=False, **masks)[0] for module in (ours, theirs))
        cotangent = torch.randn_like(want)
        for a, b in zip(
            torch.autograd.grad(got, list(ours.parameters()), cotangent),
            torch.autograd.grad(want, list(theirs.parameters()), cotangent),
            strict=True,
        ):
            torch.testing.assert_close(a, b)

    def test_one_sequence_without_a_batch(self):
        ours, theirs = self.pair()
        x = draw(6, 16)
        same(ours(x, x, x)[0], theirs(x, x, x, need_weights=False)[0], (x,))

    def test_masks_and_biases_of_keyspan(self):
        ours, theirs = self.pair(batch_first=True)
        x = draw(2, 6, 16)
        mask = keyspan.Documents([2, 4]) & keyspan.Causal()
        hidden = ~mask.materialize()[0]
        same(ours(x, x, x, mask=mask)[0], theirs(x, x, x, attn_mask=hidden, need_weights=False)[0], (x,))
        slopes = torch.tensor([0.5, 0.25, 0.125, 0.0625], dtype=torch.float64)
        i = torch.arange(6)
        bias = -slopes[:, None, None] * (i - i[:, None]).abs()
        want = theirs(x, x, x, attn_mask=bias.repeat(2, 1, 1), need_weights=False)[0]
        same(ours(x, x, x, bias=keyspan.Alibi(slopes))[0], want, (x,))

    def test_padding_beside_a_layout(self):
        ours, theirs = self.pair(batch_first=True)
        x = draw(2, 6, 16)
        padding = torch.arange(6) >= torch.tensor([6, 5])[:, None]
        mask = keyspan.Documents([2, 4])
        hidden = ~mask.materialize()[0]
        got = ours(x, x, x, key_padding_mask=padding, mask=mask)[0]
        same(got, theirs(x, x, x, key_padding_mask=padding, attn_mask=hidden, need_weights=False)[0], (x,))
        with pytest.raises(ValueError, match="mask: got KeyRanges beside another mask"):
            ours(x, x, x, key_padding_mask=padding, mask=mask.lower(2, 6, 6))

    def test_inside_a_layer_of_torch(self):
        layer = nn.TransformerEncoderLayer(16, 4, 32, dropout=0.0, batch_first=True, dtype=torch.float64)
        x = draw(2, 5, 16)
        want = layer(x)
        ours = MultiheadAttention(16, 4, batch_first=True, dtype=torch.float64)
        ours.load_state_dict(layer.self_attn.state_dict())
        layer.self_attn = ours
        same(layer(x), want, (x,))

    def test_dropout_in_training_only(self):
        layer = MultiheadAttention(16, 4, dropout=0.5)
        x = torch.randn(5, 1, 16)
        assert not torch.equal(layer(x, x, x)[0], layer(x, x, x)[0])
        layer.eval()
        assert torch.equal(layer(x, x, x)[0], layer(x, x, x)[0])

    def test_weights_are_refused(self):
        x = torch.randn(5, 1, 16)
        with pytest.raises(ValueError, match="need_weights: got True, want False"):
            MultiheadAttention(16, 4)(x, x, x, need_weights=True)


DOCUMENT = torch.tensor([0, 0, 0, 1, 1, 2, 2, 2, 2, 2])
MODS = {
    "all": (lambda b, h, q, k: q >= 0, 1),
    "nothing": (lambda b, h, q, k: q < 0, 0),
    "causal": (lambda b, h, q, k: q >= k, 1),
    "window": (lambda b, h, q, k: (q >= k) & (q - k <= 2), 1),
    "documents": (lambda b, h, q, k: (DOCUMENT[q] == DOCUMENT[k]) & (q >= k), 1),
    "sinks": (lambda b, h, q, k: (q >= k) & ((q - k <= 2) | (k < 2)), 2),
    "prefix": (lambda b, h, q, k: (k < 3 + b) | (q >= k), 1),
    "a hole": (lambda b, h, q, k: k != 4, 2),
    "every third": (lambda b, h, q, k: (q - k) % 3 == 0, 4),
    "by head": (lambda b, h, q, k: q - k >= h, 1),
}


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
class TestFindRanges:
    @pytest.mark.parametrize(("mod", "ranges"), MODS.values(), ids=MODS)
    @pytest.mark.parametrize("pairs", [1, 70, 1 << 22], ids=["row by row", "in blocks", "at once"])
    def test_exact(self, mod, ranges, pairs, monkeypatch):
        monkeypatch.setattr(door, "_PAIRS", pairs)
        found = door.find_ranges(mod, 2, 3, 10, 10, dense=True)
        want = create_block_mask(mod, 2, 3, 10, 10, device="cpu")
        index = [torch.arange(n).reshape([-1 if d == i else 1 for i in range(4)]) for d, n in enumerate((2, 3, 10, 10))]
        visible = mod(*index).expand(2, 3, 10, 10)
        shown = found.mask.materialize(10)
        assert torch.equal(
            shown.expand(2, 10, 10)[:, None].expand(2, 3, 10, 10) if shown.dim() == 3 else shown, visible
        )
        assert found.ranges == ranges
        by_head = not torch.equal(visible, visible[:, :1].expand_as(visible))
        assert found.dense == (ranges > 2 or by_head)
        q, k, v = (torch.randn(2, 3, 10, 16) for _ in range(3))
        got = door.scaled_dot_product_attention(q, k, v, found.mask)
        torch.testing.assert_close(got, flex_attention(q, k, v, block_mask=want), atol=1e-5, rtol=1e-5)

    @pytest.mark.parametrize(
        ("mod", "message"),
        [
            (MODS["every third"][0], "mask_mod: got up to 4 ranges of keys in a row, want at most 2; dense=True"),
            (MODS["by head"][0], "mask_mod: got a mask that differs by head"),
            (lambda b, h, q, k: q - k, "mask_mod: got a result of torch.int64, want a bool tensor"),
            (lambda b, h, q, k: True, "mask_mod: got a result of bool, want a bool tensor"),
        ],
    )
    def test_falls_back_only_if_told_so(self, mod, message):
        with pytest.raises(ValueError, match=message):
            door.find_ranges(mod, None, 3, 10, 10)

    @pytest.mark.parametrize("sizes", [(0, 5), (5, 0)])
    def test_nothing_to_see(self, sizes):
        found = door.find_ranges(MODS["causal"][0], None, None, *sizes)
        assert found.ranges == 0
        assert found.mask.lo.shape == (1, 1, sizes[0])

    def test_whole_batch_shares_what_is_the_same(self):
        found = door.find_ranges(MODS["causal"][0], None, None, 10, 10)
        assert found.mask.lo.shape == (1, 1, 10)
        assert (found.ranges, found.dense) == (1, False)
