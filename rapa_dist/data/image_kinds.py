"""What a file that can't be read as an image is, by its first bytes: its name's ending may say anything."""

FORMATS = ("JPEG", "PNG", "PPM", "BMP", "TIFF", "WEBP", "GIF")
"""Pillow's names of the formats that are read, whatever the ending says. Others, as PostScript, run other programs."""
HEAD = 64  # bytes to look at

_READ = (
    (b"\xff\xd8\xff", "JPEG"),
    (b"\x89PNG", "PNG"),
    (b"BM", "BMP"),
    (b"II*\0", "TIFF"),
    (b"MM\0*", "TIFF"),
    (b"II+\0", "TIFF"),
    (b"MM\0+", "TIFF"),
    (b"GIF8", "GIF"),
)
_OTHERS = (
    (b"\0\0\0\x0cjP  ", "a JPEG 2000 image"),
    (b"\xff\x4f\xff\x51", "a JPEG 2000 image"),
    (b"8BPS", "a Photoshop file"),
    (b"%PDF", "a PDF"),
    (b"%!PS", "PostScript"),
    (b"PK\x03\x04", "a ZIP archive"),
    (b"\x1f\x8b", "a gzip archive"),
    (b"version https://git-lfs", "a pointer of Git LFS; fetch the image itself with git lfs pull"),
    (b"\x00\x05\x16\x07", "what macOS stores beside a file"),
)
_TEXT = ((b"<!doctype html", "a web page"), (b"<html", "a web page"), (b"<svg", "an SVG image"), (b"<?xml", "XML"))


def describe(head: bytes) -> str:
    """Return what a file is that Pillow could not read, as a part of a sentence.

    Args:
        head: its first `HEAD` bytes.
    """
    if not head:
        return "it is empty"
    if not any(head):
        return "it begins with zeros only, as after a crash of the machine"
    for start, name in _READ:
        if head.startswith(start):
            return f"it is {name} in a form that Pillow does not read, or damaged at its beginning"
    for start, what in _OTHERS:
        if head.startswith(start):
            return f"it is {what}"
    if head[4:8] == b"ftyp":
        brand = head[8:12].decode("ascii", "replace")
        return f"it is {'an AVIF image' if brand.startswith('avi') else 'a HEIC image or a film'} ({brand!a})"
    text = head.lstrip().lower()
    for start, what in _TEXT:
        if text.startswith(start):
            return f"it is {what}"
    return "not an image"
