"""Fabric `ray`: every tile an actor in a process of its own, fed through shared memory."""

import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, suppress
from dataclasses import replace
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from rapa_dist.cells import Word
from rapa_dist.console import Advance
from rapa_dist.errors import CapacityError, NodeLostError
from rapa_dist.fabric.arena import Place
from rapa_dist.fabric.base import Kernels
from rapa_dist.fabric.chip import Chip
from rapa_dist.fabric.cluster import Cluster
from rapa_dist.fabric.command import Command, Way
from rapa_dist.fabric.doorbell import Cycle
from rapa_dist.fabric.ending import end_tiles
from rapa_dist.fabric.far import FarChip
from rapa_dist.fabric.lookout import RESTARTS, Lookout, Restart
from rapa_dist.fabric.nodes import node_here, placed, room_here
from rapa_dist.fabric.patience import ADVICE, LIMIT_S, bounded
from rapa_dist.fabric.placement import Room, choose, runs
from rapa_dist.fabric.registry import Registration
from rapa_dist.fabric.shared_rows import SharedRowsFabric
from rapa_dist.fabric.tile_actors import TileActors, named
from rapa_dist.fabric.tree import Part
from rapa_dist.hardware import Pace
from rapa_dist.inspection import TileStats, read_tile
from rapa_dist.interrupts import uninterrupted
from rapa_dist.machine import Machine, TileArray
from rapa_dist.tile import Matrix, Update

_HEAD_AFTER_S = 1.5  # of silence
_RETRY_S = 0.1
_NAME_PATIENCE_S = 20.0  # for Ray to free the names of actors that were killed
_FREE_PATIENCE_S = 2.0  # for Ray to count as free what they had


