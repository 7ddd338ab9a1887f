"""The coordinator's end of a chip on another node: messages through Ray, and whether the node is still there."""

import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

import numpy as np

from rapa_dist.errors import ClusterError, NodeLostError
from rapa_dist.fabric.arena import Arena, Place
from rapa_dist.fabric.cluster import NAMESPACE
from rapa_dist.fabric.command import Command, Way
from rapa_dist.fabric.doorbell import Cycle
from rapa_dist.fabric.nodes import CUT_OFF_S, listens
from rapa_dist.fabric.placement import Room, runs
from rapa_dist.fabric.registry import Registration
from rapa_dist.fabric.remote import Answer, Plan, RemoteChip, as_rows, clear_away, pieces
from rapa_dist.fabric.running_code import installed_code
from rapa_dist.fabric.site import Site
from rapa_dist.fabric.tree import Part, parts_of
from rapa_dist.machine import Machine
from rapa_dist.tile import Matrix

_LOOK_S = 1.0  # without an answer, after which it is looked whether the node is still there
_LONGEST_S = 240.0  # for an answer, from a node that is there: longer than a chip gives its tiles to restart
_START_TIMEOUT_S = 60.0
_CLOSING = "closing"  # of Ray's concurrency groups, each of which has a thread of its own


class _Share(NamedTuple):
    """What a chip has of one layer."""

    tiles: tuple[int, ...]
    """Its tiles, by their numbers in the machine."""
    positions: tuple[int, ...]
    """Their places among the tiles of the layer that are in use."""
    runs: list[tuple[int, int]]
    """Runs of such places that follow each other: rows of a run are one block."""


class _UnderWay(NamedTuple):
    """A cycle that a chip has been told to do."""

    references: list[Any]
    """What Ray returned: of an `Answer`, and of the pieces that come with it."""
    tiles: tuple[int, ...]
    targets: list[Matrix]
    """Where the pieces belong."""
    parts: dict[Part, Matrix]
    """By part of the tree, the planes that pieces are put together to."""
    sent_ns: int


