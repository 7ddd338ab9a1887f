"""A scaling measurement from end to end: actors, turns, the real-time factor, scaling.json and scaling.svg."""

import json
import os
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from statistics import median
from typing import Any

from rapa_dist.command_lines import no_matplotlib
from rapa_dist.config import TrainConfig
from rapa_dist.console import stderr, work
from rapa_dist.coordinator.environment import environment
from rapa_dist.coordinator.session import Place, one_digital_thread
from rapa_dist.errors import ClusterError, RunDirectoryError
from rapa_dist.fabric.lookout import Restart
from rapa_dist.fabric.ray import RayFabric
from rapa_dist.files import write_whole
from rapa_dist.footprint import Footprint, tiles_that_fit
from rapa_dist.hardware import CycleTimes, Pace
from rapa_dist.initial import initial_kernels
from rapa_dist.interrupts import asked_to_stop
from rapa_dist.layout import machine_of
from rapa_dist.machine import Machine
from rapa_dist.memory import memory
from rapa_dist.scaling.measure import (
    Block,
    Contender,
    Effort,
    Factors,
    find_factors,
    kinds_of,
    measure,
    untiled_ns,
)
from rapa_dist.scaling.plot import block_title, draw
from rapa_dist.scaling.report import DEFINITIONS, FORMAT, describe_block, describe_factors

JSON, PLOT, LOGS = "scaling.json", "scaling.svg", "ray-logs"


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """What is to be measured."""

    configurations: tuple[TrainConfig, ...]
    """Those with tiles of their own; the untiled one is among them."""
    cycles: CycleTimes
    paces: tuple[Pace, ...]
    """A paced block for each."""
    effort: Effort

    @property
    def images(self) -> int:
        """Images of a mini-batch."""
        return self.configurations[0].batch_size

    def longest_hold_s(self, pace: Pace) -> float:
        """Return for how long the slowest tile of all holds an answer at a pace."""
        layers = [layer for config in self.configurations for layer in machine_of(config).arrays]
        return (
            max(
                untiled_ns(layer, kind, self.images, pace) / layer.n_tiles
                for layer in layers
                for kind in kinds_of(layer)
            )
            / 1e9
        )

    @property
    def machine(self) -> Machine:
        """The smallest machine of which all configurations are part: its actors are started once."""
        machines = (machine_of(config).arrays for config in self.configurations)
        return Machine(tuple(max(alike, key=lambda array: array.n_tiles) for alike in zip(*machines, strict=True)))


@dataclass(slots=True)
class Findings:
    """What has been measured so far."""

    plan: Plan
    environment: dict[str, Any] = field(default_factory=environment)
    start: dict[str, Any] = field(default_factory=dict)
    blocks: list[Block] = field(default_factory=list)
    factors: list[Factors] = field(default_factory=list)
    finished: bool = False

    def as_dict(self) -> dict[str, Any]:
        """Return everything as plain values: the contents of scaling.json."""
        plan, cores = self.plan, len(os.sched_getaffinity(0))
        machines = [machine_of(config) for config in plan.configurations]
        blocks = (describe_block(block, machines, cores) for block in self.blocks)
        return {
            "format": FORMAT,
            "finished": self.finished,
            "batch_size": plan.images,
            "effort": asdict(plan.effort),
            "cycle_times": asdict(plan.cycles),
            "cores": cores,
            "start": self.start,
            "blocks": [block for block in blocks if block is not None],
            "real_time_factors": [describe_factors(factors) for factors in self.factors],
            "definitions": DEFINITIONS,
            "environment": self.environment,
        }


def check_new(folder: Path) -> None:
    """Raise RunDirectoryError if results can't be written to a folder, or would replace others; write nothing."""
    above = folder.absolute()
    while not above.exists():
        above = above.parent
    if not above.is_dir():
        raise RunDirectoryError(f"{above} is no folder, so that {folder} can't be made. Give another --out.")
    if not os.access(above, os.W_OK | os.X_OK):
        raise RunDirectoryError(f"{above} can't be written to. Give another --out.")
    if (folder / JSON).exists():
        raise RunDirectoryError(f"There is a {JSON} in {folder} already. Give another --out, or remove it.")


def check_memory(machine: Machine, images: int) -> None:
    """Raise ClusterError if there is too little memory for the actors, and say how many would fit."""
    needed, available = Footprint.of(machine, images, "ray").total, memory().available
    if needed > available:
        room = tiles_that_fit(machine, images, available)
        raise ClusterError(
            f"Too little memory: {len(machine.tiles):,} tiles with mini-batches of {images:,} images take about "
            f"{needed / 1e6:,.0f} MB, {available / 1e6:,.0f} MB are available. About {room:,} tiles would fit. "
            "Measure smaller configurations only, named by --tiles, or use a smaller --batch-size."
        )


