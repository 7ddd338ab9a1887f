"""Fabric `serial`: the same tiles, in the coordinator's own process, one after the other."""

import mmap
import os
import time
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

from rapa_dist.fabric.base import Arena, Fabric, Kernels
from rapa_dist.fabric.blas import one_blas_thread
from rapa_dist.machine import Layer, Machine
from rapa_dist.tile import AnalogTile, Cells, Matrix, Update, Word


class SerialFabric(Fabric):
    """The reference: what the other fabrics have to reproduce bit by bit."""

    name = "serial"

    def __init__(self, machine: Machine, images: int, kernels: Kernels, *, step: int = 0) -> None:
        """Make the tiles and program `kernels`, one array (n_t, k + 1, c_out) per layer, into them.

        Args:
            machine: which tiles.
            images: images in the largest mini-batch.
            kernels: initial kernels.
            step: steps that they have been trained for.
        """
        super().__init__(machine, images)
        self._arena = Arena(mmap.mmap(-1, Arena.size(machine, images)), machine, images)
        self._tiles: list[list[AnalogTile]] = []
        for layer, kernel_of_tile in zip(machine.layers, kernels, strict=True):
            tiles = [AnalogTile(Cells.volatile(layer.kernel_shape)) for _ in range(layer.n_tiles)]
            for tile, kernel in zip(tiles, kernel_of_tile, strict=True):
                words = tile.cells.words
                words[Word.PID], words[Word.STARTS], words[Word.SINCE_NS] = os.getpid(), 1, time.monotonic_ns()
                tile.cells.program(kernel, step)
            self._tiles.append(tiles)
        self._cycle = 0
        self._blas = one_blas_thread()

    def patches(self, layer: int) -> Matrix:
        """Return the patch region of a layer."""
        return self._arena.patches(layer)

    def outputs(self, layer: int) -> Matrix:
        """Return the output region of a layer."""
        return self._arena.outputs(layer)

    def begin_forward(self, layer: Layer, offsets: NDArray[np.int64]) -> int:
        """Run the forward cycle of every tile in turn."""
        self._cycle += 1
        patches, outputs = self.patches(layer.index), self.outputs(layer.index)
        for tile, (first, last) in zip(self._tiles[layer.index], pairwise(offsets.tolist()), strict=True):
            tile.forward(patches[first:last], outputs[first:last])
        return self._cycle

    def begin_backward(
        self,
        layer: Layer,
        offsets: NDArray[np.int64],
        *,
        update: Update | None,
        input_error: bool,
        commit: bool = True,
    ) -> int:
        """Run the backward and update cycles of every tile in turn."""
        self._cycle += 1
        patches, errors = self.patches(layer.index), self.outputs(layer.index)
        for tile, (first, last) in zip(self._tiles[layer.index], pairwise(offsets.tolist()), strict=True):
            tile.backward(
                patches[first:last],
                errors[first:last],
                cycle=self._cycle,
                update=update,
                input_error=input_error,
                commit=commit,
            )
        return self._cycle

    def finish(self, cycle: int) -> None:
        """Do nothing: a cycle is done when `begin_…` returns."""

    def cells(self, layer: int) -> list[Cells]:
        """Return the cells of a layer's tiles."""
        return [tile.cells for tile in self._tiles[layer]]

    def close(self) -> None:
        """Give NumPy its threads back."""
        self._blas.restore_original_limits()
