"""Planes to the rows of tiles, and input errors back, over NumPy arrays: in C, or without the library in PyTorch.

The coordinator's node and chips on others go the same way. Torch is imported only where there is no library.
"""

from functools import lru_cache
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from rapa_dist.assignment import Assignment
from rapa_dist.fabric.tree import Part
from rapa_dist.geometry import Geometry
from rapa_dist.native import native
from rapa_dist.native.im2col import NativeIm2col
from rapa_dist.tile import Matrix


class InTileOrder(Protocol):
    """Moves planes of one size."""

    def gather(
        self, planes: NDArray[np.float32], assignment: Assignment, patches: Matrix, first: int, last: int
    ) -> None:
        """Write patches in tile order (im2col).

        Args:
            planes: (images, h, w, c_in), in one piece.
            assignment: which patch is which row.
            patches: (rows, k), of which the rows first … last − 1 are overwritten; k ordered (kh, kw, c_in).
            first: first row.
            last: one past the last row.
        """

    def rows_of_patches(self, assignment: Assignment) -> NDArray[np.int64]:
        """Return (n_patches,) the row of every patch, and `rows` for one that is dropped."""

    def scatter(
        self, input_errors: Matrix, assignment: Assignment, row_of_patch: NDArray[np.int64], part: Part
    ) -> NDArray[np.float32]:
        """Add input errors up to those of the planes (col2im): each tile's in the order of (kh, kw), these in a tree.

        Args:
            input_errors: (rows, k) dI in tile order; without the library overwritten where pixels are masked.
            assignment: which rows are whose.
            row_of_patch: (n_patches,) the row of every patch; one that is not among the part's is left out.
            part: the part of the tree to be added up.

        Returns:
            (images, h, w, c_in), their part of the gradient of the loss with respect to the planes.
        """


class _InTorch:
    def __init__(self, geometry: Geometry, c_in: int) -> None:
        from rapa_dist.fabric.im2col import Im2col

        self._geometry, self._im2col = geometry, Im2col(geometry, c_in)

    def gather(
        self, planes: NDArray[np.float32], assignment: Assignment, patches: Matrix, first: int, last: int
    ) -> None:
        import torch

        from rapa_dist.fabric.im2col import seen_by

        order, seen = torch.from_numpy(assignment.order[first:last]), seen_by(assignment, self._geometry, first, last)
        self._im2col.gather(torch.from_numpy(planes), order, torch.from_numpy(patches[first:last]), seen)

    def rows_of_patches(self, assignment: Assignment) -> NDArray[np.int64]:
        return assignment.inverse()

    def scatter(
        self, input_errors: Matrix, assignment: Assignment, row_of_patch: NDArray[np.int64], part: Part
    ) -> NDArray[np.float32]:
        import torch

        from rapa_dist.fabric.im2col import seen_by

        first, last = assignment.offsets[list(part)].tolist()
        offsets = assignment.offsets[part[0] : part[1] + 1] - first
        own = Assignment(assignment.order[first:last], offsets, assignment.n_patches)
        rows = np.where((row_of_patch < first) | (row_of_patch >= last), own.rows, row_of_patch - first)
        found: NDArray[np.float32] = self._im2col.scatter_by_tile(
            torch.from_numpy(input_errors[first:last]),
            own,
            torch.from_numpy(rows),
            seen_by(assignment, self._geometry, first, last),
        ).numpy()
        return found


@lru_cache(maxsize=256)
def in_tile_order(geometry: Geometry, c_in: int) -> InTileOrder:
    """Return what moves planes of this size."""
    library = native().library
    return _InTorch(geometry, c_in) if library is None else NativeIm2col(library, geometry, c_in)
