"""im2col and col2im in tile order: rows are gathered straight to where the tiles read them.

Planes are (images, side, side, channels), so the pixels under one row of a 5×5 kernel are one run of
kw · c_in floats. A patch is five such runs; the input error of a pixel is a sum of up to 25 pieces.
"""

from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from rapa_dist.assignment import Assignment
from rapa_dist.machine import KERNEL_SIDE, Layer

_PAD = KERNEL_SIDE // 2


@dataclass(frozen=True, slots=True)
class Geometry:
    """Where the pixels of every patch lie, for mini-batches of one size. Built once, never changed."""

    runs: Tensor
    """(n_patches, kh) int64: first pixel of each run of a patch, counted in the padded planes."""
    piece_patch: Tensor
    """(pieces,) int64: the patch that each piece of the input error comes from, pixel by pixel."""
    piece_place: Tensor
    """(pieces,) int64: its place in that patch, kh · KERNEL_SIDE + kw."""
    pixel_pieces: Tensor
    """(pixels,) int64: index of the first piece of each pixel."""

    @staticmethod
    @lru_cache(maxsize=32)
    def of(side: int, images: int) -> "Geometry":
        """Return the geometry for `images` planes of side × side pixels."""
        padded = side + 2 * _PAD
        image, y, x = np.indices((images, side, side)).reshape(3, -1)
        first = (image * padded + y) * padded + x  # the patch of a pixel starts at its upper left, padded
        runs = first[:, None] + padded * np.arange(KERNEL_SIDE)

        kh, kw = np.indices((KERNEL_SIDE, KERNEL_SIDE)).reshape(2, 1, -1)
        from_y, from_x = y[:, None] - kh + _PAD, x[:, None] - kw + _PAD  # patches that saw this pixel
        inside = (from_y >= 0) & (from_y < side) & (from_x >= 0) & (from_x < side)
        patch = (image[:, None] * side + from_y) * side + from_x
        place = np.broadcast_to(kh * KERNEL_SIDE + kw, patch.shape)
        starts = np.concatenate(([0], np.cumsum(inside.sum(axis=1))[:-1]))
        arrays = (runs, patch[inside], place[inside], starts)
        return Geometry(*(torch.from_numpy(np.ascontiguousarray(a, np.int64)) for a in arrays))


class Patches:
    """Moves one layer's planes into patches and input errors back into planes."""

    def __init__(self, layer: Layer, images: int) -> None:
        """Prepare for mini-batches of at most `images` images."""
        self.layer = layer
        padded = layer.side + 2 * _PAD
        self._planes = torch.zeros(images, padded, padded, layer.c_in)  # the border stays zero for good
        run_length = KERNEL_SIDE * layer.c_in
        n_runs = images * padded * padded - KERNEL_SIDE + 1
        self._runs = self._planes.view(-1).as_strided((n_runs, run_length), (layer.c_in, 1))  # they overlap
        self._run_index = torch.empty(images * layer.n_patches, KERNEL_SIDE, dtype=torch.int64)

    def gather(self, planes: Tensor, assignment: Assignment, patches: Tensor) -> None:
        """Write the patches of some images in tile order (im2col).

        Args:
            planes: (images, side, side, c_in).
            assignment: which patch is which row.
            patches: (rows, k) overwritten; k ordered (kh, kw, c_in).
        """
        images, side = planes.shape[:2]
        geometry = Geometry.of(side, images)
        self._planes[:images, _PAD:-_PAD, _PAD:-_PAD].copy_(planes)
        index = self._run_index[: assignment.rows]
        torch.index_select(geometry.runs, 0, torch.from_numpy(assignment.order), out=index)
        runs = patches.view(-1, self._runs.shape[1])  # (rows · kh, kw · c_in)
        torch.index_select(self._runs, 0, index.view(-1), out=runs)
        if assignment.mask is not None:
            self._mask(patches, assignment)

    def scatter(self, input_errors: Tensor, row_of_patch: Tensor, assignment: Assignment) -> Tensor:
        """Add the input errors of the patches up to those of the planes (col2im).

        Args:
            input_errors: (rows, k) dI in tile order; overwritten where pixels are masked.
            row_of_patch: (n_patches,) as `Assignment.inverse` returns it.
            assignment: which patch is which row.

        Returns:
            (images, side, side, c_in), the gradient of the loss with respect to the planes.
        """
        layer = self.layer
        images = assignment.n_patches // layer.n_patches
        geometry = Geometry.of(layer.side, images)
        if assignment.mask is not None:
            self._mask(input_errors, assignment)
        if assignment.rows < assignment.n_patches:  # a zero row stands in for the dropped ones
            input_errors = torch.cat((input_errors, input_errors.new_zeros(1, layer.k)))
        pieces = torch.index_select(row_of_patch, 0, geometry.piece_patch)
        pieces.mul_(KERNEL_SIDE * KERNEL_SIDE).add_(geometry.piece_place)
        summed = F.embedding_bag(
            pieces, input_errors.view(-1, layer.c_in), geometry.pixel_pieces, mode="sum"
        )  # (pixels, c_in); each pixel's pieces are added in one fixed order
        return summed.view(images, layer.side, layer.side, layer.c_in)

    def _mask(self, patches: Tensor, assignment: Assignment) -> None:
        assert assignment.mask is not None
        pixels = torch.from_numpy(assignment.order % self.layer.n_patches)
        seen = torch.from_numpy(assignment.mask).index_select(0, pixels)  # (rows, kh · kw)
        patches.view(*seen.shape, self.layer.c_in).mul_(seen.unsqueeze(2))
