"""Measuring: configurations take turns on one set of actors; and the search for the real-time factor."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from statistics import median

import torch

from rapa_dist.config import TrainConfig
from rapa_dist.coordinator.learner import build, digital_arrays, learner
from rapa_dist.fabric.ray import RayFabric
from rapa_dist.hardware import CycleTimes, Pace
from rapa_dist.initial import initial_kernels
from rapa_dist.layout import machine_of
from rapa_dist.machine import TileArray
from rapa_dist.nn.schedule import Step as TrainingStep
from rapa_dist.nn.schedule import Whole
from rapa_dist.scaling.stopwatch import BACKWARD_UPDATE, FORWARD, UPDATE, CycleTime, Stopwatch, now_ns

EFFICIENT = 0.9
"""The efficiency at which the emulation is said to keep up."""
MOST_DILATION = 100_000
"""The largest time dilation that is tried."""
_WARM_UP = 3  # unpaced steps before each turn: the first find cold caches, and the tiles asleep
_RATE = 0.005
_PER_DECADE = 20  # dilations in the grid
_STRIDE = 6  # of the search for one that is large enough: a factor of 2
_PROBE_STEPS, _PROBE_S = (5, 25), 1.0  # at least and at most; between them, as many as this time allows
_LONGEST_STEP_S = 30.0

Cycle = tuple[int, str]
"""A layer's index and a kind of cycle."""


@dataclass(frozen=True, slots=True)
class Step:
    """One training step."""

    wall_ns: int
    cycles: tuple[CycleTime, ...]


class Contender:
    """One configuration of tiles, on the first of the actors that all configurations share."""

    def __init__(self, config: TrainConfig, fabric: RayFabric, stop: Callable[[], bool] = lambda: False) -> None:
        """Prepare it; `stop` is asked before every cycle, and ends the step with KeyboardInterrupt."""
        self.tiles, self.machine, self.images = config.tiles, machine_of(config), config.batch_size
        self._fabric = fabric
        self._kernels = initial_kernels(self.machine, config.seed)
        fabric.use(self.machine, self._kernels)
        self._watch = Stopwatch(fabric, stop)
        self._learner = learner(config, self._watch, digital_arrays(build(config).model), step=0)
        generator = torch.Generator().manual_seed(config.seed)
        assert config.image is not None
        assert config.classes is not None
        pixels = torch.rand(self.images, *config.image, generator=generator) - 0.5
        self._pixels = pixels.contiguous(memory_format=torch.channels_last)
        self._labels = torch.arange(self.images) % config.classes
        self._step = 0

    def take_over(self, pace: Pace | None) -> None:
        """Have the actors work as this machine, warm it up unpaced, then set the pace."""
        self._fabric.use(self.machine, self._kernels)
        self._fabric.pace = None
        for _ in range(_WARM_UP):
            self.step()
        self._fabric.pace = pace

    def step(self) -> Step:
        """Train one mini-batch, and time it."""
        self._watch.take()
        self._step += 1
        started = now_ns()
        for _ in Whole().train(self._learner, [TrainingStep(self._step, self._pixels, self._labels, _RATE)]):
            pass
        return Step(now_ns() - started, self._watch.take())

    def set_pace(self, pace: Pace) -> None:
        """Change the pace of the tiles."""
        self._fabric.pace = pace

    def cycles(self) -> list[tuple[TileArray, str]]:
        """Return the cycles of a step: two for every layer."""
        return [(layer, kind) for layer in self.machine.arrays for kind in kinds_of(layer)]

    def ideal_ns(self, pace: Pace) -> float:
        """Return what the cycles of a step would take at a pace if each layer were n_t times faster than untiled."""
        return sum(untiled_ns(layer, kind, self.images, pace) / layer.n_tiles for layer, kind in self.cycles())


def kinds_of(layer: TileArray) -> tuple[str, str]:
    """Return the cycles that a layer has in a training step."""
    return FORWARD, BACKWARD_UPDATE if layer.input_error else UPDATE


def untiled_ns(layer: TileArray, kind: str, images: int, pace: Pace) -> float:
    """Return what a cycle with all rows of a layer would take one array, slowed down."""
    row_ns = pace.row_ns(forward=kind == FORWARD, backward=kind == BACKWARD_UPDATE, update=kind != FORWARD)
    return images * layer.n_patches * row_ns


