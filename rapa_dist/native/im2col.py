"""im2col and col2im in C. Takes and returns NumPy arrays: chips on other nodes work without torch."""

from __future__ import annotations

import ctypes
import functools
from typing import TYPE_CHECKING

import numpy as np

from rapa_dist.native import native

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from rapa_dist.assignment import Assignment
    from rapa_dist.geometry import Geometry
    from rapa_dist.tile import Matrix

_POINTER, _SIZE = ctypes.c_void_p, ctypes.c_size_t


class NativeIm2col:
    """Moves planes of one size into patches, and input errors back into planes."""

    def __init__(self, library: ctypes.CDLL, geometry: Geometry, c_in: int) -> None:
        self.geometry, self.c_in = geometry, c_in
        numbers = (
            *geometry.size,
            *geometry.kernel,
            *geometry.stride,
            *geometry.before,
            *geometry.dilation,
            *geometry.out,
            c_in,
        )
        self._numbers = np.array(numbers, np.int64)
        self._at = self._numbers.ctypes.data
        library.rapa_gather.restype = library.rapa_rows_of_patches.restype = None
        library.rapa_gather.argtypes = [*[_POINTER] * 3, _SIZE, *[_POINTER] * 2]
        library.rapa_rows_of_patches.argtypes = [_POINTER, _SIZE, _POINTER, _SIZE]
        library.rapa_scatter.argtypes = [*[_POINTER] * 4, _SIZE, _SIZE, *[_POINTER] * 2]
        self._gather, self._rows, self._scatter = (
            library.rapa_gather,
            library.rapa_rows_of_patches,
            library.rapa_scatter,
        )

    @staticmethod
    @functools.lru_cache(maxsize=256)
    def of(geometry: Geometry, c_in: int) -> NativeIm2col | None:
        """Return what moves planes of this size; None without the library."""
        library = native().library
        return None if library is None else NativeIm2col(library, geometry, c_in)

    def gather(
        self, planes: int, assignment: Assignment, patches: int, first: int = 0, last: int | None = None
    ) -> None:
        """Write the patches of some images in tile order (im2col).

        Args:
            planes: address of (images, h, w, c_in) float32, in one piece.
            assignment: which patch is which row.
            patches: address of (last − first, k) float32, overwritten; k ordered (kh, kw, c_in).
            first: first row.
            last: one past the last row; None: all.
        """
        order = assignment.order[first:last]
        self._gather(self._at, planes, order.ctypes.data, len(order), _address(assignment.mask), patches)

    def rows_of_patches(self, assignment: Assignment) -> NDArray[np.int64]:
        """Return (n_patches,) the row of every patch, and `rows` for one that is dropped."""
        rows, order = np.empty(assignment.n_patches, np.int64), assignment.order
        self._rows(order.ctypes.data, len(order), rows.ctypes.data, len(rows))
        return rows

    def scatter(
        self,
        input_errors: int,
        assignment: Assignment,
        row_of_patch: NDArray[np.int64],
        tiles: tuple[int, int] | None = None,
    ) -> Matrix:
        """Add the input errors of the patches up to those of the planes (col2im).

        Of each pixel the pieces of a tile are added in the order of (kh, kw), then the tiles' sums in a tree.

        Args:
            input_errors: address of (rows, k) dI in tile order, of the rows of these tiles.
            assignment: which rows are whose.
            row_of_patch: (n_patches,) the row of every patch, as `rows_of_patches` gives it.
            tiles: first of some tiles, and one past the last, that have a part of the tree to themselves; None: all.

        Returns:
            (images, h, w, c_in), their part of the gradient of the loss with respect to the planes.

        Raises:
            MemoryError: there is none.
        """
        first, last = tiles or (0, len(assignment.offsets) - 1)
        images = assignment.n_patches // self.geometry.n_patches
        planes = np.empty((images, *self.geometry.size, self.c_in), np.float32)
        offsets = assignment.offsets[first : last + 1]
        at = input_errors, row_of_patch.ctypes.data, offsets.ctypes.data
        if self._scatter(self._at, *at, last - first, images, _address(assignment.mask), planes.ctypes.data):
            raise MemoryError
        return planes


def _address(mask: NDArray[np.bool_] | None) -> int | None:
    return None if mask is None else mask.ctypes.data
