"""CIFAR-10, CIFAR-100 and SVHN in their official formats: where they lie, and how they get there."""

import os
import pickle
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from rapa_dist.console import home_as_tilde
from rapa_dist.data import cache, vision
from rapa_dist.data.download import Unreachable, download, reach
from rapa_dist.errors import DataError


@dataclass(frozen=True, slots=True, kw_only=True)
class Official:
    """A published data set, in the form torchvision reads."""

    title: str
    folder: str
    """The folder its files are in, "" for none."""
    files: tuple[str, ...]
    """What torchvision reads."""
    archives: tuple[str, ...]
    """What is fetched; unpacked beside itself where it is an archive of the files."""
    url: str
    """The folder they are fetched from; a test holds it against torchvision's own."""

    def sources(self) -> str:
        """Return where to get it by hand."""
        return " and ".join(f"{self.url}/{name}" for name in self.archives)

    def lies_in(self, place: Path) -> bool:
        """Return whether a folder holds this data set, packed or unpacked; looks at names only."""
        names = (self.folder, *self.archives) if self.folder else self.archives
        return any((place / name).exists() for name in names)

    def stamps(self, place: Path) -> list[cache.Stamp] | None:
        """Return a stamp of each file torchvision reads, or None if one is missing."""
        try:
            status = [(name, (place / self.folder / name).stat()) for name in self.files]
        except OSError:
            return None
        return [cache.stamp(name, found) for name, found in status]


OFFICIAL = {
    "cifar10": Official(
        title="CIFAR-10",
        folder="cifar-10-batches-py",
        files=(*(f"data_batch_{i}" for i in range(1, 6)), "test_batch", "batches.meta"),
        archives=("cifar-10-python.tar.gz",),
        url="https://www.cs.toronto.edu/~kriz",
    ),
    "cifar100": Official(
        title="CIFAR-100",
        folder="cifar-100-python",
        files=("train", "test", "meta"),
        archives=("cifar-100-python.tar.gz",),
        url="https://www.cs.toronto.edu/~kriz",
    ),
    "svhn": Official(
        title="SVHN",
        folder="",
        files=("train_32x32.mat", "test_32x32.mat"),
        archives=("train_32x32.mat", "test_32x32.mat"),
        url="http://ufldl.stanford.edu/housenumbers",
    ),
}


def read_official(kind: str, places: Sequence[Path], fetch_to: Path) -> cache.Decoded:
    """Return a published data set from the first place that has it whole, else fetch it.

    Args:
        kind: a key of `OFFICIAL`.
        places: folders to look into, in this order.
        fetch_to: folder to put it in if none of them has it.

    Raises:
        DataError: it is in none of them, and can't be fetched.
    """
    data = OFFICIAL[kind]
    problems = []
    for place in places:
        if data.lies_in(place):
            try:
                return _read(kind, place)
            except DataError as error:
                problems.append(str(error))
    if not problems:
        problems.append(f"{data.title} is not in {' or '.join(map(home_as_tilde, places))}")
    try:
        _fetch(kind, fetch_to)
        return _read(kind, fetch_to)
    except (Unreachable, OSError) as error:
        problem = "; ".join(problems)
        message = f"{problem}, and it can't be fetched: {error}. Put {data.sources()} into {home_as_tilde(fetch_to)}"
        raise DataError(message) from error


def _read(kind: str, place: Path) -> cache.Decoded:
    """Read from a folder that holds the data set, or what was cached of it."""
    data = OFFICIAL[kind]
    stamps = data.stamps(place)
    decoded = cache.load(kind, place, cache.signature(stamps)) if stamps else None
    if decoded is not None:
        return decoded
    try:
        classes, train, test = vision.read_official(kind, place)
    except (RuntimeError, OSError, ValueError, KeyError, EOFError, pickle.UnpicklingError) as error:
        unreadable = isinstance(error, OSError)
        why = (
            f"can't be read: {error}"
            if unreadable
            else "is incomplete or damaged: files are missing or not as published"
        )
        raise DataError(f"{data.title} in {place} {why}") from error
    decoded = cache.Decoded(classes=classes, train=train, test=test)
    after = data.stamps(place)
    if after and stamps in (None, after):  # there were none before an archive was unpacked
        cache.save(kind, place, cache.signature(after), decoded)
    return decoded


def _fetch(kind: str, folder: Path) -> None:
    """Fetch what isn't there in one piece.

    Raises:
        Unreachable: there is no network, or what came was not it.
        OSError: it can't be written.
    """
    data = OFFICIAL[kind]
    # Before torchvision is imported, which takes seconds: offline is the common case.
    reach(f"{data.url}/{data.archives[0]}")
    os.makedirs(folder, exist_ok=True)
    for name, md5 in vision.checksums(kind).items():
        if not vision.is_whole(folder / name, md5):
            download(f"{data.url}/{name}", folder / name, md5)
