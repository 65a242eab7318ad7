"""Masks against their definition by brute force, their pictures, and how they combine."""

import doctest
from dataclasses import replace
from operator import add, and_, or_

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import keyspan
from keyspan.core import masks
from keyspan.core.masks import lowering

MASKS = [getattr(keyspan, name) for name in ("Causal", "Window", "Prefix", "Sinks", "Documents", "PaddedKeys",
         "GappyKeys", "PagedKeys", "KeyLengths", "SharedPrompt")]  # fmt: skip


def test_pictures_in_docstrings():
    modules = (masks.layouts, masks.visibility, masks.base)
    results = [doctest.testmod(module, extraglobs=vars(keyspan)) for module in modules]
    assert not any(result.failed for result in results)
    assert sum(result.attempted for result in results) >= len(MASKS)
    for mask in MASKS:
        assert "■" in mask.__doc__, mask


@st.composite
def visibility(draw):
    """A visibility and its definition as a function of (i, j, Nq, Nk), counted inside a document."""
    align = draw(st.sampled_from(["top_left", "bottom_right"]))
    causal = draw(st.booleans())
    left, right = (draw(st.none() | st.integers(0, 5)) for _ in range(2))
    windowed = draw(st.booleans())
    sinks, prefix = (draw(st.none() | st.integers(0, 4)) for _ in range(2))
    parts = [keyspan.Causal(align)] if causal else []
    parts += [keyspan.Window(left, right, align)] if windowed else []
    parts += [keyspan.Sinks(sinks)] if sinks is not None else []
    parts += [keyspan.Prefix(prefix)] if prefix is not None else []
    draw(st.randoms()).shuffle(parts)

    def seen(i, j, Nq, Nk):
        d = i + (Nk - Nq if align == "bottom_right" else 0)
        near = not windowed or ((left is None or j >= d - left) and (right is None or j <= d + right))
        return j < (prefix or 0) or ((not causal or j <= d) and (near or j < (sinks or 0)))

    return parts, seen


def combined(parts):
    mask = parts[0]
    for part in parts[1:]:
        mask = mask & part
    return mask


lengths = st.lists(st.integers(0, 6), min_size=1, max_size=5)


@settings(max_examples=150, deadline=None)
@given(visibility(), st.data())
def test_documents(vis, data):
    parts, seen = vis
    q = data.draw(lengths)
    k = data.draw(st.lists(st.integers(0, 6), min_size=len(q), max_size=len(q)))
    as_tensor = data.draw(st.booleans())
    given_q, given_k = (torch.tensor(x) for x in (q, k)) if as_tensor else (q, k)
    got = combined([keyspan.Documents(given_q, given_k), *parts]).materialize(sum(q), sum(k))[0]
    want = torch.zeros(sum(q), sum(k), dtype=torch.bool)
    for d, (nq, nk) in enumerate(zip(q, k, strict=True)):
        for i in range(nq):
            for j in range(nk):
                want[sum(q[:d]) + i, sum(k[:d]) + j] = seen(i, j, nq, nk)
    assert torch.equal(got, want)


