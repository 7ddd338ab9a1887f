"""Image files into one uint8 array."""

import math
import os
import warnings
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import BinaryIO

import numpy as np
import numpy.typing as npt
from PIL import ExifTags, Image, ImageOps, UnidentifiedImageError

from rapa_dist.console import work
from rapa_dist.data import colour, image_kinds
from rapa_dist.errors import DataError
from rapa_dist.files import cause, open_regular
from rapa_dist.memory import memory
from rapa_dist.names import printable

TOGETHER = 250  # files per task: enough to make a task's cost vanish, few enough for smooth progress
NAMED = 5  # undecodable files that a message names

_UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
"""What undoes an EXIF orientation; 1, and what is none, needs nothing."""
_ON_ITS_SIDE = (5, 6, 7, 8)


@dataclass(frozen=True, slots=True, kw_only=True)
class Picture:
    """One image, and what was done to it that its owner may not expect."""

    pixels: npt.NDArray[np.uint8]
    """(h, w, 3), red, green, blue."""
    width: int
    """Of the file's image, in pixels, before it was turned and scaled."""
    height: int
    turned: bool
    """Whether its EXIF orientation was another one than upright."""
    transparent: bool
    """Whether there was transparency to drop."""
    several: bool
    """Whether the file has frames or pages beside this one."""
    grey: bool
    """Whether its mode has no colours: all three channels are the same."""
    scaled: bool
    """Whether it was resized."""

    @property
    def expected(self) -> bool:
        """Whether there is nothing to say about it."""
        return not (self.scaled or self.turned or self.transparent or self.several)


def decode_all(paths: Sequence[Path], folder: Path, size: int | None = None) -> tuple[npt.NDArray[np.uint8], str]:
    """Decode images, showing progress.

    Args:
        paths: n files.
        folder: they lie below; names in messages are relative to it.
        size: pixels along both sides to which they are resized and cropped; None: all have the same size.

    Returns:
        The images, (n, h, w, 3), or (n, h, w, 1) where none has colours; and lines on what was done to those that were
        otherwise, or "".

    Raises:
        DataError: files that can't be decoded, by name; or their sizes differ, or all of them together are too large.
    """
    shape = (size, size, 3) if size else _first_shape(paths)
    check_room(len(paths), shape)
    images = np.empty((len(paths), *shape), dtype=np.uint8)
    problems: dict[int, str] = {}
    unexpected: dict[int, Picture] = {}
    sizes: dict[int, tuple[int, int]] = {}
    coloured: list[bool] = []

    def decode_some(rows: range) -> int:
        for row in rows:
            try:
                picture = decode(paths[row], size)
            except Exception as error:  # noqa: BLE001 (a damaged file can raise anything in Pillow)
                problems[row] = problem(paths[row], error)
                continue
            if picture.pixels.shape != shape:
                sizes[row] = picture.pixels.shape[:2]
                continue
            images[row] = picture.pixels
            if not picture.grey and not coloured:
                coloured.append(True)
            if not picture.expected:
                unexpected[row] = replace(picture, pixels=picture.pixels[:, :, :0])
        return len(rows)

    done, n = 0, len(paths)
    # Threads help with large images; most of a small one's time is spent in Python, which holds the lock.
    pool = ThreadPoolExecutor(min(4, os.cpu_count() or 1))
    try:
        with work("decoding images", "images") as advance, quiet_pillow():
            tasks = [pool.submit(decode_some, range(i, min(i + TOGETHER, n))) for i in range(0, n, TOGETHER)]
            for task in as_completed(tasks):
                done += task.result()
                advance(done, n)
    finally:
        pool.shutdown(cancel_futures=True)
    refuse_damaged(problems)
    refuse_mixed(shape[:2], sizes, paths, folder)
    if not coloured:
        images = np.ascontiguousarray(images[..., :1])
    return images, _notes(unexpected, paths, folder, size)


def _first_shape(paths: Sequence[Path]) -> tuple[int, int, int]:
    """Return the shape of the first image that can be decoded; (1, 1, 3) where none can."""
    with quiet_pillow():
        for path in paths:
            with suppress(Exception):  # whatever a damaged file raises is said later
                h, w, _ = decode(path, None).pixels.shape
                return h, w, 3
    return 1, 1, 3


def check_room(images: int, shape: tuple[int, int, int]) -> None:
    """Raise DataError if so many images of a shape (h, w, channels) are more than memory has room for."""
    needed, available = images * math.prod(shape), memory().available
    if needed > available:
        raise DataError(
            f"{images:,} images of {shape[0]} × {shape[1]} take {needed / 1e6:,.0f} MB of memory, "
            f"{available / 1e6:,.0f} MB are available. Use --image-size with a smaller size, or a part of the images"
        )


