"""MNIST and Fashion-MNIST in their official format, idx: a magic number, lengths, and the bytes."""

import gzip
import io
import zlib
from pathlib import Path

import numpy as np
import numpy.typing as npt

from rapa_dist.data.sets import ImageSet
from rapa_dist.files import open_regular

PARTS = ("train", "t10k")
FILES = tuple(f"{part}-{kind}-ubyte" for part in PARTS for kind in ("images-idx3", "labels-idx1"))
_UNSIGNED_BYTES = 8
_MOST = 1 << 31  # bytes of a file, unpacked


class DamagedIdxError(ValueError):
    """A file that is no idx file, or is cut, or does not fit the others; the message says what is wrong."""


def find(folder: Path) -> list[Path] | None:
    """Return the four files of a set, packed by gzip or not, or None if one is missing."""
    found = []
    for name in FILES:
        path = next((path for path in (folder / name, folder / f"{name}.gz") if path.exists()), None)
        if path is None:
            return None
        found.append(path)
    return found


def read(folder: Path, classes: int) -> tuple[ImageSet, ImageSet]:
    """Return the training and the test set of a folder that `find` finds them in.

    Raises:
        DamagedIdxError: a file is no idx file or is cut, or they do not fit each other.
        OSError: one can't be read.
    """
    paths = find(folder)
    assert paths is not None
    arrays = [_read(path, 3 if "idx3" in path.name else 1) for path in paths]
    sets = []
    for images, labels, path in zip(arrays[::2], arrays[1::2], paths[::2], strict=True):
        if len(images) != len(labels):
            raise DamagedIdxError(f"{path.name} has {len(images):,} images, and its labels are {len(labels):,}")
        if len(labels) and labels.max() >= classes:
            raise DamagedIdxError(f"the labels of {path.name} go up to {labels.max()}, and there are {classes} classes")
        sets.append(ImageSet(images=images[..., None], labels=labels.astype(np.int64)))
    train, test = sets
    if train.images.shape[1:] != test.images.shape[1:]:
        raise DamagedIdxError(
            f"its images are {train.images.shape[1:3]} to train on and {test.images.shape[1:3]} to test on"
        )
    return train, test


def _read(path: Path, dimensions: int) -> npt.NDArray[np.uint8]:
    with open_regular(path) as file:
        data = file.read(_MOST)
    if path.suffix == ".gz":
        try:
            data = gzip.GzipFile(fileobj=io.BytesIO(data)).read(_MOST)
        except (OSError, EOFError, zlib.error) as error:
            raise DamagedIdxError(f"{path.name} is damaged: {error}") from None
    head = 4 + 4 * dimensions
    if len(data) < head or data[:4] != bytes((0, 0, _UNSIGNED_BYTES, dimensions)):
        raise DamagedIdxError(f"{path.name} is no idx file of unsigned bytes with {dimensions} dimensions")
    shape = np.frombuffer(data, ">u4", dimensions, 4).tolist()
    expected, found = int(np.prod(shape, dtype=object)), len(data) - head
    if found != expected:
        raise DamagedIdxError(f"{path.name} needs {expected:,} bytes behind its head, and has {found:,}")
    return np.frombuffer(data, np.uint8, offset=head).reshape(shape)
