"""Folders that the surroundings give: the home directory, one for temporary files, the current one; each may lack."""

import os
import tempfile
from pathlib import Path

from rapa_dist.errors import UsageError

_USUAL = ("/tmp", "/var/tmp", "/usr/tmp")


def home() -> Path | None:
    """Return the home directory; None where there is none, as for an arbitrary user in a container."""
    found = os.environ["HOME"] if "HOME" in os.environ else os.path.expanduser("~")  # for Python an empty one is /
    return Path(found) if os.path.isabs(found) else None


def expanded(path: Path | str) -> Path:
    """Return a path with the home directory for ~.

    Raises:
        UsageError: there is no such home directory; the path would mean a folder called "~".
    """
    user, _, rest = os.fspath(path).partition("/")
    if not user.startswith("~"):
        return Path(path)
    root = home() if user == "~" else os.path.expanduser(user)
    if root is None or not os.path.isabs(root):
        raise UsageError(f"{path} begins with ~, and this user has no such home directory. Give the path in full.")
    return Path(root, rest)


def temporary() -> Path | None:
    """Return the folder for temporary files; None where there is none that can be written to.

    Python takes the current folder in its place, which may be on any kind of disk.
    """
    try:
        found, current = tempfile.gettempdir(), os.getcwd()
    except FileNotFoundError:  # there is none, or no current folder
        return None
    named = map(os.path.abspath, filter(None, map(os.environ.get, ("TMPDIR", "TEMP", "TMP"))))
    return None if found == current and found not in (*_USUAL, *named) else Path(found)


def check_current() -> None:
    """Raise UsageError if the current folder was deleted: neither relative paths nor PyTorch's MKL work there."""
    try:
        os.getcwd()
    except FileNotFoundError:
        raise UsageError(
            "The folder that this command was called in does not exist any more. Go to one that does, as with "
            "`cd`, and call it again."
        ) from None
