"""The tree in which the tiles of a layer add up their input errors, so that bits do not depend on who lives where.

The sum over the tiles l … r − 1 is that over l … m − 1 plus that over m … r − 1, with m = l + the largest power of two
below r − l. A node adds up the parts of the tree that it holds wholly, and sends those; the coordinator does the rest.
"""

from collections.abc import Mapping

import numpy as np
from numpy.typing import NDArray

Part = tuple[int, int]
"""Tiles of a layer that have a part of the tree to themselves: the first, and one past the last."""


def parts_of(first: int, last: int, n_tiles: int) -> list[Part]:
    """Return the largest parts of the tree over `n_tiles` that the tiles first … last − 1 hold wholly, in order."""
    found: list[Part] = []
    waiting = [(0, n_tiles)]
    while waiting:
        left, right = waiting.pop()
        if right <= first or last <= left:
            continue
        if first <= left and right <= last:
            found.append((left, right))
            continue
        middle = _middle(left, right)
        waiting += [(middle, right), (left, middle)]
    return found


def add_up(parts: Mapping[Part, NDArray[np.float32]], n_tiles: int) -> NDArray[np.float32]:
    """Return the sum over all tiles, given that over parts of the tree, which together are all; overwrites them."""
    return _sum_over(parts, 0, n_tiles)


def _sum_over(parts: Mapping[Part, NDArray[np.float32]], left: int, right: int) -> NDArray[np.float32]:
    found = parts.get((left, right))
    if found is not None:
        return found
    middle = _middle(left, right)
    total = _sum_over(parts, left, middle)
    total += _sum_over(parts, middle, right)
    return total


def _middle(left: int, right: int) -> int:
    return left + (1 << (right - left - 1).bit_length() - 1)
