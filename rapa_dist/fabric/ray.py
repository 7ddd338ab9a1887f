"""Fabric `ray`: every tile an actor in a process of its own, fed through shared memory."""

import time
from collections.abc import Callable
from contextlib import AbstractContextManager, suppress
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from rapa_dist.console import Advance
from rapa_dist.errors import ClusterError
from rapa_dist.fabric.base import Fabric, Kernels
from rapa_dist.fabric.chip import Chip, tile_name
from rapa_dist.fabric.cluster import NAMESPACE, RESOURCE, Cluster
from rapa_dist.fabric.doorbell import Cycle, Ring
from rapa_dist.fabric.lookout import RESTARTS, Lookout, Restart
from rapa_dist.fabric.registry import Registration
from rapa_dist.hardware import Pace
from rapa_dist.interrupts import uninterrupted
from rapa_dist.machine import Layer, Machine
from rapa_dist.tile import Cells, Matrix, Update

_START_TIMEOUT_S = 60.0  # for the next tile to come up, not for all of them
_STOP_TIMEOUT_S = 5.0


class RayFabric(Fabric):
    """The product: n_t actors per layer. Ray places, names and restarts them; it never carries rows."""

    name = "ray"

    def __init__(
        self,
        machine: Machine,
        images: int,
        kernels: Kernels,
        *,
        run: str,
        cluster: Cluster,
        advance: Advance = lambda done, total: None,
        on_restart: Callable[[Restart], None] = lambda restart: None,
        restarts: int = RESTARTS,
        step: int = 0,
        pace: Pace | None = None,
    ) -> None:
        """Start an actor per tile and program `kernels`, one array (n_t, k + 1, c_out) per layer, into them.

        Args:
            machine: which tiles.
            images: images in the largest mini-batch.
            kernels: initial kernels.
            run: the run's name, the first part of its actors' names.
            cluster: where; closed together with the fabric.
            advance: told how many tiles are up.
            on_restart: told of a tile whose process died, or hung and was killed, and is back.
            restarts: how often a tile may be restarted without getting on in between.
            step: steps that the kernels have been trained for.
            pace: how long tiles hold their answers; None: not at all. May be set anew between cycles.
        """
        super().__init__(machine, images)
        self.cluster = cluster
        self.pace = pace
        self._number = 0
        self._actors: dict[int, Any] = {}
        self._chip = Chip(machine, images)
        self._lookout = Lookout(self._chip, self._actors, on_restart, restarts=restarts)
        self._first_tile = {layer.index: machine.tiles.index((layer.index, 0)) for layer in machine.layers}
        try:
            self.use(machine, kernels, step)
            self._start(run, advance)
        except BaseException:
            with uninterrupted():
                self._stop_tiles()
            raise

    def use(self, machine: Machine, kernels: Kernels, step: int = 0) -> None:
        """Work with the first tiles of every layer only, as a smaller machine; the others sleep.

        Args:
            machine: the one that was started, with as many tiles per layer or fewer.
            kernels: what to program into them.
            step: steps that the kernels have been trained for.
        """
        started = self._chip.machine
        for layer, ours in zip(machine.layers, started.layers, strict=True):
            if layer.n_tiles > ours.n_tiles or replace(layer, n_tiles=ours.n_tiles) != ours:
                raise ValueError(f"{layer} is not part of {ours}")
        self.machine = machine
        for layer_index, number in machine.tiles:
            self._chip.program(self._first_tile[layer_index] + number, kernels[layer_index][number], step)

    def _start(self, run: str, advance: Advance) -> None:
        import ray
        from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

        from rapa_dist.fabric.actor import Tile

        here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
        as_actor: Any = ray.remote(concurrency_groups={"inspect": 1})  # type: ignore[call-overload]
        actor_class = as_actor(Tile)
        for tile, (layer, number) in enumerate(self._chip.machine.tiles):
            actor = actor_class.options(
                name=f"{run}/{tile_name(layer, number)}",
                namespace=NAMESPACE,
                num_cpus=0,
                resources={RESOURCE: 1},
                scheduling_strategy=here,
                max_restarts=-1,  # it is the lookout that gives a tile up
            )
            try:
                self._actors[tile] = actor.remote(self._chip.site(tile))
            except ray.exceptions.ActorAlreadyExistsError as error:
                raise ClusterError(
                    f"A run named {run} has its tiles on this cluster already. Give the run directory another name."
                ) from error
        total = len(self._actors)
        waiting = [actor.ready.remote() for actor in self._actors.values()]
        last_start = time.monotonic()
        while waiting:
            advance(total - len(waiting), total)
            up, waiting = ray.wait(waiting, num_returns=1, timeout=_START_TIMEOUT_S)
            if not up:
                silent = time.monotonic() - last_start
                raise ClusterError(
                    f"{len(waiting)} of {total} tiles did not start; none came up in the last {silent:.0f} s. "
                    f"Look whether the node has memory left and its {RESOURCE} resources are free "
                    "(`ray status`)."
                )
            last_start = time.monotonic()
            self._raise_if_dead(up)
        advance(total, total)
        self._empty_round()

    def _empty_round(self) -> None:
        self._number += 1
        self._chip.ring((tile, Ring(self._number, Cycle.EMPTY, 0, 0)) for tile in range(len(self._actors)))
        self._chip.wait()

    def patches(self, layer: int) -> Matrix:
        """Return the patch region of a layer."""
        return self._chip.arena.patches(layer)

    def outputs(self, layer: int) -> Matrix:
        """Return the output region of a layer."""
        return self._chip.arena.outputs(layer)

    def begin_forward(self, layer: Layer, offsets: NDArray[np.int64]) -> int:
        """Ring every tile of the layer for a forward cycle."""
        return self._ring(layer, offsets, Cycle.FORWARD, None)

    def begin_backward(
        self,
        layer: Layer,
        offsets: NDArray[np.int64],
        *,
        update: Update | None,
        input_error: bool,
        commit: bool = True,
    ) -> int:
        """Ring every tile of the layer for backward and update cycles."""
        cycle = Cycle.INPUT_ERROR if input_error else 0
        if update is not None:
            cycle |= Cycle.UPDATE | (Cycle.COMMIT if commit else 0)
        return self._ring(layer, offsets, cycle, update)

    def begin_empty(self, layer: Layer) -> int:
        """Ring every tile of the layer for nothing: the data plane's cost."""
        return self._ring(layer, np.zeros(layer.n_tiles + 1, np.int64), Cycle.EMPTY, None)

    def together(self) -> AbstractContextManager[None]:
        """Have the cycles that are begun inside reach every tile in one message."""
        return self._chip.together()

    def finish(self, cycle: int) -> None:
        """Wait until the tiles are done."""
        self._chip.wait(cycle)

    def _ring(self, layer: Layer, offsets: NDArray[np.int64], cycle: int, update: Update | None) -> int:
        self._number += 1
        number, first_tile, pace = self._number, self._first_tile[layer.index], self.pace
        rates = (update.learning_rate, update.weight_decay) if update else (0.0, 0.0)
        row_ns = (
            0.0
            if pace is None
            else pace.row_ns(
                forward=bool(cycle & Cycle.FORWARD),
                backward=bool(cycle & Cycle.INPUT_ERROR),
                update=bool(cycle & Cycle.UPDATE),
            )
        )
        before = self._chip.last_ring
        self._chip.ring(
            (
                tile,
                Ring(
                    number,
                    cycle,
                    first,
                    last,
                    *rates,
                    hold_ns=int((last - first) * row_ns),
                    rung_ns=time.monotonic_ns() if row_ns else 0,
                    after=before[tile],
                ),
            )
            for tile, (first, last) in enumerate(pairwise(offsets.tolist()), first_tile)
        )
        return number

    def cells(self, layer: int) -> list[Cells]:
        """Return the cells of a layer's tiles."""
        first = self._first_tile[layer]
        return self._chip.cells[first : first + self.machine.layers[layer].n_tiles]

    @staticmethod
    def _raise_if_dead(references: list[Any]) -> None:
        import ray

        for reference in references:
            try:
                ray.get(reference, timeout=_STOP_TIMEOUT_S)
            except ray.exceptions.ActorUnavailableError:
                continue  # being restarted
            except (ray.exceptions.RayActorError, ray.exceptions.RayTaskError) as error:
                raise ClusterError(f"A tile is dead and Ray does not restart it: {error}") from error

    def close(self) -> None:
        """Ask the actors to leave, disconnect from Ray, and remove arena, cells and doorbells."""
        with uninterrupted():
            self._stop_tiles()
            self.cluster.close()

    def _stop_tiles(self) -> None:
        import ray

        self._lookout.end_stopped()
        if ray.is_initialized():
            leaving = [actor.__ray_terminate__.remote() for actor in self._actors.values()]
            if leaving and self.cluster.scratch is None:
                ray.wait(leaving, num_returns=len(leaving), timeout=_STOP_TIMEOUT_S)
        self._actors.clear()
        self._chip.close()

    def register(self, run: str, run_dir: Path) -> None:
        """Let `rapa-dist stats` find the run on this node, for as long as the chip is there."""
        with suppress(OSError):  # it can still be found through its cluster
            Registration.of_this_process(
                run=run, address=self.cluster.address, run_dir=run_dir, folder=self._chip.scratch.path
            ).write()
