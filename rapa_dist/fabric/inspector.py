"""Looking into the tiles of a chip from one of their processes: their cells are files on the node."""

from pathlib import Path

from rapa_dist.cells import Cells
from rapa_dist.fabric.scratch import map_existing
from rapa_dist.fabric.site import Site, cells_name
from rapa_dist.inspection import TileStats, read_tile


class Inspector:
    """Reads the stats of all tiles that share a chip's directory. Maps their cells once, when first asked."""

    def __init__(self, site: Site, node: str) -> None:
        """Look from the place of one tile, on the node of that id."""
        self._site, self._node = site, node
        self._cells: dict[int, Cells] = {}

    def own(self) -> TileStats:
        """Return the stats of the tile itself."""
        return self._read(self._site.tile)

    def chip(self) -> list[TileStats]:
        """Return the stats of every tile on the chip."""
        tiles = range(len(self._site.machine.tiles))
        return [self._read(number) for number in tiles if number in self._cells or self._file(number).exists()]

    def _read(self, number: int) -> TileStats:
        machine = self._site.machine
        layer, tile = machine.tiles[number]
        if number not in self._cells:
            shape = machine.arrays[layer].kernel_shape
            self._cells[number] = Cells(map_existing(self._file(number), Cells.size(shape)), shape)
        return read_tile(self._cells[number], machine.arrays[layer], tile, self._node)

    def _file(self, number: int) -> Path:
        return self._site.directory / cells_name(number)
