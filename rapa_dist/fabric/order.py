"""An order: one cycle of one layer, as a chip is told of it, and the rings that it comes to."""

import time
from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple

from rapa_dist.fabric.doorbell import Ring


class Order(NamedTuple):
    """What all tiles of a layer have in common in one cycle."""

    number: int
    """Counts the cycles of a run upwards, from 1."""
    layer: int
    """Index of the layer."""
    cycle: int
    """Flags of `Cycle`."""
    learning_rate: float = 0.0
    weight_decay: float = 0.0
    row_ns: float = 0.0
    """Nanoseconds that an array would be busy with a row, slowed down; 0: answers come at once."""

    def rings(
        self, rows: Iterable[tuple[int, tuple[int, int]]], last_ring: Sequence[int]
    ) -> Iterator[tuple[int, Ring]]:
        """Yield (tile, ring) for every tile.

        Args:
            rows: (tile, (first row, one past the last row)).
            last_ring: by tile the number of its newest ring.
        """
        number, _, cycle, learning_rate, weight_decay, row_ns = self
        for tile, (first, last) in rows:
            yield (
                tile,
                Ring(
                    number,
                    cycle,
                    first,
                    last,
                    learning_rate,
                    weight_decay,
                    int((last - first) * row_ns),
                    time.monotonic_ns() if row_ns else 0,
                    last_ring[tile],
                ),
            )
