"""The chip of another node: an actor that owns that node's arena, doorbells and cells.

Its arena has the very rows of the coordinator's, so nothing has to be translated: one message brings a block of
rows, the tiles compute where it was put, and the answer takes their rows back. It never imports torch.
"""

import time
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from threading import Lock
from typing import Any, NamedTuple

import numpy as np

from rapa_dist.cells import Word
from rapa_dist.fabric.chip import Chip
from rapa_dist.fabric.command import Command
from rapa_dist.fabric.doorbell import Cycle
from rapa_dist.fabric.lookout import Lookout, Restart
from rapa_dist.fabric.registry import Registration
from rapa_dist.fabric.running_code import RunningCode, check_against
from rapa_dist.fabric.scratch import sweep
from rapa_dist.fabric.site import Site
from rapa_dist.inspection import read_tile
from rapa_dist.machine import Machine
from rapa_dist.tile import Matrix

Rows = Sequence[tuple[int, int]]
"""Rows, as (first, one past the last)."""
_PIECE_BYTES = 96_000
_ENDING_S, _PAUSE_S = 30.0, 0.1
_MOST_IN_PIECES = 8_000_000  # bytes; Ray sends 10 MB along with a call, and no more


class Answer(NamedTuple):
    """What a chip sends back after a cycle, besides the rows."""

    chip_ns: int
    """How long it took, from the arrival of the message to when all its tiles were done."""
    busy_ns: tuple[int, ...]
    """Processor time that its tiles have taken so far, in the order in which they were named."""
    restarted: tuple[Restart, ...]
    """Tiles whose process was replaced since the last answer."""


class RemoteChip:
    """A node's `Chip` as a Ray actor: does what it is told, one message after the other, but closes at any moment."""

    def __init__(self, node: str) -> None:
        self._node = node
        self._actors: dict[int, Any] = {}
        self._restarted: list[Restart] = []
        self._files = Lock()  # while some are made or removed
        self._at_close = ExitStack()
        self._closed = False

    def start(self, machine: Machine, arena_floats: int, restarts: int, coordinator: RunningCode) -> Path | None:
        """Make the chip; not in `__init__`, after whose errors Ray only says that the actor died.

        Returns:
            Its directory; None if it was closed before.

        Raises:
            ClusterError: there is too little shared memory, or other code here than the coordinator's.
        """
        check_against(coordinator)
        with self._files:
            if self._closed:
                return None
            self._chip = Chip(machine, arena_floats, tiles=())
            self._at_close.callback(self._chip.close)
            lookout = Lookout(self._chip, self._actors, self._restarted.append, restarts=restarts)
            self._at_close.callback(lookout.end_tiles)
            return self._chip.scratch.path

    def adopt(self, tiles: Sequence[int]) -> dict[int, Site]:
        """Make cells for some tiles, unless it has them, and return what their processes have to know."""
        with self._files:
            self._chip.adopt(tiles)
        return {tile: self._chip.site(tile) for tile in tiles}

    def watch(self, actors: Mapping[int, Any]) -> None:
        """Look after these tile actors from now on, which are up."""
        self._actors |= actors

    def program(self, kernels: Mapping[int, Matrix], step: int) -> None:
        """Write kernels, as after `step` steps, into the cells of tiles that are not at work."""
        for tile, kernel in kernels.items():
            self._chip.program(tile, kernel, step)

    def kernels(self, tiles: Sequence[int]) -> list[Matrix]:
        """Return the kernels of some tiles, each (k + 1, c_out). Between steps only."""
        return [self._chip.cells[tile].kernel.copy() for tile in tiles]

    def stats(self) -> list[dict[str, Any]]:
        """Return the stats of all tiles of the chip."""
        machine = self._chip.machine
        found = []
        for number, cells in self._chip.cells.items():
            layer, tile = machine.tiles[number]
            found.append(read_tile(cells, machine.arrays[layer], tile, self._node).as_dict())
        return found

    def cycle(self, command: Command, tiles: Sequence[int], rows: Rows, runs: Rows, *sent: Matrix) -> Any:
        """Have tiles do a cycle and return when they are done.

        Args:
            command: which.
            tiles: who, by number.
            rows: the rows of each of them.
            runs: the same rows, those that follow each other in one.
            sent: patches, or in a backward cycle errors, of all these rows, in pieces.

        Returns:
            An `Answer`, followed by the outputs or input errors in pieces, if there are any.
        """
        started = time.monotonic_ns()
        chip = self._chip
        patches, outputs = command.patches(chip.arena), command.outputs(chip.arena)
        if command.rows:
            for target, piece in zip(pieces(patches if command.is_forward else outputs, runs), sent, strict=True):
                target[:] = piece
        first, last = np.array(rows, np.int64).T
        chip.ring(command.rings(np.array(tiles, np.uint32), first, last, chip.last_ring))
        chip.wait(command.number)
        busy = tuple(chip.cells[tile].words[Word.BUSY_NS] for tile in tiles)
        restarted = tuple(self._restarted)
        self._restarted.clear()
        back = returned(command, patches, outputs, runs)
        answer = Answer(time.monotonic_ns() - started, busy, restarted)
        return (answer, *back) if back else answer

    def register(self, registration: Registration) -> None:
        """Let `rapa-dist stats` find the run on this node."""
        with self._files:
            registration.within(self._chip.scratch.path).write()

    def close(self) -> None:
        """Remove everything that the chip put on its node. Runs beside the others: a cycle may not end any more."""
        with self._files:
            self._closed = True
            self._at_close.close()


def clear_away(folder: Path) -> None:
    """Remove the directory of a chip on this node whose process is being killed, once it has ended."""
    deadline = time.monotonic() + _ENDING_S
    while folder.exists() and time.monotonic() < deadline:
        sweep(folder.parent)
        time.sleep(_PAUSE_S)


def returned(command: Command, patches: Matrix, outputs: Matrix, runs: Rows) -> list[Matrix]:
    """Return views of what a cycle brings back, in pieces: outputs, input errors or nothing."""
    if command.is_forward:
        return pieces(outputs, runs)
    return pieces(patches, runs) if command.cycle & Cycle.INPUT_ERROR else []


def pieces(region: Matrix, runs: Rows) -> list[Matrix]:
    """Return views of some runs of rows, in pieces that Ray sends along with a call.

    Ray carries what is larger than 100 kB by way of its object stores, which takes 8 ms where a call takes one. Both
    ends cut alike, so that the pieces of one are those of the other.
    """
    row_bytes = region.shape[1] * region.itemsize
    n_bytes = row_bytes * sum(last - first for first, last in runs)
    step = max(1, _PIECE_BYTES // row_bytes) if n_bytes <= _MOST_IN_PIECES else len(region)
    return [region[at : min(at + step, last)] for first, last in runs for at in range(first, last, step)]
