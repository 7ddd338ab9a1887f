"""The memory that an emulation takes, forecast before anything is started, and what the machine has.

Measured with Ray 2.60, Python 3.11 and torch 2.13 (CPU).
"""

from collections.abc import Sequence
from dataclasses import dataclass

from rapa_dist.demand import arena_floats
from rapa_dist.errors import ClusterError
from rapa_dist.fabric.chip import shared_bytes
from rapa_dist.machine import Machine
from rapa_dist.memory import memory

TILE_BYTES = 49_000_000
"""Memory that the process of a tile shares with no other."""
COORDINATOR_BYTES = 300_000_000
"""The coordinator's process, with torch."""
RAY_PROCESSES = 7
"""Ray's daemons on one node, where they are started for the run: GCS, raylet, dashboard, monitors and agents."""
RAY_BYTES = 400_000_000
"""Their memory. A run with 7 tiles then takes 1.10 GB in all (forecast 1.11), one with 21 takes 1.80 (1.81)."""


@dataclass(frozen=True, slots=True)
class Footprint:
    """What an emulation takes, in bytes."""

    shared: int
    """Arena and cells."""
    processes: int
    """Tiles, coordinator and Ray; what they share is not in it."""

    @property
    def total(self) -> int:
        """Bytes in all."""
        return self.shared + self.processes

    @classmethod
    def of(cls, machine: Machine, batch_size: int, fabric: str, tiles: Sequence[int] | None = None) -> "Footprint":
        """Forecast it for the coordinator's node.

        Args:
            machine: all tiles.
            batch_size: images in the largest mini-batch.
            fabric: where they live.
            tiles: those on this node, by number; None: all of them.
        """
        n_tiles = len(machine.tiles if tiles is None else tiles)
        on_ray = n_tiles * TILE_BYTES + RAY_BYTES if fabric == "ray" else 0
        return cls(shared_bytes(machine, arena_floats(machine, batch_size), tiles), COORDINATOR_BYTES + on_ray)


def tiles_that_fit(machine: Machine, batch_size: int, available: int) -> int:
    """Return how many tiles, as Ray actors, `available` bytes have room for beside all else that the run takes."""
    needed = Footprint.of(machine, batch_size, "ray").total
    return max(0, available - needed + len(machine.tiles) * TILE_BYTES) // TILE_BYTES


def check_memory(machine: Machine, batch_size: int, fabric: str, on_node: Sequence[int] | None = None) -> None:
    """Raise ClusterError if the emulation does not fit into memory, and say how much would.

    Args:
        machine: all tiles.
        batch_size: images in the largest mini-batch.
        fabric: where they live.
        on_node: those on this node, by number; None: all of them.
    """
    needed, available = Footprint.of(machine, batch_size, fabric, on_node), memory().available
    if needed.total <= available:
        return
    tiles = len(machine.tiles if on_node is None else on_node)
    room = tiles_that_fit(machine, batch_size, available) if fabric == "ray" else 0
    fits = f" About {room} tiles would fit, or use --fabric serial." if room else ""
    raise ClusterError(
        f"Too little memory: {tiles} tiles with mini-batches of {batch_size:,} images take about "
        f"{needed.total / 1e6:,.0f} MB, {available / 1e6:,.0f} MB are available.{fits} "
        "Use a smaller --batch-size or fewer --tiles."
    )
