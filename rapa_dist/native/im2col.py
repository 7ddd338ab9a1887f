"""im2col and col2im in C. Takes and returns NumPy arrays: chips on other nodes work without torch."""

from __future__ import annotations

import ctypes
from typing import TYPE_CHECKING

import numpy as np

from rapa_dist.native.tile import address_of_floats

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

    def gather(
        self, planes: NDArray[np.float32], assignment: Assignment, patches: Matrix, first: int, last: int
    ) -> None:
        """Write the patches of the rows first … last − 1; see `InTileOrder`."""
        order, at_patches = assignment.order[first:last], address_of_floats(patches[first:last])
        at = address_of_floats(planes), order.ctypes.data
        self._gather(self._at, *at, len(order), _address(assignment.mask), at_patches)

    def rows_of_patches(self, assignment: Assignment) -> NDArray[np.int64]:
        """Return (n_patches,) the row of every patch; see `InTileOrder`."""
        rows, order = np.empty(assignment.n_patches, np.int64), assignment.order
        self._rows(order.ctypes.data, len(order), rows.ctypes.data, len(rows))
        return rows

    def scatter(
        self, input_errors: Matrix, assignment: Assignment, row_of_patch: NDArray[np.int64], part: tuple[int, int]
    ) -> NDArray[np.float32]:
        """Add the input errors of a part of the tree up; see `InTileOrder`.

        Raises:
            MemoryError: there is none.
        """
        offsets = assignment.offsets[part[0] : part[1] + 1]
        images = assignment.n_patches // self.geometry.n_patches
        planes = np.empty((images, *self.geometry.size, self.c_in), np.float32)
        at_rows = address_of_floats(input_errors[int(offsets[0]) : int(offsets[-1])])
        at = at_rows, row_of_patch.ctypes.data, offsets.ctypes.data
        n_tiles = part[1] - part[0]
        if self._scatter(self._at, *at, n_tiles, images, _address(assignment.mask), planes.ctypes.data):
            raise MemoryError
        return planes


def _address(mask: NDArray[np.bool_] | None) -> int | None:
    return None if mask is None else mask.ctypes.data
