"""How to install what is missing: by its own name, into the very environment that runs this.

Never `pip install rapa-dist[…]`: the project is on no index, and pip would fetch whatever somebody else puts there
under that name.
"""

import importlib.metadata
import shlex
import sys
from collections.abc import Sequence


def pip_install(requirements: Sequence[str]) -> str:
    """Return the command line that installs packages here, quoted for a shell."""
    return shlex.join([sys.executable, "-m", "pip", "install", *requirements])


def no_matplotlib(what: str) -> str:
    """Return what to say where something can't be drawn: why, and how to install matplotlib."""
    needed = [line.partition(";")[0].strip() for line in importlib.metadata.requires("rapa-dist") or ()]
    wanted = [line for line in needed if line.startswith("matplotlib")] or ["matplotlib"]
    return f"{what}: matplotlib is missing. Install it with: {pip_install(wanted)}"
