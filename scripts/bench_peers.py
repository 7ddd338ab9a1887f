#!/usr/bin/env python
"""Time a training step of the fabrics against their peers, all on the same work, and write one JSON object.

Every contender trains the paper's network with mini-batches of 10 images in a process of its own, and they
take turns in blocks of steps, so that a machine that drifts, or is shared, slows all of them alike. While
others have their turn, a contender's tiles are stopped. Quoted are medians and quartiles over the turns of
a block's time per step, and of the ratio to each peer within a turn.

    scripts/bench_peers.py --turns 20 > results/peers-16x4x1.json
    scripts/bench_peers.py --tiles 128,32,8 --without calls > results/peers-128x32x8.json
"""

import argparse
import itertools
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from itertools import count, islice
from pathlib import Path

import numpy as np

ROOT = Path(__file__).resolve().parent.parent
BATCH, CLASSES = 10, 10
EMPTY_ROUNDS = 500
WARM_UP = 4  # the first steps of a block find cold caches, and are not counted
RATE, DECAY = 0.005, 1e-4
Block = Callable[[int], Iterator[None]]
"""Given a number of steps, trains them, and yields after each."""


class Contender:
    """A way to train the network: made in its own process, run in blocks."""

    def __init__(self, block: Block, tiles: list[int] | None = None, close: Callable[[], None] = lambda: None) -> None:
        self._block, self._tiles, self._close = block, tiles or [], close
        self.empty_round: Callable[[], None] | None = None

    def run(self, steps: int) -> float:
        """Return the seconds per step of a block."""
        self._signal(signal.SIGCONT)
        for number, _ in enumerate(self._block(WARM_UP + steps), 1):
            if number == WARM_UP:
                started = time.perf_counter()
        seconds = (time.perf_counter() - started) / steps
        self._signal(signal.SIGSTOP)
        return seconds

    def run_empty(self, rounds: int) -> float:
        """Return the median of the seconds that a round takes in which the tiles of the first layer do nothing."""
        self._signal(signal.SIGCONT)
        seconds = []
        for _ in range(rounds):
            started = time.perf_counter()
            self.empty_round()
            seconds.append(time.perf_counter() - started)
        self._signal(signal.SIGSTOP)
        return float(np.median(seconds))

    def close(self) -> None:
        self._signal(signal.SIGCONT)
        self._close()

    def _signal(self, number: int) -> None:
        for pid in self._tiles:
            with suppress(ProcessLookupError):
                os.kill(pid, number)


# --- PyTorch