@settings(max_examples=100, deadline=None)
@given(visibility(), st.data())
def test_padded_gappy_and_paged_keys(vis, data):
    parts, seen = vis
    q = data.draw(lengths)
    k = data.draw(st.lists(st.integers(0, 6), min_size=len(q), max_size=len(q)))
    kind = data.draw(st.sampled_from(["padded", "gappy", "paged"]))
    n = len(q)
    if kind == "padded":
        layout, N = keyspan.PaddedKeys(q, k, 6), 6 * n
        slot = [[6 * d + j for j in range(6)] for d in range(n)]
    elif kind == "gappy":
        starts = [data.draw(st.integers(0, 9)) for _ in q]
        layout, N = keyspan.GappyKeys(q, starts, k), 15
        slot = [[s + j for j in range(6)] for s in starts]
    else:
        table = [[data.draw(st.integers(0, 4)) for _ in range(3)] for _ in q]
        layout, N = keyspan.PagedKeys(q, k, torch.tensor(table), 2), 10
        slot = [[row[j // 2] * 2 + j % 2 for j in range(6)] for row in table]
    got = combined([layout, *parts]).materialize(sum(q), N)[0]
    want = torch.zeros(sum(q), N, dtype=torch.bool)
    for d, (nq, nk) in enumerate(zip(q, k, strict=True)):
        for i in range(nq):
            for j in range(nk):
                want[sum(q[:d]) + i, slot[d][j]] |= seen(i, j, nq, nk)
    assert torch.equal(got, want)


@settings(max_examples=80, deadline=None)
@given(visibility(), st.integers(0, 7), st.integers(0, 7), st.data())
def test_batch_with_and_without_key_lengths(vis, M, N, data):
    parts, seen = vis
    if parts:
        want = torch.tensor([[seen(i, j, M, N) for j in range(N)] for i in range(M)]).reshape(M, N)
        assert torch.equal(combined(parts).materialize(M, N)[0], want.bool())
    length = data.draw(st.lists(st.integers(0, N), min_size=1, max_size=3))
    got = combined([keyspan.KeyLengths(length), *parts]).materialize(M, N)
    for b, n in enumerate(length):
        want = torch.tensor([[j < n and seen(i, j, M, n) for j in range(N)] for i in range(M)]).reshape(M, N)
        assert torch.equal(got[b], want.bool())


def test_left_padding_equals_a_dense_mask():
    """`j ≤ i and start ≤ j`: a causal mask and a key padding mask together."""
    got = (keyspan.KeyLengths([3, 5], [2, 0]) & keyspan.Causal()).materialize(5, 5)
    i, j = torch.arange(5)[:, None], torch.arange(5)
    assert torch.equal(got[0], (j <= i) & (j >= 2))
    assert torch.equal(got[1], j <= i)
    bottom = (keyspan.KeyLengths([3, 5], [2, 0]) & keyspan.Causal("bottom_right")).materialize(5, 5)
    assert torch.equal(bottom, got)


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 4), st.lists(st.integers(0, 3), max_size=3)), min_size=1, max_size=3))
def test_shared_prompt_equals_each_answer_alone(groups):
    """Attention with ALiBi over prompt and answers equals that of every answer behind its own copy of the prompt."""
    torch.manual_seed(0)
    prompts, answers = [p for p, _ in groups], [a for _, a in groups]
    T = sum(p + sum(a) for p, a in groups)
    q, k, v = (torch.randn(1, T, 2, 4, dtype=torch.float64) for _ in range(3))
    bias = keyspan.Alibi(torch.tensor([0.5, 0.1], dtype=torch.float64))
    width = max((len(a) for a in answers), default=0)
    padded = torch.tensor([a + [0] * (width - len(a)) for a in answers], dtype=torch.int64).reshape(len(answers), width)
    for mask in (keyspan.SharedPrompt(prompts, answers), keyspan.SharedPrompt(torch.tensor(prompts), padded)):
        out = keyspan.attention(q, k, v, mask=mask, bias=bias)
        at = 0
        for p, a in groups:
            begin = at
            at += p
            for n in [0, *a]:
                rows = [*range(begin, begin + p), *range(at, at + n)]
                alone = keyspan.attention(*(x[:, rows] for x in (q, k, v)), mask=keyspan.Causal(), bias=bias)
                torch.testing.assert_close(out[:, rows[p:]], alone[:, p:])
                if n == 0:
                    torch.testing.assert_close(out[:, rows[:p]], alone[:, :p])
                at += n


def test_dense_masks_combine_from_both_sides():
    keys = torch.tensor([True, False, True])
    want = torch.ones(3, 3, dtype=torch.bool).tril() & keys
    assert torch.equal((keyspan.Causal() & keys).materialize(3, 3)[0], want)
    assert torch.equal((keys & keyspan.Causal()).materialize(3, 3)[0], want)
    rows = torch.tensor([[True], [False], [True]])
    assert torch.equal((keyspan.Causal() & keys & rows).materialize(3, 3)[0], want & rows)


def test_unbounded_windows_by_large_numbers():
    for large in (2**31 - 1, 2**40):
        assert torch.equal(keyspan.Window(0, large).materialize(3, 3), keyspan.Window(0, None).materialize(3, 3))
        assert torch.equal(keyspan.Window(large, 0).materialize(3, 3), keyspan.Window(None, 0).materialize(3, 3))
        documents = keyspan.Documents([1, 2]) & keyspan.Causal()
        for widened in (keyspan.Window(0) & keyspan.Sinks(large), keyspan.Prefix(large)):
            assert (documents & widened).materialize()[0, 1:, 1].all()


