"""The table of tiles: what launches and kernels rely on."""

import itertools

import pytest

from keyspan.backends.triton import config
from keyspan.backends.triton.arguments import STATS_PADDING

tile = config.tile  # before the fixture replaces it


@pytest.mark.parametrize("family", config.FAMILIES)
def test_tile_rows_divide_the_padding_of_statistics(family):
    terms = ("plain", "stored", "positions", "table", "loads")
    for kernel, size, dim, term in itertools.product(config.KERNELS, (1, 2, 4), (64, 128, 256), terms):
        assert STATS_PADDING.value % tile(kernel, size, dim, family, term).BM == 0
