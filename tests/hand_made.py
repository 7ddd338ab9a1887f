"""Image files for tests: byte by byte as specifications say, a truth that owes nothing to Pillow; and as it saves."""

import io
import struct
import zlib
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from PIL import Image

_TYPES = {3: "H", 4: "I"}  # TIFF's SHORT and LONG
_WIDTH, _HEIGHT, _BITS, _COMPRESSION, _PHOTOMETRIC, _OFFSETS, _ORIENTATION = 256, 257, 258, 259, 262, 273, 274
_SAMPLES, _ROWS, _COUNTS, _PLANES, _EXTRA, _SAMPLE_FORMAT = 277, 278, 279, 284, 338, 339


def saved(image: Image.Image, kind: str, **options: object) -> bytes:
    """Return the file that Pillow makes of an image."""
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def written(path: Path, data: bytes) -> Path:
    """Write a file and its folders; return its path."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data)
    return path


def png(values: np.ndarray, bits: int, colour: int, palette: bytes = b"", transparency: bytes = b"") -> bytes:
    """Return a PNG of values, (rows, columns) or (rows, columns, channels), of so many bits and a colour type."""
    rows = values.reshape(len(values), -1)
    if bits == 16:
        packed = [row.astype(">u2").tobytes() for row in rows]
    else:
        unpacked = np.unpackbits(rows.astype(np.uint8)[..., None], axis=-1)[..., 8 - bits :]
        packed = [np.packbits(row.reshape(-1)).tobytes() for row in unpacked]
    header = struct.pack(">IIBBBBB", values.shape[1], values.shape[0], bits, colour, 0, 0, 0)
    chunks = [(b"IHDR", header)]
    chunks += [(b"PLTE", palette)] if palette else []
    chunks += [(b"tRNS", transparency)] if transparency else []
    chunks += [(b"IDAT", zlib.compress(b"".join(b"\0" + row for row in packed))), (b"IEND", b"")]
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data)) for name, data in chunks
    )


def tiff(
    values: np.ndarray,
    photometric: int,
    order: str = "II",
    *,
    bits: int | None = None,
    packed: bytes | None = None,
    deflated: bool = False,
    separate: bool = False,
    extra: Sequence[int] = (),
    orientation: int = 1,
) -> bytes:
    """Return a TIFF of values, (rows, columns) or (rows, columns, channels), in their own type."""
    swap = "<" if order == "II" else ">"
    samples = values.shape[2] if values.ndim == 3 else 1
    raw = np.moveaxis(values, -1, 0) if separate else values
    data = packed if packed is not None else raw.astype(values.dtype.newbyteorder(swap)).tobytes()
    planes = [data[i * len(data) // samples :][: len(data) // samples] for i in range(samples)] if separate else [data]
    strips = [zlib.compress(plane) for plane in planes] if deflated else planes
    tags: dict[int, tuple[int, Sequence[int]]] = {
        _WIDTH: (3, [values.shape[1]]),
        _HEIGHT: (3, [values.shape[0]]),
        _BITS: (3, [bits or 8 * values.dtype.itemsize] * samples),
        _COMPRESSION: (3, [8 if deflated else 1]),
        _PHOTOMETRIC: (3, [photometric]),
        _OFFSETS: (4, [0] * len(strips)),
        _ORIENTATION: (3, [orientation]),
        _SAMPLES: (3, [samples]),
        _ROWS: (3, [values.shape[0]]),
        _COUNTS: (4, [len(strip) for strip in strips]),
        _PLANES: (3, [2 if separate else 1]),
        _SAMPLE_FORMAT: (3, [{"u": 1, "i": 2, "f": 3}[values.dtype.kind]] * samples),
    }
    if extra:
        tags[_EXTRA] = (3, extra)
    before = len(_directory(tags, swap))
    offsets = [before + sum(map(len, strips[:i])) for i in range(len(strips))]
    return _directory(tags | {_OFFSETS: (4, offsets)}, swap, order) + b"".join(strips)


def _directory(tags: Mapping[int, tuple[int, Sequence[int]]], swap: str, order: str = "II") -> bytes:
    entries, beyond = b"", b""
    end = 8 + 2 + 12 * len(tags) + 4
    for tag, (kind, numbers) in sorted(tags.items()):
        packed = struct.pack(f"{swap}{len(numbers)}{_TYPES[kind]}", *numbers)
        if len(packed) > 4:
            packed, beyond = struct.pack(f"{swap}I", end + len(beyond)), beyond + packed
        entries += struct.pack(f"{swap}HHI", tag, kind, len(numbers)) + packed.ljust(4, b"\0")
    head = order.encode() + struct.pack(f"{swap}HIH", 42, 8, len(tags))
    return head + entries + struct.pack(f"{swap}I", 0) + beyond