def test_dense_masks_of_five_dims_and_of_few():
    five = torch.rand(2, 3, 2, 4, 4) < 0.5
    got = (keyspan.KeyLengths([2, 4]) & five).materialize(4, 4)
    keys = torch.arange(4) < torch.tensor([2, 4])[:, None]
    assert torch.equal(got, five & keys[:, None, None, None])
    rows = torch.ones(4, 4, dtype=torch.bool)
    assert (keyspan.Causal() & rows & rows[0]).draw() == keyspan.Causal().draw(4, 4)


def test_equality_and_hash():
    assert keyspan.Causal() == keyspan.Causal()
    assert keyspan.Causal() != keyspan.Causal("bottom_right")
    assert keyspan.Documents([1, 2]) == keyspan.Documents((1, 2))
    assert keyspan.Documents(torch.tensor([1, 2])) == keyspan.Documents(torch.tensor([1, 2]))
    assert keyspan.Documents(torch.tensor([1, 2])) != keyspan.Documents(torch.tensor([2, 1]))
    assert len({keyspan.Window(1), keyspan.Window(1), keyspan.Window(2)}) == 2
    assert (keyspan.Causal() & keyspan.Window(2)) == (keyspan.Causal() & keyspan.Window(2))


def test_ranges_as_mask_equal_the_mask():
    q = torch.randn(1, 9, 2, 4)
    mask = keyspan.Documents([4, 5]) & keyspan.Causal()
    lowered = mask.lower(1, 9, 9)
    assert torch.equal(keyspan.attention(q, q, q, mask=mask), keyspan.attention(q, q, q, mask=lowered))
    moved = mask.to("cpu").lower(1, 9, 9).to("cpu")
    assert torch.equal(moved.lo, lowered.lo)
    assert lowered.lo.dtype == lowered.hi.dtype == lowered.diagonal.dtype == torch.int32


def test_masks_lower_on_a_device_without_reading_values():
    """Lowering with tensor lengths works on `meta`, whose values cannot be read."""
    lengths = torch.tensor([4, 5], device="meta")
    table = torch.zeros(2, 3, dtype=torch.int32, device="meta")
    layouts = [keyspan.Documents(lengths), keyspan.PaddedKeys(lengths, lengths, 6)]
    layouts += [keyspan.GappyKeys(lengths, lengths, lengths), keyspan.PagedKeys(lengths, lengths, table, 2)]
    for layout in layouts:
        ranges = (layout & keyspan.Causal() & keyspan.Window(3) & keyspan.Sinks(1)).lower(1, 9, 12, "meta")
        assert ranges.lo.shape == (2, 1, 9)
    assert (keyspan.KeyLengths(lengths) & keyspan.Causal()).lower(2, 3, 9, "meta").hi.shape == (1, 2, 3)
    assert keyspan.SharedPrompt(lengths, lengths[:, None]).lower(1, 18, 18, "meta").hi.shape == (2, 1, 18)
    moved = (keyspan.Documents(torch.tensor([4, 5])) & keyspan.Causal()).to("meta")
    assert moved.parts[0].q_lengths.device.type == "meta"


@pytest.mark.parametrize(
    "mask",
    [
        keyspan.Causal(),
        keyspan.Causal("bottom_right"),
        keyspan.Causal() & keyspan.Window(63, 0),
        keyspan.Window(20, 30) & keyspan.Prefix(9),
        keyspan.Documents([200, 7, 93], [300, 60, 140]) & keyspan.Causal("bottom_right"),
        keyspan.Documents([200, 7, 93], [60, 300, 140]),
        keyspan.GappyKeys(torch.tensor([200, 100]), [0, 100], [100, 300]) & keyspan.Causal(),
        keyspan.Causal() & keyspan.Window(30, 0) & keyspan.Sinks(4) | keyspan.Causal() & keyspan.Window(63, 0),
    ],
    ids=repr,
)
def test_the_host_knows_how_many_keys_rows_see(mask):
    ranges = mask.lower(1, 300, 500)
    mean = (ranges.hi - ranges.lo).sum() / 300
    assert ranges.row_keys.bit_count() == 1
    assert 0.7 < ranges.row_keys / mean < 1.45
    assert keyspan.Documents(torch.tensor([3]).to("meta")).lower(1, 5, 5, "meta").row_keys == 0


