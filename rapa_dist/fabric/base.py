"""What the coordinator may ask of a fabric, and the memory layout that all fabrics share."""

import mmap
from abc import ABC, abstractmethod
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from types import TracebackType
from typing import Self

import numpy as np
from numpy.typing import NDArray

from rapa_dist.inspection import TileStats, read_tile
from rapa_dist.machine import Layer, Machine, tile_name
from rapa_dist.tile import Cells, Matrix, Update, Word

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


class Tiles(ABC):
    """The tiles of a machine, wherever they are, and what can be asked of them between steps.

    Use as a context manager: leaving it stops the tiles and frees what they held.
    """

    name: str

    def __init__(self, machine: Machine, images: int) -> None:
        """Prepare for mini-batches of at most `images` images."""
        self.machine = machine
        self.images = images

    @abstractmethod
    def cells(self, layer: int) -> list[Cells]:
        """Return the cells of a layer's tiles, to look into."""

    def kernels(self, layer: Layer) -> Matrix:
        """Return a copy of the kernels of a layer, (n_t, k + 1, c_out). Between steps only."""
        return np.stack([cells.kernel for cells in self.cells(layer.index)])

    def all_kernels(self) -> list[Matrix]:
        """Return a copy of the kernels of all layers. Between steps only."""
        return [self.kernels(layer) for layer in self.machine.layers]

    def stats(self) -> list[TileStats]:
        """Return what the tiles have done so far."""
        return [
            read_tile(cells, name=tile_name(layer.index, tile), layer=layer.index)
            for layer in self.machine.layers
            for tile, cells in enumerate(self.cells(layer.index))
        ]

    def busy_ns(self, layer: int) -> list[int]:
        """Return by tile of a layer the processor time that it has taken in cycles so far."""
        return [cells.words[Word.BUSY_NS] for cells in self.cells(layer)]

    @property
    def spread(self) -> bool:
        """Whether tiles live on other nodes than the coordinator's: they can be lost, with their kernels."""
        return False

    @abstractmethod
    def close(self) -> None:
        """Stop the tiles and free what they held. Safe to call twice."""

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()


class Fabric(Tiles):
    """Tiles that do their cycles one by one, and the memory through which rows reach them."""

    network_ns = 0
    """Of the cycle that was finished last, what it took beyond the work of other nodes' chips: messages there and back;
    0 where there are none."""

    @abstractmethod
    def patches(self, layer: int) -> Matrix:
        """Return the patch region of a layer, (rows, k), in tile order; dI after a backward cycle."""

    @abstractmethod
    def outputs(self, layer: int) -> Matrix:
        """Return the output region of a layer, (rows, c_out), in tile order; D in a backward cycle."""

    @abstractmethod
    def begin_forward(self, layer: Layer, offsets: NDArray[np.int64]) -> int:
        """Have every tile compute M = I K for its rows offsets[j] … offsets[j + 1] − 1.

        Returns:
            A number to `finish` the cycle with. Until then its rows belong to the tiles. Several cycles may
            be under way, on different rows; a tile does them in the order in which they were begun.
        """

    @abstractmethod
    def begin_backward(
        self,
        layer: Layer,
        offsets: NDArray[np.int64],
        *,
        update: Update | None,
        input_error: bool,
        commit: bool = True,
    ) -> int:
        """Have every tile compute dI = D Kᵀ, if wanted, and its update; see `begin_forward`.

        Args:
            layer: whose tiles.
            offsets: (n_t + 1,) which rows are whose.
            update: λ and decay, or None to leave the kernels alone.
            input_error: whether dI is wanted.
            commit: False for all parts of a mini-batch but the last, which puts the new kernels in force.
        """

    @abstractmethod
    def finish(self, cycle: int) -> None:
        """Return when a cycle that was begun is done by all tiles."""

    def together(self) -> AbstractContextManager[None]:
        """Have the cycles that are begun inside reach every tile at once, when it is left; none may be waited for.

        A matter of speed alone: a tile that is woken once for two cycles finds its memory still in the caches.
        """
        return nullcontext()

    def forward(self, layer: Layer, offsets: NDArray[np.int64]) -> None:
        """Run a forward cycle from beginning to end."""
        self.finish(self.begin_forward(layer, offsets))

    def backward(self, layer: Layer, offsets: NDArray[np.int64], *, update: Update | None, input_error: bool) -> None:
        """Run a backward cycle with its update from beginning to end."""
        self.finish(self.begin_backward(layer, offsets, update=update, input_error=input_error))


Kernels = Sequence[Matrix]
"""The kernels of a whole machine: one array (n_t, k + 1, c_out) per layer."""


def _pages(n_bytes: int) -> int:
    return -(-n_bytes // _PAGE) * _PAGE
