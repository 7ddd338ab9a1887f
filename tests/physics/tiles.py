"""Tiles with physics for tests: in NumPy, and with the library."""

from dataclasses import replace

import numpy as np
import pytest

from rapa_dist.cells import Cells
from rapa_dist.native import native
from rapa_dist.native.physics import NativePhysicalTile
from rapa_dist.physics.parameters import IOParameters, Physics
from rapa_dist.physics.tile import PhysicalTile

WAYS = ["NumPy", pytest.param("native", marks=pytest.mark.skipif(native().library is None, reason=str(native())))]


def tile_with(way, physics, kernel, *, bias=False, seed=0, place=(0, 0), cells=None):
    """Return a tile with a kernel (k + bias, c_out), as it is: not within the devices' bounds."""
    how = {"seed": seed, "place": place, "bias": bias}
    if cells is None:
        cells = Cells.volatile(kernel.shape)
        cells.program(kernel)
    if way == "NumPy":
        return PhysicalTile(cells, physics, **how)
    return NativePhysicalTile(native().library, cells, physics, **how)


def floats(values):
    return np.array(values, np.float32)


def quiet(**fields):
    """Return an aihwkit side without noise."""
    return IOParameters(**{"out_noise": 0.0, **fields})


def backward_of(io):
    return replace(io, bound_management="NONE")


def forward(tile, patches, draw=0):
    outputs = np.full((len(patches), tile.cells.kernel_shape[1]), np.nan, np.float32)
    tile.forward(patches.copy(), outputs, draw)
    return outputs


def backward(tile, errors, k, draw=0):
    patches = np.full((len(errors), k), np.nan, np.float32)
    tile.backward(patches, errors, cycle=1, update=None, input_error=True, draw=draw)
    return patches


def updated(tile, patches, errors, update, cycle=1, draw=0):
    tile.backward(patches.copy(), errors.copy(), cycle=cycle, update=update, input_error=False, draw=draw)
    return tile.cells.kernel.copy()


IDEAL = Physics()
