"""What Pillow reads otherwise than a TIFF's tags say, without a word: values for white, signed ones, odd layouts.

Tags by their numbers in the TIFF 6.0 specification.
"""

from PIL import Image

_BITS, _COMPRESSION, _PHOTOMETRIC, _PLANES, _SAMPLE_FORMAT = 258, 259, 262, 284, 339
_UNCOMPRESSED = 1
_WHITE_IS_ZERO = 0
_SEPARATE_PLANES = 2
_UNSIGNED, _FLOATING_POINT = 1, 3


def bits(image: Image.Image) -> int:
    """Return the bits of a channel."""
    return int(max(_values(image, _BITS, 1)))


def white_is_zero(image: Image.Image) -> bool:
    """Return whether 0 is white in deep grey; in grey of 8 bits and less, Pillow has seen to it."""
    return image.format == "TIFF" and _values(image, _PHOTOMETRIC, 1)[0] == _WHITE_IS_ZERO


def misread(image: Image.Image) -> str:
    """Return in what a TIFF is other than Pillow reads it, or ""."""
    formats = set(_values(image, _SAMPLE_FORMAT, _UNSIGNED))
    if not formats <= {_UNSIGNED, _FLOATING_POINT}:
        return "its numbers have a sign, so they have no agreed range"
    if bits(image) > 8 and _values(image, _PLANES, 1)[0] == _SEPARATE_PLANES and len(image.getbands()) > 1:
        return "its channels of 16 bits lie one after the other, which Pillow does not read"
    if image.mode == "F":
        if white_is_zero(image):
            return "its floating-point values have 0 for white"
        big_endian = image.tag_v2.prefix == b"MM"  # type: ignore[attr-defined]
        if big_endian and _values(image, _COMPRESSION, 1)[0] != _UNCOMPRESSED:
            return "it has compressed floating-point values in big-endian order, which Pillow swaps"
    return ""


def _values(image: Image.Image, tag: int, default: int) -> tuple[int, ...]:
    found = image.tag_v2.get(tag, default)  # type: ignore[attr-defined]
    return found if isinstance(found, tuple) else (found,)
