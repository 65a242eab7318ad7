"""Row blocks cover the visible area exactly once, mark as full only what all rows see, and skip hidden keys."""

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import keyspan
from keyspan.backends.schedule import row_blocks


@settings(max_examples=150, deadline=None)
@given(st.data())
def test_row_blocks_cover_the_visible_area(data):
    draw = data.draw
    S, B, M, N = draw(st.integers(1, 2)), draw(st.integers(1, 2)), draw(st.integers(1, 40)), 30
    generator = torch.Generator().manual_seed(draw(st.integers(0, 999)))
    lo = torch.randint(0, N, (S, B, M), generator=generator, dtype=torch.int32)
    hi = torch.maximum(lo, torch.randint(0, N, (S, B, M), generator=generator, dtype=torch.int32))
    found = row_blocks(lo, hi, draw(st.sampled_from([1, 4, 16])), draw(st.sampled_from([0.0, 30.0, 1e9])))
    covered = torch.zeros(S, B, M, N, dtype=torch.int32)
    j = torch.arange(N)
    visible = (j >= lo[..., None]) & (j < hi[..., None])
    for block in found:
        entries = range(B) if block.batch is None else [block.batch]
        for b in entries:
            for span in block.spans:
                for begin, end, full in span.chunks(7):
                    assert 0 < end - begin <= 7
                    covered[span.range, b, block.begin : block.end, begin:end] += 1
                    if full:
                        assert visible[span.range, b, block.begin : block.end, begin:end].all()
    assert (covered[visible] == 1).all()
    assert covered.max() <= 1
    rows = [r for block in found if block.batch in (None, 0) for r in range(block.begin, block.end)]
    assert sorted(rows) == list(range(M))


def spans(mask, M, N, rows=256, overhead=1000.0):
    ranges = mask.lower(1, M, N)
    return row_blocks(ranges.lo, ranges.hi, rows, overhead)


def test_documents_do_not_share_blocks_nor_do_decode_rows():
    area = sum(
        (t.end - t.begin) * (s.last - s.first) for t in spans(keyspan.Documents([64] * 16), 1024, 1024) for s in t.spans
    )
    assert area <= 16 * 64 * 64 * 2
    decode = spans(keyspan.PaddedKeys([1] * 8, [5000] * 8, 5000) & keyspan.Causal("bottom_right"), 8, 40000)
    assert len(decode) == 8
    causal = spans(keyspan.Causal(), 1024, 1024, overhead=1e6)
    assert [t.spans[0].last for t in causal] == [256, 512, 768, 1024]
    assert [t.spans[0].full_last for t in causal] == [1, 257, 513, 769]
