"""Pixels of every mode that Pillow has as 8-bit RGB, by one stated rule each. A mode without a rule is refused.

| mode | rule |
|---|---|
| 1, L | grey: the same value in all three channels |
| P, PA | the colours of the palette |
| RGB, RGBX | as they are |
| LA, RGBA, and any with a transparent colour | transparency is dropped; the colours beneath it stay |
| La, RGBa | the same; colours that were multiplied by their opacity are divided by it first |
| CMYK | red is (255 − C) · (255 − K) / 255, and so on: without a colour profile |
| YCbCr | as in JPEG |
| LAB, HSV | their definitions, with CIE L*a*b* under D50 |
| I;16 and its byte orders | deep grey, 0…65535 (0…4095 in a TIFF of 12 bits): its eight highest bits |
| I | deep grey as PGM and PNG have it, 0…65535, likewise; whole numbers of 32 bits have no agreed range: refused |
| F | 0…1 is black to white; anything outside: refused |

Deep colour (16 bits per channel) has no mode: Pillow keeps the eight highest bits in PNG and TIFF and rounds in PPM.
Ranges are those of the format, never those of an image, or pictures of one scene would differ. Colour profiles are not
applied. So do torchvision's ImageFolder and Pillow's `convert`, but for I;16, I and F, which they cut off at 255.
"""

from collections.abc import Callable

import numpy as np
import numpy.typing as npt
from PIL import Image

from rapa_dist.data import tiff

_FULL_RANGE = ("PNG", "PPM")  # the formats whose mode I has 0…65535
_SAVE_IT = "save it as 8-bit RGB"


class Refused(Exception):  # noqa: N818 (what is done with an image, not what went wrong in here)
    """There is no rule for an image's pixels; the message says why, and what to do."""


def to_rgb(image: Image.Image) -> Image.Image:
    """Return an image in mode RGB, of 8 bits per channel, by the rule for its mode.

    Raises:
        Refused: there is none, or the values are not in the range that the rule has.
        Exception: whatever Pillow raises for a damaged file, as this is where it is read.
    """
    check(image)
    return RULES[image.mode](image)


def check(image: Image.Image) -> None:
    """Raise Refused if there is no rule for an image; looks at its header, and at no pixels."""
    if image.mode not in RULES:
        raise Refused(f"Pillow's mode {image.mode} is not known here; {_SAVE_IT}")
    if image.format == "TIFF" and (problem := tiff.misread(image)):
        raise Refused(f"{problem}; {_SAVE_IT}")
    if image.mode == "I" and image.format not in _FULL_RANGE:
        raise Refused(f"whole numbers of more than 16 bits, or signed ones, have no agreed range; {_SAVE_IT}")
    if image.mode == "F" and image.info.get("scale", 1.0) != 1:  # of PFM
        raise Refused(f"its floating-point values have the unit {image.info['scale']:g}, not 1; {_SAVE_IT}")


def is_transparent(image: Image.Image) -> bool:
    """Return whether any pixel is less than opaque."""
    if not image.has_transparency_data:
        return False
    if image.mode in _DEEP:  # PNG names one value
        return bool(np.any(np.asarray(image) == image.info["transparency"]))
    lowest, _ = _with_alpha(image).getchannel("A").getextrema()
    return bool(lowest < 255)  # type: ignore[operator]


def _with_alpha(image: Image.Image) -> Image.Image:
    return image.convert("LA" if image.mode == "La" else "RGBA")


def _plain(image: Image.Image) -> Image.Image:
    return image.convert("RGB")


def _dropping_alpha(image: Image.Image) -> Image.Image:
    if not image.has_transparency_data:
        return image.convert("RGB")
    return _with_alpha(image).convert("RGB")  # in one go, Pillow warns of palettes, and knows no way for La


def _deep_grey(image: Image.Image) -> Image.Image:
    bits = tiff.bits(image) if image.format == "TIFF" else 16
    values = np.asarray(image).astype(np.int64) >> (bits - 8)
    return _from_grey(255 - values if tiff.white_is_zero(image) else values)


def _whole_numbers(image: Image.Image) -> Image.Image:
    values = np.asarray(image)
    if values.min() < 0 or values.max() > 65535:
        raise Refused(f"expected deep grey, 0…65535; it has {values.min()}…{values.max()}. {_SAVE_IT.capitalize()}")
    return _from_grey(values >> 8)


def _floating_point(image: Image.Image) -> Image.Image:
    values = np.asarray(image).astype(np.float64)
    if not np.all((values >= 0) & (values <= 1)):  # NaN isn't either
        found = f"{values.min():g}…{values.max():g}"
        raise Refused(f"floating-point values need to be in 0…1, from black to white; it has {found}. Scale them")
    return _from_grey(np.rint(values * 255))


def _from_grey(values: npt.NDArray[np.int64] | npt.NDArray[np.float64]) -> Image.Image:
    return Image.fromarray(values.astype(np.uint8)).convert("RGB")


_DEEP: dict[str, Callable[[Image.Image], Image.Image]] = {
    "I;16": _deep_grey,
    "I;16B": _deep_grey,
    "I;16L": _deep_grey,
    "I;16N": _deep_grey,
    "I": _whole_numbers,
    "F": _floating_point,
}
RULES: dict[str, Callable[[Image.Image], Image.Image]] = {
    **dict.fromkeys(("1", "L", "P", "PA", "LA", "La", "RGB", "RGBA", "RGBa"), _dropping_alpha),
    **dict.fromkeys(("RGBX", "CMYK", "YCbCr", "LAB", "HSV"), _plain),
    **_DEEP,
}
"""How each mode of Pillow becomes RGB."""
GREY = frozenset(("1", "L", "LA", "La", *_DEEP))
"""Modes without colours."""