@pytest.mark.parametrize(
    ("make", "sizes"),
    [
        (lambda a, b: keyspan.Documents(a) & keyspan.Causal(), (1, 300, 300)),
        (lambda a, b: keyspan.Documents(a, b) & keyspan.Causal("bottom_right"), (1, 300, 500)),
        (lambda a, b: keyspan.Documents(a, b) & keyspan.Window(20, 30) & keyspan.Prefix(9), (1, 300, 500)),
        (lambda a, b: keyspan.PaddedKeys(a, b, 300), (1, 300, 900)),
        (lambda a, b: keyspan.KeyLengths(b) & keyspan.Causal() & keyspan.Window(40), (3, 50, 300)),
    ],
)
def test_a_function_compiled_for_a_gpu_gets_it_as_data(make, sizes, monkeypatch):
    mask = make(torch.tensor([200, 7, 93]), torch.tensor([300, 60, 140]))
    want = mask.lower(*sizes).row_keys
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    parts = mask.parts, lowering.alignment(mask.parts), *sizes[1:]
    found = lowering._row_keys(*parts, torch.device("cuda"))
    assert isinstance(found, torch.Tensor)
    assert int(found) == want > 1
    assert lowering._row_keys(*parts, torch.device("cpu")) == 0, "no backend there asks for it"
    elsewhere = make(*(torch.zeros(3, dtype=torch.int64, device="meta") for _ in "ab"))
    assert lowering._row_keys(elsewhere.parts, *parts[1:], torch.device("cuda")) == 0


def test_keys_of_padded_entries():
    ranges = keyspan.KeyLengths([64, 192]).lower(2, 10, 200)
    assert ranges.row_keys == 128
    with pytest.raises(ValueError, match="row_keys: got -1, want an int"):
        replace(ranges, row_keys=-1)


def test_draw_writes_a_picture(tmp_path):
    mask = keyspan.Causal() & keyspan.Window(2, 0) & keyspan.Sinks(1)
    text = mask.draw(6, 6, path=tmp_path / "mask.png")
    assert text.splitlines()[5] == "■ · · ■ ■ ■"
    assert (tmp_path / "mask.png").read_bytes().startswith(b"\x89PNG")
    assert keyspan.KeyLengths([1, 2]).draw(1, 2).split("\n\n") == ["■ ·", "■ ■"]
    with pytest.raises(ValueError, match=r"path: got a mask of shape \[1, 0, 0\], want at least one key"):
        keyspan.Documents([]).draw(path=tmp_path / "nothing.png")


@settings(max_examples=100, deadline=None)
@given(visibility(), st.lists(st.tuples(st.integers(4, 6), st.lists(st.integers(0, 4), max_size=3)), max_size=3))
def test_shared_prompt_by_its_definition(vis, groups):
    """Each answer sees what it would see alone behind its prompt. Prompts have 4 keys or more: parts may name 4."""
    parts, _ = vis
    parts = [replace(part, align=None) if isinstance(part, keyspan.Window) else part for part in parts]
    parts = [part for part in parts if not isinstance(part, keyspan.Causal)]
    prompts, answers = [p for p, _ in groups], [a for _, a in groups]
    T = sum(p + sum(a) for p, a in groups)
    got = combined([keyspan.SharedPrompt(prompts, answers), *parts]).materialize(T, T)[0]
    want = torch.zeros(T, T, dtype=torch.bool)
    at = 0
    for p, a in groups:
        begin = at
        at += p
        for n in [0, *a]:
            rows = torch.tensor([*range(begin, begin + p), *range(at, at + n)])
            alone = combined([keyspan.Causal(), *parts]).materialize(p + n, p + n)[0]
            want[rows[p:, None], rows] = alone[p:]
            want[rows[:p, None], rows[:p]] = alone[:p, :p]
            at += n
    assert torch.equal(got, want)


