"""Fabric `batched`: all tiles of a layer as one batched product in torch, on the CPU or a GPU.

The same draws and the same sums as on the other fabrics, in another order. The kernels are the layers' own parameters,
and their gradients go the way of every parameter's.
"""

import os
import time
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from rapa_dist.assignment import Assignment
from rapa_dist.cells import Cells, Word
from rapa_dist.errors import UsageError
from rapa_dist.fabric.base import Fabric, Kernels
from rapa_dist.fabric.im2col import Im2col, seen_by
from rapa_dist.fabric.passage import Passage
from rapa_dist.geometry import Geometry
from rapa_dist.inspection import TileStats, read_tile
from rapa_dist.machine import Machine, TileArray
from rapa_dist.tile import Matrix, Update


class BatchedFabric(Fabric):
    """The tiles of a machine as tensors. Nothing has to be closed."""

    name = "batched"
    gives_gradients = True

    def __init__(
        self, machine: Machine, kernels: Kernels | Sequence[Tensor], *, device: str = "cpu", step: int = 0
    ) -> None:
        """Compute with some kernels.

        Args:
            machine: which tiles.
            kernels: per tile array (n_t, k + 1, c_out); a tensor stays the caller's.
            device: "cpu" or "cuda".
            step: steps that they have been trained for.
        """
        super().__init__(machine)
        self.device = torch.device(device)
        if self.device.type == "cuda":
            compute_in_float32()
        self._kernels = [torch.as_tensor(of_array, device=self.device) for of_array in kernels]
        self._step, self._updates = step, 0
        self._im2col: dict[tuple[Geometry, int], Im2col] = {}
        self._rows = [np.zeros((3, array.n_tiles), np.int64) for array in machine.arrays]
        self._since_ns = time.monotonic_ns()

    def passage(self, array: TileArray, geometry: Geometry, planes: Tensor, assignment: Assignment) -> Passage:
        """Prepare a product; where one tile computes all patches that is an ordinary convolution."""
        kernels = self._kernels[array.index]
        rows = self._rows[array.index]
        plain = array.n_tiles == 1 and assignment.rows == assignment.n_patches and assignment.mask is None
        if plain:
            return _Plain(array, geometry, planes, kernels, rows)
        found = self._im2col.get((geometry, planes.shape[3]))
        if found is None:
            found = self._im2col[geometry, planes.shape[3]] = Im2col(geometry, planes.shape[3], kernels.device)
        return _Batched(array, found, planes, assignment, kernels, rows)

    def bind(self, parameters: Sequence[Tensor]) -> None:
        """Compute with the layers' parameters from now on, after giving them the kernels that are here."""
        with torch.no_grad():
            for parameter, kernels in zip(parameters, self._kernels, strict=True):
                parameter.copy_(kernels)
        self._kernels = list(parameters)

    def commit(self, arrays: Sequence[int]) -> None:
        """Count a step: the kernels are the optimizer's."""
        self._updates += 1

    def discard(self, arrays: Sequence[int]) -> None:
        """Do nothing: gradients are the optimizer's."""

    def kernels(self, array: TileArray) -> Matrix:
        """Return a copy of the kernels of a tile array."""
        kernels: Matrix = self._kernels[array.index].detach().cpu().numpy().copy()
        return kernels

    def write(self, array: TileArray, kernels: Matrix, step: int) -> None:
        """Write kernels into the parameter of an array."""
        self._step, self._updates = step, 0
        with torch.no_grad():
            self._kernels[array.index].copy_(torch.from_numpy(kernels))

    def stats(self) -> list[TileStats]:
        """Return what tiles would have done so far. Their processor time can't be told apart."""
        found = []
        for array in self.machine.arrays:
            for tile, (kernel, rows) in enumerate(zip(self.kernels(array), self._rows[array.index].T, strict=True)):
                cells = Cells.volatile(array.kernel_shape)
                cells.program(kernel, self._step + self._updates)
                words = cells.words
                words[Word.PID], words[Word.STARTS], words[Word.SINCE_NS] = os.getpid(), 1, self._since_ns
                words[Word.ROWS_FORWARD], words[Word.ROWS_BACKWARD], words[Word.ROWS_UPDATE] = rows.tolist()
                words[Word.UPDATES] = self._updates
                found.append(read_tile(cells, array, tile))
        return found

    def busy_ns(self, array: int) -> list[int]:
        """Return zeros: their processor time can't be told apart."""
        return [0] * self.machine.arrays[array].n_tiles

    def close(self) -> None:
        """Do nothing: the tensors are the caller's."""


