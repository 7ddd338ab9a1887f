#!/usr/bin/env python
"""Time a training step of the preset networks on `ray` against the same models in plain PyTorch; write one JSON object.

Tiles are balanced as §5 of the paper has it, mini-batches of 10 images. Every contender has a process of its own, and
the two of a network take turns in blocks of steps; whose tiles do not work are stopped. PyTorch has as many threads as
there are cores, and so has `ray`: one for the coordinator, the others for tiles.

    scripts/bench_networks.py --turns 8 > results/networks.json
"""

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import suppress
from itertools import count, islice
from pathlib import Path

import numpy as np
from bench_peers import BATCH, CLASSES, DECAY, RATE, Contender, quartiles

NETWORKS = {  # as the table names them: network, image, tiles of the layer with most patches
    "lenet, 28 × 28": ("lenet", (1, 28, 28), 16),
    "alexnet, 64 × 64": ("alexnet", (3, 64, 64), 17),
    "alexnet, 224 × 224": ("alexnet", (3, 224, 224), 17),
    "vgg11, 32 × 32": ("vgg11", (3, 32, 32), 16),
    "resnet18, 32 × 32": ("resnet18", (3, 32, 32), 4),
}
BLOCK_S = 1.5


def images_of(image: tuple[int, int, int]):
    import torch

    channels, h, w = image
    return torch.rand(BATCH, h, w, channels).permute(0, 3, 1, 2) - 0.5, torch.arange(BATCH) % CLASSES


def plain(network: str, image: tuple[int, int, int]) -> tuple[Contender, dict]:
    import torch
    import torch.nn.functional as F

    from rapa_dist.networks import make

    torch.set_num_threads(len(os.sched_getaffinity(0)))
    model = make(network, CLASSES, image)
    optimiser = torch.optim.SGD(model.parameters(), lr=RATE, weight_decay=DECAY)
    images, labels = images_of(image)

    def block(steps: int) -> Iterator[None]:
        for _ in range(steps):
            optimiser.zero_grad()
            F.cross_entropy(model(images), labels).backward()
            optimiser.step()
            yield

    return Contender(block), {}


def on_ray(network: str, image: tuple[int, int, int], tiles: int) -> tuple[Contender, dict]:
    import torch

    from rapa_dist.config import resolve
    from rapa_dist.coordinator.learner import build, digital_arrays, learner
    from rapa_dist.demand import arena_floats
    from rapa_dist.fabric.cluster import connect
    from rapa_dist.fabric.quiet import keep_memory
    from rapa_dist.fabric.ray import RayFabric
    from rapa_dist.nn.schedule import Step

    torch.set_num_threads(1)  # as in a run
    keep_memory()
    config = resolve(network=network, image=image, tiles=(tiles,), classes=CLASSES, lr=RATE, weight_decay=DECAY)
    made = build(config)
    machine = made.recording.machine
    floats = arena_floats(machine, BATCH)
    fabric = RayFabric(
        machine, floats, made.initial_kernels(), run="networks", cluster=connect("local", len(machine.tiles))
    )
    ours = learner(made.config, fabric, digital_arrays(made.model), step=0)
    images, labels = images_of(image)
    numbers = count()

    def block(steps: int) -> Iterator[None]:
        for _ in ours.train(Step(number, images, labels, RATE) for number in islice(numbers, steps)):
            yield

    about = {"tiles": made.config.tiles, "micro_batches": made.config.micro_batches, "shared_mb": floats * 4e-6}
    return Contender(block, fabric.pids(), fabric.close), about


def work(name: str, kind: str) -> None:
    """Be a contender: read how many steps to train, line by line."""
    network, image, tiles = NETWORKS[name]
    contender, about = plain(network, image) if kind == "plain" else on_ray(network, image, tiles)
    contender.run(2)
    started = time.perf_counter()
    contender.run(2)
    step_s = (time.perf_counter() - started) / 6
    print("> " + json.dumps(about | {"step_s": step_s, "pids": [os.getpid(), *contender._tiles]}), flush=True)
    for line in sys.stdin:
        print(f"> {contender.run(int(line))}", flush=True)
    contender.close()


class Worker:
    """A contender's process."""

    def __init__(self, name: str, kind: str) -> None:
        self._process = subprocess.Popen(
            [sys.executable, __file__, "--worker", name, kind],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        self.about = json.loads(self._read())
        self.steps = max(2, round(BLOCK_S / self.about.pop("step_s")))

    def run(self) -> float:
        self._process.stdin.write(f"{self.steps}\n")
        self._process.stdin.flush()
        return float(self._read())

    def memory_mb(self) -> float:
        """Return the memory of its processes; what they share counts once."""
        kib = 0
        for pid in self.about["pids"]:
            with suppress(OSError):
                lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
                kib += next(int(line.split()[1]) for line in lines if line.startswith("Pss:"))
        return kib / 1024

    def close(self) -> None:
        self._process.stdin.close()
        self._process.wait(120)

    def _read(self) -> str:
        while not (line := self._process.stdout.readline()).startswith("> "):
            if not line:
                raise SystemExit("a contender has died; see above")
        return line[2:]


def compare(name: str, turns: int) -> dict:
    ray, torch = Worker(name, "ray"), Worker(name, "plain")
    seconds: dict[Worker, list[float]] = {ray: [], torch: []}
    for turn in range(turns):
        for worker in (ray, torch) if turn % 2 == 0 else (torch, ray):
            seconds[worker].append(worker.run())
        print(f"{name}: turn {turn + 1} of {turns}", file=sys.stderr)
    ours, theirs = np.array(seconds[ray]), np.array(seconds[torch])
    found = {
        "tiles": ray.about["tiles"],
        "actors": len(ray.about["pids"]) - 1,
        "micro_batches": ray.about["micro_batches"],
        "steps_per_turn": [ray.steps, torch.steps],
        "step_ms": {"ray": quartiles(1e3 * ours), "plain": quartiles(1e3 * theirs)},
        "ray_over_plain": quartiles(ours / theirs),
        "shared_mb": round(ray.about["shared_mb"], 1),
        "memory_mb": {"ray": round(ray.memory_mb()), "plain": round(torch.memory_mb())},
    }
    ray.close()
    torch.close()
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--turns", type=int, default=8)
    parser.add_argument("--only", action="append", choices=NETWORKS, metavar="NAME")
    parser.add_argument("--worker", nargs=2, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.worker:
        work(*arguments.worker)
        return

    from rapa_dist.coordinator.environment import environment

    report = {
        "batch_size": BATCH,
        "turns": arguments.turns,
        "networks": {name: compare(name, arguments.turns) for name in arguments.only or NETWORKS},
        "environment": {key: value for key, value in environment().items() if key != "argv"},
    }
    print(json.dumps(report, indent=2))


if __name__ == "__main__":
    main()