def plain(threads: int, channels_last: bool = False, keep: bool = False) -> Contender:
    """Return the untiled network as anybody would write it in PyTorch; `keep`: with freed memory kept, as ours."""
    import torch
    import torch.nn.functional as F
    from torch import nn

    class PlainNetwork(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.convolutions = nn.ModuleList(nn.Conv2d(i, o, 5, padding=2) for i, o in ((3, 32), (32, 32), (32, 64)))
            self.head = nn.Linear(1024, CLASSES)

        def forward(self, planes: torch.Tensor) -> torch.Tensor:
            for index, convolution in enumerate(self.convolutions):
                pool = F.avg_pool2d if index == 2 else F.max_pool2d
                planes = pool(F.relu(convolution(planes)), 3, 2, ceil_mode=True)
                planes = planes * (1 + 5e-5 * F.avg_pool2d(planes * planes, 3, 1, 1)) ** -0.75
            return self.head(planes.flatten(1))

    if keep:
        from rapa_dist.fabric.quiet import keep_memory

        keep_memory()
    torch.set_num_threads(threads)
    layout = torch.channels_last if channels_last else torch.contiguous_format
    network = PlainNetwork().to(memory_format=layout)
    optimiser = torch.optim.SGD(network.parameters(), lr=RATE, weight_decay=DECAY)
    images = torch.rand(BATCH, 3, 32, 32).to(memory_format=layout)
    labels = torch.arange(BATCH) % CLASSES

    def block(steps: int) -> Iterator[None]:
        for _ in range(steps):
            optimiser.zero_grad()
            F.cross_entropy(network(images), labels).backward()
            optimiser.step()
            yield

    return Contender(block)


# --- rapa-dist


def on_fabric(
    name: str, tiles: tuple[int, ...], micro_batches: int, threads: int = 1, physics: str | None = None
) -> Contender:
    """Return the network on a fabric of rapa-dist, or on actors that are called the ordinary way."""
    import torch

    from rapa_dist.config import resolve
    from rapa_dist.coordinator.learner import build, digital_arrays, learner
    from rapa_dist.demand import arena_floats
    from rapa_dist.fabric.batched import BatchedFabric
    from rapa_dist.fabric.cluster import connect
    from rapa_dist.fabric.quiet import keep_memory
    from rapa_dist.fabric.ray import RayFabric
    from rapa_dist.fabric.serial import SerialFabric
    from rapa_dist.nn.schedule import Step

    torch.set_num_threads(threads)  # 1, as in a run
    keep_memory()
    config = resolve(
        tiles=tiles,
        classes=CLASSES,
        micro_batches=micro_batches,
        lr=RATE,
        physics=physics,
        weight_decay=None if physics else DECAY,
    )
    network = build(config)
    machine, kernels = network.recording.machine, network.initial_kernels()
    floats = arena_floats(machine, BATCH)  # memory as in a run
    pids: list[int] = []
    if name == "batched":
        fabric = BatchedFabric(machine, kernels)
    elif name == "serial":
        fabric = SerialFabric(machine, floats, kernels)
    else:
        cluster = connect("local", len(machine.tiles))
        if name == "ray":
            fabric = RayFabric(machine, floats, kernels, run="peers", cluster=cluster)
        else:
            fabric = fabric_of_calls(machine, floats, kernels, cluster)
        pids = fabric.pids()
    ours = learner(config, fabric, digital_arrays(network.model), step=0)
    images, labels = torch.rand(BATCH, 32, 32, 3).permute(0, 3, 1, 2) - 0.5, torch.arange(BATCH) % CLASSES
    numbers = count()

    def block(steps: int) -> Iterator[None]:
        for _ in ours.train(Step(number, images, labels, RATE) for number in islice(numbers, steps)):
            yield

    contender = Contender(block, pids, fabric.close)
    if name == "ray":
        first = machine.arrays[0]
        contender.empty_round = lambda: fabric.finish(fabric.begin_empty(first))
    return contender


def fabric_of_calls(machine, floats, kernels, cluster):
    """Return a fabric whose tiles are ordinary Ray actors: rows go through the object store."""
    import mmap

    import ray

    from rapa_dist.fabric.arena import Arena, arena_bytes
    from rapa_dist.fabric.doorbell import Cycle
    from rapa_dist.fabric.shared_rows import SharedRowsFabric

    @ray.remote(num_cpus=0)
    class OrdinaryTile:
        def __init__(self, kernel: np.ndarray) -> None:
            self.kernel = kernel.copy()

        def pid(self) -> int:
            return os.getpid()

        def forward(self, patches: np.ndarray) -> np.ndarray:
            self.patches = patches
            return patches @ self.kernel[:-1] + self.kernel[-1]

        def backward(self, errors: np.ndarray, rate: float, decay: float, input_error: bool) -> np.ndarray | None:
            back = errors @ self.kernel[:-1].T if input_error else None
            self.kernel *= 1 - rate * decay
            self.kernel[:-1] -= rate * self.patches.T @ errors
            self.kernel[-1] -= rate * errors.sum(axis=0)
            return back

    class Calls(SharedRowsFabric):
        name = "calls"

        def __init__(self) -> None:
            super().__init__(machine, Arena(mmap.mmap(-1, arena_bytes(floats))))
            self._tiles = [[OrdinaryTile.remote(kernel) for kernel in of_layer] for of_layer in kernels]
            self._calls = {}

        def pids(self):
            return ray.get([tile.pid.remote() for tiles in self._tiles for tile in tiles])

        def begin(self, array, cycle, place, offsets, update=None, way=None, draw=0):
            number = len(self._calls) + 1
            patches = self.arena.rows(place.patches, offsets[-1], array.k)
            outputs = self.arena.rows(place.outputs, offsets[-1], array.c_out)
            rows, tiles = [slice(*edges) for edges in itertools.pairwise(offsets)], self._tiles[array.index]
            target, calls = None, []
            if cycle == Cycle.FORWARD:
                target = outputs
                calls = [tile.forward.remote(patches[mine]) for tile, mine in zip(tiles, rows, strict=True)]
            elif offsets[-1]:
                wanted = cycle & Cycle.INPUT_ERROR != 0
                target = patches if wanted else None
                rates = update.learning_rate, update.weight_decay
                calls = [
                    tile.backward.remote(outputs[mine], *rates, wanted) for tile, mine in zip(tiles, rows, strict=True)
                ]
            self._calls[number] = target, rows, calls
            return number

        def finish(self, cycle):
            target, rows, calls = self._calls[cycle]
            for mine, result in zip(rows, ray.get(calls), strict=False):
                if target is not None:
                    target[mine] = result
            self._calls[cycle] = None

        def kernels(self, array):
            raise NotImplementedError

        write = stats = busy_ns = kernels

        def close(self) -> None:
            cluster.close()

    return Calls()


def floor(tiles: tuple[int, ...]) -> Contender:
    """Return nothing but the matrix products of a step, in one thread, on memory that stays the same."""
    from rapa_dist.fabric.blas import one_blas_thread
    from rapa_dist.machine import Machine

    one_blas_thread()
    products = []
    for layer in Machine.build(channels=(32, 32, 64), tiles=tiles).arrays:
        for _ in range(layer.n_tiles):
            rows = BATCH * layer.n_patches // layer.n_tiles
            patches, kernel = np.ones((rows, layer.k), np.float32), np.ones((layer.k, layer.c_out), np.float32)
            outputs, gradient = np.ones((rows, layer.c_out), np.float32), np.ones_like(kernel)
            products += [(patches, kernel, outputs), (patches.T, outputs, gradient)]
            if layer.index:
                products.append((outputs, kernel.T, np.empty_like(patches)))

    def block(steps: int) -> Iterator[None]:
        for _ in range(steps):
            for left, right, out in products:
                np.dot(left, right, out=out)
            yield

    return Contender(block)


CONTENDERS: dict[str, tuple[str, Callable[[tuple[int, ...], int], Contender]]] = {
    "ray": ("`ray`", lambda tiles, micro_batches: on_fabric("ray", tiles, micro_batches)),
    "serial": ("`serial`, the same tiles in one process", lambda tiles, m: on_fabric("serial", tiles, m)),
    "plain-2": ("PyTorch, 2 threads", lambda tiles, m: plain(2)),
    "plain-1": ("PyTorch, 1 thread", lambda tiles, m: plain(1)),
    "plain-2-kept": (
        "PyTorch, 2 threads, freed memory kept as `rapa-dist` keeps it",
        lambda tiles, m: plain(2, keep=True),
    ),
    "plain-2-last": ("PyTorch, 2 threads, channels last", lambda tiles, m: plain(2, channels_last=True)),
    "plain-1-last": ("PyTorch, 1 thread, channels last", lambda tiles, m: plain(1, channels_last=True)),
    "calls": ("tiles as ordinary Ray actors, rows in the object store", lambda tiles, m: on_fabric("calls", tiles, 1)),
    "floor": ("the bare matrix products, 1 thread", lambda tiles, m: floor(tiles)),
    "batched-1": ("`batched`, 1 thread", lambda tiles, m: on_fabric("batched", tiles, 1, 1)),
    "batched-2": ("`batched`, 2 threads", lambda tiles, m: on_fabric("batched", tiles, 1, 2)),
}


# --- taking turns


def default_cut(tiles: str) -> int:
    """Return into how many parts `rapa-dist train` cuts a mini-batch."""
    from rapa_dist.checks import parse_list
    from rapa_dist.config import resolve

    return resolve(tiles=parse_list("--tiles", tiles)).micro_batches


class Worker:
    """A contender's process."""

    def __init__(self, name: str, tiles: str, micro_batches: int, root: Path = ROOT) -> None:
        """Start it, with the code of the checkout in `root`."""
        options = ["--worker", name, "--tiles", tiles, "--micro-batches", str(micro_batches)]
        self._process = subprocess.Popen(
            [sys.executable, str(root / "scripts" / "bench_peers.py"), *options],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=os.environ | {"PYTHONPATH": str(root)},
        )
        self._read()

    def run(self, steps: int | str) -> float:
        self._process.stdin.write(f"{steps}\n")
        self._process.stdin.flush()
        return float(self._read())

    def close(self) -> None:
        self._process.stdin.close()
        self._process.wait(60)

    def _read(self) -> str:
        while not (line := self._process.stdout.readline()).startswith("> "):
            if not line:
                raise SystemExit("a contender has died; see above")
        return line[2:]


def work(name: str, tiles: tuple[int, ...], micro_batches: int) -> None:
    """Be a contender: time a block for every number of steps that comes in."""
    contender = CONTENDERS[name][1](tiles, micro_batches)
    contender.run(5)
    print("> ready", flush=True)
    for line in sys.stdin:
        word, _, count = line.strip().rpartition(" ")
        print(f"> {(contender.run_empty if word else contender.run)(int(count))}", flush=True)
    contender.close()


def quartiles(values: np.ndarray) -> dict[str, float]:
    low, median, high = np.percentile(values, (25, 50, 75)).round(3).tolist()
    return {"q25": low, "median": median, "q75": high}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tiles", default="16,4,1")
    parser.add_argument("--micro-batches", type=int, help="default: as `rapa-dist train` would cut")
    parser.add_argument("--turns", type=int, default=20)
    parser.add_argument("--steps", type=int, default=25, help="steps of a block that are counted")
    parser.add_argument("--without", action="append", default=[], choices=CONTENDERS, metavar="NAME")
    parser.add_argument(
        "--only", action="append", choices=CONTENDERS, metavar="NAME", help="the first is the reference"
    )
    parser.add_argument("--worker", choices=CONTENDERS, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    tiles = tuple(int(part) for part in arguments.tiles.split(","))
    if arguments.worker:
        work(arguments.worker, tiles, arguments.micro_batches)
        return

    from rapa_dist.coordinator.environment import environment

    names = arguments.only or [name for name in CONTENDERS if name not in arguments.without]
    reference = names[0]
    micro_batches = arguments.micro_batches or default_cut(arguments.tiles)
    workers = {name: Worker(name, arguments.tiles, micro_batches) for name in names}
    seconds: dict[str, list[float]] = {name: [] for name in names}
    for turn in range(arguments.turns):
        for name in names if turn % 2 == 0 else names[::-1]:
            seconds[name].append(workers[name].run(arguments.steps))
        print(f"turn {turn + 1} of {arguments.turns}", file=sys.stderr)
    empty_s = workers["ray"].run(f"empty {EMPTY_ROUNDS}") if "ray" in names else None
    for worker in workers.values():
        worker.close()
    times = {name: np.array(values) for name, values in seconds.items()}
    report = {
        "tiles": list(tiles),
        "batch_size": BATCH,
        "micro_batches": micro_batches,
        "turns": arguments.turns,
        "steps_per_turn": arguments.steps,
        "contenders": {name: CONTENDERS[name][0] for name in names},
        "step_ms": {name: quartiles(1e3 * values) for name, values in times.items()},
        f"{reference}_over": {
            name: quartiles(times[reference] / values) for name, values in times.items() if name != reference
        },
        "environment": {key: value for key, value in environment().items() if key != "argv"},
    }
    if empty_s is not None:
        us_per_tile = round(1e6 * empty_s / tiles[0], 1)
        report["empty_round"] = {"tiles": tiles[0], "rounds": EMPTY_ROUNDS, "us_per_tile": us_per_tile}
    print(json.dumps(report, indent=2))


if __name__ == "__main__":
    main()
