"""Fabric `serial`: the same tiles, in the coordinator's own process, one after the other."""

import mmap
import os
import time
from collections.abc import Mapping
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

from rapa_dist.cells import Cells, Word
from rapa_dist.fabric.arena import Arena, Place, arena_bytes
from rapa_dist.fabric.base import Kernels
from rapa_dist.fabric.blas import one_blas_thread
from rapa_dist.fabric.command import Way
from rapa_dist.fabric.doorbell import Cycle
from rapa_dist.fabric.shared_rows import SharedRowsFabric
from rapa_dist.inspection import TileStats, read_tile
from rapa_dist.machine import Machine, TileArray
from rapa_dist.native import tile_of
from rapa_dist.physics.tile import PhysicalTile
from rapa_dist.tile import Matrix, Update


class SerialFabric(SharedRowsFabric):
    """The reference: what the other fabrics have to reproduce bit by bit."""

    name = "serial"

    def __init__(self, machine: Machine, arena_floats: int, kernels: Kernels, *, step: int = 0) -> None:
        """Make the tiles and program `kernels`, one array (n_t, k + 1, c_out) per tile array, into them.

        Args:
            machine: which tiles.
            arena_floats: what passages need at the same time, as `demand` gives it.
            kernels: initial kernels.
            step: steps that they have been trained for.
        """
        super().__init__(machine, Arena(mmap.mmap(-1, arena_bytes(arena_floats))))
        self._tiles = [
            [tile_of(Cells.volatile(array.kernel_shape), array, tile) for tile in range(array.n_tiles)]
            for array in machine.arrays
        ]
        for tile in (tile for of_array in self._tiles for tile in of_array):
            words = tile.cells.words
            words[Word.PID], words[Word.STARTS], words[Word.SINCE_NS] = os.getpid(), 1, time.monotonic_ns()
        self.program(kernels, step)
        self._cycle = 0
        self._blas = one_blas_thread()

    def begin(
        self,
        array: TileArray,
        cycle: int,
        place: Place,
        offsets: NDArray[np.int64],
        update: Update | None = None,
        way: Way | None = None,
        draw: int = 0,
    ) -> int:
        """Run the cycle of every tile in turn."""
        self._cycle += 1
        edges = offsets.tolist()
        patches = self.arena.rows(place.patches, edges[-1], array.k)
        outputs = self.arena.rows(place.outputs, edges[-1], array.c_out)
        for tile, (first, last) in zip(self._tiles[array.index], pairwise(edges), strict=True):
            if cycle == Cycle.FORWARD:
                tile.forward(patches[first:last], outputs[first:last], draw)
            elif cycle == Cycle.DISCARD:
                tile.discard(self._cycle)
            else:
                tile.backward(
                    patches[first:last],
                    outputs[first:last],
                    cycle=self._cycle,
                    update=update if cycle & Cycle.UPDATE else None,
                    input_error=cycle & Cycle.INPUT_ERROR != 0,
                    commit=cycle & Cycle.COMMIT != 0,
                    draw=draw,
                )
        return self._cycle

    def finish(self, cycle: int) -> None:
        """Do nothing: a cycle is done when `begin` returns."""

    def kernels(self, array: TileArray) -> Matrix:
        """Return a copy of the kernels of a tile array."""
        return np.stack([tile.cells.kernel for tile in self._tiles[array.index]])

    def write(self, array: TileArray, kernels: Matrix, step: int) -> None:
        """Program kernels into the tiles of an array."""
        for tile, kernel in zip(self._tiles[array.index], kernels, strict=True):
            tile.program(kernel, step)

    def stored(self) -> dict[int, Matrix]:
        """Return what devices store, where writing is noisy."""
        return {
            array.index: np.stack([tile.stored for tile in self._tiles[array.index] if isinstance(tile, PhysicalTile)])  # type: ignore[misc]
            for array in self.machine.arrays
            if array.stores
        }

    def restore(self, kernels: Kernels, stored: Mapping[int, Matrix]) -> None:
        """Put what was stored back, with what was seen of it."""
        for index, of_array in stored.items():
            for tile, kernel, of_tile in zip(self._tiles[index], kernels[index], of_array, strict=True):
                assert isinstance(tile, PhysicalTile)
                tile.restore(kernel, of_tile)

    def stats(self) -> list[TileStats]:
        """Return what the tiles have done so far."""
        return [
            read_tile(self._tiles[index][tile].cells, self.machine.arrays[index], tile)
            for index, tile in self.machine.tiles
        ]

    def busy_ns(self, array: int) -> list[int]:
        """Return by tile of an array the processor time of its cycles."""
        return [tile.cells.words[Word.BUSY_NS] for tile in self._tiles[array]]

    def close(self) -> None:
        """Give NumPy its threads back."""
        self._blas.restore_original_limits()