@settings(max_examples=100, deadline=None)
@given(visibility(), visibility(), visibility(), st.data())
def test_unions(a, b, c, data):
    """`|` sees what any member sees, in documents and in a batch; its ranges are sorted and disjoint."""
    members = [parts for parts, _ in (a, b, c) if any(isinstance(p, keyspan.Causal | keyspan.Window) for p in parts)]
    q = data.draw(lengths)
    k = data.draw(st.lists(st.integers(0, 6), min_size=len(q), max_size=len(q)))
    layout = data.draw(st.sampled_from([keyspan.Documents(q, k), keyspan.KeyLengths(k), None]))
    M, N = (sum(q), sum(k)) if isinstance(layout, keyspan.Documents) else (5, 7)
    # A window without an alignment takes that of the other members: name it.
    members = [combined([layout, *parts] if layout is not None else parts) for parts in members]
    if not members:
        return
    want = torch.stack([member.materialize(M, N) for member in members]).any(0)
    union = members[0]
    for member in members[1:]:
        union = union | member
    assert torch.equal(union.materialize(M, N), want)
    ranges = union.lower(len(k) if isinstance(layout, keyspan.KeyLengths) else 1, M, N)
    lo, hi = ranges.lo, ranges.hi
    assert ((lo >= 0) & (lo <= hi) & (hi <= N)).all()
    if len(members) > 1:
        filled = lo < hi
        assert (filled[:-1] | ~filled[1:]).all()
        assert ((hi[:-1] <= lo[1:]) | ~filled[1:]).all()


def test_unions_of_shared_prompts_and_pages():
    shared = keyspan.SharedPrompt([3, 2], [[2, 1], [2]])
    near, first = shared & keyspan.Window(1), shared & keyspan.Window(0) & keyspan.Sinks(1)
    assert torch.equal((near | first).materialize(), near.materialize() | first.materialize())
    pages = keyspan.PagedKeys([1, 2], [3, 4], torch.tensor([[2, 0], [1, 3]]), 2)
    near, first = (
        pages & keyspan.Causal("bottom_right") & keyspan.Window(1),
        pages & keyspan.Window(0, 0, "bottom_right"),
    )
    assert torch.equal((near | first).materialize(N=8), near.materialize(N=8) | first.materialize(N=8))
    with pytest.raises(ValueError, match="got a union over different pages, want the same PagedKeys object"):
        _ = pages | keyspan.Causal()


def test_attention_over_a_union_is_attention_over_the_dense_mask():
    torch.manual_seed(0)
    q, k, v = (torch.randn(1, 9, 2, 4) for _ in range(3))
    bias = keyspan.Alibi(torch.tensor([0.5, 0.1]))
    layout = keyspan.Documents([4, 5])
    union = (layout & keyspan.Causal() & keyspan.Window(1)) | (layout & keyspan.Window(0, 2))
    assert union == (layout & keyspan.Causal() & keyspan.Window(1)) | (layout & keyspan.Window(0, 2))
    assert union.cache_key() is not None
    dense = union.materialize()[:, None]
    # ALiBi counts from the documents' diagonal, which is that of the row here.
    want = keyspan.attention(q, k, v, mask=dense, bias=bias)
    for mask in (union, union.to("cpu"), union.lower(1, 9, 9)):
        torch.testing.assert_close(keyspan.attention(q, k, v, mask=mask, bias=bias), want)


def test_unions_distribute_over_and_take_one_alignment():
    union = keyspan.Window(0, 1) | keyspan.Window(2, 0)
    documents, causal = keyspan.Documents([3, 4]), keyspan.Causal()
    want = documents.materialize() & union.materialize(7, 7)
    for mask in (documents & union, union & documents):
        assert torch.equal(mask.materialize(), want)
    assert torch.equal((causal & union).materialize(4, 4), causal.materialize(4, 4) & union.materialize(4, 4))
    # The window has no alignment of its own: it takes that of Causal, as under &.
    got = (keyspan.Causal("bottom_right") | keyspan.Window(0, 1)).materialize(2, 4)
    want = keyspan.Causal("bottom_right").materialize(2, 4) | keyspan.Window(0, 1, "bottom_right").materialize(2, 4)
    assert torch.equal(got, want)
    assert (
        repr(union | causal) == "Window(left=0, right=1, align='top_left') | "
        "Window(left=2, right=0, align='top_left') | Causal(align='top_left')"
    )


