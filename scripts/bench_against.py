#!/usr/bin/env python
"""Time a training step of this checkout against that of another commit; write one JSON object.

Both are contenders of `bench_peers.py`, the fabric `ray`, each with its own tiles and its own code, and take turns;
whose tiles do not work are stopped. Use it before and after a change, or to see what a capability costs all those
who do not need it:

    scripts/bench_against.py 880ed5a --turns 30 > results/price.json

880ed5a is the last commit that knew neither several nodes nor what to do when something fails.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
from bench_peers import Worker, quartiles

from rapa_dist.coordinator.environment import environment

ROOT = Path(__file__).resolve().parent.parent


@contextmanager
def checked_out(commit: str) -> Iterator[Path]:
    """Yield a folder with another commit's files, which is gone afterwards."""
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder) / "other"
        git = ["git", "-C", str(ROOT)]
        subprocess.run([*git, "worktree", "add", "--quiet", "--detach", str(root), commit], check=True)
        try:
            if (root / "rapa_dist" / "native" / "__main__.py").exists():  # its own library, not none
                build = [sys.executable, "-m", "rapa_dist.native"]
                subprocess.run(build, cwd=root, env=os.environ | {"PYTHONPATH": str(root)}, check=True)
            yield root
        finally:
            subprocess.run([*git, "worktree", "remove", "--force", str(root)], check=True)


def cut_of(root: Path, tiles: str) -> int:
    """Return into how many parts the `rapa-dist train` of a checkout cuts a mini-batch."""
    program = f"from bench_peers import default_cut; print(default_cut({tiles!r}))"
    environment = os.environ | {"PYTHONPATH": f"{root}{os.pathsep}{root / 'scripts'}"}
    command = [sys.executable, "-c", program]
    return int(subprocess.run(command, check=True, capture_output=True, text=True, env=environment, cwd=root).stdout)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("commit", help="what to compare with; it needs a scripts/bench_peers.py that knows `ray`")
    parser.add_argument("--tiles", default="16,4,1")
    parser.add_argument("--turns", type=int, default=20)
    parser.add_argument("--steps", type=int, default=50, help="steps of a turn that are counted")
    arguments = parser.parse_args()
    other = subprocess.run(
        ["git", "-C", str(ROOT), "rev-parse", "--verify", f"{arguments.commit}^{{commit}}"],
        check=True,
        capture_output=True,
        text=True,
    ).stdout.strip()
    with checked_out(other) as folder:
        cuts = {root: cut_of(root, arguments.tiles) for root in (ROOT, folder)}
        here, there = (Worker("ray", arguments.tiles, cut, root=root) for root, cut in cuts.items())
        seconds: dict[Worker, list[float]] = {here: [], there: []}
        for turn in range(arguments.turns):
            for worker in (here, there) if turn % 2 == 0 else (there, here):
                seconds[worker].append(worker.run(arguments.steps))
            print(f"turn {turn + 1} of {arguments.turns}", file=sys.stderr)
        here.close()
        there.close()
    ours, theirs = np.array(seconds[here]), np.array(seconds[there])
    report = {
        "tiles": arguments.tiles,
        "micro_batches": dict(zip(("here", "there"), cuts.values(), strict=True)),
        "turns": arguments.turns,
        "steps_per_turn": arguments.steps,
        "commit": environment()["git"]["commit"],
        "against": other,
        "step_ms": {"here": quartiles(1e3 * ours), "there": quartiles(1e3 * theirs)},
        "here_over_there": quartiles(ours / theirs),
        "load": os.getloadavg()[2],
        "environment": {key: value for key, value in environment().items() if key != "argv"},
    }
    print(json.dumps(report, indent=2))


if __name__ == "__main__":
    main()
