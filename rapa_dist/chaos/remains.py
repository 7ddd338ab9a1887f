"""What a run has left behind: files in the folders that it was given for itself, and processes that use them."""

import os
import time
from collections.abc import Sequence
from pathlib import Path

_PATIENCE_S = 60.0  # for Ray's processes to end after their driver has; its agents look for it only now and then
_PAUSE_S = 0.2


def remains(folders: Sequence[Path]) -> list[str]:
    """Return what is left behind in some folders, once it had time to go away.

    Args:
        folders: temporary folders of a run that has ended; nobody else uses them.
    """
    deadline = time.monotonic() + _PATIENCE_S
    while (found := _processes(folders)) and time.monotonic() < deadline:
        time.sleep(_PAUSE_S)
    return found + [str(path) for folder in folders for path in sorted(folder.iterdir())]


def _processes(folders: Sequence[Path]) -> list[str]:
    """Return this user's processes that use files below one of the folders, or have it in their environment."""
    found = []
    for entry in Path("/proc").iterdir():
        if not entry.name.isdigit() or int(entry.name) == os.getpid():
            continue
        try:
            used = [os.readlink(link) for link in (entry / "fd").iterdir()] + (entry / "maps").read_text().splitlines()
            used += (entry / "environ").read_bytes().decode(errors="replace").replace("\0", "/\0").split("\0")
            command = (entry / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace").strip()
        except OSError:  # it has gone, or belongs to somebody else
            continue
        if any(f"{folder}/" in name for name in used for folder in folders):
            found.append(f"process {entry.name} {command[:80]}")
    return found
