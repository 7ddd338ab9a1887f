"""Which parts of the tree a node holds, and that adding them up is adding up all."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from rapa_dist.fabric.tree import add_up, parts_of


def pair_by_pair(sums):
    """The tree as the library walks it: neighbours first."""
    while len(sums) > 1:
        pairs = [sums[at : at + 2] for at in range(0, len(sums), 2)]
        sums = [pair[0] + pair[1] if len(pair) > 1 else pair[0] for pair in pairs]
    return sums[0]


@pytest.mark.parametrize(
    ("first", "last", "n_tiles", "expected"),
    [
        (0, 4, 4, [(0, 4)]),
        (0, 3, 4, [(0, 2), (2, 3)]),
        (1, 4, 4, [(1, 2), (2, 4)]),
        (3, 6, 16, [(3, 4), (4, 6)]),
        (4, 7, 7, [(4, 7)]),
        (5, 11, 11, [(5, 6), (6, 8), (8, 11)]),
        (0, 1, 1, [(0, 1)]),
        (2, 2, 4, []),
    ],
)
def test_the_largest_parts_that_some_tiles_hold_wholly(first, last, n_tiles, expected):
    assert parts_of(first, last, n_tiles) == expected


@given(n_tiles=st.integers(1, 40), data=st.data())
def test_parts_of_nodes_add_up_to_the_bits_of_all(n_tiles, data):
    edges = sorted(data.draw(st.lists(st.integers(0, n_tiles), max_size=4)))
    sums = np.random.default_rng(n_tiles).normal(size=(n_tiles, 5)).astype(np.float32)
    parts = {}
    for first, last in zip([0, *edges], [*edges, n_tiles], strict=True):
        for left, right in parts_of(first, last, n_tiles):
            parts[left, right] = pair_by_pair(list(sums[left:right])).copy()
    np.testing.assert_array_equal(add_up(parts, n_tiles), pair_by_pair(list(sums)))
