"""Image files into one uint8 array."""

import os
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageOps, UnidentifiedImageError

from rapa_dist.console import work
from rapa_dist.data.sets import SIDE
from rapa_dist.errors import DataError

TOGETHER = 250  # files per task: enough to make a task's cost vanish, few enough for smooth progress
NAMED = 5  # undecodable files that a message names

Size = tuple[int, int]


def decode_all(paths: Sequence[Path], folder: Path) -> tuple[npt.NDArray[np.uint8], str]:
    """Decode images, showing progress.

    Args:
        paths: n files.
        folder: they lie below; names in messages are relative to it.

    Returns:
        The images, (n, 32, 32, 3), and a sentence on those that had another size, or "".

    Raises:
        DataError: files that can't be decoded, by name.
    """
    images = np.empty((len(paths), SIDE, SIDE, 3), dtype=np.uint8)
    problems: dict[int, str] = {}
    resized: dict[int, Size] = {}

    def decode_some(rows: range) -> int:
        for row in rows:
            try:
                images[row], size = decode(paths[row])
            except Exception as error:  # noqa: BLE001 (a damaged file can raise anything in Pillow)
                problems[row] = f"{paths[row]} ({reason(error)})"
            else:
                if size != (SIDE, SIDE):
                    resized[row] = size
        return len(rows)

    done, n = 0, len(paths)
    # Threads help with large images; most of a small one's time is spent in Python, which holds the lock.
    pool = ThreadPoolExecutor(min(4, os.cpu_count() or 1))
    try:
        with work("decoding images", "images") as advance:
            tasks = [pool.submit(decode_some, range(i, min(i + TOGETHER, n))) for i in range(0, n, TOGETHER)]
            for task in as_completed(tasks):
                done += task.result()
                advance(done, n)
    finally:
        pool.shutdown(cancel_futures=True)
    refuse_damaged(problems)
    if not resized:
        return images, ""
    first = min(resized)
    width, height = resized[first]
    return images, (
        f"{len(resized):,} of {n:,} images in {folder} are not {SIDE} × {SIDE} (the first, "
        f"{paths[first].relative_to(folder)}, is {width} × {height}): scaled, shorter side to {SIDE}, and "
        "cropped around their centre"
    )


def refuse_damaged(problems: Mapping[int, str]) -> None:
    """Raise DataError, with names and causes by their place in the order of the files, if there are any."""
    if problems:
        named = "; ".join(problems[row] for row in sorted(problems)[:NAMED])
        rest = f"; and {len(problems) - NAMED:,} more" if len(problems) > NAMED else ""
        raise DataError(f"images that can't be decoded: {named}{rest}. Replace or delete them.")


def decode(path: Path) -> tuple[npt.NDArray[np.uint8], Size]:
    """Decode one file, (32, 32, 3), and return its own width and height too.

    Raises:
        Exception: whatever Pillow raises for a file that is no image or a damaged one.
    """
    with path.open("rb") as file, Image.open(file) as image:
        size = image.size
        image.draft(None, (4 * SIDE, 4 * SIDE))  # large JPEGs are decoded at a fraction of their size, which is quicker
        colour = _to_rgb(image)
    if size != (SIDE, SIDE):
        colour = ImageOps.fit(colour, (SIDE, SIDE), Image.Resampling.BILINEAR)
    return np.asarray(colour), size


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode.startswith("I;16"):  # converted as it is, everything above 255 would be white
        return Image.fromarray((np.asarray(image) >> 8).astype(np.uint8)).convert("RGB")
    if image.mode == "P" and "transparency" in image.info:  # Pillow warns if this is done in one go
        image = image.convert("RGBA")
    return image.convert("RGB")


def reason(error: Exception) -> str:
    """Return why a file can't be decoded, in a few words."""
    if isinstance(error, UnidentifiedImageError):
        return "not an image"
    return error.strerror or str(error) if isinstance(error, OSError) else str(error) or type(error).__name__