def test_unions_that_are_not_ranges_raise_the_reason():
    keys = torch.tensor([True, False, True])
    for make in (lambda: keyspan.Causal() | keys, lambda: keys | keyspan.Causal()):
        with pytest.raises(ValueError, match=r"a union with a bool tensor, which is not ranges; want .*materialize"):
            make()
    with pytest.raises(ValueError, match=r"want & in place of \| beside Prefix and Sinks"):
        _ = keyspan.Causal() | keyspan.Prefix(2)


@pytest.mark.parametrize(
    "other", ["x", 3, None, np.ones((2, 3), dtype=bool), keyspan.Causal, keyspan.Alibi(torch.rand(4))]
)
def test_masks_and_biases_combine_with_their_kind_only(other):
    union = keyspan.Causal() | keyspan.Window(0, 1)
    for mask in (keyspan.Causal(), keyspan.Causal() & keyspan.Window(1), union):
        for combine in (and_, or_):
            for pair in ((mask, other), (other, mask)):
                with pytest.raises(
                    ValueError, match=r"^mask: got \w+.*, want a mask such as Causal\(\) or a bool tensor"
                ):
                    combine(*pair)
    if not isinstance(other, keyspan.Alibi):
        bias = keyspan.Alibi(torch.rand(4))
        for pair in ((bias, other), (other, bias), (bias + bias, other)):
            with pytest.raises(
                ValueError, match=r"^bias: got \w+, want a tensor, Alibi, RelativeBias or a sum of them"
            ):
                add(*pair)


def test_bool_tensors_of_a_union_and_other_tensors():
    keys = torch.tensor([True, False, True])
    union = keyspan.Causal() | keyspan.Window(0, 1)
    assert torch.equal((union & keys).materialize(3, 3)[0], union.materialize(3, 3)[0] & keys)


def test_key_ranges_are_checked_at_construction():
    x = torch.zeros(1, 1, 3, dtype=torch.int32)
    sequence, table = torch.zeros(3, dtype=torch.int32), torch.zeros(1, 2, dtype=torch.int32)
    paged = {"sequence": sequence, "block_table": table, "page_size": 2}
    for changed, message in (
        ({"lo": [0]}, "lo: got list, want a tensor of torch.int32"),
        ({"hi": x.long()}, "hi: got torch.int64, want torch.int32"),
        ({"hi": x[0]}, r"hi: got shape \[1, 3\], want"),
        ({"lo": x[0], "hi": x[0]}, r"lo: got shape \[1, 3\], want"),
        ({"diagonal": x.expand(2, 1, 3)}, r"diagonal: got shape \[2, 1, 3\], want .* that of lo"),
        ({"diagonal": x.to("meta")}, "diagonal: got a tensor on meta, want cpu"),
        ({"hi": x.to_sparse()}, "hi: got a tensor of layout torch.sparse_coo"),
        ({"page_size": 2}, "page_size: got some of sequence, block_table and page_size"),
        ({**paged, "page_size": -1}, "page_size: got -1"),
        ({**paged, "page_size": 2**30}, "page_size: got 1073741824 with 2 pages"),
        ({**paged, "sequence": sequence[:2]}, r"sequence: got shape \[2\], want \[3\]"),
        ({**paged, "sequence": sequence.long()}, "sequence: got torch.int64"),
        ({**paged, "block_table": table[:0]}, r"block_table: got shape \[0, 2\], want .* not empty"),
        ({**paged, "block_table": table[0]}, r"block_table: got shape \[2\]"),
        ({"dense": x}, "dense: got torch.int32, want torch.bool"),
        ({"keys": -1}, "keys: got -1"),
        ({"origin": x[0].long()}, "origin: got torch.int64, want torch.int32"),
        ({"origin": x}, r"origin: got shape \[1, 1, 3\], want \[1, 3\]"),
    ):
        with pytest.raises(ValueError, match=f"^{message}"):
            keyspan.KeyRanges(**{"lo": x, "hi": x, "diagonal": x, **changed})
        with pytest.raises(ValueError, match=f"^{message}"):
            replace(keyspan.KeyRanges(x, x, x), **changed)
    assert keyspan.KeyRanges(x, x, x, **paged).materialize(4).shape == (1, 3, 4)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: keyspan.Causal().lower(1, -1, 3), "M: got -1, want an int ≥ 0"),
        (lambda: keyspan.Causal().lower(1, 3, -8), "N: got -8, want an int ≥ 0"),
        (lambda: keyspan.Causal().lower(1, 3, 2**31), "N: got 2147483648, want .* less than 2\\*\\*31"),
        (lambda: keyspan.Documents(torch.tensor([1, 2], dtype=torch.uint16)), "q_lengths: got torch.uint16"),
        (lambda: keyspan.Documents(torch.tensor([1, 2], dtype=torch.complex64)), "q_lengths: got torch.complex64"),
        (lambda: keyspan.Documents([1.0, 2.0]), r"q_lengths: got 1\.0, want every length an int"),
        (lambda: keyspan.Documents([1, True]), "q_lengths: got True, want every length an int"),
        (lambda: keyspan.Documents(["1"]), "q_lengths: got '1', want every length an int"),
        (lambda: keyspan.Documents(3), "q_lengths: got 3, want a sequence of int"),
        (lambda: keyspan.Documents(torch.tensor([3], device="meta")).lower(1, 3, 3), "mask: got lengths on meta"),
        (
            lambda: keyspan.PagedKeys([1], [1], torch.zeros(1, 2, dtype=torch.int32), 2**30),
            "page_size: got 1073741824 with 2 pages",
        ),
        (
            lambda: keyspan.PagedKeys([1], [1], torch.zeros(1, 2, dtype=torch.uint32), 2),
            "block_table: got torch.uint32",
        ),
        (lambda: keyspan.core.masks.Dense([True]), "mask: got list, want a bool tensor"),
    ],
)
def test_errors_of_masks_name_the_argument(make, message):
    with pytest.raises(ValueError, match=f"^{message}"):
        make()


