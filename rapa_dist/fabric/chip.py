"""A chip: the tiles of one node, the memory they share, and the doorbells that start their cycles."""

import secrets
import time
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from mmap import mmap
from pathlib import Path

from rapa_dist.errors import ClusterError
from rapa_dist.fabric import board
from rapa_dist.fabric.arena import Arena, arena_bytes
from rapa_dist.fabric.board import Board
from rapa_dist.fabric.cut_short import Guard
from rapa_dist.fabric.doorbell import Cycle, NodeDoorbell, Ring, Status, check_names
from rapa_dist.fabric.scratch import Scratch, check_shared_memory, fresh_name, map_existing, shared_memory_root
from rapa_dist.machine import Machine, TileArray, tile_name
from rapa_dist.tile import Cells, Matrix, Word

_ARENA = "arena"
_BOARD = "board"
PATIENCE_S = 0.5  # silence of a tile after which the chip looks whether its tiles are still there
_ROOM_PATIENCE_S = 0.005  # after which rings are tried again that a tile had no room for


@dataclass(frozen=True, slots=True, kw_only=True)
class Site:
    """Everything a tile needs to find its place on a chip; sent to its actor once, when it is made."""

    directory: Path
    """The chip's private directory."""
    token: int
    """What rings and answers of this run carry."""
    machine: Machine
    arena_floats: int
    """Size of the chip's arena."""
    tile: int
    """Number of the tile in `machine.tiles`."""

    @property
    def array(self) -> TileArray:
        """The array that the tile belongs to."""
        return self.machine.arrays[self.machine.tiles[self.tile][0]]

    def open_cells(self) -> Cells:
        """Map the tile's cells."""
        shape = self.array.kernel_shape
        return Cells(map_existing(self.directory / cells_name(self.tile), Cells.size(shape)), shape)

    def map_arena(self) -> mmap:
        """Map the memory of the chip's arena."""
        return map_existing(self.directory / _ARENA, arena_bytes(self.arena_floats))

    def map_board(self) -> mmap:
        """Map the memory of the chip's board."""
        return map_existing(self.directory / _BOARD, board.SIZE)


def cells_name(tile: int) -> str:
    """Return the name of the file that holds the cells of tile number `tile`."""
    return f"cells-{tile}"


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
            self.arena = Arena(self.scratch.map_file(_ARENA, arena_bytes(self.arena_floats)))
            total = len(self.machine.tiles)
            self.adopt(range(total) if self.tiles is None else self.tiles)
            self._board = Board(self.scratch.map_file(_BOARD, board.SIZE))
            self._bell = NodeDoorbell(self.scratch.path, total, self._token)
            self._bell.set_patience(PATIENCE_S)
        except BaseException:
            self._guard.close()
            self.scratch.remove()
            raise
        self.last_ring = [0] * len(self.machine.tiles)
        """By tile the number of its newest ring, for the `after` of the next one."""
        self.waiting_since = 0.0
        """time.monotonic() when `wait` was called last."""
        self._disturbed = False
        self._under_way: dict[int, dict[int, Ring]] = defaultdict(dict)  # by number and tile, in their order
        self._held: dict[int, list[Ring]] | None = None  # by tile, while rings are gathered into one message
        self._unsent: dict[int, list[Ring]] = {}  # by tile, those that it had no room for yet

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
        self.cells[tile].program(kernel, step)

    def ring(self, rings: Iterable[tuple[int, Ring]]) -> None:
        """Start a cycle on some tiles, given as (tile, ring); one that is busy does it afterwards."""
        under_way, held = self._under_way, self._held
        for tile, ring in rings:
            under_way[ring.number][tile] = ring
            self.last_ring[tile] = ring.number
            if held is None:
                self._send(tile, (ring,))
            else:
                held[tile].append(ring)

    @contextmanager
    def together(self) -> Iterator[None]:
        """Send what a tile is rung for inside as one message at the end: it wakes up once for all of it."""
        held: dict[int, list[Ring]] = defaultdict(list)
        self._held = held
        try:
            yield
        finally:  # also after an error: what was begun is under way
            self._held = None
            for tile, rings in held.items():
                self._send(tile, rings)

    def _send(self, tile: int, rings: Sequence[Ring]) -> None:
        """Ring a tile; what it has no room for waits for its turn, so that nobody else waits for this tile."""
        if tile in self._unsent:
            self._unsent[tile].extend(rings)
        elif left := self._bell.ring(tile, *rings):
            self._unsent[tile] = list(left)

    def _send_again(self) -> None:
        for tile, rings in list(self._unsent.items()):
            if left := self._bell.ring(tile, *rings, wait=False):
                self._unsent[tile] = list(left)
            else:
                del self._unsent[tile]
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
            for tile in reversed(self._under_way.get(awaited, ())):  # those that were rung last are done last
                self._wait_for(tile, awaited)
            self._under_way.pop(awaited, None)
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
            self._send(tile, self.owed(tile))
        elif status == Status.FAILED and (ring := self._under_way.get(number, {}).get(tile)):
            cycle = "forward" if ring.cycle == Cycle.FORWARD else "backward"
            raise ClusterError(
                f"{self.name_of(tile)} failed in its {cycle} cycle; the cause is in its log, below ray-logs in "
                "the run directory or with Ray."
            )

    def owed(self, tile: int) -> list[Ring]:
        """Return the rings of a tile that it has not answered yet."""
        answered = self.cells[tile].words[Word.ANSWERED]
        return [rings[tile] for number, rings in self._under_way.items() if number > answered and tile in rings]

    def _silent_tiles(self) -> list[int]:
        return [
            tile
            for number, rings in self._under_way.items()
            for tile in rings
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
