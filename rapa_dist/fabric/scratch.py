"""A private directory in shared memory for the files and sockets of one run on one node.

It vanishes with the run. Should the run be killed outright, the next run on the node finds that nobody
holds its lock any more, and sweeps it away. Where everybody may write, others could plant such a directory:
one counts only if it is this user's and closed to everyone else.
"""

import contextlib
import errno
import fcntl
import mmap
import os
import secrets
import shutil
import stat
import sys
import time
import weakref
from pathlib import Path

from rapa_dist import folders
from rapa_dist.cells import Word
from rapa_dist.errors import ClusterError
from rapa_dist.fabric.processes import end, end_users_of
from rapa_dist.interrupts import uninterrupted

PREFIX = "rapa-dist-"
LOCK = "lock"
RAY = "r"
"""Of a cluster that is started, Ray's own folder in it: Ray opens the one that it is given to everybody."""
_HALF_MADE_S = 60.0
_REMOVALS, _REMOVAL_PAUSE_S = 5, 0.1


def shared_memory_root() -> Path:
    """Return where shared memory lives on this machine: /dev/shm, or the temporary folder without it.

    Symbolic links are resolved, as in /proc, where a tile's process is told by the files it has mapped.

    Raises:
        ClusterError: RAPA_DIST_SHM names another folder, which can't be used; or neither can be written to.
    """
    if named := os.environ.get("RAPA_DIST_SHM"):
        root = Path(named)
        if not (root.is_dir() and os.access(root, os.W_OK | os.X_OK)):
            raise ClusterError(
                f"RAPA_DIST_SHM is {root}, which is no folder that can be written to. Correct or unset it."
            )
        return root.resolve()
    root = Path("/dev/shm")
    if not os.access(root, os.W_OK | os.X_OK):
        if (temporary := folders.temporary()) is None:
            raise ClusterError(
                f"A run needs a folder that can be written to in memory, usually {root}, or at least one for temporary "
                "files, usually /tmp; there is neither. Name one in RAPA_DIST_SHM, or in TMPDIR."
            )
        root = temporary
    return root.resolve()


class Scratch:
    """A directory of mode 0700 that this process owns for as long as it lives."""

    def __init__(self, root: Path | None = None) -> None:
        """Make the directory below `root` (default: shared memory), after sweeping up abandoned ones.

        It is removed when this process ends, at the latest: a signal may end a run between any two lines.
        """
        self.root = root or shared_memory_root()
        self._sizes: dict[str, int] = {}  # of mapped files, by name
        sweep(self.root)
        with uninterrupted():
            self._make()
            _here.add(self)

    def abandon(self) -> None:
        """Kill what has been started here, stopped or not, and remove the directory."""
        end_owners(self.path)
        end_users_of(self.path / RAY)
        self.remove()

    def _make(self) -> None:
        name = fresh_name()
        unlocked = self.root / f".{name}"
        try:
            with contextlib.ExitStack() as undo:
                unlocked.mkdir(mode=0o700)
                undo.callback(shutil.rmtree, unlocked, ignore_errors=True)
                self._lock = _lock(unlocked / LOCK)
                undo.callback(os.close, self._lock)
                self.path = unlocked.rename(self.root / name)  # under its final name it is locked, always
                self.remove = weakref.finalize(self, _give_back, self.path, self._lock, os.getpid())
                """Removes the directory and everything in it. May be called twice."""
                undo.pop_all()
        except OSError as error:
            raise ClusterError(
                f"Can't make a directory for the run in {self.root}: {error.strerror}. "
                "Free space there, or set RAPA_DIST_SHM to another folder in memory."
            ) from error

    def map_file(self, name: str, size: int) -> mmap.mmap:
        """Make a file of `size` bytes, all of them reserved, and return it memory-mapped.

        Raises:
            ClusterError: there is too little shared memory.
        """
        descriptor = os.open(self.path / name, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o600)
        try:
            os.posix_fallocate(descriptor, 0, size)  # a hole found later would kill the process
            mapped = mmap.mmap(descriptor, size)
            self._sizes[name] = size
            return mapped
        except OSError as error:
            if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
                raise
            raise ClusterError(too_little_memory(self.root, size)) from error
        finally:
            os.close(descriptor)

    def what_is_cut(self) -> str | None:
        """Return a sentence about a mapped file that somebody has cut short: its memory can't be touched any more."""
        for name, size in self._sizes.items():
            with contextlib.suppress(OSError):
                if (found := os.stat(self.path / name).st_size) < size:
                    return cut_short(self.path / name, found, size)
        return None


_here: weakref.WeakSet[Scratch] = weakref.WeakSet()


