"""Times every cycle of a fabric: from just before the first ring to after the last answer."""

import time
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from rapa_dist.fabric.base import Fabric
from rapa_dist.fabric.ray import RayFabric
from rapa_dist.machine import Layer
from rapa_dist.tile import Cells, Matrix, Update

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
    """FORWARD, BACKWARD_UPDATE (one ring for both), or UPDATE (layer 1, whose input error nobody wants)."""
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


class Stopwatch(Fabric):
    """A fabric that passes everything on to another one, and notes how long cycles take.

    A cycle is over when `begin_…` returns, so that no two overlap and every layer is measured by itself.
    """

    name = "stopwatch"

    def __init__(self, fabric: RayFabric, stop: Callable[[], bool] = lambda: False) -> None:
        """Watch a fabric as the machine that it works as now.

        Args:
            fabric: the one that does the work; stays open when this is closed.
            stop: asked before every cycle; True raises KeyboardInterrupt.
        """
        super().__init__(fabric.machine, fabric.images)
        self._fabric = fabric
        self._stop = stop
        self._cycles: list[CycleTime] = []

    def take(self) -> tuple[CycleTime, ...]:
        """Return the cycles since the last call, in the order in which they were run."""
        cycles = tuple(self._cycles)
        self._cycles.clear()
        return cycles

    def patches(self, layer: int) -> Matrix:
        """Return the patch region of a layer."""
        return self._fabric.patches(layer)

    def outputs(self, layer: int) -> Matrix:
        """Return the output region of a layer."""
        return self._fabric.outputs(layer)

    def begin_forward(self, layer: Layer, offsets: NDArray[np.int64]) -> int:
        """Run a forward cycle, and time it."""
        row_ns = self._row_ns(forward=True)
        return self._time(layer, FORWARD, offsets, row_ns, lambda: self._fabric.begin_forward(layer, offsets))

    def begin_backward(
        self,
        layer: Layer,
        offsets: NDArray[np.int64],
        *,
        update: Update | None,
        input_error: bool,
        commit: bool = True,
    ) -> int:
        """Run backward and update cycles, and time them together."""
        return self._time(
            layer,
            BACKWARD_UPDATE if input_error else UPDATE,
            offsets,
            self._row_ns(backward=input_error, update=update is not None),
            lambda: self._fabric.begin_backward(layer, offsets, update=update, input_error=input_error, commit=commit),
        )

    def finish(self, cycle: int) -> None:
        """Do nothing: a cycle is done when `begin_…` returns."""

    def cells(self, layer: int) -> list[Cells]:
        """Return the cells of a layer's tiles."""
        return self._fabric.cells(layer)

    def close(self) -> None:
        """Do nothing: the fabric is not this one's."""

    def _row_ns(self, **cycles: bool) -> float:
        return self._fabric.pace.row_ns(**cycles) if self._fabric.pace is not None else 0.0

    def _time(
        self, layer: Layer, kind: str, offsets: NDArray[np.int64], row_ns: float, begin: Callable[[], int]
    ) -> int:
        if self._stop():
            raise KeyboardInterrupt
        before = self._fabric.busy_ns(layer.index)
        started = now_ns()
        number = begin()
        self._fabric.finish(number)
        wall_ns = now_ns() - started
        busy = [now - then for now, then in zip(self._fabric.busy_ns(layer.index), before, strict=True)]
        self._cycles.append(
            CycleTime(
                layer=layer.index,
                kind=kind,
                wall_ns=wall_ns,
                longest_busy_ns=max(busy),
                total_busy_ns=sum(busy),
                hold_ns=int(int(np.diff(offsets).max()) * row_ns),
                network_ns=min(wall_ns, self._fabric.network_ns),
            )
        )
        return number
