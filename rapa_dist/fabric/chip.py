"""A chip: the tiles of one node, the memory they share, and the doorbells that start their cycles."""

import secrets
import time
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from rapa_dist.cells import Cells, Word
from rapa_dist.errors import ClusterError
from rapa_dist.fabric import board
from rapa_dist.fabric.arena import Arena, arena_bytes
from rapa_dist.fabric.board import Board
from rapa_dist.fabric.cut_short import Guard
from rapa_dist.fabric.doorbell import MOST_RINGS, Cycle, Ring, Status, check_names
from rapa_dist.fabric.ringing import NodeDoorbell, Rings
from rapa_dist.fabric.scratch import Scratch, check_shared_memory, fresh_name, shared_memory_root
from rapa_dist.fabric.site import ARENA, BOARD, Site, cells_name
from rapa_dist.machine import Machine, tile_name
from rapa_dist.native import tile_of
from rapa_dist.tile import Matrix

PATIENCE_S = 0.5  # silence of a tile after which the chip looks whether its tiles are still there
_ROOM_PATIENCE_S = 0.005  # after which rings are tried again that a tile had no room for


def shared_bytes(machine: Machine, arena_floats: int, tiles: Iterable[int] | None = None) -> int:
    """Return the shared memory that a chip takes which holds some tiles of a machine; None: all of them."""
    numbers = range(len(machine.tiles)) if tiles is None else tiles
    arrays = (machine.arrays[machine.tiles[tile][0]] for tile in numbers)
    return arena_bytes(arena_floats) + sum(Cells.size(array.kernel_shape) for array in arrays) + board.SIZE


def check_room(machine: Machine, arena_floats: int, tiles: Iterable[int] | None = None) -> None:
    """Raise ClusterError unless shared memory here can take a chip: enough is free, and names aren't too long."""
    root = shared_memory_root()
    check_names(root / fresh_name(), len(machine.tiles))
    check_shared_memory(shared_bytes(machine, arena_floats, tiles), root)


