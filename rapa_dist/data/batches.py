"""Mini-batches: which images, in which order, under which augmentation. A function of (seed, epoch, step) alone."""

from collections.abc import Iterator

import numpy as np
import numpy.typing as npt

from rapa_dist.data.sets import ImageSet
from rapa_dist.streams import Purpose, stream

Batch = tuple[npt.NDArray[np.float32], npt.NDArray[np.int64]]

BRIGHTNESS = 0.05
"""Largest shift of all of an image's pixels by augmentation, in pixel values 0…1."""
WHITE = np.float32(255)


class Batches:
    """The mini-batches of training, epoch by epoch.

    Nothing is dropped: where the batch size doesn't divide the number of images, an epoch's last mini-batch is smaller.

    Args:
        images: what to train on, n images.
        mean: (channels,), subtracted from every pixel value 0…1.
        batch_size: images per mini-batch, at least 1.
        seed: the run's seed.
        augment: whether to mirror each image with probability ½ and to shift its brightness by a uniform draw in ±0.05.

    Raises:
        ValueError: the batch size is below 1.
    """

    def __init__(
        self, images: ImageSet, mean: npt.NDArray[np.float32], *, batch_size: int, seed: int, augment: bool
    ) -> None:
        if batch_size < 1:
            raise ValueError(f"a mini-batch has at least 1 image; got {batch_size}")
        self._shape = images.images.shape[1:]
        self._pixels = images.images.reshape(len(images), -1)
        self._labels = images.labels
        self._mean = _plane(mean, self._shape)
        self._batch_size = batch_size
        self._seed = seed
        self._augment = augment

    def __len__(self) -> int:
        """Return the number of steps of an epoch."""
        return -(-len(self._labels) // self._batch_size)

    def epoch(self, epoch: int, first_step: int = 0) -> Iterator[Batch]:
        """Yield an epoch's mini-batches from `first_step` on; those before are neither drawn nor computed.

        Args:
            epoch: counted from 0.
            first_step: step within the epoch, counted from 0.

        Yields:
            Pixel values less the mean, float32 (b, h, w, channels), and labels, int64 (b,). Both are the caller's to
            keep.
        """
        order = stream(self._seed, Purpose.SHUFFLE, epoch).permutation(len(self._labels))
        for step in range(first_step, len(self)):
            rows = order[step * self._batch_size : (step + 1) * self._batch_size]
            x = np.divide(self._pixels[rows], WHITE, dtype=np.float32)  # (b, h · w · channels)
            x -= self._mean
            images = x.reshape(-1, *self._shape)
            if self._augment:
                draws = stream(self._seed, Purpose.AUGMENT, epoch * len(self) + step)
                mirrored = draws.random(len(rows)) < 0.5
                x += draws.uniform(-BRIGHTNESS, BRIGHTNESS, (len(rows), 1)).astype(np.float32)
                images[mirrored] = images[mirrored, :, ::-1]
            yield images, self._labels[rows]


def evaluation_batches(images: ImageSet, mean: npt.NDArray[np.float32], batch_size: int) -> Iterator[Batch]:
    """Yield all images in their order, without augmentation, as `Batches.epoch` does.

    Args:
        images: what to evaluate on.
        mean: (channels,), the training set's, subtracted from every pixel value 0…1.
        batch_size: images per mini-batch, at least 1; the last one may be smaller.

    Raises:
        ValueError: the batch size is below 1.
    """
    if batch_size < 1:
        raise ValueError(f"a mini-batch has at least 1 image; got {batch_size}")
    return _in_order(images, _plane(mean, images.images.shape[1:]), batch_size)


def _in_order(images: ImageSet, mean: npt.NDArray[np.float32], batch_size: int) -> Iterator[Batch]:
    shape = images.images.shape[1:]
    pixels = images.images.reshape(len(images), -1)
    for first in range(0, len(images), batch_size):
        rows = slice(first, first + batch_size)
        x = np.divide(pixels[rows], WHITE, dtype=np.float32)
        x -= mean
        yield x.reshape(-1, *shape), images.labels[rows].copy()


def _plane(mean: npt.NDArray[np.float32], shape: tuple[int, ...]) -> npt.NDArray[np.float32]:
    """Return the mean repeated for every pixel, (h · w · channels,), which is quicker to subtract than it alone."""
    h, w, channels = shape
    return np.tile(np.asarray(mean, dtype=np.float32).reshape(channels), h * w)