def test_lengths_from_generators_and_numpy():
    assert keyspan.Documents(n for n in (1, 2)) == keyspan.Documents([1, 2])
    assert keyspan.Documents(torch.tensor([1, 2]).numpy()) == keyspan.Documents([1, 2])


def test_windows_near_the_largest_sizes():
    """Positions plus windows beyond int32: the last rows of 2³¹ − 1 keys, of which two queries are made."""
    N = 2**31 - 1
    for left, right in ((7, 2**40), (2**31, 0), (2**31 + 7, 2**31), (2**30, 2**30)):
        ranges = keyspan.Window(left, right, "bottom_right").lower(1, 2, N)
        assert ranges.lo.flatten().tolist() == [max(N - 2 - left, 0), max(N - 1 - left, 0)]
        assert ranges.hi.flatten().tolist() == [min(N - 2 + right + 1, N), N]
    ranges = (keyspan.Causal("bottom_right") & keyspan.Prefix(2**31)).lower(1, 1, N)
    assert ranges.hi.flatten().tolist() == [N]


@pytest.mark.parametrize("backend", ["reference", "chunked", "native"])
@pytest.mark.parametrize("pages", [0, 2])
def test_paged_keys_without_documents(backend, pages):
    """Rows behind the last document read the table although they see no key: there is an entry for them."""
    none = torch.zeros(0, dtype=torch.int32)
    mask = keyspan.PagedKeys(none, none, torch.zeros(0, pages, dtype=torch.int32), 2)
    assert not mask.materialize(3, 4).any()
    assert mask.materialize(3, 0).shape == (1, 3, 0)
    for K in (8, 16, 64):
        q, k = torch.randn(1, 3, 2, K, requires_grad=True), torch.randn(1, 4, 2, K, requires_grad=True)
        out = keyspan.attention(q, k, k, mask=mask, backend=backend)
        assert torch.equal(out, torch.zeros_like(out))
        assert not any(x.any() for x in torch.autograd.grad(out.sum(), (q, k)))


