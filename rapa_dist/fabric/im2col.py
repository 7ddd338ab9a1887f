"""im2col and col2im in tile order: rows are gathered straight to where the tiles read them.

Planes are (images, h, w, c_in), so pixels that lie side by side under one row of a kernel are one run of floats: a
patch of an undilated 5 × 5 kernel is five runs of 5 · c_in. The input error of a pixel is the sum of a piece from each
patch that saw it; each pixel's pieces are added in one fixed order, so that the bits depend neither on threads nor on
the assignment.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache

import numpy as np
import torch
from torch import Tensor

from rapa_dist.assignment import Assignment
from rapa_dist.geometry import Geometry

_SUM = 0  # what PyTorch calls it where it does not ask for names


@dataclass(frozen=True)
class _Places:
    """Where the pixels of every patch lie, for mini-batches of one size. Built once, never changed."""

    geometry: Geometry
    images: int
    device: torch.device

    @staticmethod
    @lru_cache(maxsize=64)
    def of(geometry: Geometry, images: int, device: torch.device) -> "_Places":
        """Return the places for so many images."""
        return _Places(geometry, images, device)

    @cached_property
    def runs(self) -> Tensor:
        """(n_patches, runs) int64: first pixel of each run of a patch, counted in the padded planes."""
        geometry = self.geometry
        (height, width), (down, across) = geometry.padded, geometry.stride
        image, y, x = np.indices((self.images, *geometry.out)).reshape(3, -1)
        first = (image * height + down * y) * width + across * x  # a patch starts at its upper left, padded
        kh, kw = np.indices(_runs_of(geometry)).reshape(2, -1)
        runs = first[:, None] + geometry.dilation[0] * kh * width + geometry.dilation[1] * kw
        return torch.from_numpy(runs).to(self.device)

    @cached_property
    def pieces(self) -> tuple[Tensor, Tensor, Tensor]:
        """What the input errors of the pixels are summed up from, pixel by pixel.

        Returns:
            (pieces,) int64 the patch that each piece comes from; (pieces,) int64 its place in that patch,
            kh · width + kw; (pixels,) int64 index of the first piece of each pixel, which may have none.
        """
        geometry = self.geometry
        image, y, x = np.indices((self.images, *geometry.size)).reshape(3, -1)
        kh, kw = np.indices(geometry.kernel).reshape(2, 1, -1)
        from_y = y[:, None] + geometry.before[0] - geometry.dilation[0] * kh  # of the patch, times the stride
        from_x = x[:, None] + geometry.before[1] - geometry.dilation[1] * kw
        (down, across), (rows, columns) = geometry.stride, geometry.out
        patch_y, patch_x = from_y // down, from_x // across
        seen = (from_y % down == 0) & (from_x % across == 0)
        seen &= (patch_y >= 0) & (patch_y < rows) & (patch_x >= 0) & (patch_x < columns)
        patch = (image[:, None] * rows + patch_y) * columns + patch_x
        place = np.broadcast_to(kh * geometry.kernel[1] + kw, patch.shape)
        starts = np.concatenate(([0], np.cumsum(seen.sum(axis=1))[:-1]))
        arrays = (np.ascontiguousarray(array, np.int64) for array in (patch[seen], place[seen], starts))
        of_piece, in_patch, first = (torch.from_numpy(array).to(self.device) for array in arrays)
        return of_piece, in_patch, first


def _runs_of(geometry: Geometry) -> tuple[int, int]:
    """Return how many runs a patch has, down and across: pixels that a dilated kernel leaves out end a run."""
    kh, kw = geometry.kernel
    return (kh, 1) if geometry.dilation[1] == 1 else (kh, kw)


class Im2col:
    """Moves planes of one size into patches, and input errors back into planes."""

    def __init__(self, geometry: Geometry, c_in: int, device: torch.device | str = "cpu") -> None:
        self.geometry, self.c_in, self._device = geometry, c_in, torch.device(device)
        down, across = _runs_of(geometry)
        self._n_runs = down * across
        self._run_pixels = geometry.places // self._n_runs
        self._planes = torch.empty(0, *geometry.padded, c_in, device=device)  # padded; the border stays zero for good
        self._runs = torch.empty(0, device=device)
        self._index = torch.empty(0, self._n_runs, dtype=torch.int64, device=device)

    def _make_room(self, images: int, rows: int) -> None:
        """Keep padded planes for so many images, and an index for so many rows."""
        if rows > self._index.shape[0]:
            self._index = torch.empty(rows, self._n_runs, dtype=torch.int64, device=self._device)
        if images > self._planes.shape[0]:
            (height, width), run = self.geometry.padded, self._run_pixels
            self._planes = torch.zeros(images, height, width, self.c_in, device=self._device)
            starts = images * height * width - run + 1
            self._runs = self._planes.view(-1).as_strided((starts, run * self.c_in), (self.c_in, 1))  # they overlap

    def gather(self, planes: Tensor, order: Tensor, patches: Tensor, seen: Tensor | None = None) -> None:
        """Write the patches of some images in tile order (im2col).

        Args:
            planes: (images, h, w, c_in).
            order: (rows,) int64, which patch is which row.
            patches: (rows, k) overwritten; k ordered (kh, kw, c_in).
            seen: (rows, kh · kw) False where a patch must see zero instead of the pixel; None: it sees all.
        """
        images, (top, left), (h, w) = planes.shape[0], self.geometry.before, self.geometry.size
        rows = order.shape[0]
        self._make_room(images, rows)
        self._planes[:images, top : top + h, left : left + w].copy_(planes)
        index = self._index[:rows]
        torch.index_select(_Places.of(self.geometry, images, self._device).runs, 0, order, out=index)
        runs = patches.view(rows * self._n_runs, -1)  # (rows · runs, run · c_in)
        torch.index_select(self._runs, 0, index.view(-1), out=runs)
        if seen is not None:
            patches.view(*seen.shape, self.c_in).mul_(seen.unsqueeze(2))

    def scatter(
        self, input_errors: Tensor, row_of_patch: Tensor, images: int, *, dropped: bool, seen: Tensor | None = None
    ) -> Tensor:
        """Add the input errors of the patches up to those of the planes (col2im).

        Args:
            input_errors: (rows, k) dI in tile order; overwritten where pixels are masked.
            row_of_patch: (n_patches,) int64 the row of every patch; `rows` for one that was dropped.
            images: how many.
            dropped: whether some patches were.
            seen: as in `gather`.

        Returns:
            (images, h, w, c_in), the gradient of the loss with respect to the planes.
        """
        geometry = self.geometry
        piece_patch, piece_place, first_pieces = _Places.of(geometry, images, self._device).pieces
        if seen is not None:
            input_errors.view(*seen.shape, self.c_in).mul_(seen.unsqueeze(2))
        if dropped:  # a zero row stands in for them
            input_errors = torch.cat((input_errors, input_errors.new_zeros(1, input_errors.shape[1])))
        pieces = torch.index_select(row_of_patch, 0, piece_patch).mul_(geometry.places).add_(piece_place)
        by_piece = input_errors.view(-1, self.c_in)
        summed = torch.embedding_bag(by_piece, pieces, first_pieces, False, _SUM)[0]  # (pixels, c_in)
        return summed.view(images, *geometry.size, self.c_in)

    def scatter_by_tile(
        self, input_errors: Tensor, assignment: Assignment, row_of_patch: Tensor, seen: Tensor | None = None
    ) -> Tensor:
        """Add input errors up as the library does: of each pixel each tile's pieces, and the tiles' sums in a tree.

        The tree is that of `add_tree`: so the bits do not depend on who adds which part of it.

        Args:
            input_errors: (rows, k) dI in tile order; overwritten where pixels are masked.
            assignment: which rows are whose.
            row_of_patch: (n_patches,) int64 the row of every patch; `rows` for one that was dropped.
            seen: as in `gather`.

        Returns:
            (images, h, w, c_in), the gradient of the loss with respect to the planes.
        """
        geometry, n_tiles = self.geometry, len(assignment.offsets) - 1
        images = assignment.n_patches // geometry.n_patches
        if n_tiles == 1:
            return self.scatter(
                input_errors, row_of_patch, images, dropped=assignment.rows < assignment.n_patches, seen=seen
            )
        if seen is not None:
            input_errors.view(*seen.shape, self.c_in).mul_(seen.unsqueeze(2))
        pixels = images * math.prod(geometry.size)
        sums = torch.zeros(n_tiles, pixels, self.c_in)
        tile_of_row = np.repeat(np.arange(n_tiles), np.diff(assignment.offsets))
        tile_of_patch = torch.from_numpy(np.append(tile_of_row, 0)).index_select(0, row_of_patch)
        of_piece, place, first = _Places.of(geometry, images, self._device).pieces
        ends = torch.cat((first[1:], first.new_tensor([len(of_piece)])))
        pixel = torch.repeat_interleave(torch.arange(pixels), ends - first)
        there = row_of_patch.index_select(0, of_piece) < assignment.rows
        by_piece, flat = input_errors.view(-1, self.c_in), sums.view(-1, self.c_in)
        for at in range(geometry.places):  # through one place of the kernel a pixel is seen by one patch at most
            those = (place == at) & there
            patch = of_piece[those]
            target = tile_of_patch.index_select(0, patch) * pixels + pixel[those]
            piece = row_of_patch.index_select(0, patch) * geometry.places + at
            flat[target] += by_piece.index_select(0, piece)
        return add_tree(list(sums)).view(images, *geometry.size, self.c_in)


def add_tree(sums: Sequence[Tensor]) -> Tensor:
    """Add tiles' sums up pair by pair, the pairs' sums pair by pair, and so on; overwrites them."""
    while len(sums) > 1:
        for left, right in zip(sums[::2], sums[1::2], strict=False):
            left += right
        sums = sums[::2]
    return sums[0]


def seen_by(assignment: Assignment, geometry: Geometry, first: int = 0, last: int | None = None) -> Tensor | None:
    """Return (rows, kh · kw) False where the patch of a row must see zero instead of the pixel; None: all see all."""
    if assignment.mask is None:
        return None
    pixels = torch.from_numpy(assignment.order[first:last] % geometry.n_patches)
    return torch.from_numpy(assignment.mask).index_select(0, pixels)
