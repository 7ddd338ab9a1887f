"""A lock on a folder: held by one process, and gone with it, however it ends."""

import errno
import fcntl
import os
import stat
from pathlib import Path

from rapa_dist.console import stderr
from rapa_dist.files import UNSUPPORTED, kind_of

_NO_LOCKS = UNSUPPORTED | {errno.ENOLCK}


def lock_folder(folder: Path, name: str) -> int:
    """Lock a folder by a file in it, and return the descriptor that holds the lock until it is closed.

    Where the file system has no locks, as some of networks have none, a warning takes their place.

    Raises:
        BlockingIOError: another process has it.
        OSError: the file can't be made, or is a link or the like.
    """
    path = folder / name
    flags = os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK
    descriptor = os.open(path, flags, 0o600)
    try:
        if not stat.S_ISREG(mode := os.fstat(descriptor).st_mode):
            raise OSError(errno.EINVAL, f"{name} is {kind_of(mode)}, not a file", str(path))
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(descriptor)
        raise
    except OSError as error:
        if error.errno not in _NO_LOCKS or error.filename:
            os.close(descriptor)
            raise
        stderr.print(
            f"warning: the file system of {folder} has no locks ({error.strerror}). "
            "See to it that no other process writes there.",
            markup=False,
        )
    return descriptor


def is_locked(path: Path) -> bool:
    """Whether a process of this machine has locked a file. That is looked up, not tried: nobody is kept from it."""
    try:
        about = path.stat()
        table = Path("/proc/locks").read_text()
    except OSError:
        return False
    place = f" {os.major(about.st_dev):02x}:{os.minor(about.st_dev):02x}:{about.st_ino} "
    return any(place in line and "FLOCK" in line and "->" not in line for line in table.splitlines())