class _Passage(Passage):
    """What both kinds have in common: tiles that compute at once, and count rows."""

    def __init__(self, array: TileArray, rows: np.ndarray, of_tiles: np.ndarray | int) -> None:
        self._array, self._counted, self._of_tiles = array, rows, of_tiles
        self._gradient: Tensor | None = None
        self._back: Tensor | None = None

    def begin(self) -> None:
        """Count the rows; they are computed when they are asked for."""
        self._counted[0] += self._of_tiles

    def _count_back(self, *, input_error: bool, learn: bool) -> None:
        if input_error:
            self._counted[1] += self._of_tiles
        if learn:
            self._counted[2] += self._of_tiles

    def input_errors(self) -> Tensor | None:
        """Return what `send_errors` found."""
        back, self._back = self._back, None
        return back

    def kernel_gradient(self) -> Tensor | None:
        """Return Iᵀ D of every tile."""
        gradient, self._gradient = self._gradient, None
        return gradient

    def release(self) -> None:
        """Do nothing: memory goes with the passage."""


class _Batched(_Passage):
    """A passage through several tiles. Every tile has as many slots; some may be empty, and hold patch 0 then."""

    def __init__(
        self,
        array: TileArray,
        im2col: Im2col,
        planes: Tensor,
        assignment: Assignment,
        kernels: Tensor,
        rows: np.ndarray,
    ) -> None:
        sizes = np.diff(assignment.offsets)
        super().__init__(array, rows, sizes)
        self._im2col, self._images, self._kernels = im2col, len(planes), kernels.detach()
        width, device = int(sizes.max()), planes.device
        self._some_empty = assignment.rows < array.n_tiles * width
        self._dropped = assignment.rows < assignment.n_patches
        order, error_of_slot = assignment.order, assignment.order
        if self._some_empty:
            filled = np.arange(width) < sizes[:, None]  # (n_t, width)
            order, error_of_slot = np.zeros(filled.shape, np.int64), np.full(filled.shape, assignment.n_patches)
            order[filled] = error_of_slot[filled] = assignment.order
            order, error_of_slot = order.ravel(), error_of_slot.ravel()
            slot_of_patch = np.full(assignment.n_patches, order.size, np.int64)
            slot_of_patch[assignment.order] = np.flatnonzero(filled)
        else:
            slot_of_patch = assignment.inverse()
        self._slot_of_patch = torch.from_numpy(slot_of_patch).to(device)
        self._error_of_slot = torch.from_numpy(error_of_slot).to(device)
        self._seen = seen_by(
            Assignment(order, assignment.offsets, assignment.n_patches, assignment.mask), im2col.geometry
        )
        if self._seen is not None:
            self._seen = self._seen.to(device)
        self._patches = planes.new_empty(order.size, array.k)
        im2col.gather(planes, torch.from_numpy(order).to(device), self._patches, self._seen)

    def outputs(self, first: int = 0, last: int | None = None) -> Tensor:
        """Multiply, and return the outputs."""
        array, of_tiles = self._array, self._patches.view(self._array.n_tiles, -1, self._array.k)
        weights = self._kernels[:, : array.k]
        product = torch.baddbmm(self._kernels[:, array.k :], of_tiles, weights) if array.bias else of_tiles @ weights
        outputs = product.view(-1, array.c_out)
        if self._dropped:
            outputs = torch.cat((outputs, outputs.new_zeros(1, array.c_out)))
        return outputs.index_select(0, self._slot_of_patch).view(self._images, *self._im2col.geometry.out, array.c_out)[
            first:last
        ]

    def send_errors(self, errors: Tensor, update: Update | None, *, input_error: bool, commit: bool) -> None:
        """Multiply by errors: the gradient of the kernels, and over the patches their input errors."""
        array = self._array
        rows = errors.reshape(-1, array.c_out)
        if self._some_empty:
            rows = torch.cat((rows, rows.new_zeros(1, array.c_out)))
        rows = rows.index_select(0, self._error_of_slot).view(array.n_tiles, -1, array.c_out)
        patches = self._patches.view(array.n_tiles, -1, array.k)
        self._count_back(input_error=input_error, learn=update is not None)
        if update is not None:
            self._gradient = torch.bmm(patches.transpose(1, 2), rows)  # with `out` a part of a tensor: tile by tile
            if array.bias:
                self._gradient = torch.cat((self._gradient, rows.sum(dim=1, keepdim=True)), dim=1)
        if input_error:
            torch.bmm(rows, self._kernels[:, : array.k].transpose(1, 2), out=patches)
            self._back = self._im2col.scatter(
                self._patches, self._slot_of_patch, self._images, dropped=self._dropped, seen=self._seen
            )


