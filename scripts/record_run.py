#!/usr/bin/env python
"""Keep the result of a finished run in results/: configuration, environment, metrics, similarities in one JSON file.

scripts/record_run.py runs/20261123T120000Z-images-16x4x1 results/cifar10-jpeg-random.json
"""

import argparse
import json
import re
from pathlib import Path

from rapa_dist.analysis.learnt import similarities_of
from rapa_dist.coordinator.run_directory import RunDirectory
from rapa_dist.coordinator.sessions import sessions_of


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run_dir", type=Path)
    parser.add_argument("result", type=Path)
    arguments = parser.parse_args()
    directory = RunDirectory(arguments.run_dir)
    metrics = directory.metrics()
    environment = (sessions_of(arguments.run_dir) or [{}])[-1]
    config = directory.config.as_dict()
    config["dataset"] = re.sub(r"^images:.*/", "images:", config["dataset"])  # where it lay is nobody's concern
    last, end = metrics[-1], directory.read_checkpoint(directory.find_checkpoint("newest"))
    result = {
        "config": config,
        "test_error_percent": last["test_error_percent"],
        "best_test_error_percent": min(line["test_error_percent"] for line in metrics),
        "train_error_percent": last["train_error_percent"],
        "train_s": round(sum(line["wall"]["train_s"] for line in metrics), 1),
        "test_s": round(sum(line["wall"]["test_s"] for line in metrics), 1),
        "steps": end.progress.step,
        "similarities": similarities_of(end),
        "environment": {key: value for key, value in environment.items() if key not in ("argv", "options")},
        "metrics": metrics,
    }
    arguments.result.parent.mkdir(parents=True, exist_ok=True)
    arguments.result.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
