"""Files that a run reads and writes: read only where they are files, written whole or not at all.

What lies in a run directory may have been put there by anybody: a pipe that nobody writes to keeps its reader waiting
for good, a device has no end, and a link leads elsewhere.
"""

import errno
import json
import os
import re
import secrets
import stat
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any, BinaryIO

from rapa_dist.errors import UsageError

UNSUPPORTED = frozenset({errno.EINVAL, errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP, errno.EBADF})
"""What file systems answer that don't know a call, as those of networks do."""
_KINDS: tuple[tuple[Callable[[int], bool], str], ...] = (
    (stat.S_ISLNK, "a link"),
    (stat.S_ISDIR, "a folder"),
    (stat.S_ISFIFO, "a pipe"),
    (stat.S_ISSOCK, "a socket"),
    (stat.S_ISREG, "a file"),
)


def kind_of(mode: int) -> str:
    """Return what the mode of something in a folder says that it is, like "a file" or "a link"."""
    return next((name for test, name in _KINDS if test(mode)), "a device")


def open_regular(path: Path) -> BinaryIO:
    """Open a regular file to read it; a link to one is followed.

    Raises:
        OSError: it can't be read, or is something else.
    """
    _check_regular(path, os.stat(path).st_mode)  # before it is opened: a device may act on that
    descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    try:
        _check_regular(path, os.fstat(descriptor).st_mode)
    except BaseException:
        os.close(descriptor)
        raise
    return open(descriptor, "rb")


def read_file(path: Path, most: int) -> bytes:
    """Return the contents of a regular file of at most `most` bytes; a link to one is followed.

    Raises:
        OSError: it can't be read, is something else, or longer.
    """
    with open_regular(path) as file:
        length = os.fstat(file.fileno()).st_size
        if length > most:
            too_long = f"it has {length:,} bytes, where at most {most:,} are expected"
            raise OSError(errno.EFBIG, too_long, str(path))
        return file.read(most)


def _check_regular(path: Path, mode: int) -> None:
    if not stat.S_ISREG(mode):
        raise OSError(errno.EINVAL, f"it is {kind_of(mode)}, not a file", str(path))


def parse_json(data: bytes) -> Any:
    """Return what JSON says.

    Raises:
        ValueError: it is none, has numbers that are not finite, or is nested more deeply than anything is here.
    """
    try:
        return json.loads(data, parse_constant=_refuse_constant)
    except RecursionError:
        raise ValueError("it is nested too deeply") from None


def _refuse_constant(name: str) -> None:
    raise ValueError(f"{name} is no number that JSON knows")


def cause(error: Exception) -> str:
    """Return why a file could not be read, as a part of a sentence."""
    text = error.strerror or str(error) if isinstance(error, OSError) else str(error)
    return text.rstrip(".") or type(error).__name__


def write_whole(path: Path, data: bytes) -> None:
    """Write a file so that a reader finds the old contents or the new ones, whatever happens, and whoever else does.

    Raises:
        OSError: it can't be written.
    """
    _clear_partials(path)
    partial = path.with_name(f".{path.name}.{os.getpid()}-{secrets.token_hex(4)}.partial")
    try:
        with partial.open("wb") as file:
            file.write(data)
            file.flush()
            _sync(file.fileno())
        partial.replace(path)
        _sync_folder(path.parent)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise


def _sync(descriptor: int) -> None:
    """Have the disk keep what was written, as far as its file system can promise that."""
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in UNSUPPORTED:
            raise


def _sync_folder(folder: Path) -> None:
    try:
        descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    except PermissionError:  # a folder may be written to and not read
        return
    try:
        _sync(descriptor)
    finally:
        os.close(descriptor)


def append_whole(path: Path, data: bytes, *, durable: bool = False) -> int:
    """Append to a file all of `data` or nothing, and return its length then; `durable`: also if the power fails.

    Raises:
        OSError: it can't be written, or is a link or a pipe or the like.
    """
    flags = os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
    descriptor = os.open(path, flags, 0o666)
    try:
        about = os.fstat(descriptor)
        _check_regular(path, about.st_mode)
        before = about.st_size
        try:
            if os.write(descriptor, data) < len(data):  # the disk took a part, and has no room for the rest
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            if durable:
                _sync(descriptor)  # over a network, a full disk may be noticed only here
        except OSError:
            os.ftruncate(descriptor, before)
            raise
        return before + len(data)
    finally:
        os.close(descriptor)


def part_from_copies(path: Path) -> None:
    """See that a file, if it is there, has this name alone: backups by hard links would be written to with it.

    Raises:
        OSError: it can't be read, or written.
    """
    with suppress(FileNotFoundError):
        about = os.stat(path)
        if about.st_nlink > 1:
            write_whole(path, path.read_bytes())
            os.utime(path, ns=(about.st_atime_ns, about.st_mtime_ns))


def check_target(option: str, path: Path | None) -> None:
    """Raise UsageError unless `write_whole` can write the file that was given with an option, if any; before any work.

    Args:
        option: its name.
        path: the file.
    """
    if path is None:
        return
    folder = path.parent
    if not folder.is_dir():
        raise UsageError(f"{option} is {path}: there is no folder {folder}. Make it, or give another name.")
    if path.exists() and not path.is_file():  # a device would be replaced, too
        raise UsageError(f"{option} is a file to write, and {path} is none. Give another name.")
    if not os.access(folder, os.W_OK | os.X_OK):
        raise UsageError(
            f"{option} is {path}: the folder {folder} can't be written to. "
            "Correct its permissions, or give another name."
        )


def _clear_partials(path: Path) -> None:
    """Remove what writers of a file left that were killed."""
    with suppress(OSError):
        for partial in path.parent.iterdir():
            written = re.fullmatch(r"\.(.*)\.(\d{1,9})-[0-9a-f]{8}\.partial", partial.name, re.DOTALL)
            if written is not None and written[1] == path.name and not _lives(int(written[2])):
                partial.unlink(missing_ok=True)


def _lives(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:  # another user's
        pass
    return True
