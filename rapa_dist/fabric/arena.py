"""Memory that the tiles of a node share with the coordinator, and how passages borrow places in it.

A place holds the patches I of some images, tile by tile, and beside them the outputs M. In the backward cycle the
errors D take the place of M, and the input errors dI that of I, so that nothing is copied. A passage borrows a place
when its patches are gathered, and returns it when its errors have come back: an arena is as large as what is really
under way.
"""

from __future__ import annotations

import mmap
from bisect import insort
from typing import TYPE_CHECKING, NamedTuple

from rapa_dist.errors import UsageError

if TYPE_CHECKING:  # whoever only maps the memory does without it
    import numpy as np
    from numpy.typing import NDArray

_PAGE = 1024  # floats


class Place(NamedTuple):
    """Where the rows of a passage lie, counted in floats from the beginning of the arena."""

    patches: int
    """First patch."""
    outputs: int
    """First output."""


def place_floats(rows: int, k: int, c_out: int) -> int:
    """Return the floats that a place for some rows takes, whole pages."""
    return _pages(rows * k) + _pages(rows * c_out)


def arena_bytes(floats: int) -> int:
    """Return the bytes of an arena with room for so many floats, whole pages and at least one."""
    return 4 * max(_pages(floats), _PAGE)


class Arena:
    """A buffer as rows of floats."""

    def __init__(self, buffer: mmap.mmap) -> None:
        import numpy as np

        self.floats: NDArray[np.float32] = np.frombuffer(buffer, np.float32)

    def rows(self, at: int, rows: int, columns: int) -> NDArray[np.float32]:
        """Return a view of (rows, columns) floats that begin at `at`."""
        return self.floats[at : at + rows * columns].reshape(rows, columns)


class Lending:
    """Who holds which place of an arena. First fit: what was lent before, and is still in the caches, is lent again."""

    def __init__(self, floats: int) -> None:
        self._total = floats
        self._free: list[tuple[int, int]] = [(0, floats)] if floats else []  # (first, length), in order
        self._lent: dict[int, int] = {}

    def lend(self, rows: int, k: int, c_out: int) -> Place:
        """Return a place for the patches (rows, k) and outputs (rows, c_out) of a passage.

        Raises:
            UsageError: there is none left that is large enough.
        """
        wanted = max(place_floats(rows, k, c_out), _PAGE)
        for number, (first, length) in enumerate(self._free):
            if length >= wanted:
                left = (first + wanted, length - wanted)
                self._free[number : number + 1] = [left] if left[1] else []
                self._lent[first] = wanted
                return Place(first, first + _pages(rows * k))
        raise UsageError(
            f"The tiles' memory holds {4e-6 * self._total:,.1f} MB, of which {4e-6 * self.lent:,.1f} are in use, and a "
            f"passage needs {4e-6 * wanted:,.1f} more. Open the fabric with `images` as large as the largest "
            "mini-batch, or call backward() or drop the outputs of a forward pass before the next one."
        )

    @property
    def lent(self) -> int:
        """Floats that are lent now."""
        return sum(self._lent.values())

    def take_back(self, place: Place) -> None:
        """Take back what was lent."""
        first = place.patches
        length = self._lent.pop(first)
        insort(self._free, (first, length))
        merged: list[tuple[int, int]] = []
        for begin, size in self._free:
            if merged and sum(merged[-1]) == begin:
                merged[-1] = merged[-1][0], merged[-1][1] + size
            else:
                merged.append((begin, size))
        self._free = merged


def _pages(floats: int) -> int:
    return -(-floats // _PAGE) * _PAGE
