#!/usr/bin/env python
"""Time a training step of the fabrics against the same network in plain PyTorch, and the empty round.

All contenders train the paper's network with mini-batches of 10 images, and take turns in blocks of a few
steps, so that a machine that drifts, or is shared, slows all of them alike. Quoted are medians and
quartiles of the single steps, and the ratio of medians within each turn.

    scripts/bench_step.py --tiles 16,4,1 --turns 20 > results/step.json
"""

import argparse
import json
import sys
import time
from collections.abc import Callable

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from rapa_dist.config import parse_list, resolve
from rapa_dist.coordinator.assigner import Assigner
from rapa_dist.coordinator.run_directory import environment
from rapa_dist.fabric.base import Fabric
from rapa_dist.fabric.cluster import connect
from rapa_dist.fabric.ray import RayFabric
from rapa_dist.fabric.serial import SerialFabric
from rapa_dist.machine import Machine
from rapa_dist.network.model import Network, initial_digital, initial_kernels
from rapa_dist.tile import Update

BATCH, CLASSES = 10, 10
STEPS_PER_BLOCK, WARM_UP = 12, 3  # the first steps of a block find cold caches and are not counted
Step = Callable[[], None]


class PlainNetwork(nn.Module):
    """The untiled network as anybody would write it in PyTorch."""

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


def plain_step(threads: int, memory_format: torch.memory_format) -> Step:
    network = PlainNetwork().to(memory_format=memory_format)
    optimiser = torch.optim.SGD(network.parameters(), lr=0.005, weight_decay=1e-4)
    images = torch.rand(BATCH, 3, 32, 32).to(memory_format=memory_format)
    labels = torch.arange(BATCH) % CLASSES

    def step() -> None:
        torch.set_num_threads(threads)
        optimiser.zero_grad()
        F.cross_entropy(network(images), labels).backward()
        optimiser.step()

    return step


def fabric_step(fabric: Fabric, scheme: str) -> Step:
    machine = fabric.machine
    network = Network(fabric, pooling="max", digital=initial_digital(machine, CLASSES, 0))
    assigner, update = Assigner(machine, scheme, 0), Update(0.005, 1e-4)
    images, labels = torch.rand(BATCH, 32, 32, 3) - 0.5, torch.arange(BATCH) % CLASSES
    number = 0

    def step() -> None:
        nonlocal number
        torch.set_num_threads(1)  # as in a run
        number += 1
        F.cross_entropy(network(images, assigner.for_training(number, BATCH), update), labels).backward()
        network.update_digital(update)

    return step


def measure(contenders: dict[str, Step], turns: int) -> dict[str, np.ndarray]:
    """Return the seconds of every counted step, (turns, steps) for each contender."""
    times: dict[str, list[list[float]]] = {name: [] for name in contenders}
    for turn in range(turns + 1):  # the first turn warms everything up
        for name, step in contenders.items():
            block = []
            for _ in range(STEPS_PER_BLOCK):
                started = time.perf_counter()
                step()
                block.append(time.perf_counter() - started)
            if turn:
                times[name].append(block[WARM_UP:])
        print(f"turn {turn} of {turns}", file=sys.stderr)
    return {name: np.array(blocks) for name, blocks in times.items()}


def quartiles(values: np.ndarray) -> dict[str, float]:
    low, median, high = np.percentile(values, (25, 50, 75)).round(3).tolist()
    return {"q25": low, "median": median, "q75": high}


def empty_rounds(fabric: RayFabric, rounds: int) -> dict[str, object]:
    """Return the microseconds per tile of a round over layer 1 in which the tiles only answer."""
    layer, times = fabric.machine.layers[0], []
    for _ in range(rounds):
        started = time.perf_counter()
        fabric.empty(layer)
        times.append((time.perf_counter() - started) / layer.n_tiles * 1e6)
    return {"tiles": layer.n_tiles, "rounds": rounds, "us_per_tile": quartiles(np.array(times))}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tiles", default="16,4,1")
    parser.add_argument("--turns", type=int, default=20)
    arguments = parser.parse_args()
    config = resolve(
        tiles=parse_list("--tiles", arguments.tiles),
        pooling="max",
        dataset=None,
        limit_train=None,
        limit_test=None,
        epochs=1,
        batch_size=BATCH,
        lr_decay_every=25,
        warmup_epochs=1,
        weight_decay=1e-4,
        augment=True,
        seed=0,
    )
    machine: Machine = config.machine
    kernels = initial_kernels(machine, 0)
    cluster = connect("local", len(machine.tiles))
    with RayFabric(machine, BATCH, kernels, run="bench", cluster=cluster) as ray_fabric:
        contenders: dict[str, Step] = {}
        for layout, suffix in ((torch.contiguous_format, ""), (torch.channels_last, ", channels last")):
            contenders["plain, 1 thread" + suffix] = plain_step(1, layout)
            contenders["plain, 2 threads" + suffix] = plain_step(2, layout)
        contenders["serial"] = fabric_step(SerialFabric(machine, BATCH, kernels), config.scheme)
        contenders["ray"] = fabric_step(ray_fabric, config.scheme)
        times = measure(contenders, arguments.turns)
        rounds = empty_rounds(ray_fabric, 500)
    in_turn = {name: np.median(blocks, axis=1) for name, blocks in times.items()}
    report = {
        "tiles": list(config.tiles),
        "batch_size": BATCH,
        "turns": arguments.turns,
        "steps_per_turn": STEPS_PER_BLOCK - WARM_UP,
        "step_ms": {name: quartiles(1e3 * blocks) for name, blocks in times.items()},
        "ray_over": {
            name: {
                "median": round(float(np.median(in_turn["ray"] / turn)), 3),
                "min": round(float(np.min(in_turn["ray"] / turn)), 3),
                "max": round(float(np.max(in_turn["ray"] / turn)), 3),
            }
            for name, turn in in_turn.items()
            if name != "ray"
        },
        "empty_round": rounds,
        "environment": environment(),
    }
    print(json.dumps(report, indent=2))


if __name__ == "__main__":
    main()
