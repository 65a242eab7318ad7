"""The table of tiles: what launches and kernels take for granted of it."""

import itertools

import pytest

from keyspan.backends.triton import config
from keyspan.backends.triton.primitives import STATS_PADDING

tile = config.tile  # as it is; tests here run with a smaller one


@pytest.mark.parametrize("family", config.FAMILIES)
def test_rows_of_tiles_divide_those_that_statistics_are_padded_to(family):
    terms = ("plain", "stored", "positions", "loads")
    for kernel, size, dim, term in itertools.product(config.KERNELS, (1, 2, 4), (64, 128, 256), terms):
        assert STATS_PADDING.value % tile(kernel, size, dim, family, term).BM == 0
