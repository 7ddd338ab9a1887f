"""Any folder of images: FOLDER/train/<class>/… and FOLDER/test/<class>/…, as torchvision's ImageFolder reads it."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from rapa_dist.data import cache
from rapa_dist.data.classes import listed
from rapa_dist.data.decode import decode_all
from rapa_dist.data.scan import SUFFIXES, Part, PassedOver, class_folders, endings, scan
from rapa_dist.data.sets import ImageSet
from rapa_dist.errors import DataError
from rapa_dist.names import printable

PARTS = ("train", "test")
NEEDED = "images:FOLDER needs FOLDER/train/<class>/… and FOLDER/test/<class>/…, with the same classes in both"


def read_folder(folder: Path, size: int | None = None) -> cache.Decoded:
    """Return all images of a folder, decoded, or from the cache if nothing in it has changed.

    Where all are grey they have one channel, else three; what becomes of other pixels than RGB of 8 bits is told in
    `rapa_dist.data.colour`. What is passed over is said in the note.

    Args:
        folder: with `train` and `test`, each with one folder per class; labels follow the sorted names.
        size: pixels along both sides to which images are resized, shorter side to `size`, and cropped around their
            centre; None: they are left as they are, and all have the same size.

    Raises:
        DataError: the folder or a part is missing, the parts have different classes or fewer than two, a class has no
            image, an image can't be decoded, or the sizes differ and no size is given.
    """
    found = find(folder, size)
    decoded = found.decoded
    if decoded is None:
        decoded = _decode(folder, found, size)
        cache.save(_kind(size), folder, found.made_from, decoded)
    note = "\n".join(part for part in (found.note, decoded.note) if part)
    return cache.Decoded(classes=found.classes, train=decoded.train, test=decoded.test, note=note)


@dataclass(frozen=True, slots=True, kw_only=True)
class Found:
    """A folder of images before they are decoded."""

    classes: tuple[str, ...]
    train: Part
    test: Part
    note: str
    """What the user should know about the folder's names, lines."""
    made_from: str
    """`cache.signature` of the files."""
    decoded: cache.Decoded | None
    """From the cache; None: they are still to be decoded."""

    @property
    def files(self) -> list[str]:
        """All files, relative to the folder: those to train on and those to test on, by class."""
        return [file for part in (self.train, self.test) for name in self.classes for file in part.images[name]]

    @property
    def counts(self) -> list[int]:
        """Files of each part."""
        return [len(part.stamps) for part in (self.train, self.test)]


def find(folder: Path, size: int | None = None) -> Found:
    """Return what there is in a folder of images, from the cache or to be decoded; arguments as for `read_folder`.

    Raises:
        DataError: as `read_folder` does, but no image is decoded.
    """
    passed_over = PassedOver()
    try:
        _check_parts(folder)
        train, test = (scan(folder, part, passed_over) for part in PARTS)
        classes = _classes(folder, train, test)
        _check_filled(folder, train, test, passed_over)
        made_from = cache.signature([*train.stamps, *test.stamps])
        decoded = cache.load(_kind(size), folder, made_from)
    except OSError as error:
        raise DataError(f"{printable(folder)} can't be read: {error}") from error
    notes = [passed_over.sentence(folder), *_alike(folder, train, test)]
    note = "\n".join(note for note in notes if note)
    return Found(classes=classes, train=train, test=test, note=note, made_from=made_from, decoded=decoded)


def is_image_folder(folder: Path) -> bool:
    """Return whether a folder looks like what `read_folder` reads; looks at names only."""
    try:
        return all(class_folders(folder / part) for part in PARTS)
    except OSError:
        return False


def _check_parts(folder: Path) -> None:
    if not folder.is_dir():
        raise DataError(f"there is no folder {printable(folder)}; {NEEDED}")
    for part in PARTS:
        if not (folder / part).is_dir():
            raise DataError(f"{printable(folder)} has no folder {part!r}; {NEEDED}")


def _classes(folder: Path, train: Part, test: Part) -> tuple[str, ...]:
    """Return the sorted names of the classes, the same in both parts."""
    for name, part in zip(PARTS, (train, test), strict=True):
        if not part.images:
            raise DataError(f"{printable(folder / name)} has no class folders; {NEEDED}")
    if train.images.keys() != test.images.keys():
        only = [sorted(own.images.keys() - other.images.keys()) for own, other in ((train, test), (test, train))]
        named = [f"only in {part}: {listed(names)}" for part, names in zip(PARTS, only, strict=True) if names]
        folded = [{name.casefold() for name in names} for names in only]
        case = " Some differ in upper and lower case alone: rename them." if folded[0] & folded[1] else ""
        raise DataError(
            f"train and test of {printable(folder)} have different classes ({'; '.join(named)}); {NEEDED}.{case}"
        )
    if len(train.images) == 1:
        raise DataError(
            f"{printable(folder)} has a single class, {listed(list(train.images))}; a network needs two or more to "
            f"tell apart. {NEEDED}"
        )
    return tuple(train.images)


def _check_filled(folder: Path, train: Part, test: Part, passed_over: PassedOver) -> None:
    """Raise DataError if a class has no image in a part."""
    empty = [
        printable(folder / place)
        for part in (train, test)
        for name, images in part.images.items()
        if not images
        for place in part.folders[name]
    ]
    if empty:
        others = f"; other files there: {endings(passed_over.otherwise)}" if passed_over.otherwise else ""
        needed = f"a class folder needs at least one file ending in {', '.join(SUFFIXES)}"
        raise DataError(f"no images in {listed(empty)}; {needed}{others}")


def _alike(folder: Path, train: Part, test: Part) -> list[str]:
    """Return lines on classes whose names people can hardly tell apart."""
    lines = []
    several = [places for part in (train, test) for places in part.folders.values() if len(places) > 1]
    if several:
        together = "; ".join(" and ".join(ascii(place) for place in places) for places in several)
        lines.append(
            f"folders whose names differ in their Unicode form alone are one class in {printable(folder)}: {together}"
        )
    spellings: dict[str, list[str]] = {}
    for name in train.images:
        spellings.setdefault(name.casefold(), []).append(name)
    if cases := [" and ".join(names) for names in spellings.values() if len(names) > 1]:
        lines.append(f"warning: classes of {printable(folder)} differ in upper and lower case alone: {listed(cases)}")
    return lines


def _kind(size: int | None) -> str:
    """Return the name of the cache: there is one for each size."""
    return f"images-{size}" if size else "images"


def _decode(folder: Path, found: Found, size: int | None) -> cache.Decoded:
    try:
        images, note = decode_all([folder / file for file in found.files], folder, size)
    except OSError as error:
        raise DataError(f"{printable(folder)} can't be read: {error}") from error
    train, test = (
        np.repeat(np.arange(len(found.classes)), [len(part.images[name]) for name in found.classes])
        for part in (found.train, found.test)
    )
    n = len(train)
    return cache.Decoded(
        classes=found.classes,
        train=ImageSet(images=images[:n], labels=train),
        test=ImageSet(images=images[n:], labels=test),
        note=note,
    )