def abandon_all() -> None:
    """Abandon the scratch directories of this process; for when it has to end at once."""
    for scratch in list(_here):
        scratch.abandon()


def _give_back(folder: Path, lock: int, owner: int) -> None:
    """Remove a directory and everything in it."""
    if os.getpid() == owner:  # not in a process that was forked
        _remove(folder)
        with contextlib.suppress(OSError):
            os.close(lock)


def fresh_name() -> str:
    """Return a name for a scratch directory; all have the same length."""
    return f"{PREFIX}{os.getuid()}-{secrets.token_hex(6)}"


def map_existing(path: Path, size: int) -> mmap.mmap:
    """Return the first `size` bytes of an existing file memory-mapped, writable.

    Raises:
        ClusterError: it was cut short.
    """
    descriptor = open_file(path, os.O_RDWR)
    try:
        if (found := os.fstat(descriptor).st_size) < size:
            raise ClusterError(cut_short(path, found, size))
        return mmap.mmap(descriptor, size)
    finally:
        os.close(descriptor)


def cut_short(path: Path, found: int, size: int) -> str:
    """Say that a file in shared memory has fewer bytes than it was made with."""
    return (
        f"The run's file {path} in shared memory was cut short by another program: it has {found:,} of {size:,} bytes. "
        "The run can't go on without the others."
    )


def check_shared_memory(needed: int, root: Path | None = None) -> None:
    """Raise ClusterError unless `needed` bytes are free in shared memory, once abandoned runs are swept."""
    root = root or shared_memory_root()
    sweep(root)
    if free_bytes(root) < needed:
        raise ClusterError(too_little_memory(root, needed))


def free_bytes(root: Path) -> int:
    """Return the bytes that are free below `root`."""
    status = os.statvfs(root)
    return status.f_bavail * status.f_frsize


def too_little_memory(root: Path, needed: int) -> str:
    """Say that `needed` bytes do not fit below `root`, and what to do."""
    return (
        f"Too little shared memory: the run needs {needed / 1e6:.0f} MB in {root}, "
        f"{free_bytes(root) / 1e6:.0f} MB are free. Use a smaller --batch-size or fewer --tiles, free some "
        "(in a container: --shm-size), or set RAPA_DIST_SHM to another folder in memory."
    )


def sweep(root: Path) -> None:
    """Remove the directories of this user's runs that were killed and hold their lock no longer."""
    for path in own_folders(root):
        with contextlib.suppress(OSError):
            lock = _lock(path / LOCK)
            try:
                end_owners(path)
                _remove(path)
            finally:
                os.close(lock)
    for path in own_folders(root, "."):  # not locked yet: age tells whether its maker was killed
        with contextlib.suppress(OSError):
            if time.time() - path.stat().st_mtime > _HALF_MADE_S:
                shutil.rmtree(path, ignore_errors=True)


def _remove(folder: Path) -> None:
    """Remove a directory in which processes of Ray that are about to end may still be making files."""
    for _ in range(_REMOVALS):
        shutil.rmtree(folder, ignore_errors=True)
        if not folder.exists():
            return
        time.sleep(_REMOVAL_PAUSE_S)


def end_owners(folder: Path) -> None:
    """Kill the tiles' processes that an abandoned directory knows of; Ray has not, if one of them was stopped."""
    for cells in folder.glob("cells-*"):
        with contextlib.suppress(OSError), open(open_file(cells, os.O_RDONLY), "rb") as file:
            file.seek(8 * Word.PID)
            end(int.from_bytes(file.read(8), sys.byteorder), cells)


def own_folders(root: Path, before: str = "") -> list[Path]:
    """Return the scratch directories below `root` that this user made; `before` is put before their names."""
    return [path for path in root.glob(f"{before}{PREFIX}{os.getuid()}-*") if _is_own(path)]


def _is_own(folder: Path) -> bool:
    try:
        status = os.lstat(folder)
    except OSError:
        return False
    return stat.S_ISDIR(status.st_mode) and status.st_uid == os.getuid() and not status.st_mode & 0o077


def open_file(path: Path, flags: int) -> int:
    """Return a descriptor of a file in a scratch directory, following no link and waiting for no one.

    Raises:
        OSError: it can't be opened, or is no regular file.
    """
    descriptor = os.open(path, flags | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC, 0o600)
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise OSError(errno.EINVAL, "Not a regular file", str(path))
    return descriptor


def _lock(path: Path) -> int:
    descriptor = open_file(path, os.O_RDWR | os.O_CREAT)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        os.close(descriptor)
        raise
    return descriptor
