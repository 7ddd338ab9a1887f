"""Times every cycle of a fabric: from just before the first ring to after the last answer."""

import time
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from rapa_dist.fabric.arena import Place
from rapa_dist.fabric.command import Way
from rapa_dist.fabric.doorbell import Cycle
from rapa_dist.fabric.ray import RayFabric
from rapa_dist.fabric.shared_rows import SharedRowsFabric
from rapa_dist.fabric.tree import Part
from rapa_dist.inspection import TileStats
from rapa_dist.machine import TileArray
from rapa_dist.tile import Matrix, Update

FORWARD = "forward"
BACKWARD_UPDATE = "backward_update"
UPDATE = "update"


def now_ns() -> int:
    """Return nanoseconds on the clock that all times are taken with; the tiles' holds run on it, too."""
    return time.monotonic_ns()


@dataclass(frozen=True, slots=True, kw_only=True)
class CycleTime:
    """One cycle of one layer."""

    layer: int
    kind: str
    """FORWARD, BACKWARD_UPDATE (one ring for both), or UPDATE (a layer whose input error nobody wants)."""
    wall_ns: int
    """From just before the first ring to after the last answer."""
    longest_busy_ns: int
    """Processor time of the tile that took most."""
    total_busy_ns: int
    """Processor time of all tiles."""
    hold_ns: int
    """Rows of the slowest tile × an array's time, slowed down: how long its answer is held; 0: not paced."""
    network_ns: int = 0
    """What messages to other nodes and back took, the longest of them; 0 on one node."""


class Stopwatch(SharedRowsFabric):
    """A fabric that passes every cycle on to another one, and notes how long it takes.

    A cycle is over when `begin` returns, so that no two overlap and every layer is measured by itself.
    """

    name = "stopwatch"

    def __init__(self, fabric: RayFabric, stop: Callable[[], bool] = lambda: False) -> None:
        """Watch a fabric as the machine that it works as now.

        Args:
            fabric: the one that does the work; stays open when this is closed.
            stop: asked before every cycle; True raises KeyboardInterrupt.
        """
        super().__init__(fabric.machine, fabric.arena)
        self._fabric = fabric
        self._stop = stop
        self._cycles: list[CycleTime] = []

    def take(self) -> tuple[CycleTime, ...]:
        """Return the cycles since the last call, in the order in which they were run."""
        cycles = tuple(self._cycles)
        self._cycles.clear()
        return cycles

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
        """Run a cycle, and time it."""
        if self._stop():
            raise KeyboardInterrupt
        before = self._fabric.busy_ns(array.index)
        started = now_ns()
        number = self._fabric.begin(array, cycle, place, offsets, update, way, draw)
        self._fabric.finish(number)
        wall_ns = now_ns() - started
        busy = [now - then for now, then in zip(self._fabric.busy_ns(array.index), before, strict=True)]
        kind = FORWARD if cycle == Cycle.FORWARD else BACKWARD_UPDATE if cycle & Cycle.INPUT_ERROR else UPDATE
        self._cycles.append(
            CycleTime(
                layer=array.index,
                kind=kind,
                wall_ns=wall_ns,
                longest_busy_ns=max(busy),
                total_busy_ns=sum(busy),
                hold_ns=int(int(np.diff(offsets).max()) * self._fabric.row_ns(cycle)),
                network_ns=min(wall_ns, self._fabric.network_ns),
            )
        )
        return number

    @property
    def spread(self) -> bool:
        """Whether tiles live on other nodes than the coordinator's."""
        return self._fabric.spread

    def here(self, array: TileArray) -> list[tuple[int, int]]:
        """Return the tiles of an array that read this arena."""
        return self._fabric.here(array)

    def from_elsewhere(self, cycle: int) -> dict[Part, Matrix]:
        """Return what other nodes have added up."""
        return self._fabric.from_elsewhere(cycle)

    def finish(self, cycle: int) -> None:
        """Do nothing: a cycle is done when `begin` returns."""

    def kernels(self, array: TileArray) -> Matrix:
        """Return a copy of the kernels of a tile array."""
        return self._fabric.kernels(array)

    def write(self, array: TileArray, kernels: Matrix, step: int) -> None:
        """Program kernels into the tiles of an array."""
        self._fabric.write(array, kernels, step)

    def stats(self) -> list[TileStats]:
        """Return what the tiles have done so far."""
        return self._fabric.stats()

    def busy_ns(self, array: int) -> list[int]:
        """Return by tile of an array the processor time of its cycles."""
        return self._fabric.busy_ns(array)

    def close(self) -> None:
        """Do nothing: the fabric is not this one's."""
