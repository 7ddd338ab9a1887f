"""What the coordinator may ask of a fabric, and the memory layout that all fabrics share."""

import mmap
from abc import ABC, abstractmethod
from collections.abc import Sequence
from types import TracebackType
from typing import Self

import numpy as np
from numpy.typing import NDArray

from rapa_dist.machine import Layer, Machine
from rapa_dist.tile import Matrix, Update

_PAGE = 4096


class Arena:
    """Memory with two regions per layer: patches (rows, k) and, beside them, outputs (rows, c_out).

    In the backward cycle the errors D take the place of the outputs M, and the input errors dI that of
    the patches I, so that nothing is copied and nothing is allocated while training.
    """

    def __init__(self, buffer: mmap.mmap, machine: Machine, images: int) -> None:
        """Lay the regions over `buffer` (`Arena.size` bytes); a region holds `images` images."""
        self._patches: list[Matrix] = []
        self._outputs: list[Matrix] = []
        offset = 0
        for layer in machine.layers:
            rows = images * layer.n_patches
            for regions, columns in ((self._patches, layer.k), (self._outputs, layer.c_out)):
                flat = np.frombuffer(buffer, np.float32, rows * columns, offset=offset)
                regions.append(flat.reshape(rows, columns))
                offset += _pages(flat.nbytes)

    @staticmethod
    def size(machine: Machine, images: int) -> int:
        """Return the bytes an arena takes that holds `images` images at once."""
        row_bytes = ((4 * columns, layer) for layer in machine.layers for columns in (layer.k, layer.c_out))
        return sum(_pages(images * layer.n_patches * width) for width, layer in row_bytes)

    def patches(self, layer: int) -> Matrix:
        """Return the whole patch region of a layer, (rows, k)."""
        return self._patches[layer]

    def outputs(self, layer: int) -> Matrix:
        """Return the whole output region of a layer, (rows, c_out)."""
        return self._outputs[layer]


class Fabric(ABC):
    """The tiles of a machine, and the memory through which rows reach them.

    Use as a context manager: leaving it stops the tiles and frees what they held.
    """

    name: str

    def __init__(self, machine: Machine, images: int) -> None:
        """Prepare for mini-batches of at most `images` images."""
        self.machine = machine
        self.images = images

    @abstractmethod
    def patches(self, layer: int) -> Matrix:
        """Return the patch region of a layer, (rows, k), in tile order; dI after a backward cycle."""

    @abstractmethod
    def outputs(self, layer: int) -> Matrix:
        """Return the output region of a layer, (rows, c_out), in tile order; D in a backward cycle."""

    @abstractmethod
    def forward(self, layer: Layer, offsets: NDArray[np.int64]) -> None:
        """Have every tile compute M = I K for its rows offsets[j] … offsets[j + 1] − 1; return when done."""

    @abstractmethod
    def backward(self, layer: Layer, offsets: NDArray[np.int64], *, update: Update | None, input_error: bool) -> None:
        """Have every tile compute dI = D Kᵀ, if wanted, and update its kernel; return when done."""

    @abstractmethod
    def kernels(self, layer: Layer) -> Matrix:
        """Return a copy of the kernels of a layer, (n_t, k + 1, c_out). Between cycles only."""

    @abstractmethod
    def close(self) -> None:
        """Stop the tiles and free what they held. Safe to call twice."""

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()


Kernels = Sequence[Matrix]
"""The kernels of a whole machine: one array (n_t, k + 1, c_out) per layer."""


def _pages(n_bytes: int) -> int:
    return -(-n_bytes // _PAGE) * _PAGE
