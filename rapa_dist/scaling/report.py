"""From measured steps to the numbers of scaling.json. Arithmetic only."""

from collections.abc import Callable, Iterable, Sequence
from itertools import chain
from typing import Any

import numpy as np

from rapa_dist.hardware import Pace
from rapa_dist.machine import Machine, TileArray
from rapa_dist.scaling.measure import Block, Cycle, Factors, Step, kinds_of, wall_ns
from rapa_dist.scaling.plot import PARTS
from rapa_dist.scaling.stopwatch import CycleTime

FORMAT = 1
DEFINITIONS = {
    "wall_ms": "of a cycle: from just before the first ring to after the last answer; of a step: from the drawing of "
    "its assignments to the update of the digital side. A mini-batch is not cut into parts, and nothing overlaps: "
    "a step of `train`, where coordinator and tiles work at the same time, is shorter.",
    "cycles": "forward; backward_update (one ring does both); in the first layer update alone, as nobody wants the "
    "error of the network's input. “all” is a layer's two cycles together. Layers are numbered from 0.",
    "compute": "tiles work as fast as the cores of this machine let them.",
    "paced": "each tile holds its answer until rows × cycle time × F have passed since its doorbell rang, as an array "
    "with that cycle time would, slowed down F times. A waiting tile costs no core.",
    "ideal_ms": "paced: rows of the slowest tile × time of its cycles × F. compute: untiled wall time / n_t, which no "
    "machine with fewer cores than n_t can give. Of a step: the sum over its cycles.",
    "speed_up": "median wall time of the untiled machine / median wall time here, of the same cycle (or layer, or "
    "step) in the same block; speed_up_range: the smallest and the largest ratio of medians within one turn.",
    "efficiency": "speed_up / n_t. Of a step: what its cycles would take if each were n_t times faster than untiled, "
    "over the wall time of the step; so the untiled step itself falls short of 1 by the coordinator's share.",
    "shares_percent": "of the wall time of all steps. coordinator: everything outside cycles. data_plane: wall time of "
    "cycles that the tiles' work does not explain. tiles: what it explains, which is in compute the longest busy time "
    "or that of all tiles / cores, whichever is more, and paced the longest hold.",
    "network_percent": "of the wall time of all steps, what messages to other nodes and back took: of every cycle the "
    "longest, less the time that the chip there had. It overlaps with the work of this node's tiles. 0 on one node.",
    "busy_ms": "processor time of the tiles in a cycle: of the one that took most, and of all together.",
    "own_memory_per_actor_mb": "Private_Clean + Private_Dirty of the actor's process; memory_of_all_processes_mb: the "
    "sum of Pss over actors, coordinator and what it has started, Ray's own processes among them.",
    "real_time_factor": "the smallest F, on a grid of 20 per decade from 1 on, at which the efficiency is 0.9, found "
    "by measured training steps (medians of 5 to 25). The untiled time in it is the ideal one, rows × cycle time × F. "
    "first_layer: its forward and update cycles; machine: all cycles of a step.",
}


def describe_block(block: Block, machines: Sequence[Machine], cores: int) -> dict[str, Any] | None:
    """Return a block's numbers, a configuration at a time, or None if the untiled machine has not had a turn.

    Args:
        block: the measured steps.
        machines: the configurations, the untiled one among them.
        cores: cores that the tiles share.
    """
    untiled = tuple(1 for _ in machines[0].arrays)
    turns = [turn for turn in block.turns if turn.get(untiled)]
    if not turns:
        return None
    return {
        "mode": "compute" if block.pace is None else "paced",
        "time_dilation": block.pace.dilation if block.pace is not None else None,
        "turns": len(turns),
        "configurations": [
            _Comparison(machine, turns, untiled, block.pace, cores).describe()
            for machine in machines
            if any(turn.get(_tiles(machine)) for turn in turns)
        ],
    }