class FarChip:
    """The tiles of one other node, for the coordinator. What it is told, it does one after the other."""

    def __init__(self, room: Room, run: str, machine: Machine, arena_floats: int, arena: Arena, restarts: int) -> None:
        """Start the chip on its node; returns before it is up.

        Args:
            room: the node.
            run: the run's name.
            machine: the whole machine.
            arena_floats: what passages need at the same time.
            arena: the coordinator's, from which errors are sent, and into which outputs are received.
            restarts: how often a tile may be restarted without getting on in between.
        """
        import ray

        self.node, self.address = room.node, room.address
        self._port, self._arena = room.port, arena
        self.busy_ns: dict[int, int] = {}
        """By tile, as of its last answer."""
        self._shares: list[_Share] = []
        self._under_way: dict[int, _UnderWay] = {}
        self._planes: dict[Place, tuple[tuple[int, ...], int]] = {}
        """By place of a passage, the shape of its planes, and how many tiles its layer has."""
        self._folder: Path | None = None
        as_actor: Any = ray.remote(concurrency_groups={_CLOSING: 1})  # type: ignore[call-overload]
        self._actor = (
            as_actor(RemoteChip)
            .options(
                name=f"{run}/chip/{room.node}",
                namespace=NAMESPACE,
                num_cpus=0,
                max_restarts=0,
                scheduling_strategy=self._there(),
            )
            .remote(room.node)
        )
        self._started = self._actor.start.remote(machine, arena_floats, restarts, installed_code())

    def adopt(self, tiles: Sequence[int]) -> dict[int, Site]:
        """Have it make cells for tiles, and return what their processes have to know.

        Raises:
            NodeLostError: the node is gone.
            ClusterError: it has too little shared memory.
        """
        self._folder = self._get(self._started, limit_s=_START_TIMEOUT_S)
        sites: dict[int, Site] = self._get(self._actor.adopt.remote(tiles), limit_s=_START_TIMEOUT_S)
        return sites

    def watch(self, actors: Mapping[int, Any]) -> None:
        """Have it look after tile actors, which are up."""
        self._actor.watch.remote(dict(actors))

    def register(self, registration: Registration) -> None:
        """Have the run found on that node."""
        self._actor.register.remote(registration)

    def use(self, places: Sequence[Sequence[tuple[int, int]]]) -> None:
        """Take note of which of its tiles are in use: for every layer (place in the layer, number of the tile)."""
        self._shares = []
        for of_layer in places:
            positions, tiles = [place for place, _ in of_layer], tuple(tile for _, tile in of_layer)
            self._shares.append(_Share(tiles, tuple(positions), runs(positions)))

    def program(self, kernels: Mapping[int, Matrix], step: int) -> None:
        """Have kernels written, by tile, as after so many steps; returns when they are."""
        self._get(self._actor.program.remote(dict(kernels), step))

    def restore(self, states: Mapping[int, tuple[Matrix, Matrix]]) -> None:
        """Have what was seen and what was stored put back, by tile; returns when it is."""
        self._get(self._actor.restore.remote(dict(states)))

    def ask_stored(self, tiles: Sequence[int]) -> Any:
        """Ask for what the devices of tiles store; `receive` returns it as a list."""
        return self._actor.stored.remote(tiles)

    def ask_kernels(self, tiles: Sequence[int]) -> Any:
        """Ask for the kernels of tiles; `receive` returns them as a list."""
        return self._actor.kernels.remote(tiles)

    def ask_stats(self) -> Any:
        """Ask for the stats of its tiles; `receive` returns them as dictionaries."""
        return self._actor.stats.remote()

    def receive(self, reference: Any) -> Any:
        """Return what was asked for.

        Raises:
            NodeLostError: the node is gone.
        """
        return self._get(reference)

    def send(self, command: Command, edges: Sequence[int], way: Way | None = None) -> None:
        """Send a cycle, with the planes or errors that it needs.

        Args:
            command: the cycle.
            edges: tile j of the layer has the rows edges[j] … edges[j + 1] − 1.
            way: in a forward cycle the planes, and which patches of theirs go where.
        """
        share = self._shares[command.array]
        if not share.tiles:
            return
        sent_ns = time.monotonic_ns()
        blocks = [(edges[first], edges[last]) for first, last in share.runs]
        outputs = command.outputs(self._arena)
        sent: list[Any] = []
        plan, targets, parts = None, [], {}
        if command.is_forward and command.rows:
            assert way is not None
            plan = Plan.of(way, share.runs)
            self._planes[command.place] = way.planes.shape, len(edges) - 1
            order = way.assignment.order.astype(np.int32)[:, None]
            sent = pieces(as_rows(way.planes)) + pieces(order, blocks)
            targets = pieces(outputs, blocks)
        elif command.rows:
            sent = pieces(outputs, blocks)
            if command.cycle & Cycle.INPUT_ERROR:
                shape, n_tiles = self._planes[command.place]
                held = (part for run in share.runs for part in parts_of(*run, n_tiles))
                parts = {part: np.empty(shape, np.float32) for part in held}
                targets = [piece for planes in parts.values() for piece in pieces(as_rows(planes))]
        rows = [(edges[place], edges[place + 1]) for place in share.positions]
        method = self._actor.cycle.options(num_returns=1 + len(targets))
        references = method.remote(command, share.tiles, rows, plan, *sent)
        references = references if targets else [references]
        self._under_way[command.number] = _UnderWay(references, share.tiles, targets, parts, sent_ns)

    def finish(self, number: int) -> tuple[int, Answer, dict[Part, Matrix]] | None:
        """Wait for a cycle, and put the outputs that come back into the arena.

        Returns:
            The nanoseconds from sending to having it all, the answer, and by part of the tree what was added up of the
            input errors; None if it has none of the layer's tiles.

        Raises:
            NodeLostError: the node is gone.
            ClusterError: a tile failed there.
        """
        under_way = self._under_way.pop(number, None)
        if under_way is None:
            return None
        answer, *rows = self._get(under_way.references)
        for target, piece in zip(under_way.targets, rows, strict=True):
            target[:] = piece
        self.busy_ns.update(zip(under_way.tiles, answer.busy_ns, strict=True))
        return time.monotonic_ns() - under_way.sent_ns, answer, under_way.parts

    def settle(self) -> None:
        """Wait for whatever is under way, and forget it."""
        for number in list(self._under_way):
            self._get(self._under_way.pop(number).references)

    def close(self) -> Any:
        """Have it remove what it put on its node; returns what to wait for."""
        return self._actor.close.options(concurrency_group=_CLOSING).remote()

    def kill(self) -> None:
        """End its process, if it can be reached."""
        import ray

        self._under_way.clear()
        with suppress(Exception):  # it has gone already
            ray.kill(self._actor)

    def clear_away(self) -> list[Any]:
        """Once it is killed, have another process remove what it put on its node; return what to wait for, if any."""
        import ray

        if self._folder is None or not self.reachable():
            return []
        task: Any = ray.remote(num_cpus=0, max_retries=0)(clear_away)
        return [task.options(scheduling_strategy=self._there()).remote(self._folder)]

    def _there(self) -> Any:
        """Return what has Ray place something on its node."""
        from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

        return NodeAffinitySchedulingStrategy(self.node, soft=False)

    def _get(self, reference: Any, limit_s: float = _LONGEST_S) -> Any:
        import ray

        asked = last_sign = time.monotonic()
        while True:
            try:
                return ray.get(reference, timeout=_LOOK_S)
            except ray.exceptions.GetTimeoutError:
                now = time.monotonic()
                there = self.reachable()
                if there:
                    last_sign = now
                if there is False:
                    self._lost("its Ray daemon is gone")
                if now - last_sign > CUT_OFF_S:
                    self._lost(f"it can't be reached for {now - last_sign:.0f} s")
                if now - asked > limit_s:
                    self._lost(f"its chip has not answered for {now - asked:.0f} s")
            except ray.exceptions.RayTaskError as error:
                raise ClusterError(f"On the node {self.address}: {self._cause(error)}") from error
            except ray.exceptions.RayError as error:
                if getattr(error, "actor_init_failed", False):
                    raise ClusterError(
                        f"On the node {self.address} the chip does not start: {str(error).strip().splitlines()[-1]}. "
                        "See that rapa-dist and what it needs are installed there as they are here."
                    ) from error
                self._lost(f"its chip does not answer any more ({type(error).__name__})")

    @staticmethod
    def _cause(error: Any) -> str:
        """Say what went wrong in a call."""
        if isinstance(error.cause, ClusterError):
            return str(error.cause)
        return f"{type(error.cause).__name__}: {error.cause}; where it happened is in the logs of Ray there."

    def _lost(self, why: str) -> NoReturn:
        raise NodeLostError(f"The node {self.address} is lost: {why}", self.node, self.address) from None

    def check(self) -> None:
        """Raise NodeLostError if the node is gone."""
        if self.reachable() is False:
            self._lost("its Ray daemon is gone")

    def reachable(self) -> bool | None:
        """Return whether the node's Ray daemon listens; None if nothing is heard at all, as where a network is cut."""
        return listens(self.address, self._port)
