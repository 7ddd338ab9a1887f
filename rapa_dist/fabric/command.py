"""One cycle of one tile array, in the one form in which it goes from the coordinator to the chips, and its rings."""

import time
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from rapa_dist.assignment import Assignment
from rapa_dist.fabric.arena import Arena, Place
from rapa_dist.fabric.doorbell import Cycle
from rapa_dist.fabric.ringing import RING, Rings
from rapa_dist.geometry import Geometry
from rapa_dist.native.rings import writer
from rapa_dist.tile import Matrix


class Way(NamedTuple):
    """How planes become rows: what chips of other nodes need to gather theirs, and to add up what goes back."""

    geometry: Geometry
    planes: NDArray[np.float32]
    """(images, h, w, c_in), in one piece."""
    assignment: Assignment


class Command(NamedTuple):
    """What all tiles of an array have in common in one cycle."""

    number: int
    """Counts the cycles of a run upwards, from 1."""
    array: int
    """Index of the tile array."""
    cycle: int
    """Flags of `Cycle`."""
    place: Place
    """Where in the arena the rows of the passage lie."""
    rows: int
    """How many they are, on all tiles."""
    k: int
    """Length of a patch."""
    c_out: int
    """Length of an output."""
    learning_rate: float = 0.0
    weight_decay: float = 0.0
    row_ns: float = 0.0
    """Nanoseconds that an array would be busy with a row, slowed down; 0: answers come at once."""
    draw: int = 0
    """64-bit number of the passage, for what tiles draw."""

    @property
    def is_forward(self) -> bool:
        """Whether patches become outputs."""
        return self.cycle == Cycle.FORWARD

    def patches(self, arena: Arena) -> Matrix:
        """Return the patches of the passage, (rows, k), or its input errors."""
        return arena.rows(self.place.patches, self.rows, self.k)

    def outputs(self, arena: Arena) -> Matrix:
        """Return the outputs of the passage, (rows, c_out), or its errors."""
        return arena.rows(self.place.outputs, self.rows, self.c_out)

    def rings(
        self,
        tiles: NDArray[np.uint32],
        first: NDArray[np.int64],
        last: NDArray[np.int64],
        last_ring: NDArray[np.uint64],
    ) -> Rings:
        """Return the rings of some tiles.

        Args:
            tiles: (n,) their numbers.
            first: (n,) first row of each, counted in the passage; in one piece, like all the others.
            last: (n,) one past its last row.
            last_ring: by tile the number of its newest ring.
        """
        number, _, cycle, (patches, outputs), _, k, c_out, learning_rate, weight_decay, row_ns, draw = self
        messages = np.empty(len(tiles), RING)
        rung_ns = time.monotonic_ns() if row_ns else 0
        if (write := writer()) is not None:
            if first.strides != (8,) or last.strides != (8,):
                raise ValueError(f"rows have to lie in one piece, not {first.strides} and {last.strides} bytes apart")
            at = messages.ctypes.data, tiles.ctypes.data, first.ctypes.data, last.ctypes.data
            rates = learning_rate, weight_decay, row_ns
            rest = number, cycle, patches, outputs, k, c_out, *rates, rung_ns, draw
            write(*at, len(tiles), last_ring.ctypes.data, *rest)
            return Rings(number, tiles, messages)
        rows = last - first
        messages[:] = (0, number, cycle, 0, 0, 0, learning_rate, weight_decay, 0, rung_ns, 0, draw)
        messages["rows"] = rows
        messages["patches"] = patches + first * k
        messages["outputs"] = outputs + first * c_out
        messages["hold_ns"] = rows * row_ns
        messages["after"] = last_ring[tiles]
        return Rings(number, tiles, messages)
