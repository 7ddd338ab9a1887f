"""Command lines that messages tell a user to type, quoted for a shell."""

import shlex
import sys
from collections.abc import Sequence
from pathlib import Path

from rapa_dist.installed import requirements


def resume(run_dir: Path | str, options: Sequence[str] = ()) -> str:
    """Return what resumes a run, with further options."""
    return shlex.join(["rapa-dist", "train", "--resume", str(run_dir), *options])


def pip_install(packages: Sequence[str]) -> str:
    """Return what installs packages into the environment that runs this.

    They go by their own names, and never by `rapa-dist[…]`: the project is on no index, and pip would fetch whatever
    somebody else puts there under that name.
    """
    return shlex.join([sys.executable, "-m", "pip", "install", *packages])


def no_matplotlib(what: str) -> str:
    """Return what to say where something can't be drawn: why, and how to install matplotlib."""
    needed = [line.partition(";")[0].strip() for line in requirements()]
    wanted = [line for line in needed if line.startswith("matplotlib")] or ["matplotlib"]
    return f"{what}: matplotlib is missing. Install it with: {pip_install(wanted)}"
