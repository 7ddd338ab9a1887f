"""Opening the machine of a run: the fabric that was asked for, with kernels in its tiles."""

import os
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import torch

from rapa_dist.console import stderr, work
from rapa_dist.coordinator.sessions import last_options
from rapa_dist.demand import arena_floats
from rapa_dist.fabric.address import find_address
from rapa_dist.fabric.base import Fabric, Kernels
from rapa_dist.fabric.chip import check_room
from rapa_dist.fabric.cluster import Cluster, connect_to
from rapa_dist.fabric.lookout import RESTARTS, Restart
from rapa_dist.fabric.nodes import find_rooms, node_here, placed, reachable
from rapa_dist.fabric.placement import Room
from rapa_dist.fabric.quiet import keep_memory
from rapa_dist.fabric.registry import registered
from rapa_dist.fabric.running_code import installed_modules
from rapa_dist.footprint import check_memory
from rapa_dist.interrupts import uninterrupted
from rapa_dist.machine import Machine
from rapa_dist.native import use_threads

_MOST_THREADS = 4


@contextmanager
def one_digital_thread() -> Iterator[None]:
    """Compute the digital side on one thread, but for passes of the library where there are cores to spare.

    The sums of a matrix product depend on how many threads share them, and so would a run's bits; and
    threads of PyTorch's that wait for work keep the cores from the tiles. From here on the process also keeps
    memory that it frees.
    """
    keep_memory()
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    use_threads(min(_MOST_THREADS, len(os.sched_getaffinity(0)) // 2))  # the other half is the tiles'
    try:
        yield
    finally:
        use_threads(1)
        torch.set_num_threads(before)


def look_ahead(kind: str, address: str | None) -> None:
    """Look for the Ray cluster that a run will join, before its images are read, which may take minutes.

    What code this process runs is noted as well, as long as it is surely what the files hold.

    Raises:
        UsageError, ClusterError: an address was asked for, and nothing that can be joined is there.
    """
    if kind == "ray":
        installed_modules()
        find_address(address)


class Place:
    """Where a run's tiles live; owns the Ray cluster that was joined or started, and the tiles on it."""

    def __init__(
        self, kind: str, machine: Machine, batch_size: int, device: str = "cpu", nodes: int | None = None
    ) -> None:
        """Choose it; nothing is started yet.

        Args:
            kind: the fabric, one of `FABRICS`.
            machine: which tiles.
            batch_size: images in the largest mini-batch.
            device: where the fabric "batched" has its tensors, "cpu" or "cuda".
            nodes: nodes to use at most, this one first; None: all that offer tiles.
        """
        self._kind, self._machine, self._batch_size, self._device = kind, machine, batch_size, device
        self._arena_floats = arena_floats(machine, batch_size)
        self._nodes = nodes
        self.where = ""
        """The cluster that was joined or started, in words; empty where there is none."""
        self._cluster: Cluster | None = None
        self._fabric: Fabric | None = None
        self._rooms: list[Room] | None = None
        self._registered = ExitStack()

    def connect(self, address: str | None) -> None:
        """Join the Ray cluster at `address`, or find or start one; for the other fabrics only look at the memory.

        Raises:
            UsageError, ClusterError: there is none with enough tiles, or this node has too little memory.
        """
        if self._kind != "ray":
            check_memory(self._machine, self._batch_size, self._kind)
            return
        found = find_address(address)
        if found is None:
            self._check(None)
        with uninterrupted():  # else it might be connected, and not be known to `close`
            self._cluster = connect_to(found, len(self._machine.tiles))
        if found is not None:
            self._rooms = self.rooms()
            on_nodes = placed(self._machine, self._rooms)
            self._check([tile for tile, node in enumerate(on_nodes) if node == node_here()])
        self.where = f"Ray cluster at {self._cluster.address} ({self._cluster.description})"
        if self._rooms is not None and (counts := Counter(on_nodes)).keys() != {node_here()}:
            shares = (f"{counts[room.node]} on {room.address}" for room in self._rooms if counts[room.node])
            self.where += f"\n{len(on_nodes)} tiles on {len(counts)} nodes: {', '.join(shares)}"
        stderr.print(self.where, markup=False)

    def rooms_left(self) -> list[Room]:
        """Return the same as `rooms` after something was lost.

        Raises:
            ClusterError: the cluster's head is gone.
        """
        if self._cluster is not None:
            self._cluster.check_head(wait=True)  # Ray would be asked in vain
        return self.rooms()

    def rooms(self) -> list[Room]:
        """Return the nodes that tiles may be placed on now: those that can be reached, as many as are to be used."""
        return reachable(find_rooms(), self._nodes)

    def _check(self, tiles: list[int] | None) -> None:
        """Raise ClusterError if this node has too little memory for some tiles; None: all of them."""
        check_room(self._machine, self._arena_floats, tiles)
        check_memory(self._machine, self._batch_size, self._kind, tiles)

    def open(
        self,
        kernels: Kernels,
        run: str,
        run_dir: Path,
        on_restart: Callable[[Restart], None],
        *,
        step: int = 0,
        restarts: int = RESTARTS,
    ) -> Fabric:
        """Bring the tiles up with the given kernels.

        Args:
            kernels: one array (n_t, k + 1, c_out) per layer.
            run: the run's name.
            run_dir: its directory, for those who find the run on this node.
            on_restart: told of a tile whose process died, or hung and was killed, and is back.
            step: training steps that the kernels have been through.
            restarts: how often a tile's process may be replaced in one and the same cycle.
        """
        options = last_options(run_dir)
        if self._kind != "ray":
            registration = registered(run=run, run_dir=run_dir, fabric=self._kind, options=options)
            with uninterrupted():
                self._registered.enter_context(registration)
        if self._kind == "batched":
            from rapa_dist.fabric.batched import BatchedFabric

            self._fabric = BatchedFabric(self._machine, kernels, device=self._device, step=step)
            return self._fabric
        if self._cluster is None:
            from rapa_dist.fabric.serial import SerialFabric

            self._fabric = SerialFabric(self._machine, self._arena_floats, kernels, step=step)
            return self._fabric
        from rapa_dist.fabric.ray import RayFabric

        with work("Starting tiles") as advance:
            self._fabric = fabric = RayFabric(
                self._machine,
                self._arena_floats,
                kernels,
                run=run,
                cluster=self._cluster,
                rooms=self._rooms,
                advance=advance,
                on_restart=on_restart,
                restarts=restarts,
                step=step,
            )
        fabric.register(run, run_dir, options)
        return fabric

    def keep_logs(self, folder: Path) -> None:
        """Copy the logs of Ray and the tiles, before closing, if Ray was started for this run."""
        if self._cluster is not None:
            self._cluster.keep_logs(folder)

    def close(self) -> None:
        """Stop the tiles, and what was started for them. Safe to call twice."""
        with uninterrupted(), ExitStack() as each:  # the others also where one fails
            each.callback(self._registered.close)
            if self._cluster is not None:
                each.callback(self._cluster.close)
            if self._fabric is not None:
                each.callback(self._fabric.close)