@pytest.mark.parametrize("as_given", [list, torch.tensor])
def test_documents_from_cu_seqlens(as_given):
    want = keyspan.Documents([2, 0, 3], [1, 2, 4])
    got = keyspan.Documents.from_cu_seqlens(as_given([0, 2, 2, 5]), as_given([0, 1, 3, 7]))
    assert torch.equal(got.materialize(), want.materialize())
    alone = keyspan.Documents.from_cu_seqlens(as_given([0, 2, 2, 5]))
    assert torch.equal(alone.materialize(), keyspan.Documents([2, 0, 3]).materialize())
    assert keyspan.Documents.from_cu_seqlens(as_given([0])).materialize().shape == (1, 0, 0)
    for wrong, message in (([1, 2], "want 0 and then"), ([0, 3, 2], "do not decrease"), ([], "no entries")):
        with pytest.raises(ValueError, match=f"cu_q: got .*{message}"):
            keyspan.Documents.from_cu_seqlens(torch.tensor(wrong, dtype=torch.int64))


@settings(max_examples=40, deadline=None)
@given(st.lists(st.integers(1, 5), max_size=5), st.booleans())
def test_documents_from_ids(q, in_a_batch):
    want = keyspan.Documents(q).materialize()
    positions = torch.tensor([i for n in q for i in range(n)], dtype=torch.int64)
    documents = torch.tensor([7 - d for d, n in enumerate(q) for _ in range(n)], dtype=torch.int32)
    if in_a_batch:
        positions, documents = positions[None], documents[None]
    for got in (keyspan.Documents.from_position_ids(positions), keyspan.Documents.from_document_ids(documents)):
        assert got.q_lengths.tolist() == q
        assert torch.equal(got.materialize(), want)


def test_ids_that_are_not_one_packed_row():
    for make in (keyspan.Documents.from_position_ids, keyspan.Documents.from_document_ids):
        with pytest.raises(ValueError, match=r"ids: got shape \[2, 3\], want .* of one packed row; pack a batch by"):
            make(torch.zeros(2, 3, dtype=torch.int64))
        with pytest.raises(ValueError, match=r"ids: got torch\.float32, want an int tensor"):
            make(torch.zeros(3))
        # Values that are not read on the host: as many documents as tokens, most of them empty.
        assert make(torch.zeros(1, 9, dtype=torch.int64, device="meta")).q_lengths.shape == (9,)


def test_ids_under_compile_are_data():
    def visible(ids):
        ranges = (keyspan.Documents.from_position_ids(ids) & keyspan.Causal()).lower(1, 6, 6)
        return ranges.lo, ranges.hi

    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    compiled = torch.compile(visible, backend="eager", fullgraph=True)
    for ids in ([0, 1, 2, 0, 1, 2], [0, 0, 1, 2, 3, 0], [3, 4, 0, 1, 0, 1]):
        for got, want in zip(compiled(torch.tensor(ids)), visible(torch.tensor(ids)), strict=True):
            assert torch.equal(got, want)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1


@pytest.mark.parametrize("dtype", [torch.bool, torch.int64])
def test_key_lengths_from_a_padding_mask(dtype):
    padding = torch.tensor([[1, 1, 0, 0], [0, 0, 1, 1], [1, 1, 1, 1], [0, 0, 0, 0], [0, 1, 1, 0]]).to(dtype)
    got = keyspan.KeyLengths.from_padding_mask(padding)
    assert torch.equal(got.materialize(3, 4), padding.bool()[:, None].expand(-1, 3, -1))
    assert keyspan.KeyLengths.from_padding_mask(padding[:, :0]).materialize(3, 0).shape == (5, 3, 0)
    assert keyspan.KeyLengths.from_padding_mask(padding.to("meta")).lower(5, 3, 4, "meta").lo.shape == (1, 5, 3)
    with pytest.raises(ValueError, match=r"got padding between the keys of entry 1, want .* \[B, 1, 1, N\]"):
        keyspan.KeyLengths.from_padding_mask(torch.tensor([[1, 1, 1], [1, 0, 1]]).to(dtype))
    for wrong in (torch.ones(2, 3), torch.ones(2, 1, 1, 3, dtype=torch.bool), [[True]]):
        with pytest.raises(ValueError, match=r"visible: got .*, want a bool or int tensor \[B, N\]"):
            keyspan.KeyLengths.from_padding_mask(wrong)
