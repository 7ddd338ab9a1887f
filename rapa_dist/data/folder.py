"""Any folder of images: FOLDER/train/<class>/… and FOLDER/test/<class>/…, as torchvision's ImageFolder reads it."""

import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from rapa_dist.data import cache, vision
from rapa_dist.data.decode import decode_all
from rapa_dist.data.sets import ImageSet
from rapa_dist.errors import DataError

PARTS = ("train", "test")
NEEDED = "images:FOLDER needs FOLDER/train/<class>/… and FOLDER/test/<class>/…, with the same classes in both"


def read_folder(folder: Path) -> cache.Decoded:
    """Return all images of a folder, decoded, or from the cache if nothing in it has changed.

    Images of another size than 32 × 32 are scaled, shorter side to 32, and cropped around their centre; greyscale
    and transparent ones become RGB.

    Args:
        folder: with `train` and `test`, each with one folder per class; labels follow the sorted names.

    Raises:
        DataError: the folder or a part is missing, the parts have different classes or none, a class has no image,
            or an image can't be decoded.
    """
    found = find(folder)
    if found.decoded is not None:
        return found.decoded
    decoded = _decode(folder, found)
    cache.save("images", folder, found.made_from, decoded)
    return decoded


@dataclass(frozen=True, slots=True, kw_only=True)
class Found:
    """A folder of images before they are decoded."""

    classes: tuple[str, ...]
    made_from: str
    """`cache.signature` of the files."""
    decoded: cache.Decoded | None
    """From the cache; None: they are still to be decoded."""
    samples: tuple[list[tuple[Path, int]], ...] = ()
    """Of each part the files and their labels; none where they are decoded."""

    @property
    def files(self) -> list[Path]:
        """All files to decode."""
        return [path for samples in self.samples for path, _ in samples]

    @property
    def counts(self) -> list[int]:
        """Files of each part."""
        return [len(samples) for samples in self.samples]


def find(folder: Path) -> Found:
    """Return what there is in a folder of images, from the cache or to be decoded; arguments as for `read_folder`.

    Raises:
        DataError: as `read_folder` does, but no image is decoded.
    """
    try:
        classes = _classes(folder)
        made_from = cache.signature(stamp for part in PARTS for stamp in _stamps(folder / part, part))
        decoded = cache.load("images", folder, made_from)
        samples = _samples(folder, classes) if decoded is None else ()
    except OSError as error:
        raise DataError(f"{folder} can't be read: {error}") from error
    return Found(classes=classes, made_from=made_from, decoded=decoded, samples=samples)


def is_image_folder(folder: Path) -> bool:
    """Return whether a folder looks like what `read_folder` reads; looks at names only."""
    try:
        return all(_class_folders(folder / part) for part in PARTS)
    except OSError:
        return False


def _classes(folder: Path) -> tuple[str, ...]:
    """Return the sorted names of the classes, the same in both parts."""
    if not folder.is_dir():
        raise DataError(f"there is no folder {folder}; {NEEDED}")
    found = []
    for part in PARTS:
        if not (folder / part).is_dir():
            raise DataError(f"{folder} has no folder {part!r}; {NEEDED}")
        found.append(_class_folders(folder / part))
        if not found[-1]:
            raise DataError(f"{folder / part} has no class folders; {NEEDED}")
    train, test = found
    if train != test:
        differences = [
            f"only in {part}: {_some(sorted(set(own) - set(others)))}"
            for part, own, others in (("train", train, test), ("test", test, train))
            if set(own) - set(others)
        ]
        raise DataError(f"train and test of {folder} have different classes ({'; '.join(differences)}); {NEEDED}")
    return tuple(train)


def _class_folders(part: Path) -> list[str]:
    with os.scandir(part) as entries:
        return sorted(entry.name for entry in entries if entry.is_dir() and not entry.name.startswith("."))


def _stamps(folder: Path, name: str) -> Iterator[cache.Stamp]:
    """Yield a stamp of each file and folder below a folder, under names that begin with `name`."""
    with os.scandir(folder) as entries:
        for entry in entries:
            path = f"{name}/{entry.name}"
            if entry.is_dir():
                yield (path,)  # a class may be empty; the folder's times change with what is cached beside
                yield from _stamps(Path(entry.path), path)
            else:
                try:
                    status = entry.stat()
                except OSError:  # a link that leads nowhere
                    status = entry.stat(follow_symlinks=False)
                yield cache.stamp(path, status)


def _samples(folder: Path, classes: tuple[str, ...]) -> tuple[list[tuple[Path, int]], ...]:
    """Return the image files of each part with their labels; raise DataError if a class has none."""
    samples = {part: vision.list_folder(folder / part, classes) for part in PARTS}
    for part in PARTS:
        filled = {label for _, label in samples[part]}
        empty = [str(folder / part / name) for label, name in enumerate(classes) if label not in filled]
        if empty:
            endings = ", ".join(vision.image_suffixes())
            message = f"no images in {_some(empty)}; a class folder needs at least one file ending in {endings}"
            raise DataError(message)
    return tuple(samples.values())


def _decode(folder: Path, found: Found) -> cache.Decoded:
    try:
        images, note = decode_all(found.files, folder)
    except OSError as error:
        raise DataError(f"{folder} can't be read: {error}") from error
    n = found.counts[0]
    train, test = (np.array([label for _, label in samples], dtype=np.int64) for samples in found.samples)
    return cache.Decoded(
        classes=found.classes,
        train=ImageSet(images=images[:n], labels=train),
        test=ImageSet(images=images[n:], labels=test),
        note=note,
    )


def _some(names: list[str]) -> str:
    """Return a list of names for a message, shortened if it is long."""
    return ", ".join(names[:8]) + (f" and {len(names) - 8} more" if len(names) > 8 else "")