def run(plan: Plan, out: Path, address: str | None) -> dict[str, Any]:
    """Measure, write scaling.json and scaling.svg, and return what is in the former.

    Ctrl-C ends it after the cycle under way; what was measured by then is written, with "finished" false.

    Raises:
        RapaError: with the cause, and what to do.
        KeyboardInterrupt: before anything was measured.
    """
    check_new(out)
    machine = plan.machine
    check_memory(machine, plan.images)
    place = Place("ray", machine, plan.images)
    findings = Findings(plan)
    with one_digital_thread():
        try:
            started = time.perf_counter()
            place.connect(address)
            cluster_s, started = time.perf_counter() - started, time.perf_counter()
            fabric = place.open(initial_kernels(machine, 0), out.resolve().name, out, _restarted)
            assert isinstance(fabric, RayFabric)
            findings.start = {
                "actors": len(machine.tiles),
                "cluster_s": round(cluster_s, 3),
                "actors_up_s": round(time.perf_counter() - started, 3),
                "memory_forecast_mb": round(Footprint.of(machine, plan.images, "ray").total / 1e6, 1),
                **_memory(fabric.pids()),
            }
            stderr.print(
                f"{len(machine.tiles)} actors up after {findings.start['actors_up_s']:.1f} s, each with "
                f"{findings.start['own_memory_per_actor_mb']['max']:.1f} MB of its own at most",
                markup=False,
            )
            with asked_to_stop() as stop, _written(findings, out):
                _measure(findings, fabric, out, stop)
                findings.start |= _memory(fabric.pids())  # now with all that they have touched
                findings.finished = True
        except ClusterError:
            place.keep_logs(out / LOGS)
            raise
        finally:
            place.close()
    return findings.as_dict() | {"out": str(out)}


def _measure(findings: Findings, fabric: RayFabric, out: Path, stop: Callable[[], bool]) -> None:
    plan = findings.plan
    contenders = [Contender(config, fabric, stop) for config in plan.configurations]
    for pace in (None, *plan.paces):
        block = Block(pace)
        findings.blocks.append(block)
        title = block_title(pace.dilation if pace else None)
        seconds = plan.effort.block_s(contenders, pace)
        stderr.print(
            f"{title}: {len(contenders)} configurations in {plan.effort.turns} turns, about {_duration(seconds)}",
            markup=False,
        )
        with work(title, "s", auto_refresh=False) as advance:
            measure(block, contenders, plan.effort, advance)
        write_json(findings, out)  # so that a kill, too, leaves what is whole
    if plan.paces:
        stderr.print("real-time factor: the smallest F with an efficiency of 0.9, by bisection", markup=False)
        with work("real-time factor", "configurations", auto_refresh=False) as advance:
            for number, contender in enumerate(contenders):
                advance(number, len(contenders))
                findings.factors.append(find_factors(contender, plan.cycles))


@contextmanager
def _written(findings: Findings, out: Path) -> Iterator[None]:
    """Write what was found, however it ends; an interruption ends it in good order, once there is something."""
    try:
        yield
    except KeyboardInterrupt:
        if not findings.as_dict()["blocks"]:
            raise
        stderr.print(f"\nInterrupted; what was measured so far is in {out}", markup=False)
    finally:
        if findings.as_dict()["blocks"]:
            write_json(findings, out)
            write_plot(out)


def write_json(findings: Findings, out: Path) -> None:
    """Write scaling.json.

    Raises:
        RunDirectoryError: it can't be written.
    """
    text = json.dumps(findings.as_dict(), indent=1, ensure_ascii=False) + "\n"
    try:
        out.mkdir(mode=0o700, parents=True, exist_ok=True)
        write_whole(out / JSON, text.encode(errors="backslashreplace"))
    except OSError as error:
        raise RunDirectoryError(f"Can't write to {out}: {error.strerror}. Give another --out.") from error


def write_plot(folder: Path) -> None:
    """Draw scaling.svg from the scaling.json in a folder; without matplotlib only say so.

    Raises:
        RunDirectoryError: it can't be written.
    """
    try:
        write_whole(folder / PLOT, draw(json.loads((folder / JSON).read_text())))
    except ImportError:
        stderr.print(no_matplotlib(f"warning: there is no {PLOT}"), markup=False)
    except OSError as error:
        raise RunDirectoryError(f"Can't write to {folder}: {error.strerror}. Give another --out.") from error


def _memory(actors: Sequence[int]) -> dict[str, Any]:
    """Return what the actors' processes on this node take, each and together, and all processes of the measurement."""
    own = [memory_of(pid)[0] / 1e6 for pid in actors] or [0.0]  # there are none where all tiles are on other nodes
    everybody = {os.getpid(), *descendants(os.getpid()), *actors}
    return {
        "own_memory_per_actor_mb": {"median": round(median(own), 2), "max": round(max(own), 2)},
        "own_memory_of_actors_mb": round(sum(own), 1),
        "memory_of_all_processes_mb": round(sum(memory_of(pid)[1] for pid in everybody) / 1e6, 1),
    }


def memory_of(pid: int) -> tuple[int, int]:
    """Return a process's memory in bytes: what it shares with no other; and that with its share of the rest (PSS).

    Both are 0 if it has gone.
    """
    try:
        lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()[1:]
    except OSError:
        return 0, 0
    sizes = {name: 1024 * int(size.split()[0]) for name, _, size in (line.partition(":") for line in lines)}
    return sizes["Private_Clean"] + sizes["Private_Dirty"], sizes["Pss"]


def descendants(pid: int) -> set[int]:
    """Return the processes that a process has started, and those that they have."""
    parents: dict[int, int] = {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            with suppress(OSError):  # it has gone
                parents[int(entry.name)] = int((entry / "stat").read_text().rpartition(")")[2].split()[1])
    found, before = {pid}, 0
    while len(found) > before:
        before = len(found)
        found |= {child for child, parent in parents.items() if parent in found}
    return found - {pid}


def _restarted(restart: Restart) -> None:
    stderr.print(f"{restart.tile} died and is back; the step that it died in counts as measured", markup=False)


def _duration(seconds: float) -> str:
    return f"{seconds:.0f} s" if seconds < 100 else f"{seconds / 60:.0f} min"
