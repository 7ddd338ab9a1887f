"""What a result was obtained with: versions, hardware, state of the source, command line."""

import os
import platform
import subprocess
import sys
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from threadpoolctl import ThreadpoolController

from rapa_dist.installed import version_of
from rapa_dist.native import native


def environment() -> dict[str, Any]:
    """Return what a result was obtained with: versions, hardware, state of the source, command line."""
    packages = ("rapa-dist", "torch", "torchvision", "numpy", "ray")
    return {
        "argv": sys.argv,
        "started": datetime.now(UTC).isoformat(timespec="seconds"),
        "python": platform.python_version(),
        "packages": {name: version_of(name) for name in packages},
        "platform": platform.platform(),
        "processor": _processor(),
        "cores": len(os.sched_getaffinity(0)),
        "blas": _blas(),
        "products": str(native()),
        "memory_bytes": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
        "git": _git_state(),
    }


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), "unknown")


def _blas() -> str:
    """Return for which processor NumPy's BLAS computes: bits and speed of the tiles depend on it."""
    found = ThreadpoolController().select(user_api="blas").info()
    return ", ".join(sorted({str(library.get("architecture", "unknown")) for library in found})) or "unknown"


def _git_state() -> dict[str, Any] | None:
    """Return commit and cleanliness of the checkout that this program runs from, or None outside one."""
    here = Path(__file__).resolve().parent
    try:
        _git(here, "ls-files", "--error-unmatch", Path(__file__).name)  # not a checkout that .venv merely lies in
        commit = _git(here, "rev-parse", "HEAD")
        return {"commit": commit, "dirty": bool(_git(here, "status", "--porcelain", "--untracked-files=no"))}
    except (OSError, subprocess.SubprocessError):
        return None


def _git(folder: Path, *arguments: str) -> str:
    command = ["git", "-C", str(folder), *arguments]
    # in a hook of another repository's, variables name that one
    ours = {name: value for name, value in os.environ.items() if not name.startswith("GIT_")}
    return subprocess.run(command, capture_output=True, text=True, timeout=10, check=True, env=ours).stdout.strip()
