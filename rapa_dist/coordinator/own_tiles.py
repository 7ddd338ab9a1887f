"""The tiles of the run that this process trains: read where they lie, without asking anybody."""

from rapa_dist.fabric.base import Tiles
from rapa_dist.fabric.chip import tile_name
from rapa_dist.inspection import RunStats, read_tile


class OwnTiles:
    """What the tiles of a fabric have done, for the live table, the metrics and tiles.json."""

    def __init__(self, fabric: Tiles, run: str) -> None:
        """Look into a fabric while it is open."""
        self._fabric, self.run = fabric, run
        self._node = _node_id() if fabric.name == "ray" else ""

    def read(self) -> RunStats:
        """Return the stats of all tiles."""
        machine = self._fabric.machine
        return RunStats.of(
            self.run,
            [
                read_tile(cells, name=tile_name(layer.index, tile), layer=layer.index, node=self._node)
                for layer in machine.layers
                for tile, cells in enumerate(self._fabric.cells(layer.index))
            ],
        )


def _node_id() -> str:
    import ray

    return str(ray.get_runtime_context().get_node_id())