@dataclass
class Chip:
    """Owns a node's arena, cells and doorbells. Knows nothing of Ray: tiles are whoever answers."""

    machine: Machine
    arena_floats: int
    """What passages need at the same time."""
    on_silence: Callable[[list[int], float], None] = lambda tiles, seconds: None
    """Called with the tiles that owe an answer and for how long; raises to give the run up."""
    on_hello: Callable[[int], None] = lambda tile: None
    """Called when a tile's process has come up, for the first time or again; raises to give the run up."""
    on_calm: Callable[[], None] = lambda: None
    """Called at the end of a wait in which one of the others was."""
    tiles: Iterable[int] | None = None
    """Numbers of the tiles of the machine that live here; None: all of them."""
    cells: dict[int, Cells] = field(init=False, default_factory=dict)
    """By number of the tile, for those that live here."""
    arena: Arena = field(init=False)

    def __post_init__(self) -> None:
        self.scratch = Scratch()
        self._guard = Guard(self.scratch.what_is_cut, self.scratch.remove)
        try:
            self._token = secrets.randbits(64)
            self.arena = Arena(self.scratch.map_file(ARENA, arena_bytes(self.arena_floats)))
            total = len(self.machine.tiles)
            self.adopt(range(total) if self.tiles is None else self.tiles)
            self._board = Board(self.scratch.map_file(BOARD, board.SIZE))
            self._bell = NodeDoorbell(self.scratch.path, total, self._token)
            self._bell.set_patience(PATIENCE_S)
        except BaseException:
            self._guard.close()
            self.scratch.remove()
            raise
        self.last_ring = np.zeros(len(self.machine.tiles), np.uint64)
        """By tile the number of its newest ring, for the `after` of the next one."""
        self.waiting_since = 0.0
        """time.monotonic() when `wait` was called last."""
        self._disturbed = False
        self._under_way: dict[int, Rings] = {}  # by number, in their order
        self._held: list[Rings] | None = None  # while rings are gathered into one message
        self._unsent: dict[int, list[Sequence[NDArray[np.void]]]] = {}  # by tile, those that it had no room for yet

    def adopt(self, tiles: Iterable[int]) -> None:
        """Make cells for further tiles of the machine; those that live here already keep theirs.

        Raises:
            ClusterError: there is too little shared memory.
        """
        for tile in tiles:
            if tile in self.cells:
                continue
            shape = self.machine.arrays[self.machine.tiles[tile][0]].kernel_shape
            self.cells[tile] = Cells(self.scratch.map_file(cells_name(tile), Cells.size(shape)), shape)

    def site(self, tile: int) -> Site:
        """Return what the process of tile number `tile` has to know."""
        return Site(
            directory=self.scratch.path,
            token=self._token,
            machine=self.machine,
            arena_floats=self.arena_floats,
            tile=tile,
        )

    def program(self, tile: int, kernel: Matrix, step: int = 0) -> None:
        """Write a kernel (k + 1, c_out), as after `step` steps, into the cells of a tile that is not at work."""
        if self.machine.arrays[self.machine.tiles[tile][0]].physics is None:
            self.cells[tile].program(kernel, step)
        else:
            self._physical(tile).program(kernel, step)

    def stored(self, tile: int) -> Matrix:
        """Return a copy of what the devices of a tile store, (k + 1, c_out), where writing is noisy."""
        found: Matrix = self._physical(tile).stored.copy()
        return found

    def restore(self, tile: int, kernel: Matrix, stored: Matrix) -> None:
        """Put what was stored back into a tile that is not at work, with what was seen of it."""
        self._physical(tile).restore(kernel, stored)

    def _physical(self, tile: int) -> Any:
        index, number = self.machine.tiles[tile]
        return tile_of(self.cells[tile], self.machine.arrays[index], number)

    def ring(self, rings: Rings) -> None:
        """Start a cycle on some tiles; one that is busy does it afterwards."""
        self._under_way[rings.number] = rings
        self.last_ring[rings.tiles] = rings.number
        if self._held is None:
            self._send(rings.tiles, [rings.messages])
        else:
            self._held.append(rings)

    @contextmanager
    def together(self) -> Iterator[None]:
        """Send what a tile is rung for inside as one message at the end: it wakes up once for all of it."""
        held: list[Rings] = []
        self._held = held
        try:
            yield
        finally:  # also after an error: what was begun is under way
            self._held = None
            if held:
                self._send_together(held)

    def _send_together(self, held: Sequence[Rings]) -> None:
        """Send rings of several cycles, those of one tile in one message, as far as it holds them."""
        tiles = held[0].tiles
        if all(rings.tiles is tiles for rings in held):
            for first in range(0, len(held), MOST_RINGS):
                self._send(tiles, [rings.messages for rings in held[first : first + MOST_RINGS]])
            return
        of_tile: dict[int, list[NDArray[np.void]]] = defaultdict(list)
        for rings in held:
            for place, tile in enumerate(rings.tiles.tolist()):
                of_tile[tile].append(rings.messages[place : place + 1])
        for tile, messages in of_tile.items():
            for first in range(0, len(messages), MOST_RINGS):
                self._send(np.array([tile], np.uint32), messages[first : first + MOST_RINGS])

    def _send(self, tiles: NDArray[np.uint32], messages: Sequence[NDArray[np.void]]) -> None:
        """Ring tiles; what one has no room for waits for its turn, so that nobody else waits for this tile."""
        left: NDArray[np.bool_] | None
        if self._unsent:  # a tile hears them in their order
            left = np.isin(tiles, list(self._unsent))
            others = ~left
            if others.any():
                more = self._bell.ring(tiles[others], [rings[others] for rings in messages])
                if more is not None:
                    left[others] = more
        else:
            left = self._bell.ring(tiles, messages)
        if left is not None:
            for place in np.nonzero(left)[0]:
                message = [rings[place : place + 1] for rings in messages]
                self._unsent.setdefault(int(tiles[place]), []).append(message)

    def _send_again(self) -> None:
        for number, messages in list(self._unsent.items()):
            tile = np.array([number], np.uint32)
            while messages and self._bell.ring(tile, messages[0], wait=False) is None:
                messages.pop(0)
            if not messages:
                del self._unsent[number]
        self._bell.set_patience(_ROOM_PATIENCE_S if self._unsent else PATIENCE_S)

    def wait(self, number: int | None = None) -> None:
        """Return when all tiles that were rung with this number are done, or all that were rung at all.

        Tiles that had to be restarted are rung again with everything they owe.

        Raises:
            ClusterError: a tile reports that it failed, or `on_silence` or `on_hello` gave up.
        """
        self.waiting_since = time.monotonic()
        if self._unsent:
            self._send_again()
        for awaited in [number] if number is not None else list(self._under_way):
            if (rings := self._under_way.get(awaited)) is not None:
                for tile in reversed(rings.tiles.tolist()):  # those that were rung last are done last
                    self._wait_for(tile, awaited)
                del self._under_way[awaited]
        if self._disturbed:
            self._disturbed = False
            self.on_calm()

    def _wait_for(self, tile: int, number: int) -> None:
        words, silence_s, unlooked_s = self.cells[tile].words, 0.0, 0.0
        while words[Word.ANSWERED] < number:
            self._board.ask(tile)
            if words[Word.ANSWERED] >= number:
                break
            asked = time.monotonic()
            message = self._bell.hear()
            # Counted whoever else was heard, as that says nothing of this tile. And no longer at a time than its
            # patience: a coordinator that was stopped for a while has not been waiting.
            unlooked_s += min(time.monotonic() - asked, PATIENCE_S)
            if message is not None:
                self._take_note(*message)
            if self._unsent:
                self._send_again()
            if unlooked_s >= 0.99 * PATIENCE_S:
                unlooked_s = 0.0
                silence_s += PATIENCE_S
                self._disturbed = True
                if (cut := self.scratch.what_is_cut()) is not None:
                    raise ClusterError(cut)
                self.on_silence(self._silent_tiles(), silence_s)
        self._board.ask_nobody()

    def _take_note(self, tile: int, number: int, status: int) -> None:
        """Act on a tile's message. That it is done needs no act: its cells say so."""
        if status == Status.HELLO:
            self._disturbed = True
            self.on_hello(tile)
            self._unsent.pop(tile, None)
            for owed in self.owed(tile):
                again = Rings.of([(tile, owed)])
                self._send(again.tiles, [again.messages])
        elif status == Status.FAILED and (rings := self._under_way.get(number)) and (ring := rings.to(tile)):
            cycle = "forward" if ring.cycle == Cycle.FORWARD else "backward"
            raise ClusterError(
                f"{self.name_of(tile)} failed in its {cycle} cycle; the cause is in its log, below ray-logs in "
                "the run directory or with Ray."
            )

    def owed(self, tile: int) -> list[Ring]:
        """Return the rings of a tile that it has not answered yet."""
        answered = self.cells[tile].words[Word.ANSWERED]
        found = (rings.to(tile) for number, rings in self._under_way.items() if number > answered)
        return [ring for ring in found if ring is not None]

    def _silent_tiles(self) -> list[int]:
        return [
            tile
            for number, rings in self._under_way.items()
            for tile in rings.tiles.tolist()
            if self.cells[tile].words[Word.ANSWERED] < number
        ]

    def name_of(self, tile: int) -> str:
        """Return a tile's name as people read it, like "L0/T003"."""
        layer, number = self.machine.tiles[tile]
        return tile_name(layer, number)

    def close(self) -> None:
        """Remove everything that the chip put on the node. Safe to call twice."""
        self._bell.close()
        self._guard.close()
        self.scratch.remove()
