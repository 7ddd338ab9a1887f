#!/usr/bin/env python
"""Keep what `rapa-dist reproduce` has in its output folder: protocol and all results, in one JSON file in results/.

scripts/record_experiment.py reproduce/images results/reproduce-cifar10-jpeg.json
"""

import argparse
import json
import re
from pathlib import Path


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("output", type=Path)
    parser.add_argument("result", type=Path)
    arguments = parser.parse_args()
    protocol = json.loads((arguments.output / "protocol.json").read_text())
    protocol["dataset"] = re.sub(r"^images:.*/", "images:", protocol["dataset"])  # where it lay is nobody's concern
    found = sorted((arguments.output / "results").glob("*.json"))
    results = {path.name.removesuffix(".json"): json.loads(path.read_text()) for path in found}
    arguments.result.write_text(json.dumps({"protocol": protocol, "results": results}) + "\n")


if __name__ == "__main__":
    main()