def refuse_mixed(
    expected: tuple[int, int], others: Mapping[int, tuple[int, int]], paths: Sequence[Path], folder: Path
) -> None:
    """Raise DataError if there are images of another size than the first, (h, w) by their place among the files."""
    if not others:
        return
    counts = Counter(others.values())
    counts[expected] += len(paths) - len(others)
    listed = ", ".join(f"{n:,} of {h} × {w}" for (h, w), n in counts.most_common(NAMED))
    more = f" and {len(counts) - NAMED:,} more sizes" if len(counts) > NAMED else ""
    row = min(others)
    raise DataError(
        f"the images in {printable(folder)} have several sizes (h × w): {listed}{more}; "
        f"{printable(paths[row].relative_to(folder))} is the first of another size than the first image. "
        "Say with --image-size N to which size they are resized and cropped"
    )


def refuse_damaged(problems: Mapping[int, str]) -> None:
    """Raise DataError, with names and causes by their place in the order of the files, if there are any."""
    if problems:
        named = "; ".join(problems[row] for row in sorted(problems)[:NAMED])
        rest = f"; and {len(problems) - NAMED:,} more" if len(problems) > NAMED else ""
        raise DataError(f"images that can't be decoded: {named}{rest}. Replace or delete them.")


def problem(path: Path, error: Exception) -> str:
    """Return which file can't be decoded, and why."""
    return f"{printable(path)} ({cause(error)})"


def look_at_header(path: Path) -> tuple[tuple[int, int], bool]:
    """Return h and w of an image, once it is upright, and whether it is grey, from its header.

    Raises:
        Exception: as `decode` does, if the header says that it can't be decoded.
    """
    with open_regular(path) as file, _opened(file) as image:
        colour.check(image)
        width, height = image.size
        turned = image.format != "TIFF" and _orientation(image) in _ON_ITS_SIDE
        return (width, height) if turned else (height, width), image.mode in colour.GREY


@contextmanager
def quiet_pillow() -> Iterator[None]:
    """Drop Pillow's warnings, of EXIF data and the like: they name no file, and what matters is an error here."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def decode(path: Path, size: int | None = None) -> Picture:
    """Decode one file.

    Args:
        path: the file.
        size: pixels along both sides to which it is resized, shorter side to `size`, and cropped around its centre;
            None: it is left as it is.

    Raises:
        Refused: there is no rule for its pixels.
        Exception: whatever Pillow raises for a file that is no image or a damaged one.
    """
    with open_regular(path) as file, _opened(file) as image:
        width, height = image.size
        if size:
            image.draft(None, (4 * size, 4 * size))  # large JPEGs are decoded at a fraction of their size: quicker
        orientation = _orientation(image)
        grey = image.mode in colour.GREY
        rgb = colour.to_rgb(image)
        transparent = colour.is_transparent(image)
        several = bool(getattr(image, "is_animated", False))
        if image.format != "TIFF" and orientation in _UPRIGHT:  # Pillow turns TIFF as it reads it
            rgb = rgb.transpose(_UPRIGHT[orientation])
    scaled = size is not None and rgb.size != (size, size)
    if size and scaled:
        rgb = ImageOps.fit(rgb, (size, size), Image.Resampling.BILINEAR)
    return Picture(
        pixels=np.asarray(rgb),
        width=width,
        height=height,
        turned=orientation in _UPRIGHT,
        transparent=transparent,
        several=several,
        grey=grey,
        scaled=scaled,
    )


def _opened(file: BinaryIO) -> Image.Image:
    try:
        return Image.open(file, formats=image_kinds.FORMATS)
    except UnidentifiedImageError:
        file.seek(0)
        raise colour.Refused(image_kinds.describe(file.read(image_kinds.HEAD))) from None


def _orientation(image: Image.Image) -> int:
    """Return the EXIF orientation, 1…8; 1, upright, where there is none that can be read."""
    try:
        return int(image.getexif().get(ExifTags.Base.Orientation, 1))
    except Exception:  # noqa: BLE001 (damaged EXIF data can raise anything, and say nothing about the pixels)
        return 1


def _notes(unexpected: dict[int, Picture], paths: Sequence[Path], folder: Path, size: int | None) -> str:
    """Return a line for each thing that was done to images, with how many they are and the first of them."""
    lines = []

    def note(rows: list[int], what: str, done: str, of_first: str = "") -> None:
        if rows:
            first = printable(paths[rows[0]].relative_to(folder))
            count = f"{len(rows):,} of {len(paths):,} images in {printable(folder)}"
            lines.append(f"{count} {what} (the first, {first}{of_first}): {done}")

    rows = sorted(unexpected)
    scaled = [row for row in rows if unexpected[row].scaled]
    if scaled:
        first = unexpected[scaled[0]]
        centred = f"resized, shorter side to {size}, and cropped around their centre"
        note(scaled, f"are not {size} × {size}", centred, f", is {first.width} × {first.height}")
    note([row for row in rows if unexpected[row].turned], "have an EXIF orientation", "turned upright by it")
    transparent = [row for row in rows if unexpected[row].transparent]
    note(transparent, "are partly transparent", "their transparency is dropped")
    several = [row for row in rows if unexpected[row].several]
    note(several, "have several frames or pages", "only the first one is used")
    return "\n".join(lines)