class RayFabric(SharedRowsFabric):
    """The product: n_t actors per tile array. Ray places, names and restarts them; it never carries rows."""

    name = "ray"

    def __init__(
        self,
        machine: Machine,
        arena_floats: int,
        kernels: Kernels,
        *,
        run: str,
        cluster: Cluster,
        rooms: Sequence[Room] | None = None,
        advance: Advance = lambda done, total: None,
        on_restart: Callable[[Restart], None] = lambda restart: None,
        restarts: int = RESTARTS,
        step: int = 0,
        pace: Pace | None = None,
    ) -> None:
        """Start an actor per tile and program `kernels`, one array (n_t, k + 1, c_out) per tile array, into them.

        Args:
            machine: which tiles.
            arena_floats: what passages need at the same time.
            kernels: initial kernels.
            run: the run's name, the first part of its actors' names.
            cluster: where; closed together with the fabric.
            rooms: the nodes that tiles may be placed on; None: this one, whatever it offers.
            advance: told how many tiles are up.
            on_restart: told of a tile whose process died, or hung and was killed, and is back.
            restarts: how often a tile may be restarted without getting on in between.
            step: steps that the kernels have been trained for.
            pace: how long tiles hold their answers; None: not at all. May be set anew between cycles.

        Raises:
            CapacityError: the nodes have too little room.
            ClusterError: tiles do not start.
        """
        self.network_ns = 0
        """Of the cycle that was finished last, what messages took beyond the work of other nodes' chips; 0 without."""
        self._arena_floats = arena_floats
        self.cluster = cluster
        self.pace = pace
        self._number = 0
        self._run = run
        self._actors = TileActors(run)
        self._on_restart = on_restart
        self._restarts = restarts
        self._registration: Registration | None = None
        self._far: list[FarChip] = []
        self._added_up: dict[int, dict[Part, Matrix]] = {}  # by cycle, until it is asked for
        self._leaving: list[Any] = []
        self._here = node_here()
        rooms = [room_here(len(machine.tiles))] if rooms is None else rooms
        self._node_of = dict(enumerate(placed(machine, rooms)))
        local = [tile for tile, node in self._node_of.items() if node == self._here]
        self._chip = Chip(machine, arena_floats, tiles=local)
        super().__init__(machine, self._chip.arena)
        self._lookout = Lookout(self._chip, self._actors, on_restart, restarts=restarts)
        self._look_after_tiles, self._chip.on_silence = self._chip.on_silence, self._on_silence
        try:
            self._start(rooms, advance)
            self.use(machine, kernels, step)
            self._empty_round()
        except BaseException:
            with uninterrupted():
                self._stop_tiles()
            raise

    def use(self, machine: Machine, kernels: Kernels, step: int = 0) -> None:
        """Work with some tiles of every layer only, as a smaller machine; the others sleep.

        On one node these are the first ones; on several, every node has its share.

        Args:
            machine: the one that was started, with as many tiles per layer or fewer.
            kernels: what to program into them.
            step: steps that the kernels have been trained for.
        """
        started = self._chip.machine
        for array, ours in zip(machine.arrays, started.arrays, strict=True):
            if array.n_tiles > ours.n_tiles or replace(array, n_tiles=ours.n_tiles, scheme=ours.scheme) != ours:
                raise ValueError(f"{array} is not part of {ours}")
        self.machine = machine
        self._tiles = choose(started, machine, self._node_of)
        self._local = self._places(self._here)
        self._ours = [
            (np.array([tile for _, tile in of], np.uint32), np.array([place for place, _ in of], np.int64))
            for of in self._local
        ]
        for far in self._far:
            far.use(self._places(far.node))
        self.program(kernels, step)

    def program(self, kernels: Kernels, step: int) -> None:
        """Program all tiles that are in use; tells every node once."""
        self._write(kernels, self.machine.arrays, step)

    def write(self, array: TileArray, kernels: Matrix, step: int) -> None:
        """Program kernels into the tiles of an array."""
        self._write([kernels], [array], step)

    def _write(self, kernels: Kernels, arrays: Sequence[TileArray], step: int) -> None:
        for array, of_array in zip(arrays, kernels, strict=True):
            for j, tile in self._local[array.index]:
                self._chip.program(tile, of_array[j], step)
        for far in self._far:
            places = self._places(far.node)
            pairs = zip(arrays, kernels, strict=True)
            far.program({tile: of_array[j] for array, of_array in pairs for j, tile in places[array.index]}, step)

    def _places(self, node: str) -> list[list[tuple[int, int]]]:
        """Return, for every layer, the tiles in use on a node, as (place in the layer, number)."""
        return [[(j, tile) for j, tile in enumerate(tiles) if self._node_of[tile] == node] for tiles in self._tiles]

    @property
    def spread(self) -> bool:
        """Whether tiles live on other nodes than the coordinator's: they can be lost, with their kernels."""
        return bool(self._far)

    def _start(
        self, rooms: Sequence[Room], advance: Advance = lambda done, total: None, patience_s: float = 0.0
    ) -> None:
        """Start the actors of all tiles that have none yet, and the chips that they need; return when they are up.

        Args:
            rooms: the nodes.
            advance: told how many are up.
            patience_s: for how long names that are still taken are tried again.
        """
        tiles = [tile for tile in self._node_of if tile not in self._actors]
        sites = {tile: self._chip.site(tile) for tile in tiles if self._node_of[tile] == self._here}
        known = {far.node: far for far in self._far}
        wanted = dict.fromkeys(self._node_of[tile] for tile in tiles if tile not in sites)
        deadline = time.monotonic() + patience_s
        with bounded("Starting a chip on each node", ADVICE, grace_s=patience_s):
            for room in rooms:
                if room.node in wanted and room.node not in known:
                    make = partial(
                        FarChip,
                        room,
                        self._run,
                        self._chip.machine,
                        self._arena_floats,
                        self._chip.arena,
                        self._restarts,
                    )
                    far = named(make, self._run, deadline)
                    known[room.node] = far
                    self._far.append(far)
        for node in wanted:
            sites |= known[node].adopt([tile for tile in tiles if self._node_of[tile] == node])
        with bounded("Naming the tiles", ADVICE, limit_s=LIMIT_S + len(tiles), grace_s=patience_s):
            for tile in tiles:
                self._actors.start(tile, self._chip.name_of(tile), sites[tile], self._node_of[tile], deadline)
        self._actors.wait_until_up(tiles, self._check_far, advance)
        for node, far in known.items():  # all of its tiles: an attempt that failed may have started some of them
            far.watch({tile: self._actors[tile] for tile, of in self._node_of.items() if of == node})

    def _check_far(self, tile: int | None) -> None:
        """Raise NodeLostError if another node, or the one that a tile is on, is lost."""
        for far in self._far:
            if tile is None or far.node == self._node_of[tile]:
                far.check()

    def _empty_round(self) -> None:
        """Ring all tiles that are in use, for nothing."""
        for array in self.machine.arrays:
            self.finish(self.begin_empty(array))

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
        """Ring every tile of an array."""
        self._number += 1
        rates = (update.learning_rate, update.weight_decay) if update else (0.0, 0.0)
        rows, row_ns = int(offsets[-1]), self.row_ns(cycle)
        command = Command(
            self._number, array.index, cycle, place, rows, array.k, array.c_out, *rates, row_ns=row_ns, draw=draw
        )
        if self._far:
            edges = offsets.tolist()
            for far in self._far:
                far.send(command, edges, way)
        tiles, places = self._ours[array.index]
        if len(tiles):
            first, last = (offsets[:-1], offsets[1:]) if not self._far else (offsets[places], offsets[places + 1])
            self._chip.ring(command.rings(tiles, first, last, self._chip.last_ring))
        return command.number

    def here(self, array: TileArray) -> list[tuple[int, int]]:
        """Return the tiles of an array that live on this node, as runs of their places in it."""
        return runs([place for place, _ in self._local[array.index]]) if self._far else super().here(array)

    def from_elsewhere(self, cycle: int) -> dict[Part, Matrix]:
        """Return, by part of the tree, what other nodes have added up of the input errors of a cycle; once."""
        return self._added_up.pop(cycle, {})

    def row_ns(self, cycle: int) -> float:
        """Return for how long an array would be busy with a row, slowed down."""
        if self.pace is None:
            return 0.0
        return self.pace.row_ns(
            forward=bool(cycle & Cycle.FORWARD),
            backward=bool(cycle & Cycle.INPUT_ERROR),
            update=bool(cycle & Cycle.UPDATE),
        )

    def begin_empty(self, array: TileArray) -> int:
        """Ring every tile of an array for nothing: the data plane's cost."""
        return self.begin(array, Cycle.EMPTY, Place(0, 0), np.zeros(array.n_tiles + 1, np.int64))

    def together(self) -> AbstractContextManager[None]:
        """Have the cycles that are begun inside reach every tile in one message."""
        return self._chip.together()

    def finish(self, cycle: int) -> None:
        """Wait until the tiles are done."""
        self._chip.wait(cycle)
        if self._far:
            self._finish_far(cycle)

    def _finish_far(self, cycle: int) -> None:
        self.network_ns = 0
        for far in self._far:
            done = far.finish(cycle)
            if done is not None:
                elapsed_ns, answer, parts = done
                if parts:
                    self._added_up.setdefault(cycle, {}).update(parts)
                self.network_ns = max(self.network_ns, elapsed_ns - answer.chip_ns)
                for restart in answer.restarted:
                    self._on_restart(restart)

    def kernels(self, array: TileArray) -> Matrix:
        """Return a copy of the kernels of a tile array, (n_t, k + 1, c_out). Between steps only."""
        return self._kernels([array])[0]

    def all_kernels(self) -> list[Matrix]:
        """Return a copy of the kernels of all tile arrays; asks every node once."""
        return self._kernels(self.machine.arrays)

    def stored(self) -> dict[int, Matrix]:
        """Return what devices store, where writing is noisy; asks every node once."""
        wanted = {array.index: self._tiles[array.index] for array in self.machine.arrays if array.stores}
        found: dict[int, Matrix] = {}
        for of_array in wanted.values():
            found |= {tile: self._chip.stored(tile) for tile in of_array if self._node_of[tile] == self._here}
        for far in self._far:
            tiles = [tile for of_array in wanted.values() for tile in of_array if self._node_of[tile] == far.node]
            if tiles:
                found |= zip(tiles, far.receive(far.ask_stored(tiles)), strict=True)
        return {index: np.stack([found[tile] for tile in of_array]) for index, of_array in wanted.items()}

    def restore(self, kernels: Kernels, stored: Mapping[int, Matrix]) -> None:
        """Put what was stored back, with what was seen of it."""
        states = {
            tile: (kernels[index][j], of_array[j])
            for index, of_array in stored.items()
            for j, tile in enumerate(self._tiles[index])
        }
        for tile, state in states.items():
            if self._node_of[tile] == self._here:
                self._chip.restore(tile, *state)
        for far in self._far:
            theirs = {tile: state for tile, state in states.items() if self._node_of[tile] == far.node}
            if theirs:
                far.restore(theirs)

    def _kernels(self, arrays: Sequence[TileArray]) -> list[Matrix]:
        wanted = list(chain(*(self._tiles[array.index] for array in arrays)))
        theirs = [[tile for tile in wanted if self._node_of[tile] == far.node] for far in self._far]
        asked = [far.ask_kernels(tiles) for far, tiles in zip(self._far, theirs, strict=True)]
        found = {tile: cells.kernel for tile, cells in self._chip.cells.items()}
        for far, tiles, reference in zip(self._far, theirs, asked, strict=True):
            found |= zip(tiles, far.receive(reference), strict=True)
        return [np.stack([found[tile] for tile in self._tiles[array.index]]) for array in arrays]

    def stats(self) -> list[TileStats]:
        """Return the stats of all tiles that are in use; asks every node once.

        Raises:
            ClusterError: the cluster's head is gone.
        """
        self.cluster.check_head()
        asked = [far.ask_stats() for far in self._far]
        tiles, arrays = self._chip.machine.tiles, self._chip.machine.arrays
        found = [
            read_tile(cells, arrays[tiles[tile][0]], tiles[tile][1], self._here)
            for tile, cells in self._chip.cells.items()
        ]
        for far, reference in zip(self._far, asked, strict=True):
            found += map(TileStats.from_dict, far.receive(reference))
        used = {self._chip.name_of(tile) for tile in chain(*self._tiles)}
        return [entry for entry in found if entry.tile in used]

    def _on_silence(self, tiles: list[int], seconds: float) -> None:
        if seconds >= _HEAD_AFTER_S:
            self.cluster.check_head()
        self._look_after_tiles(tiles, seconds)

    def busy_ns(self, array: int) -> list[int]:
        """Return by tile of a layer the processor time that it has taken so far, as of its last cycle."""
        far: dict[int, int] = {}
        for chip in self._far:
            far |= chip.busy_ns
        cells = self._chip.cells
        return [cells[tile].words[Word.BUSY_NS] if tile in cells else far.get(tile, 0) for tile in self._tiles[array]]

    def pids(self) -> list[int]:
        """Return the processes of the tiles that are in use on this node."""
        return [int(self._chip.cells[tile].words[Word.PID]) for places in self._local for _, tile in places]

    def recover(self, lost: NodeLostError, kernels: Kernels, step: int, rooms: Callable[[], Sequence[Room]]) -> None:
        """Go on without a node: place its tiles on others and program all tiles. May be called again if it fails.

        Args:
            lost: what was raised.
            kernels: what to program, one array (n_t, k + 1, c_out) per layer.
            step: steps that they have been trained for.
            rooms: returns the nodes that are left, and how many tiles they can take besides those that they have.

        Raises:
            CapacityError: they have too little room.
            NodeLostError: another node is lost.
        """
        deadline = time.monotonic()
        if lost.node in self._node_of.values():
            deadline += _FREE_PATIENCE_S
        self._forget(lost.node)
        self.lend_anew()
        self._added_up.clear()
        for far in self._far:
            far.settle()
        self._chip.wait()
        before = set(self._chip.cells)
        left = self._place_again(rooms, deadline)
        local = {tile for tile, node in self._node_of.items() if node == self._here}
        self._chip.adopt(sorted(local - before))
        self._start(left, patience_s=_NAME_PATIENCE_S)
        self.use(self.machine, kernels, step)
        self._empty_round()
        if self._registration is not None:
            self._register(self._registration)

    def _place_again(self, rooms: Callable[[], Sequence[Room]], deadline: float) -> Sequence[Room]:
        """Place the tiles that have no node; until the deadline Ray may not have counted as free what was lost."""
        while True:
            left = rooms()
            try:
                self._node_of = dict(enumerate(placed(self._chip.machine, left, self._node_of)))
                return left
            except CapacityError:
                if time.monotonic() > deadline:
                    raise
                time.sleep(_RETRY_S)

    def _forget(self, node: str) -> None:
        """Drop a node's chip and tiles, and end their processes and remove their files where they can be reached."""
        lost = [far for far in self._far if far.node == node]
        self._far = [far for far in self._far if far.node != node]
        for far in lost:
            far.kill()
        for tile in [tile for tile, of in self._node_of.items() if of == node]:
            del self._node_of[tile]
            self._actors.end(tile)
        for far in lost:
            self._leaving += far.clear_away()

    def close(self) -> None:
        """Ask the actors to leave, disconnect from Ray, and remove arena, cells and doorbells."""
        with uninterrupted():
            self._stop_tiles()
            self.cluster.close()

    def _stop_tiles(self) -> None:
        import ray

        if not ray.is_initialized() or (self.cluster.scratch is None and not self.cluster.is_there()):
            self._lookout.end_tiles()  # Ray does not
        elif self.cluster.scratch is None:
            end_tiles(self._run, self._actors, self._lookout, self._far, self._leaving)
        else:  # what does not leave goes with the cluster
            self._lookout.end_tiles(only_stopped=True)
            self._actors.ask_to_leave()
        self._far.clear()
        self._chip.close()

    def register(self, run: str, run_dir: Path, options: Sequence[str] = ()) -> None:
        """Let `rapa-dist stats` find the run on each of its nodes, for as long as the chips are there.

        Args:
            run: its name.
            run_dir: its directory.
            options: of `rapa-dist train`, to resume it in the same way.
        """
        import ray

        address = ray.get_runtime_context().gcs_address  # what other nodes know, where the user wrote 127.0.0.1
        self._registration = Registration.of_this_process(
            run=run, address=address, run_dir=run_dir, folder=self._chip.scratch.path, options=options
        )
        self._register(self._registration)

    def _register(self, registration: Registration) -> None:
        with suppress(OSError):  # it can still be found through its cluster
            registration.write()
        for far in self._far:
            far.register(registration)