@dataclass(frozen=True, slots=True)
class Block:
    """Turns of all configurations in one way of measuring."""

    pace: Pace | None
    """None: tiles work as fast as this machine's cores let them ("compute")."""
    turns: list[dict[tuple[int, ...], list[Step]]] = field(default_factory=list)
    """For every turn the steps of each configuration, by its tiles; a turn that was interrupted lacks some."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Effort:
    """How much is measured."""

    turns: int
    """Turns that every configuration has."""
    steps: int
    """Steps of a turn, at most."""
    budget_s: float
    """Seconds after which a turn ends with the step under way; at least one step is always taken."""

    def turn_s(self, contender: Contender, pace: Pace | None) -> float:
        """Return about how long a turn of a configuration takes; a guess, for the progress that is shown."""
        step_s = 0.02 + 0.0003 * len(contender.machine.tiles)
        warm_up_s = _WARM_UP * step_s
        if pace is not None:
            step_s += contender.ideal_ns(pace) * 1e-9
        return warm_up_s + min(self.steps * step_s, max(self.budget_s + step_s / 2, step_s))

    def block_s(self, contenders: Sequence[Contender], pace: Pace | None) -> float:
        """Return about how long a block takes."""
        return self.turns * sum(self.turn_s(contender, pace) for contender in contenders)


def measure(
    block: Block,
    contenders: Sequence[Contender],
    effort: Effort,
    advance: Callable[[int, int], None] = lambda done, total: None,
) -> None:
    """Let the configurations take turns, and add what they do to the block.

    Args:
        block: where the steps go, also those of a measurement that is interrupted.
        contenders: the configurations.
        effort: how much is measured.
        advance: told about how many seconds of how many are over.
    """
    total, done = effort.block_s(contenders, block.pace), 0.0
    for number in range(effort.turns):
        turn: dict[tuple[int, ...], list[Step]] = {}
        block.turns.append(turn)
        for contender in contenders if number % 2 == 0 else reversed(contenders):
            advance(int(done), int(total))
            contender.take_over(block.pace)
            steps = turn.setdefault(contender.tiles, [])
            ends = now_ns() + effort.budget_s * 1e9
            while not steps or (len(steps) < effort.steps and now_ns() < ends):
                steps.append(contender.step())
            done += effort.turn_s(contender, block.pace)
    advance(int(total), int(total))


# --- the real-time factor


@dataclass(frozen=True, slots=True, kw_only=True)
class Probe:
    """What was found at one time dilation."""

    dilation: float
    first_layer: float
    """Efficiency of the first layer's cycles."""
    machine: float
    """Efficiency of all cycles of a step."""
    steps: int


@dataclass(frozen=True, slots=True)
class Factors:
    """The smallest time dilations at which the emulation keeps up."""

    tiles: tuple[int, ...]
    first_layer: float | None
    """For the first layer's cycles; None: not reached."""
    machine: float | None
    """For all cycles of a step; None: not reached."""
    largest_tried: float
    probes: tuple[Probe, ...]
    """Everything that was measured for it, by dilation."""


def dilation(index: int) -> float:
    """Return a dilation of the grid, 1 · 10^(index / 20), to three digits."""
    return float(f"{10 ** (index / _PER_DECADE):.3g}")


def smallest(efficiency: Callable[[int], float], last: int, wanted: float = EFFICIENT) -> int | None:
    """Return the smallest index from 0 to `last` at which an efficiency that rises is as wanted; None: nowhere.

    It is approached from below, as small dilations are measured soon, and then bisected.
    """
    low, high = -1, 0
    while efficiency(high) < wanted:
        if high == last:
            return None
        low, high = high, min(high + _STRIDE, last)
    while high - low > 1:
        middle = (low + high) // 2
        if efficiency(middle) >= wanted:
            high = middle
        else:
            low = middle
    return high


def find_factors(contender: Contender, cycles: CycleTimes) -> Factors:
    """Search the smallest dilations at which the efficiency is 0.9, by measured steps.

    The untiled time is the ideal one, rows × cycle time × F, as measuring it would take long where F is large.
    """
    probes: dict[int, Probe] = {}

    def probe(index: int) -> Probe:
        if index not in probes:
            probes[index] = _probe(contender, Pace(cycles, dilation(index)))
        return probes[index]

    last = 0
    while dilation(last + 1) <= MOST_DILATION:
        if contender.ideal_ns(Pace(cycles, dilation(last + 1))) > _LONGEST_STEP_S * 1e9:
            break
        last += 1
    contender.take_over(None)
    first_layer = smallest(lambda index: probe(index).first_layer, last)
    machine = smallest(lambda index: probe(index).machine, last)
    return Factors(
        contender.tiles,
        None if first_layer is None else dilation(first_layer),
        None if machine is None else dilation(machine),
        dilation(max(probes)),
        tuple(probes[index] for index in sorted(probes)),
    )


def _probe(contender: Contender, pace: Pace) -> Probe:
    contender.set_pace(pace)
    steps: list[Step] = []
    least, most = _PROBE_STEPS
    ends = now_ns() + _PROBE_S * 1e9
    while len(steps) < least or (len(steps) < most and now_ns() < ends):
        steps.append(contender.step())
    ideal, wall = {True: 0.0, False: 0.0}, {True: 0.0, False: 0.0}  # by whether it is the first layer
    for layer, kind in contender.cycles():
        first = layer.index == 0
        ideal[first] += untiled_ns(layer, kind, contender.images, pace) / layer.n_tiles
        wall[first] += median(wall_ns(step, (layer.index, kind)) for step in steps)
    return Probe(
        dilation=pace.dilation,
        first_layer=ideal[True] / wall[True],
        machine=sum(ideal.values()) / sum(wall.values()),
        steps=len(steps),
    )


def wall_ns(step: Step, cycle: Cycle) -> int:
    """Return the wall time of all cycles of one kind in one layer."""
    return sum(time.wall_ns for time in step.cycles if (time.layer, time.kind) == cycle)
