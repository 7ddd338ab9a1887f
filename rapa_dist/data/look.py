"""Looking at a data set before a run: is it there, which classes, how many images. No image is decoded for that.

What is cached is read from there, so that its fingerprint is known too. Of other images the headers are read: what is
no image, or is empty, is found; one that is damaged further down is found when it is decoded.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rapa_dist.console import work
from rapa_dist.data import builtin, cache, folder, official
from rapa_dist.data.cache import say
from rapa_dist.data.decode import check_room, look_at_header, problem, quiet_pillow, refuse_damaged, refuse_mixed
from rapa_dist.data.load import IMAGES, AllImages, at_most, check_limits, check_name, image_of, places, say_substitute
from rapa_dist.errors import DataError


@dataclass(frozen=True, slots=True, kw_only=True)
class Look:
    """A data set as far as it is known without decoding it."""

    name: str
    """In full, as `DataSet.name`."""
    state: str
    """How it is there, in a few words."""
    classes: tuple[str, ...] | None = None
    """None where it is still to be fetched."""
    train_images: int | None = None
    """Training images that a run would use; None where that is not known yet."""
    test_images: int | None = None
    """Test images that a run would use."""
    image: tuple[int, int, int] | None = None
    """Channels, h and w of an image."""
    fingerprint: str | None = None
    """Of these; None where they are not decoded yet."""


def look(
    name: str | None,
    *,
    data_dir: Path | None = None,
    limit_train: int | None = None,
    limit_test: int | None = None,
    image_size: int | None = None,
) -> Look:
    """Look at a data set; arguments and errors are those of `load_dataset`."""
    check_limits(limit_train, limit_test)
    if name is None:
        rest: dict[str, Any] = {"limit_train": limit_train, "limit_test": limit_test, "image_size": image_size}
        try:
            return look("cifar10", data_dir=data_dir, **rest)
        except DataError as error:
            say_substitute(error, data_dir)
            return look("builtin", **rest)
    name = check_name(name)
    limits = (limit_train, limit_test)
    shape = image_of(name, image_size)
    if name == "builtin":
        counts = [
            builtin.DEFAULT[part] if limit is None else at_most(limit, builtin.MOST[part], part)
            for part, limit in enumerate(limits)
        ]
        return _known(name, "drawn when it is needed", builtin.CLASSES, counts, shape)
    if name.startswith(IMAGES):
        place = Path(name.removeprefix(IMAGES))
        found = folder.find(place, image_size)
        if found.note:
            say(found.note)
        if found.decoded is None:
            shape = _look_at([place / file for file in found.files], place, image_size)
            counts = [at_most(limit, n, part) for part, (limit, n) in enumerate(zip(limits, found.counts, strict=True))]
            return _known(name, "not decoded yet, headers read", found.classes, counts, shape)
        return _cached(name, found.decoded, limits, None)
    looked_at = places(data_dir)
    decoded, state = official.find(name, looked_at, looked_at[0])
    return Look(name=name, state=state, image=shape) if decoded is None else _cached(name, decoded, limits, image_size)


def _known(
    name: str,
    state: str,
    classes: tuple[str, ...],
    counts: Sequence[int],
    image: tuple[int, int, int] | None,
) -> Look:
    return Look(name=name, state=state, classes=classes, train_images=counts[0], test_images=counts[1], image=image)


def _cached(name: str, decoded: cache.Decoded, limits: tuple[int | None, int | None], image_size: int | None) -> Look:
    data = AllImages(name=name, decoded=decoded, image_size=image_size).limited(*limits)
    return Look(
        name=name,
        state="decoded and cached",
        classes=data.classes,
        train_images=len(data.train),
        test_images=len(data.test),
        image=data.image,
        fingerprint=data.fingerprint,
    )


def _look_at(paths: Sequence[Path], folder: Path, size: int | None) -> tuple[int, int, int]:
    """Return the shape of images by their headers.

    Raises:
        DataError: some are none, or their sizes differ and no size is given.
    """
    problems = {}
    sizes: dict[int, tuple[int, int]] = {}
    grey = True
    with work("looking at images", "images") as advance, quiet_pillow():
        for row, path in enumerate(paths):
            try:
                sizes[row], without_colours = look_at_header(path)
                grey = grey and without_colours
            except Exception as error:  # noqa: BLE001 (a damaged file can raise anything in Pillow)
                problems[row] = problem(path, error)
            advance(row + 1, len(paths))
    refuse_damaged(problems)
    if size is None:
        first = sizes[0]
        refuse_mixed(first, {row: found for row, found in sizes.items() if found != first}, paths, folder)
    h, w = (size, size) if size else first
    shape = 1 if grey else 3, h, w
    check_room(len(paths), (h, w, shape[0]))
    return shape
