"""Published data sets in their official formats: where they lie, and how they get there."""

import os
import pickle
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from rapa_dist.console import home_as_tilde
from rapa_dist.data import cache, idx, vision
from rapa_dist.data.download import Unreachable, download, reach
from rapa_dist.data.sets import ImageSet
from rapa_dist.errors import DataError

T = TypeVar("T")


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
    fetch_folder: str = ""
    """The folder that archives are put in, "" for none."""

    def sources(self) -> str:
        """Return where to get it by hand."""
        return " and ".join(f"{self.url}/{name}" for name in self.archives)

    def lies_in(self, place: Path) -> bool:
        """Return whether a folder holds this data set, packed or unpacked; looks at names only."""
        names = (self.folder, *self.archives) if self.folder else self.archives
        return any((place / name).exists() for name in names)

    def read(self, kind: str, place: Path) -> tuple[tuple[str, ...], ImageSet, ImageSet]:
        """Return classes, training and test set; errors are those of `vision.read_official`, and DamagedIdxError."""
        return vision.read_official(kind, place)

    def stamps(self, place: Path) -> list[cache.Stamp] | None:
        """Return a stamp of each file torchvision reads, or None if one is missing."""
        try:
            status = [(name, (place / self.folder / name).stat()) for name in self.files]
        except OSError:
            return None
        return [cache.stamp(name, found) for name, found in status]


@dataclass(frozen=True, slots=True, kw_only=True)
class IdxFiles(Official):
    """One whose files are of the format idx, each packed by gzip or not."""

    classes: tuple[str, ...]

    def lies_in(self, place: Path) -> bool:
        """Return whether a folder, or one of the folders that are usual below it, holds this data set."""
        return self._files(place) is not None

    def stamps(self, place: Path) -> list[cache.Stamp] | None:
        """Return a stamp of each file, or None if one is missing."""
        try:
            return [cache.stamp(path.name, path.stat()) for path in self._files(place) or ()] or None
        except OSError:
            return None

    def read(self, kind: str, place: Path) -> tuple[tuple[str, ...], ImageSet, ImageSet]:
        """Return classes, training and test set."""
        files = self._files(place)
        if files is None:
            raise idx.DamagedIdxError("files are missing")
        return self.classes, *idx.read(files[0].parent, len(self.classes))

    def _files(self, place: Path) -> list[Path] | None:
        folders = (place / self.fetch_folder, place / self.folder, place)
        return next((files for folder in folders if (files := idx.find(folder))), None)


OFFICIAL: dict[str, Official] = {
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
    "mnist": IdxFiles(
        title="MNIST",
        folder="MNIST/raw",
        files=idx.FILES,
        archives=tuple(f"{name}.gz" for name in idx.FILES),
        url="https://ossci-datasets.s3.amazonaws.com/mnist",
        fetch_folder="mnist",
        classes=tuple(str(digit) for digit in range(10)),
    ),
    "fashion-mnist": IdxFiles(
        title="Fashion-MNIST",
        folder="FashionMNIST/raw",
        files=idx.FILES,
        archives=tuple(f"{name}.gz" for name in idx.FILES),
        url="http://fashion-mnist.s3-website.eu-central-1.amazonaws.com",
        fetch_folder="fashion-mnist",
        classes=(
            "T-shirt/top",
            "Trouser",
            "Pullover",
            "Dress",
            "Coat",
            "Sandal",
            "Shirt",
            "Sneaker",
            "Bag",
            "Ankle boot",
        ),
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
    decoded, problem = _first_whole(kind, places, _read)
    if decoded is not None:
        return decoded
    try:
        _fetch(kind, fetch_to)
        return _read(kind, fetch_to)
    except (Unreachable, OSError) as error:
        raise _not_fetched(kind, problem, error, fetch_to) from error


def find(kind: str, places: Sequence[Path], fetch_to: Path) -> tuple[cache.Decoded | None, str]:
    """Return a published data set if it lies unpacked in one of the places, and how it is there, in a few words.

    Nothing is unpacked, fetched or written. Arguments as for `read_official`.

    Raises:
        DataError: it is in none of them, or damaged, and it can't be fetched.
    """
    data = OFFICIAL[kind]
    found, problem = _first_whole(kind, places, _look)
    if found is not None:
        return found
    try:
        reach(f"{data.url}/{data.archives[0]}")
    except Unreachable as error:
        raise _not_fetched(kind, problem, error, fetch_to) from error
    return None, f"to be fetched to {home_as_tilde(fetch_to)}"


def _first_whole(kind: str, places: Sequence[Path], read: Callable[[str, Path], T]) -> tuple[T | None, str]:
    """Return what could be read in the first place that has a data set whole; else None, and why in none."""
    problems = []
    for place in places:
        if OFFICIAL[kind].lies_in(place):
            try:
                return read(kind, place), ""
            except DataError as error:
                problems.append(str(error))
    title = OFFICIAL[kind].title
    return None, "; ".join(problems) or f"{title} is not in {' or '.join(map(home_as_tilde, places))}"


def _not_fetched(kind: str, problem: str, error: Exception, fetch_to: Path) -> DataError:
    sources = OFFICIAL[kind].sources()
    return DataError(f"{problem}, and it can't be fetched: {error}. Put {sources} into {home_as_tilde(fetch_to)}")


def _look(kind: str, place: Path) -> tuple[cache.Decoded | None, str]:
    """Return a data set that lies unpacked in a place; None for a whole archive of it."""
    data = OFFICIAL[kind]
    if data.stamps(place) is None:
        for name, md5 in vision.checksums(kind).items():
            if not vision.is_whole(place / data.fetch_folder / name, md5):
                raise DataError(f"{data.title} in {place} is incomplete or damaged: {name} is not as published")
        return None, "in its archive, to be unpacked"
    return _read(kind, place), "decoded and cached"


def _read(kind: str, place: Path) -> cache.Decoded:
    """Read from a folder that holds the data set, or what was cached of it."""
    data = OFFICIAL[kind]
    stamps = data.stamps(place)
    decoded = cache.load(kind, place, cache.signature(stamps)) if stamps else None
    if decoded is not None:
        return decoded
    try:
        classes, train, test = data.read(kind, place)
    except (RuntimeError, OSError, ValueError, KeyError, EOFError, pickle.UnpicklingError) as error:
        unreadable = isinstance(error, OSError)
        why = f"can't be read: {error}" if unreadable else f"is incomplete or damaged: {_what_is_wrong(error)}"
        raise DataError(f"{data.title} in {place} {why}") from error
    decoded = cache.Decoded(classes=classes, train=train, test=test)
    after = data.stamps(place)
    if after and stamps in (None, after):  # there were none before an archive was unpacked
        cache.save(kind, place, cache.signature(after), decoded)
    return decoded


def _what_is_wrong(error: Exception) -> str:
    return str(error) if isinstance(error, idx.DamagedIdxError) else "files are missing or not as published"


def _fetch(kind: str, folder: Path) -> None:
    """Fetch what isn't there in one piece.

    Raises:
        Unreachable: there is no network, or what came was not it.
        OSError: it can't be written.
    """
    data = OFFICIAL[kind]
    # Before torchvision is imported, which takes seconds: offline is the common case.
    reach(f"{data.url}/{data.archives[0]}")
    folder = folder / data.fetch_folder
    os.makedirs(folder, exist_ok=True)
    for name, md5 in vision.checksums(kind).items():
        if not vision.is_whole(folder / name, md5):
            download(f"{data.url}/{name}", folder / name, md5)
