"""Row blocks cover the visible area exactly once, mark as full only what all rows see, and skip hidden keys."""

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import keyspan
from keyspan.backends.schedule import row_blocks


def test_ranges_may_begin_before_their_document():
    lo, hi = torch.tensor([[[2, 3]]]), torch.tensor([[[9, 9]]])
    (block,) = row_blocks(lo, hi, torch.tensor([[5, 5]]), 4)
    assert block.origin == 2
    assert [(begin, end) for begin, end, _ in block.spans[0].chunks(block.origin, 4, 9)] == [(2, 6), (6, 10)]


@settings(max_examples=150, deadline=None)
@given(st.data())
def test_row_blocks_cover_the_visible_area(data):
    draw = data.draw
    S, B, M, N = draw(st.integers(1, 2)), draw(st.integers(1, 2)), draw(st.integers(1, 40)), 30
    generator = torch.Generator().manual_seed(draw(st.integers(0, 999)))

    def random(least, shape):
        return torch.maximum(least, torch.randint(0, N, shape, generator=generator, dtype=torch.int32))

    runs = torch.randint(0, 2, (B, M), generator=generator)
    origin = runs.cumsum(1).int().clamp(max=N // 2) if draw(st.booleans()) else None
    lo = random(torch.zeros(()).int() if origin is None else origin, (S, B, M))
    hi = random(lo, (S, B, M))
    rows, size, most = draw(st.sampled_from([1, 4, 5, 16])), draw(st.sampled_from([1, 4, 7])), draw(st.integers(1, 3))
    found = row_blocks(lo, hi, origin, rows)
    end = N + size
    covered = torch.zeros(S, B, M, end, dtype=torch.int32)
    j = torch.arange(end)
    visible = (j >= lo[..., None]) & (j < hi[..., None])
    for block in found:
        assert block.end - block.begin <= rows
        for b in range(B) if block.batch is None else [block.batch]:
            assert origin is None or (origin[b, block.begin : block.end] == block.origin).all()
            for span in block.spans:
                before = block.origin
                for begin, end, full in span.chunks(block.origin, size, most):
                    assert before <= begin < end <= begin + most * size
                    assert (begin - block.origin) % size == (end - begin) % size == 0
                    before = end
                    covered[span.range, b, block.begin : block.end, begin:end] += 1
                    if full:
                        assert visible[span.range, b, block.begin : block.end, begin:end].all()
    assert (covered[visible] == 1).all()
    assert covered.max() <= 1
    for b in range(B):
        seen = [r for block in found if block.batch in (None, b) for r in range(block.begin, block.end)]
        assert sorted(seen) == list(range(M))


def blocks(mask, M, N, rows=256):
    ranges = mask.lower(1, M, N)
    return row_blocks(ranges.lo, ranges.hi, ranges.origin, rows)


def test_documents_do_not_share_blocks_nor_do_decode_rows():
    area = sum(
        (t.end - t.begin) * (s.last - s.first)
        for t in blocks(keyspan.Documents([64] * 16), 1024, 1024)
        for s in t.spans
    )
    assert area == 16 * 64 * 64
    decode = blocks(keyspan.PaddedKeys([1] * 8, [5000] * 8, 5000) & keyspan.Causal("bottom_right"), 8, 40000)
    assert [x.origin for x in decode] == [5000 * n for n in range(8)]
    causal = blocks(keyspan.Causal(), 1024, 1024)
    assert [t.spans[0].last for t in causal] == [256, 512, 768, 1024]
    assert [t.spans[0].full_last for t in causal] == [1, 257, 513, 769]


def test_blocks_of_rows_begin_at_the_first_row_that_sees_a_key():
    """Of its document: one without keys has the origin of the next."""
    mask = keyspan.Documents([3, 2, 7], [0, 4, 5]) & keyspan.Causal("bottom_right")
    found = blocks(mask, 12, 9, rows=4)
    assert [(x.begin, x.end, x.origin, len(x.spans)) for x in found] == [
        (0, 3, 0, 0), (3, 5, 0, 1), (5, 7, 4, 0), (7, 11, 4, 1), (11, 12, 4, 1),
    ]  # fmt: skip
