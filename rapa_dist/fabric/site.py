"""Where a tile finds its place on a chip: the files that its process maps."""

from dataclasses import dataclass
from mmap import mmap
from pathlib import Path

from rapa_dist.cells import Cells
from rapa_dist.fabric import board
from rapa_dist.fabric.arena import arena_bytes
from rapa_dist.fabric.scratch import map_existing
from rapa_dist.machine import Machine, TileArray

ARENA, BOARD = "arena", "board"  # names of files


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
        return map_existing(self.directory / ARENA, arena_bytes(self.arena_floats))

    def map_board(self) -> mmap:
        """Map the memory of the chip's board."""
        return map_existing(self.directory / BOARD, board.SIZE)


def cells_name(tile: int) -> str:
    """Return the name of the file that holds the cells of tile number `tile`."""
    return f"cells-{tile}"
