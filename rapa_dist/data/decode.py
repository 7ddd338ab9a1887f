"""Image files into one uint8 array."""

import os
import warnings
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import numpy as np
import numpy.typing as npt
from PIL import ExifTags, Image, ImageOps, UnidentifiedImageError

from rapa_dist.console import work
from rapa_dist.data import colour, image_kinds
from rapa_dist.data.sets import SIDE
from rapa_dist.errors import DataError
from rapa_dist.files import cause, open_regular
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


@dataclass(frozen=True, slots=True, kw_only=True)
class Picture:
    """One image, and what was done to it that its owner may not expect."""

    pixels: npt.NDArray[np.uint8]
    """(32, 32, 3), red, green, blue."""
    width: int
    """Of the file's image, in pixels, before it was turned and scaled."""
    height: int
    turned: bool
    """Whether its EXIF orientation was another one than upright."""
    transparent: bool
    """Whether there was transparency to drop."""
    several: bool
    """Whether the file has frames or pages beside this one."""

    @property
    def scaled(self) -> bool:
        """Whether it had another size."""
        return (self.width, self.height) != (SIDE, SIDE)

    @property
    def expected(self) -> bool:
        """Whether there is nothing to say about it."""
        return not (self.scaled or self.turned or self.transparent or self.several)


def decode_all(paths: Sequence[Path], folder: Path) -> tuple[npt.NDArray[np.uint8], str]:
    """Decode images, showing progress.

    Args:
        paths: n files.
        folder: they lie below; names in messages are relative to it.

    Returns:
        The images, (n, 32, 32, 3), and lines on what was done to those that were otherwise, or "".

    Raises:
        DataError: files that can't be decoded, by name.
    """
    images = np.empty((len(paths), SIDE, SIDE, 3), dtype=np.uint8)
    problems: dict[int, str] = {}
    unexpected: dict[int, Picture] = {}

    def decode_some(rows: range) -> int:
        for row in rows:
            try:
                picture = decode(paths[row])
            except Exception as error:  # noqa: BLE001 (a damaged file can raise anything in Pillow)
                problems[row] = problem(paths[row], error)
            else:
                images[row] = picture.pixels
                if not picture.expected:
                    unexpected[row] = picture
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
    return images, _notes(unexpected, paths, folder)


def refuse_damaged(problems: Mapping[int, str]) -> None:
    """Raise DataError, with names and causes by their place in the order of the files, if there are any."""
    if problems:
        named = "; ".join(problems[row] for row in sorted(problems)[:NAMED])
        rest = f"; and {len(problems) - NAMED:,} more" if len(problems) > NAMED else ""
        raise DataError(f"images that can't be decoded: {named}{rest}. Replace or delete them.")


def problem(path: Path, error: Exception) -> str:
    """Return which file can't be decoded, and why."""
    return f"{printable(path)} ({cause(error)})"


def check_header(path: Path) -> None:
    """Raise an exception, as `decode` does, if a file's header says that it can't be decoded."""
    with open_regular(path) as file, _opened(file) as image:
        colour.check(image)


@contextmanager
def quiet_pillow() -> Iterator[None]:
    """Drop Pillow's warnings, of EXIF data and the like: they name no file, and what matters is an error here."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def decode(path: Path) -> Picture:
    """Decode one file.

    Raises:
        Refused: there is no rule for its pixels.
        Exception: whatever Pillow raises for a file that is no image or a damaged one.
    """
    with open_regular(path) as file, _opened(file) as image:
        width, height = image.size
        image.draft(None, (4 * SIDE, 4 * SIDE))  # large JPEGs are decoded at a fraction of their size, which is quicker
        orientation = _orientation(image)
        rgb = colour.to_rgb(image)
        transparent = colour.is_transparent(image)
        several = bool(getattr(image, "is_animated", False))
        if image.format != "TIFF" and orientation in _UPRIGHT:  # Pillow turns TIFF as it reads it
            rgb = rgb.transpose(_UPRIGHT[orientation])
    if (width, height) != (SIDE, SIDE):
        rgb = ImageOps.fit(rgb, (SIDE, SIDE), Image.Resampling.BILINEAR)
    return Picture(
        pixels=np.asarray(rgb),
        width=width,
        height=height,
        turned=orientation in _UPRIGHT,
        transparent=transparent,
        several=several,
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


def _notes(unexpected: dict[int, Picture], paths: Sequence[Path], folder: Path) -> str:
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
        centred = f"scaled, shorter side to {SIDE}, and cropped around their centre"
        note(scaled, f"are not {SIDE} × {SIDE}", centred, f", is {first.width} × {first.height}")
    note([row for row in rows if unexpected[row].turned], "have an EXIF orientation", "turned upright by it")
    transparent = [row for row in rows if unexpected[row].transparent]
    note(transparent, "are partly transparent", "their transparency is dropped")
    several = [row for row in rows if unexpected[row].several]
    note(several, "have several frames or pages", "only the first one is used")
    return "\n".join(lines)
