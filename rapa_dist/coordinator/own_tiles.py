"""The tiles of the run that this process trains: read where they lie, without asking them."""

from rapa_dist.fabric.base import Fabric
from rapa_dist.inspection import RunStats


class OwnTiles:
    """What the tiles of a fabric have done, for the live table, the metrics and tiles.json."""

    def __init__(self, fabric: Fabric, run: str) -> None:
        """Look into a fabric while it is open."""
        self._fabric, self.run = fabric, run

    def read(self) -> RunStats:
        """Return the stats of all tiles.

        Raises:
            NodeLostError: a node does not answer any more.
        """
        return RunStats.of(self.run, self._fabric.stats())
