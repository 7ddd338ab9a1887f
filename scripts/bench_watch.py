#!/usr/bin/env python
"""Measure what `rapa-dist stats --watch` costs the training that it watches; write one JSON object.

A training goes on, with a watcher attached to it that works in every second epoch and is stopped in the others,
so that a machine that drifts, or is shared, slows both alike. Compared are neighbouring epochs' times per step.

    scripts/bench_watch.py --epochs 41 > results/watch.json
"""

import argparse
import json
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

from rapa_dist.coordinator.environment import environment

COMMAND = [sys.executable, "-P", "-m", "rapa_dist"]


def epochs_done(metrics: Path) -> int:
    return len(metrics.read_text().splitlines()) if metrics.exists() else 0


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--epochs", type=int, default=41)
    parser.add_argument("--tiles", default="16,4,1")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        directory = Path(folder) / "watched"
        options = ["--tiles", arguments.tiles, "--epochs", str(arguments.epochs), "--dataset", "builtin"]
        train = subprocess.Popen([*COMMAND, "train", *options, "--run-dir", str(directory)], stdout=subprocess.DEVNULL)
        metrics, watcher, seen = directory / "metrics.jsonl", None, 0
        while train.poll() is None:
            done = epochs_done(metrics)
            if watcher is None and done == 1:
                watcher = subprocess.Popen(
                    [*COMMAND, "stats", "--run", "watched", "--watch"], stdout=subprocess.DEVNULL
                )
            elif watcher is not None and done > max(seen, 2):  # two epochs for it to find its place
                seen = done
                if watcher.poll() is not None:
                    raise SystemExit("the watcher has ended")
                watcher.send_signal(signal.SIGCONT if done % 2 == 0 else signal.SIGSTOP)
            time.sleep(0.02)
        watcher.send_signal(signal.SIGCONT)
        if train.returncode or watcher.wait(60):
            raise SystemExit(f"training ended with {train.returncode}, watcher with {watcher.returncode}")
        lines = [json.loads(line) for line in metrics.read_text().splitlines()]
    step_ms = np.array([line["wall"]["step_ms"] for line in lines])
    alone, watched = step_ms[3::2], step_ms[4::2]  # counted from 0, even epochs are watched
    pairs = min(len(alone), len(watched))
    ratios = watched[:pairs] / alone[:pairs]
    low, median, high = np.percentile(ratios, (25, 50, 75)).round(4).tolist()
    report = {
        "tiles": arguments.tiles,
        "pairs_of_epochs": pairs,
        "steps_per_epoch": lines[0]["wall"]["steps"],
        "step_ms_alone": np.median(alone).round(3),
        "step_ms_watched": np.median(watched).round(3),
        "watched_over_alone": {"q25": low, "median": median, "q75": high},
        "environment": {key: value for key, value in environment().items() if key != "argv"},
    }
    print(json.dumps(report, indent=2))


if __name__ == "__main__":
    main()
