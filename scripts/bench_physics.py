#!/usr/bin/env python
"""Time a training step on tiles with physics against aihwkit, on the same configuration, and write one JSON object.

aihwkit is no dependency: name the Python of an environment that has it. It trains the paper's network untiled, on one
thread (two are slower), with its bias on the array and its matrices whole. They take turns in blocks of steps, as in
scripts/bench_peers.py.

    scripts/bench_physics.py --aihwkit ~/aihwkit/bin/python > results/physics.json
"""

import argparse
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "scripts"))
from bench_peers import BATCH, CLASSES, RATE, Contender, on_fabric, quartiles  # noqa: E402

PHYSICS = ("io", "gokmen-vlasov", "ecram")
TILES = (16, 4, 1)


def aihwkit(physics: str) -> Contender:
    """Return the untiled network in aihwkit."""
    import torch
    import torch.nn.functional as F
    from aihwkit.nn import AnalogConv2d
    from aihwkit.optim import AnalogSGD
    from aihwkit.simulator.configs import SingleRPUConfig
    from aihwkit.simulator.configs.devices import IdealDevice
    from aihwkit.simulator.parameters.enums import PulseType
    from aihwkit.simulator.presets import EcRamPresetDevice, GokmenVlasovPresetDevice
    from aihwkit.simulator.presets.utils import PresetIOParameters, PresetUpdateParameters
    from torch import nn

    torch.set_num_threads(1)

    def config() -> Any:
        device = {"io": IdealDevice, "gokmen-vlasov": GokmenVlasovPresetDevice, "ecram": EcRamPresetDevice}[physics]()
        update = PresetUpdateParameters()
        if physics == "io":
            update.pulse_type = PulseType.NONE
        found = SingleRPUConfig(
            device=device, forward=PresetIOParameters(), backward=PresetIOParameters(), update=update
        )
        found.mapping.digital_bias = False
        found.mapping.max_input_size = found.mapping.max_output_size = 0
        return found

    class Network(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            sizes = ((3, 32), (32, 32), (32, 64))
            self.convolutions = nn.ModuleList(AnalogConv2d(i, o, 5, padding=2, rpu_config=config()) for i, o in sizes)
            self.head = nn.Linear(1024, CLASSES)

        def forward(self, planes: torch.Tensor) -> torch.Tensor:
            for index, convolution in enumerate(self.convolutions):
                pool = F.avg_pool2d if index == 2 else F.max_pool2d
                planes = pool(F.relu(convolution(planes)), 3, 2, ceil_mode=True)
                planes = planes * (1 + 5e-5 * F.avg_pool2d(planes * planes, 3, 1, 1)) ** -0.75
            return self.head(planes.flatten(1))

    network = Network()
    optimiser = AnalogSGD(network.parameters(), lr=RATE)
    optimiser.regroup_param_groups(network)
    images, labels = torch.rand(BATCH, 3, 32, 32) - 0.5, torch.arange(BATCH) % CLASSES

    def block(steps: int) -> Iterator[None]:
        for _ in range(steps):
            optimiser.zero_grad()
            F.cross_entropy(network(images), labels).backward()
            optimiser.step()
            yield

    return Contender(block)


class Worker:
    """A contender's process."""

    def __init__(self, python: str, name: str) -> None:
        self._process = subprocess.Popen(
            [python, __file__, "--worker", name], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        self._read()

    def run(self, steps: int) -> float:
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


def work(name: str) -> None:
    """Be a contender: time a block for every number of steps that comes in."""
    whose, _, physics = name.partition(" ")
    contender = aihwkit(physics) if whose == "aihwkit" else on_fabric(whose, TILES, 1, physics=physics)
    contender.run(2)
    print("> ready", flush=True)
    for line in sys.stdin:
        print(f"> {contender.run(int(line))}", flush=True)
    contender.close()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--aihwkit", metavar="PYTHON", help="of an environment with aihwkit 1.2.0")
    parser.add_argument("--turns", type=int, default=10)
    parser.add_argument("--steps", type=int, default=5, help="steps of a block that are counted")
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.worker:
        work(arguments.worker)
        return
    if not arguments.aihwkit or not os.access(arguments.aihwkit, os.X_OK):
        parser.error("--aihwkit needs the Python of an environment with aihwkit")

    from rapa_dist.coordinator.environment import environment

    found = {}
    for physics in PHYSICS:
        workers = {
            "ray": Worker(sys.executable, f"ray {physics}"),
            "serial": Worker(sys.executable, f"serial {physics}"),
            "aihwkit": Worker(arguments.aihwkit, f"aihwkit {physics}"),
        }
        seconds: dict[str, list[float]] = {name: [] for name in workers}
        for turn in range(arguments.turns):
            for name in list(workers) if turn % 2 == 0 else list(workers)[::-1]:
                seconds[name].append(workers[name].run(arguments.steps))
            print(f"{physics}: turn {turn + 1} of {arguments.turns}", file=sys.stderr)
        for worker in workers.values():
            worker.close()
        times = {name: np.array(values) for name, values in seconds.items()}
        found[physics] = {
            "step_ms": {name: quartiles(1e3 * values) for name, values in times.items()},
            "over_aihwkit": {
                name: quartiles(values / times["aihwkit"]) for name, values in times.items() if name != "aihwkit"
            },
        }
    report = {
        "tiles": list(TILES),
        "batch_size": BATCH,
        "turns": arguments.turns,
        "steps_per_turn": arguments.steps,
        "physics": found,
        "environment": {key: value for key, value in environment().items() if key != "argv"},
    }
    print(json.dumps(report, indent=2))


if __name__ == "__main__":
    main()
