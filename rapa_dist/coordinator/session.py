"""Opening the machine of a run: the fabric that was asked for, with kernels in its tiles."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch

from rapa_dist.console import stderr, work
from rapa_dist.fabric.base import Fabric, Kernels
from rapa_dist.fabric.chip import check_room
from rapa_dist.footprint import check_memory
from rapa_dist.machine import Machine


@contextmanager
def one_digital_thread() -> Iterator[None]:
    """Compute the digital side on one thread.

    The sums of a matrix product depend on how many threads share them, and so would a run's bits; and
    threads of PyTorch's that wait for work keep the cores from the tiles.
    """
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


class Place:
    """Where a run's tiles will live: checked, and Ray connected, before anything is written."""

    def __init__(self, fabric: str, machine: Machine, images: int, address: str | None) -> None:
        """Check memory; for the fabric "ray" find or start a cluster with enough tiles.

        Raises:
            UsageError, ClusterError: the machine can't be had; nothing was started.
        """
        self.fabric, self.machine, self.images = fabric, machine, images
        self._cluster = None
        if fabric == "ray":
            check_room(machine, images)
        check_memory(machine, images, fabric)
        if fabric == "ray":
            from rapa_dist.fabric.cluster import connect

            self._cluster = connect(address, len(machine.tiles))
            stderr.print(f"Ray cluster at {self._cluster.address} ({self._cluster.description})", markup=False)

    def open(self, kernels: Kernels, run: str, on_restart: Callable[[str], None]) -> Fabric:
        """Bring the tiles up with the given kernels; closing the fabric closes this place, too.

        Args:
            kernels: one array (n_t, k + 1, c_out) per layer.
            run: the run's name.
            on_restart: told the name of a tile whose process died and is back.
        """
        if self._cluster is None:
            from rapa_dist.fabric.serial import SerialFabric

            return SerialFabric(self.machine, self.images, kernels)
        from rapa_dist.fabric.ray import RayFabric

        with work("Starting tiles") as advance:
            return RayFabric(
                self.machine,
                self.images,
                kernels,
                run=run,
                cluster=self._cluster,
                advance=advance,
                on_restart=on_restart,
            )

    def close(self) -> None:
        """Let go of the cluster. Safe to call twice, and after the fabric was closed."""
        if self._cluster is not None:
            self._cluster.close()
