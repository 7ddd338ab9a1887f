"""Decoded images on disk, so that they are decoded once.

A cache lies beside the data, in `.rapa-dist-cache/`, or in the home directory's `.cache/rapa-dist` where that
can't be written to. It is a plain .npz without pickles, written under another name and renamed, and used only if
it was made from the very files that are there now. The archive's checksums find damage.

Name, size and modification time don't tell one file from another: two folders that changed places, or one that was
restored from an archive, have the same. Inode and change time do, as nobody can set them. Hashing the contents would
take about as long as decoding small images.
"""

import hashlib
import os
import stat
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from rapa_dist import folders
from rapa_dist.console import stderr
from rapa_dist.data.sets import ImageSet
from rapa_dist.errors import DataError
from rapa_dist.files import open_regular

FORMAT = 4  # counted up when the images decoded from the same files change
BESIDE = ".rapa-dist-cache"

Stamp = tuple[str | int, ...]
"""A source file as it is now; see `stamp`."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Decoded:
    """All of a data set's images."""

    classes: tuple[str, ...]
    train: ImageSet
    test: ImageSet
    note: str = ""
    """What the user should know about how they were decoded, a sentence."""


def home_cache() -> Path:
    """Return the folder for data and caches of this user; one for temporary files where there is no home directory."""
    if (home := folders.home()) is not None:
        return home / ".cache" / "rapa-dist"
    folder = (folders.temporary() or Path("/tmp")) / f"rapa-dist-{os.getuid()}"
    if os.path.lexists(folder) and not _is_own(folder):
        raise DataError(
            f"There is no home directory, and the folder {folder}, which would stand in for it, is not yours "
            "alone. Have it removed, or set HOME."
        )
    return folder


def _is_own(folder: Path) -> bool:
    """Whether a folder is this user's, and no link, and nobody else may write to it: others may plant one anywhere."""
    status = folder.lstat()
    return stat.S_ISDIR(status.st_mode) and status.st_uid == os.getuid() and not status.st_mode & 0o022


def stamp(name: str, status: os.stat_result) -> Stamp:
    """Return what tells a file from any other, and from itself before it was written to, whatever became of its times.

    Args:
        name: by which the data set knows it.
        status: of the file itself, where the name is a link to it.
    """
    return name, status.st_size, status.st_mtime_ns, status.st_ctime_ns, status.st_ino, status.st_dev


def signature(stamps: Iterable[Stamp]) -> str:
    """Return what changes when a file is added, removed, renamed, exchanged or written to; their order is free."""
    digest = hashlib.sha256(str(FORMAT).encode())
    for line in sorted(map(repr, stamps)):
        digest.update(line.encode())
    return digest.hexdigest()


def load(kind: str, source: Path, wanted: str) -> Decoded | None:
    """Return what was decoded from a source, or None if that was never cached, is out of date or damaged.

    Args:
        kind: the data set's kind, which names the file.
        source: the folder the data lie in.
        wanted: `signature` of the files as they are now.
    """
    for path in _paths(kind, source):
        if _is_from_friends(path, source):
            try:
                decoded = _read(path, wanted)
            except Exception as error:  # noqa: BLE001 (a damaged file can raise anything)
                say(f"warning: the cache {path} is damaged ({error}); the images are decoded again")
                continue
            if decoded is not None:
                return decoded
    return None


def save(kind: str, source: Path, made_from: str, decoded: Decoded) -> None:
    """Cache what was decoded; where that is impossible, say so and go on.

    Args:
        kind: the data set's kind, which names the file.
        source: the folder the data lie in.
        made_from: `signature` of the files, taken before they were read.
        decoded: what to keep.
    """
    problems = []
    for path in _paths(kind, source):
        try:
            path.parent.mkdir(mode=0o777 if path.parent.name == BESIDE else 0o700, parents=True, exist_ok=True)
            _write(path, made_from, decoded)
        except OSError as error:
            problems.append(f"{path.parent}: {error.strerror or error}")
        else:
            return
    say(f"warning: the decoded images can't be cached and will be decoded again ({'; '.join(problems)})")


def _is_from_friends(path: Path, source: Path) -> bool:
    """Whether a cache is there, and from somebody who may say what the images are: their owner, this user or root."""
    try:
        status, owner = path.stat(), source.stat().st_uid
    except OSError:  # also where another user keeps it to themselves
        return False
    return stat.S_ISREG(status.st_mode) and status.st_uid in (os.getuid(), owner, 0) and not status.st_mode & 0o002


def say(message: str) -> None:
    """Print a line for the user, on stderr."""
    stderr.print(message, markup=False)


def _paths(kind: str, source: Path) -> list[Path]:
    """Return where the cache may be, the best place first."""
    source = source.absolute()
    name = hashlib.sha256(os.fsencode(source)).hexdigest()[:16]
    return [source / BESIDE / f"{kind}.npz", home_cache() / f"{kind}-{name}.npz"]


def _read(path: Path, wanted: str) -> Decoded | None:
    with open_regular(path) as raw, np.load(raw, allow_pickle=False) as file:  # np.load leaves damaged files open
        if file["made_from"].item() != wanted:
            return None
        train, test = (
            ImageSet(images=file[f"{part}_images"], labels=file[f"{part}_labels"]) for part in ("train", "test")
        )
        classes = tuple(str(name) for name in file["classes"])
        return Decoded(classes=classes, train=train, test=test, note=file["note"].item())


def _write(path: Path, made_from: str, decoded: Decoded) -> None:
    beside = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        beside.unlink(missing_ok=True)
        made = os.open(
            beside, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o644
        )  # a link that others planted is not followed
        with open(made, "wb") as file:
            np.savez(
                file,
                made_from=np.array(made_from),
                classes=np.array(decoded.classes),
                note=np.array(decoded.note),
                train_images=decoded.train.images,
                train_labels=decoded.train.labels,
                test_images=decoded.test.images,
                test_labels=decoded.test.labels,
            )
        beside.replace(path)
    except BaseException:
        with suppress(OSError):
            beside.unlink(missing_ok=True)
        raise