class _Comparison:
    """One configuration against the untiled one."""

    def __init__(
        self,
        machine: Machine,
        turns: list[dict[tuple[int, ...], list[Step]]],
        untiled: tuple[int, ...],
        pace: Pace | None,
        cores: int,
    ) -> None:
        tiles = _tiles(machine)
        turns = [turn for turn in turns if turn.get(tiles)]
        self._machine, self._pace, self._cores = machine, pace, cores
        self._ours = [turn[tiles] for turn in turns]
        self._untiled = [turn[untiled] for turn in turns]
        self._steps = list(chain(*self._ours))

    def describe(self) -> dict[str, Any]:
        machine = self._machine
        layers = [self._layer(layer) for layer in machine.arrays]
        parts = np.array([split(step, self._pace is not None, self._cores) for step in self._steps]) / 1e6
        ideal_ms = sum(layer["cycles"]["all"]["ideal_ms"] for layer in layers)
        perfect_ms = sum(layer["cycles"]["all"]["untiled_wall_ms"]["median"] / layer["n_tiles"] for layer in layers)
        step = self._compare(lambda one: one.wall_ns)
        return {
            "tiles": list(_tiles(machine)),
            "actors": len(machine.tiles),
            "step": step
            | {"efficiency": _ratio(perfect_ms, step["wall_ms"]["median"]), "ideal_ms": round(ideal_ms, 4)},
            "shares_percent": dict(zip(PARTS, (100 * parts.sum(axis=0) / parts.sum()).tolist(), strict=True)),
            "network_percent": self._network_percent(),
            "parts_ms": {name: spread(values) for name, values in zip(PARTS, parts.T, strict=True)},
            "layers": layers,
        }

    def _network_percent(self) -> float:
        """Return the share of messages between nodes in the wall time of all steps; it is part of the data plane's."""
        network_ns = sum(time.network_ns for step in self._steps for time in step.cycles)
        return round(100 * network_ns / sum(step.wall_ns for step in self._steps), 4)

    def _layer(self, layer: TileArray) -> dict[str, Any]:
        kinds = kinds_of(layer)
        cycles = {kind: self._cycle(layer, kind) for kind in kinds}
        both = self._compare(lambda step: sum(wall_ns(step, (layer.index, kind)) for kind in kinds))
        ideal_ms = sum(cycle["ideal_ms"] for cycle in cycles.values())
        cycles["all"] = both | {"efficiency": _ratio(both["speed_up"], layer.n_tiles), "ideal_ms": round(ideal_ms, 4)}
        return {"layer": layer.index, "name": layer.name, "n_tiles": layer.n_tiles, "cycles": cycles}

    def _cycle(self, layer: TileArray, kind: str) -> dict[str, Any]:
        cycle = layer.index, kind
        compared = self._compare(lambda step: wall_ns(step, cycle))
        if self._pace is None:
            ideal_ms = compared["untiled_wall_ms"]["median"] / layer.n_tiles
        else:
            ideal_ms = float(np.median([_sum(step, cycle, "hold_ns") for step in self._steps])) / 1e6
        explained = [_explained_ns(step, cycle, self._pace is not None, self._cores) for step in self._steps]
        wall = [wall_ns(step, cycle) for step in self._steps]
        return compared | {
            "efficiency": _ratio(compared["speed_up"], layer.n_tiles),
            "ideal_ms": round(ideal_ms, 4),
            "data_plane_ms": spread((np.array(wall) - explained) / 1e6),
            "busy_ms": {
                "longest": spread(np.array([_sum(step, cycle, "longest_busy_ns") for step in self._steps]) / 1e6),
                "total": spread(np.array([_sum(step, cycle, "total_busy_ns") for step in self._steps]) / 1e6),
            },
        }

    def _compare(self, ns_of: Callable[[Step], int]) -> dict[str, Any]:
        """Return wall times of some part of a step, here and untiled, and the speed-up."""
        ours = [np.array([ns_of(step) for step in steps]) / 1e6 for steps in self._ours]
        untiled = [np.array([ns_of(step) for step in steps]) / 1e6 for steps in self._untiled]
        in_turn = [np.median(before) / np.median(now) for before, now in zip(untiled, ours, strict=True)]
        wall_ms, untiled_ms = spread(np.concatenate(ours)), spread(np.concatenate(untiled))
        return {
            "wall_ms": wall_ms,
            "untiled_wall_ms": untiled_ms,
            "speed_up": _ratio(untiled_ms["median"], wall_ms["median"]),
            "speed_up_range": [round(float(min(in_turn)), 4), round(float(max(in_turn)), 4)],
        }


def split(step: Step, paced: bool, cores: int) -> tuple[int, int, int]:
    """Return the nanoseconds of a step that go to coordinator, data plane and tiles; they add up to its wall time."""
    in_cycles = sum(time.wall_ns for time in step.cycles)
    explained = sum(_explained(time, paced, cores) for time in step.cycles)
    return step.wall_ns - in_cycles, in_cycles - explained, explained


def _explained(time: CycleTime, paced: bool, cores: int) -> int:
    """Return how much of a cycle's wall time is the tiles' work."""
    work = time.hold_ns if paced else max(time.longest_busy_ns, time.total_busy_ns // cores)
    return min(work, time.wall_ns)


def _explained_ns(step: Step, cycle: Cycle, paced: bool, cores: int) -> int:
    return sum(_explained(time, paced, cores) for time in step.cycles if (time.layer, time.kind) == cycle)


def _sum(step: Step, cycle: Cycle, name: str) -> int:
    return sum(getattr(time, name) for time in step.cycles if (time.layer, time.kind) == cycle)


def describe_factors(factors: Factors) -> dict[str, Any]:
    """Return a configuration's real-time factors."""
    not_reached = f"0.9 is not reached at F = {factors.largest_tried:,g}, the largest that was tried"
    return {
        "tiles": list(factors.tiles),
        **{
            name: {"time_dilation": found, "reason": not_reached if found is None else None}
            for name, found in (("first_layer", factors.first_layer), ("machine", factors.machine))
        },
        "probes": [
            {
                "time_dilation": probe.dilation,
                "first_layer_efficiency": round(probe.first_layer, 4),
                "machine_efficiency": round(probe.machine, 4),
                "steps": probe.steps,
            }
            for probe in factors.probes
        ],
    }


def spread(values: Iterable[float]) -> dict[str, Any]:
    """Return median, quartiles and number."""
    numbers = np.asarray(list(values))
    low, middle, high = np.percentile(numbers, (25, 50, 75)).round(4).tolist()
    return {"q25": low, "median": middle, "q75": high, "n": len(numbers)}


def _tiles(machine: Machine) -> tuple[int, ...]:
    return tuple(layer.n_tiles for layer in machine.arrays)


def _ratio(numerator: float, denominator: float) -> float:
    return round(numerator / denominator, 4)
