"""One cycle of one tile array, in the one form in which it goes from the coordinator to the chips, and its rings."""

import time
from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple

from rapa_dist.fabric.arena import Arena, Place
from rapa_dist.fabric.doorbell import Cycle, Ring
from rapa_dist.tile import Matrix


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
        self, rows: Iterable[tuple[int, tuple[int, int]]], last_ring: Sequence[int]
    ) -> Iterator[tuple[int, Ring]]:
        """Yield (tile, ring) for every tile.

        Args:
            rows: (tile, (first row, one past the last row)), counted in the passage.
            last_ring: by tile the number of its newest ring.
        """
        number, _, cycle, (patches, outputs), _, k, c_out, learning_rate, weight_decay, row_ns = self
        for tile, (first, last) in rows:
            yield (
                tile,
                Ring(
                    number,
                    cycle,
                    last - first,
                    patches + first * k,
                    outputs + first * c_out,
                    learning_rate,
                    weight_decay,
                    int((last - first) * row_ns),
                    time.monotonic_ns() if row_ns else 0,
                    last_ring[tile],
                ),
            )
