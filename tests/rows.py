"""Rows of a tile array in the arena of a fabric, as a passage has them: for tests of single cycles."""

from rapa_dist.fabric.doorbell import Cycle
from rapa_dist.tile import Update


class Rows:
    """A place of an arena. `patches` (rows, k) and `outputs` (rows, c_out) are NumPy views of it."""

    def __init__(self, fabric, array, rows):
        self._fabric, self._array, self._lending = fabric, array, fabric.lending
        self.place = self._lending.lend(rows, array.k, array.c_out)
        self.patches = fabric.arena.rows(self.place.patches, rows, array.k)
        self.outputs = fabric.arena.rows(self.place.outputs, rows, array.c_out)

    def __enter__(self):
        return self

    def __exit__(self, *error):
        self._lending.take_back(self.place)

    def begin(self, offsets, cycle=Cycle.FORWARD, update=None):
        return self._fabric.begin(self._array, cycle, self.place, offsets, update)

    def forward(self, offsets):
        self._fabric.finish(self.begin(offsets))

    def backward(self, offsets, update: Update | None, *, input_error):
        cycle = (Cycle.INPUT_ERROR if input_error else 0) | (Cycle.UPDATE | Cycle.COMMIT if update else 0)
        self._fabric.finish(self.begin(offsets, cycle, update))
