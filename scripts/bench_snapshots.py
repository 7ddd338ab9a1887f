#!/usr/bin/env python
"""Measure what it costs a training on several nodes to be able to lose one of them; write one JSON object.

In every second epoch the coordinator copies all weights as often as `rapa-dist train` does, in the others never.
Compared are neighbouring epochs' times per step. Run it where a cluster of several nodes is joined, as in

    cluster/local.sh run -- scripts/bench_snapshots.py --epochs 41 > results/snapshots.json
"""

import argparse
import json
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
from bench_peers import quartiles

from rapa_dist.config import parse_list, resolve
from rapa_dist.coordinator.checkpoint import Progress
from rapa_dist.coordinator.environment import environment
from rapa_dist.coordinator.recoveries import Recoveries
from rapa_dist.coordinator.run_directory import RunDirectory
from rapa_dist.coordinator.session import Place, one_digital_thread
from rapa_dist.coordinator.trainer import SNAPSHOT_EVERY, Trainer, initial_checkpoint
from rapa_dist.data import load_dataset
from rapa_dist.footprint import images_per_batch

WARM_UP = 2  # epochs that are not counted


class Switch:
    """Turns snapshots on and off from epoch to epoch."""

    trainer: Trainer

    def trained(self, progress: Progress, steps_per_epoch: int, loss: float) -> None:
        pass

    def tested(self, done: int, total: int) -> None:
        pass

    def finished_epoch(self, metrics: dict[str, Any]) -> None:
        self.trainer.snapshot_every = 0 if metrics["epoch"] % 2 else SNAPSHOT_EVERY
        print(f"epoch {metrics['epoch']}: {metrics['wall']['step_ms']} ms", file=sys.stderr)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--epochs", type=int, default=41)
    parser.add_argument("--tiles", default="16,4,1")
    arguments = parser.parse_args()
    config = resolve(
        tiles=parse_list("--tiles", arguments.tiles),
        pooling="max",
        dataset="builtin",
        limit_train=SNAPSHOT_EVERY * 10,
        limit_test=10,
        epochs=arguments.epochs,
        batch_size=10,
        lr_decay_every=1000,
        warmup_epochs=1,
        weight_decay=1e-4,
        augment=True,
        seed=0,
    )
    data = load_dataset(config.dataset, limit_train=config.limit_train, limit_test=config.limit_test)
    place = Place("ray", config.machine, images_per_batch(config.batch_size, len(data.train)))
    with tempfile.TemporaryDirectory() as folder, one_digital_thread():
        place.connect(None)
        try:
            start = initial_checkpoint(config, data)
            directory = RunDirectory.create(Path(folder) / "run", config, None)
            recoveries = Recoveries(directory)
            fabric = place.open(start.kernels, "snapshots", directory.path, recoveries.restarted)
            if not fabric.spread:
                raise SystemExit("all tiles are on this node; there is nothing to measure")
            nodes = len({entry.node for entry in fabric.stats()})
            switch = Switch()
            switch.trainer = Trainer(start, data, fabric, directory, switch, recoveries)
            switch.trainer.run()
            step_ms = np.array([line["wall"]["step_ms"] for line in directory.metrics()][WARM_UP:])
        finally:
            place.close()
    with_them, without = step_ms[0::2], step_ms[1::2]
    pairs = min(len(with_them), len(without))
    report = {
        "tiles": arguments.tiles,
        "nodes": nodes,
        "snapshot_every": SNAPSHOT_EVERY,
        "pairs_of_epochs": pairs,
        "step_ms": {"with": quartiles(with_them), "without": quartiles(without)},
        "with_over_without": quartiles(with_them[:pairs] / without[:pairs]),
        "environment": {key: value for key, value in environment().items() if key != "argv"},
    }
    print(json.dumps(report, indent=2))


if __name__ == "__main__":
    main()