class _Plain(_Passage):
    """A passage through a single tile that computes every patch: an ordinary convolution."""

    def __init__(self, array: TileArray, geometry: Geometry, planes: Tensor, kernels: Tensor, rows: np.ndarray) -> None:
        super().__init__(array, rows, planes.shape[0] * geometry.n_patches)
        weight = kernels.detach()[0, : array.k].view(*geometry.kernel, -1, array.c_out).permute(3, 2, 0, 1)
        self._weight = weight.contiguous(memory_format=torch.channels_last)
        self._bias = kernels.detach()[0, array.k] if array.bias else None
        self._geometry, self._planes = geometry, planes.detach().permute(0, 3, 1, 2)
        self._padding = geometry.before
        if geometry.before != geometry.after:
            (top, left), (bottom, right) = geometry.before, geometry.after
            self._planes, self._padding = F.pad(self._planes, (left, right, top, bottom)), (0, 0)

    def outputs(self, first: int = 0, last: int | None = None) -> Tensor:
        """Convolve."""
        geometry = self._geometry
        with torch.no_grad():
            outputs = torch.conv2d(
                self._planes, self._weight, self._bias, geometry.stride, self._padding, geometry.dilation
            )
        return outputs.permute(0, 2, 3, 1)[first:last]

    def send_errors(self, errors: Tensor, update: Update | None, *, input_error: bool, commit: bool) -> None:
        """Go back through the convolution."""
        array, geometry, learn = self._array, self._geometry, update is not None
        self._count_back(input_error=input_error, learn=learn)
        if not input_error and not learn:
            return
        errors = errors.permute(0, 3, 1, 2)
        of_planes, of_weight, of_bias = torch.ops.aten.convolution_backward(
            errors,
            self._planes,
            self._weight,
            [array.c_out],
            geometry.stride,
            self._padding,
            geometry.dilation,
            False,  # not transposed
            (0, 0),
            1,  # a single group
            (input_error, learn, learn and array.bias),
        )
        if learn:
            self._gradient = torch.empty(1, *array.kernel_shape, dtype=errors.dtype, device=errors.device)
            self._gradient[0, : array.k] = of_weight.permute(2, 3, 1, 0).reshape(array.k, array.c_out)
            if array.bias:
                self._gradient[0, array.k] = of_bias
        if input_error:
            (top, left), (h, w) = geometry.before, geometry.size
            if self._padding != geometry.before:
                of_planes = of_planes[:, :, top : top + h, left : left + w]
            self._back = of_planes.permute(0, 2, 3, 1)


def compute_in_float32() -> None:
    """Have a GPU compute convolutions as it does products: in float32, and every time alike."""
    torch.backends.cudnn.allow_tf32 = False
    torch.backends.cuda.matmul.allow_tf32 = False
    torch.backends.cudnn.deterministic = True


def check_device(device: str, *, here: bool = True) -> None:
    """Raise UsageError unless tensors can be put there.

    Args:
        device: "cpu" or "cuda".
        here: whether it is this machine that computes.
    """
    if device not in ("cpu", "cuda"):
        raise UsageError(f"--device is cpu or cuda; not “{device}”.")
    if device == "cuda" and here and not torch.cuda.is_available():
        built: Any = torch.version.cuda
        why = "PyTorch finds no GPU on this machine" if built else "this PyTorch was built for the CPU alone"
        raise UsageError(f"--device cuda needs a GPU, and {why}. Use --device cpu, or a machine with a GPU.")
