"""What a data set is, once it is in memory."""

import hashlib
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from rapa_dist.streams import Purpose, stream


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class ImageSet:
    """Images and what they show.

    Raises:
        ValueError: the arrays have another shape or type than said below.
    """

    images: npt.NDArray[np.uint8]
    """(n, h, w, 3), red, green, blue; or (n, h, w, 1), grey."""
    labels: npt.NDArray[np.int64]
    """(n,), index into the data set's classes."""

    def __post_init__(self) -> None:
        n = len(self.labels)
        shape = self.images.shape
        if len(shape) != 4 or shape[0] != n or shape[3] not in (1, 3) or self.images.dtype != np.uint8:
            raise ValueError(f"images must be uint8 of ({n}, h, w, 1 or 3); got {self.images.dtype} of {shape}")
        if self.labels.shape != (n,) or self.labels.dtype != np.int64:
            raise ValueError(f"labels must be int64 of (n,); got {self.labels.dtype} of {self.labels.shape}")

    def __len__(self) -> int:
        return len(self.labels)

    def take(self, rows: npt.NDArray[np.int64]) -> "ImageSet":
        """Return copies of the images at `rows`, (m,), in that order."""
        return ImageSet(images=self.images[rows], labels=self.labels[rows])

    def sample(self, most: int, index: int = 2) -> "ImageSet":
        """Return the first images of a fixed random order, or all in their own where there are no more than `most`.

        Args:
            most: images.
            index: of the stream `Purpose.SUBSET`.
        """
        if most >= len(self):
            return self
        return self.take(stream(0, Purpose.SUBSET, index).permutation(len(self))[:most])


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class DataSet:
    """A training and a test set, as a run uses them."""

    name: str
    """What was used, in the form `load_dataset` takes: "builtin", "cifar10", "images:/abs/folder", …"""
    classes: tuple[str, ...]
    """Names of the classes, by label."""
    train: ImageSet
    test: ImageSet
    mean: npt.NDArray[np.float32]
    """(channels,), the training set's mean per channel of pixel values 0…1."""
    fingerprint: str
    """16 hexadecimal digits that tell these images and labels from others, in this order."""

    @property
    def image(self) -> tuple[int, int, int]:
        """Channels, h and w of its images."""
        h, w, channels = self.train.images.shape[1:]
        return channels, h, w


def make_dataset(name: str, classes: tuple[str, ...], train: ImageSet, test: ImageSet) -> DataSet:
    """Return a data set with its mean and its fingerprint worked out.

    Raises:
        ValueError: a part is empty, or a label is not one of a class.
    """
    for part in (train, test):
        if not len(part) or part.labels.min() < 0 or part.labels.max() >= len(classes):
            raise ValueError(f"{name}: a part is empty or has labels beyond its {len(classes)} classes")
    if train.images.shape[1:] != test.images.shape[1:]:
        raise ValueError(f"{name}: {train.images.shape[1:]} to train on, {test.images.shape[1:]} to test on")
    # Whole numbers, added exactly: the mean does not depend on the order of the images.
    _, h, w, channels = train.images.shape
    sums = train.images.reshape(len(train), -1).sum(axis=0, dtype=np.int64).reshape(-1, channels).sum(axis=0)
    mean = (sums / (255 * len(train) * h * w)).astype(np.float32)
    digest = hashlib.sha256()
    for part in (train, test):
        digest.update(f"{len(part)} {len(classes)} ".encode())
        digest.update(np.ascontiguousarray(part.images).data)
        digest.update(np.ascontiguousarray(part.labels, dtype="<i8").data)
    return DataSet(name=name, classes=classes, train=train, test=test, mean=mean, fingerprint=digest.hexdigest()[:16])
