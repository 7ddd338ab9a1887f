"""The chip of another node: an actor that owns that node's arena, doorbells and cells.

The network carries planes, not rows: one message brings the planes and which of their patches are routed here; they are
gathered here, in an arena that has the very rows of the coordinator's. Outputs and errors go as rows, and back go input
errors, added up part by part of a tree (`tree`). It imports torch only where there is no library.
"""

import time
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from threading import Lock
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from rapa_dist.assignment import Assignment
from rapa_dist.cells import Word
from rapa_dist.fabric.arena import Place
from rapa_dist.fabric.chip import Chip
from rapa_dist.fabric.command import Command, Way
from rapa_dist.fabric.doorbell import Cycle
from rapa_dist.fabric.in_tile_order import in_tile_order
from rapa_dist.fabric.lookout import Lookout, Restart
from rapa_dist.fabric.registry import Registration
from rapa_dist.fabric.running_code import RunningCode, check_against
from rapa_dist.fabric.scratch import sweep
from rapa_dist.fabric.site import Site
from rapa_dist.fabric.tree import parts_of
from rapa_dist.geometry import Geometry
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
        self._passages: dict[Place, RemotePassage] = {}  # by place, until another one has it
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

    def stored(self, tiles: Sequence[int]) -> list[Matrix]:
        """Return what the devices of some tiles store, each (k + 1, c_out). Between steps only."""
        return [self._chip.stored(tile) for tile in tiles]

    def restore(self, states: Mapping[int, tuple[Matrix, Matrix]]) -> None:
        """Put what was seen and what was stored back into tiles that are not at work."""
        for tile, (kernel, stored) in states.items():
            self._chip.restore(tile, kernel, stored)

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

    def cycle(self, command: Command, tiles: Sequence[int], rows: Rows, plan: "Plan | None", *sent: Matrix) -> Any:
        """Have tiles do a cycle and return when they are done.

        Args:
            command: which.
            tiles: who, by number.
            rows: the rows of each of them.
            plan: in a forward cycle how planes become their rows.
            sent: in pieces, the planes and which patches are the rows; in a backward cycle the errors of the rows.

        Returns:
            An `Answer`, followed in pieces by the outputs, or by what input errors add up to, part by part of the tree.
        """
        started = time.monotonic_ns()
        chip = self._chip
        patches, outputs = command.patches(chip.arena), command.outputs(chip.arena)
        if plan is not None:
            self._passages[command.place] = RemotePassage(plan, sent, patches)
        elif command.rows:
            for target, piece in zip(self._passages[command.place].pieces_of(outputs), sent, strict=True):
                target[:] = piece
        first, last = np.array(rows, np.int64).T.copy()
        chip.ring(command.rings(np.array(tiles, np.uint32), first, last, chip.last_ring))
        chip.wait(command.number)
        back: list[Matrix] = []
        if command.rows and command.is_forward:
            back = self._passages[command.place].pieces_of(outputs)
        elif command.rows and command.cycle & Cycle.INPUT_ERROR:
            back = self._passages[command.place].add_up(patches)
        busy = tuple(chip.cells[tile].words[Word.BUSY_NS] for tile in tiles)
        restarted = tuple(self._restarted)
        self._restarted.clear()
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


class Plan(NamedTuple):
    """How planes become the rows of a chip's tiles: `Way` without the planes, and without what others are routed."""

    geometry: Geometry
    shape: tuple[int, ...]
    """Of the planes, (images, h, w, c_in)."""
    offsets: NDArray[np.int64]
    """(n_t + 1,) of the assignment."""
    n_patches: int
    mask: NDArray[np.bool_] | None
    runs: Rows
    """The chip's tiles, as runs of their places in the layer."""

    @classmethod
    def of(cls, way: Way, runs: Rows) -> "Plan":
        """Return the plan of a chip that has some runs of tiles."""
        assignment = way.assignment
        return cls(way.geometry, way.planes.shape, assignment.offsets, assignment.n_patches, assignment.mask, runs)


class RemotePassage:
    """Planes on their way through the tiles of one chip."""

    def __init__(self, plan: Plan, sent: Sequence[Matrix], patches: Matrix) -> None:
        """Gather the patches of the chip's tiles (im2col).

        Args:
            plan: how.
            sent: planes and orders, in pieces.
            patches: (rows, k) of the whole passage; only the chip's rows are written.
        """
        self._plan, offsets = plan, plan.offsets
        self._blocks = [(int(offsets[first]), int(offsets[last])) for first, last in plan.runs]
        planes = np.empty(plan.shape, np.float32)
        order, row_of_patch = np.empty(offsets[-1], np.int64), np.full(plan.n_patches, -1)
        targets = pieces(as_rows(planes)) + pieces(order[:, None], self._blocks, itemsize=np.dtype(np.int32).itemsize)
        for target, piece in zip(targets, sent, strict=True):
            target[:] = piece
        self._assignment = Assignment(order, offsets, plan.n_patches, plan.mask)
        self._im2col = in_tile_order(plan.geometry, plan.shape[3])
        for first, last in self._blocks:
            row_of_patch[order[first:last]] = np.arange(first, last)
            self._im2col.gather(planes, self._assignment, patches, first, last)
        self._row_of_patch = row_of_patch

    def pieces_of(self, rows: Matrix) -> list[Matrix]:
        """Return views of the chip's rows among all of the passage, in pieces."""
        return pieces(rows, self._blocks)

    def add_up(self, input_errors: Matrix) -> list[Matrix]:
        """Return what the chip's tiles add to the errors of the planes, part by part of the tree, in pieces."""
        n_tiles, found = len(self._plan.offsets) - 1, []
        for run in self._plan.runs:
            for part in parts_of(*run, n_tiles):
                planes = self._im2col.scatter(input_errors, self._assignment, self._row_of_patch, part)
                found += pieces(as_rows(planes))
        return found


def as_rows(planes: NDArray[np.float32]) -> Matrix:
    """Return planes (images, h, w, c) as (pixels, c)."""
    return planes.reshape(-1, planes.shape[-1])


def pieces(region: NDArray[Any], runs: Rows | None = None, itemsize: int | None = None) -> list[Any]:
    """Return views of some runs of rows, or of all, in pieces that Ray sends along with a call.

    Ray carries what is larger than 100 kB by way of its object stores, which takes 8 ms where a call takes one. Both
    ends cut alike, so that the pieces of one are those of the other; `itemsize` says how wide values are on the way.
    """
    runs = [(0, len(region))] if runs is None else runs
    row_bytes = region.shape[1] * (itemsize or region.itemsize)
    n_bytes = row_bytes * sum(last - first for first, last in runs)
    step = max(1, _PIECE_BYTES // row_bytes) if n_bytes <= _MOST_IN_PIECES else len(region)
    return [region[at : min(at + step, last)] for first, last in runs for at in range(first, last, step)]
