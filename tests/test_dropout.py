"""The Philox generator against its published test vectors."""

import torch

from keyspan.core.dropout import kept, philox

# Random123's known-answer tests for philox4x32-10: (counter, key, result).
KNOWN = [
    ((0, 0, 0, 0), (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
    ((0xFFFFFFFF,) * 4, (0xFFFFFFFF,) * 2, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
    (
        (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
        (0xA4093822, 0x299F31D0),
        (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
    ),
]


def test_known_answers():
    for counter, key, want in KNOWN:
        got = philox(tuple(map(torch.tensor, counter)), tuple(map(torch.tensor, key)))
        assert tuple(map(int, got)) == want


def test_any_tile_gives_the_same_bits():
    seed = torch.tensor([123456789012345])
    b, h, m, n = (torch.arange(size) for size in (2, 3, 5, 13))
    whole = kept(seed, 0.5, b, h, m, n)
    assert torch.equal(kept(seed, 0.5, b[1:], h[1:2], m[2:4], n[3:11]), whole[1:, 1:2, 2:4, 3:11])
    assert torch.equal(kept(seed, 0.5, b, h, m, n[[7, 2, 7]]), whole[..., [7, 2, 7]])
    assert 0.35 < whole.double().mean() < 0.65
