"""A data set from what somebody has in memory: arrays, or PyTorch's data sets."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from rapa_dist.data.sets import DataSet, ImageSet, make_dataset
from rapa_dist.errors import DataError

NAME = "arrays"
"""What a data set from memory is called; none of the names that `load_dataset` takes."""
_PARTS = ("training", "test")


def dataset_of(train: Any, test: Any, *, limit_train: int | None = None, limit_test: int | None = None) -> DataSet:
    """Return a data set.

    Args:
        train: to train on: a `torch.utils.data.Dataset` whose items are (image, label), or a pair (images, labels) of
            arrays or tensors. An image is a PIL image or has the shape (h, w), (h, w, channels) or (channels, h, w)
            with 1 or 3 channels; its values are bytes, or floating point from 0 to 1, which are rounded to 255ths.
            Classes are the data set's `classes` if it has them, else "0", "1", ….
        test: the same, to test on.
        limit_train: number of training images to use, None for all.
        limit_test: number of test images to use, None for all.

    Raises:
        DataError: an item is no image with a label; or the parts are empty or do not fit each other.
    """
    parts = [_image_set(part, of) for part, of in zip((train, test), _PARTS, strict=True)]
    named = getattr(train, "classes", None)
    most = 1 + max(int(part.labels.max(initial=-1)) for part in parts)
    classes = tuple(map(str, named)) if named is not None else tuple(map(str, range(most)))
    for part, of in zip(parts, _PARTS, strict=True):
        if not len(part):
            raise DataError(f"The {of} images are none. Give at least one.")
        if part.labels.min() < 0 or part.labels.max() >= len(classes):
            raise DataError(
                f"The labels of the {of} images are {part.labels.min()} … {part.labels.max()}; expected 0 … "
                f"{len(classes) - 1}, for {len(classes)} classes."
            )
    if len(classes) < 2:
        raise DataError("All images are of one class; a network needs two or more to tell apart.")
    if parts[0].images.shape[1:] != parts[1].images.shape[1:]:
        raise DataError(
            f"Training images are {_shape(parts[0])} and test images {_shape(parts[1])}. Bring them to one shape."
        )
    limits = enumerate((limit_train, limit_test))
    used = [parts[part] if limit is None else parts[part].sample(limit, part) for part, limit in limits]
    return make_dataset(NAME, classes, *used)


def _shape(part: ImageSet) -> str:
    h, w, channels = part.images.shape[1:]
    return f"{h} × {w} × {channels}"


def _image_set(part: Any, of: str) -> ImageSet:
    if isinstance(part, Sequence) and len(part) == 2 and not isinstance(part[0], tuple):
        images, labels = part
        pairs = zip(images, _plain(labels), strict=False)
        if len(images) != len(labels):
            raise DataError(f"There are {len(images):,} {of} images and {len(labels):,} labels. Give one for each.")
        found = list(pairs)
    else:
        found = [_item(part, index, of) for index in range(len(part))]
    pixels = [_pixels(image, index, of) for index, (image, _) in enumerate(found)]
    shapes = {array.shape for array in pixels}
    if len(shapes) > 1:
        sizes = ", ".join(" × ".join(map(str, shape)) for shape in sorted(shapes))
        raise DataError(f"The {of} images have several shapes: {sizes}. Bring them to one.")
    stacked = np.stack(pixels) if pixels else np.zeros((0, 1, 1, 1), np.uint8)
    try:
        labels = np.array([int(label) for _, label in found], np.int64)
    except (TypeError, ValueError) as error:
        raise DataError(f"Labels of {of} images are whole numbers from 0; {error}.") from None
    return ImageSet(images=stacked, labels=labels)


def _item(part: Any, index: int, of: str) -> tuple[Any, Any]:
    item = part[index]
    if not isinstance(item, tuple | list) or len(item) != 2:
        raise DataError(f"Item {index} of the {of} set is no pair (image, label), but {type(item).__name__}.")
    return item[0], item[1]


def _plain(values: Any) -> Any:
    return values.numpy() if hasattr(values, "numpy") else values


def _pixels(image: Any, index: int, of: str) -> npt.NDArray[np.uint8]:
    """Return one image, (h, w, channels)."""
    if hasattr(image, "convert"):  # of Pillow
        image = image if image.mode == "L" else image.convert("RGB")
    try:
        array = np.asarray(_plain(image))
    except (TypeError, ValueError):
        array = np.asarray(None)
    if array.ndim == 2:
        array = array[..., None]
    if array.ndim == 3 and array.shape[2] not in (1, 3) and array.shape[0] in (1, 3):
        array = array.transpose(1, 2, 0)
    if array.ndim != 3 or array.shape[2] not in (1, 3) or array.dtype.kind not in "uif":
        raise DataError(
            f"Item {index} of the {of} set is no image: expected (h, w), (h, w, channels) or (channels, h, w) with 1 "
            f"or 3 channels, got {type(image).__name__} of shape {array.shape} and type {array.dtype}."
        )
    limit = 1 if array.dtype.kind == "f" else 255
    if not (np.all(array >= 0) and np.all(array <= limit)):
        raise DataError(
            f"Item {index} of the {of} set has values from {array.min():g} to {array.max():g}; expected bytes, or "
            "floating point from 0 to 1. Leave normalisation to rapa-dist, which subtracts the mean."
        )
    return np.rint(array * 255).astype(np.uint8) if array.dtype.kind == "f" else array.astype(np.uint8)
