"""Pixels of every mode and format; what can't be read for what it is, is refused by name.

They are held against NumPy's arithmetic and against files that are written byte by byte.
"""

import colorsys
import os
import socket
import struct
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import pytest
from hand_made import png, saved, tiff, written
from PIL import Image

from rapa_dist.data import colour, load_dataset
from rapa_dist.data.decode import decode, decode_all
from rapa_dist.errors import DataError

DRAW = np.random.default_rng(0)
GREY8 = DRAW.integers(0, 256, (32, 32), dtype=np.uint8)
RGB8 = DRAW.integers(0, 256, (32, 32, 3), dtype=np.uint8)
DEEP = DRAW.integers(0, 65536, (32, 32), dtype=np.uint16)
DEEP[0, :5] = 0, 1, 255, 256, 65535
DEEP_RGB = DRAW.integers(0, 65536, (32, 32, 3), dtype=np.uint16)
ALPHA = DRAW.integers(1, 256, (32, 32, 1), dtype=np.uint8)
PALETTE = DRAW.integers(0, 256, (256, 3), dtype=np.uint8)
UNIT = DRAW.random((32, 32), dtype=np.float32)
UNIT[0, :2] = 0, 1


@pytest.fixture(autouse=True)
def _home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.delenv("RAPA_DIST_DATA", raising=False)


@pytest.fixture
def images(tmp_path: Path) -> Path:
    """Two classes of one image each, of one colour."""
    for part in ("train", "test"):
        for i, name in enumerate(("cat", "dog")):
            written(tmp_path / "images" / part / name / "1.png", png(np.full((32, 32, 3), 10 * i + 5), 8, 2))
    return tmp_path / "images"


def thrice(grey: np.ndarray) -> np.ndarray:
    return np.repeat(np.asarray(grey)[..., None], 3, axis=-1)


# --- every mode that Pillow has


def in_mode(mode: str, values: np.ndarray) -> Image.Image:
    return Image.frombytes(mode, (32, 32), values.tobytes())


def _with_palette(image: Image.Image, mode: str = "RGB", colours: np.ndarray = PALETTE) -> Image.Image:
    image.putpalette(colours.tobytes(), mode)
    return image


def _transparent(image: Image.Image, value: object) -> Image.Image:
    image.info["transparency"] = value
    return image


def _divided(values: np.ndarray) -> np.ndarray:
    return np.minimum(255, values * 255.0 / ALPHA)


def _from_ycbcr(values: np.ndarray) -> np.ndarray:
    y, cb, cr = np.moveaxis(values.astype(float), -1, 0)
    cb, cr = cb - 128, cr - 128
    return np.stack([y + 1.402 * cr, y - 0.344136 * cb - 0.714136 * cr, y + 1.772 * cb], axis=-1).clip(0, 255)


def _from_hsv(values: np.ndarray) -> np.ndarray:
    return np.array([colorsys.hsv_to_rgb(*pixel) for pixel in values.reshape(-1, 3) / 255]).reshape(32, 32, 3) * 255


def _from_lab(values: np.ndarray) -> np.ndarray:
    """CIE 15: L*a*b* to XYZ under D50, then Bradford's sRGB; L* has 0…255 for 0…100, a* and b* are signed."""
    _, a, b = np.moveaxis(values.astype(np.int8).astype(float), -1, 0)
    lightness = values[..., 0].astype(float) * 100 / 255
    f = (lightness[..., None] + 16) / 116 + np.stack([a / 500, a * 0, -b / 200], axis=-1)
    xyz = np.where(f > 6 / 29, f**3, (f - 4 / 29) * 108 / 841) * (0.96422, 1, 0.82521)
    from_d50 = [
        [3.1338561, -1.6168667, -0.4906146],
        [-0.9787684, 1.9161415, 0.033454],
        [0.0719453, -0.2289914, 1.4052427],
    ]
    linear = (xyz @ np.array(from_d50).T).clip(0, 1)
    return 255 * np.where(linear <= 0.0031308, 12.92 * linear, 1.055 * linear ** (1 / 2.4) - 0.055)


LAB = DRAW.integers((100, -15, -15), (200, 15, 15), (32, 32, 3)).astype(np.uint8)
LA = np.concatenate([GREY8[..., None], ALPHA], axis=-1)
RGBA = np.concatenate([RGB8, ALPHA], axis=-1)
CMYK = DRAW.integers(0, 256, (32, 32, 4), dtype=np.uint8)

# By case: image, red, green and blue, and how far off they may be where a rule rounds.
CASES: dict[str, tuple[Callable[[], Image.Image], Callable[[], np.ndarray], int]] = {
    "1": (lambda: Image.fromarray(GREY8 > 127), lambda: thrice(np.where(GREY8 > 127, 255, 0)), 0),
    "L": (lambda: in_mode("L", GREY8), lambda: thrice(GREY8), 0),
    "L, one grey transparent": (lambda: _transparent(in_mode("L", GREY8), 7), lambda: thrice(GREY8), 0),
    "LA": (lambda: in_mode("LA", LA), lambda: thrice(GREY8), 0),
    "La": (lambda: in_mode("La", LA), lambda: thrice(_divided(GREY8[..., None])[..., 0]), 1),
    "P": (lambda: _with_palette(in_mode("P", GREY8)), lambda: PALETTE[GREY8], 0),
    "P, transparent": (
        lambda: _transparent(_with_palette(in_mode("P", GREY8)), bytes(range(256))),
        lambda: PALETTE[GREY8],
        0,
    ),
    "P, one colour transparent": (
        lambda: _transparent(_with_palette(in_mode("P", GREY8)), 7),
        lambda: PALETTE[GREY8],
        0,
    ),
    "P, RGBA palette": (
        lambda: _with_palette(in_mode("P", GREY8), "RGBA", np.insert(PALETTE, 3, range(256), axis=1)),
        lambda: PALETTE[GREY8],
        0,
    ),
    "PA": (lambda: _with_palette(in_mode("PA", LA)), lambda: PALETTE[GREY8], 0),
    "RGB": (lambda: in_mode("RGB", RGB8), lambda: RGB8, 0),
    "RGB, one colour transparent": (lambda: _transparent(in_mode("RGB", RGB8), (1, 2, 3)), lambda: RGB8, 0),
    "RGBX": (lambda: in_mode("RGBX", RGBA), lambda: RGB8, 0),
    "RGBA": (lambda: in_mode("RGBA", RGBA), lambda: RGB8, 0),
    "RGBa": (lambda: in_mode("RGBa", RGBA), lambda: _divided(RGB8), 1),
    "CMYK": (lambda: in_mode("CMYK", CMYK), lambda: (255.0 - CMYK[..., :3]) * (255.0 - CMYK[..., 3:]) / 255, 1),
    "YCbCr": (lambda: in_mode("YCbCr", RGB8), lambda: _from_ycbcr(RGB8), 1),
    "HSV": (lambda: in_mode("HSV", RGB8), lambda: _from_hsv(RGB8), 3),
    "LAB": (lambda: in_mode("LAB", LAB), lambda: _from_lab(LAB), 3),
    "I;16": (lambda: in_mode("I;16", DEEP.astype("<u2")), lambda: thrice(DEEP // 256), 0),
    "I;16L": (lambda: in_mode("I;16L", DEEP.astype("<u2")), lambda: thrice(DEEP // 256), 0),
    "I;16B": (lambda: in_mode("I;16B", DEEP.astype(">u2")), lambda: thrice(DEEP // 256), 0),
    "I;16N": (lambda: in_mode("I;16N", DEEP.astype("=u2")), lambda: thrice(DEEP // 256), 0),
    "F": (lambda: in_mode("F", UNIT), lambda: thrice(np.rint(UNIT.astype(float) * 255)), 0),
}
REFUSED_MODES = {"I"}
"""But from PNG and PGM, below: elsewhere whole numbers of 32 bits have no range."""


@pytest.mark.parametrize("case", CASES)
def test_every_mode_becomes_rgb_by_its_rule(case: str) -> None:
    image, truth, within = CASES[case]
    found = np.asarray(colour.to_rgb(image())).astype(float)
    assert np.abs(found - truth()).max() <= within


def test_no_mode_of_pillow_is_without_a_rule_and_a_test() -> None:
    assert set(Image.MODES) == {case.partition(",")[0] for case in CASES} | REFUSED_MODES == set(colour.RULES)


# --- formats, written byte by byte where Pillow would write what it reads


def _levels(bits: int) -> np.ndarray:
    """Grey of so few bits: the values that are stored."""
    return GREY8 >> (8 - bits)


def _as_eight(values: np.ndarray, bits: int) -> np.ndarray:
    return thrice(values.astype(int) * 255 // (2**bits - 1))


def _pgm(values: np.ndarray, most: int) -> bytes:
    kind = b"P6" if values.ndim == 3 else b"P5"
    return kind + b" 32 32 %d\n" % most + values.astype(">u2" if most > 255 else "u1").tobytes()


def _twelve_bits(values: np.ndarray) -> bytes:
    first, second = values.reshape(-1, 2).astype(int).T
    return np.stack([first >> 4, (first & 15) << 4 | second >> 8, second & 255], axis=-1).astype(np.uint8).tobytes()


def _frames(kind: str) -> bytes:
    others = [Image.new("RGB", (32, 32), colour) for colour in ((1, 2, 3), (4, 5, 6))]
    first = Image.fromarray(RGB8 // 128 * 255)  # eight colours, which GIF has without loss
    return saved(first, kind, save_all=True, append_images=others, lossless=True)


def _bmp_555(values: np.ndarray) -> bytes:
    header = struct.pack("<2sIHHI", b"BM", 54 + 2048, 0, 0, 54)
    about = struct.pack("<IiiHHIIiiII", 40, 32, -32, 1, 16, 0, 2048, 0, 0, 0, 0)
    return header + about + values.astype("<u2").tobytes()


DEEP12 = DEEP >> 4
SMALL = DEEP % 1024
FIVES = DEEP & 0x7FFF
FORMATS: dict[str, tuple[Callable[[], bytes], Callable[[], np.ndarray]]] = {
    **{
        f"PNG, grey, {bits} bits": (
            lambda bits=bits: png(_levels(bits), bits, 0),
            lambda bits=bits: _as_eight(_levels(bits), bits),
        )
        for bits in (1, 2, 4, 8)
    },
    **{
        f"PNG, palette, {bits} bits": (
            lambda bits=bits: png(_levels(bits), bits, 3, PALETTE[: 2**bits].tobytes(), bytes(range(2**bits))),
            lambda bits=bits: PALETTE[_levels(bits)],
        )
        for bits in (1, 2, 4, 8)
    },
    "PNG, grey, 16 bits": (lambda: png(DEEP, 16, 0), lambda: thrice(DEEP >> 8)),
    "PNG, grey, 16 bits, one transparent": (
        lambda: png(DEEP, 16, 0, transparency=b"\0\1"),
        lambda: thrice(DEEP >> 8),
    ),
    "PNG, RGB, 8 bits": (lambda: png(RGB8, 8, 2), lambda: RGB8),
    "PNG, RGB, 16 bits": (lambda: png(DEEP_RGB, 16, 2), lambda: DEEP_RGB >> 8),
    "PNG, grey and alpha, 8 bits": (lambda: png(LA, 8, 4), lambda: thrice(GREY8)),
    "PNG, grey and alpha, 16 bits": (
        lambda: png(np.stack([DEEP, DEEP[::-1]], axis=-1), 16, 4),
        lambda: thrice(DEEP >> 8),
    ),
    "PNG, RGBA, 8 bits": (lambda: png(RGBA, 8, 6), lambda: RGB8),
    "PNG, RGBA, 16 bits": (
        lambda: png(np.concatenate([DEEP_RGB, DEEP[..., None]], axis=-1), 16, 6),
        lambda: DEEP_RGB >> 8,
    ),
    **{
        f"TIFF, {what}, {order}{', deflated' if deflated else ''}": (
            lambda make=make, order=order, deflated=deflated: make(order=order, deflated=deflated),
            truth,
        )
        for order in ("II", "MM")
        for deflated in (False, True)
        for what, make, truth in (
            ("grey, 8 bits", partial(tiff, GREY8, 1), lambda: thrice(GREY8)),
            ("grey, 8 bits, 0 is white", partial(tiff, GREY8, 0), lambda: thrice(255 - GREY8)),
            ("grey, 16 bits", partial(tiff, DEEP, 1), lambda: thrice(DEEP >> 8)),
            ("RGB, 8 bits", partial(tiff, RGB8, 2), lambda: RGB8),
            ("RGB, 16 bits", partial(tiff, DEEP_RGB, 2), lambda: DEEP_RGB >> 8),
            ("RGBA", partial(tiff, RGBA, 2, extra=[2]), lambda: RGB8),
            ("grey and alpha", partial(tiff, LA, 1, extra=[2]), lambda: thrice(GREY8)),
            ("CIELAB", partial(tiff, LAB, 8), lambda: _from_lab(LAB)),
        )
    },
    "TIFF, RGB, 8 bits, channel by channel": (lambda: tiff(RGB8, 2, separate=True), lambda: RGB8),
    "TIFF, grey, 16 bits, 0 is white": (lambda: tiff(DEEP, 0), lambda: thrice(255 - (DEEP >> 8))),
    "TIFF, grey, 12 bits": (
        lambda: tiff(DEEP12, 1, bits=12, packed=_twelve_bits(DEEP12)),
        lambda: thrice(DEEP12 >> 4),
    ),
    "TIFF, floating point": (lambda: tiff(UNIT, 1), lambda: thrice(np.rint(UNIT.astype(float) * 255))),
    "TIFF, floating point, MM": (lambda: tiff(UNIT, 1, "MM"), lambda: thrice(np.rint(UNIT.astype(float) * 255))),
    "TIFF, floating point, deflated": (
        lambda: tiff(UNIT, 1, deflated=True),
        lambda: thrice(np.rint(UNIT.astype(float) * 255)),
    ),
    "PGM, 8 bits": (lambda: _pgm(GREY8, 255), lambda: thrice(GREY8)),
    "PGM, 4 bits": (lambda: _pgm(_levels(4), 15), lambda: _as_eight(_levels(4), 4)),
    "PGM, 16 bits": (lambda: _pgm(DEEP, 65535), lambda: thrice(DEEP >> 8)),
    "PGM, 10 bits": (lambda: _pgm(SMALL, 1023), lambda: thrice(np.rint(SMALL / 1023 * 65535).astype(int) >> 8)),
    "PGM, 16 bits, in words": (
        lambda: b"P2 32 32 65535\n" + b" ".join(b"%d" % value for value in DEEP.reshape(-1)),
        lambda: thrice(DEEP >> 8),
    ),
    "PPM, 8 bits": (lambda: _pgm(RGB8, 255), lambda: RGB8),
    "PPM, 16 bits": (lambda: _pgm(DEEP_RGB, 65535), lambda: np.rint(DEEP_RGB / 257)),
    "PBM": (
        lambda: b"P4 32 32\n" + np.packbits(GREY8 > 127, axis=1).tobytes(),
        lambda: thrice(np.where(GREY8 > 127, 0, 255)),
    ),
    "PFM": (
        lambda: b"Pf 32 32 -1\n" + UNIT[::-1].astype("<f4").tobytes(),
        lambda: thrice(np.rint(UNIT.astype(float) * 255)),
    ),
    "BMP, 24 bits": (lambda: saved(Image.fromarray(RGB8), "BMP"), lambda: RGB8),
    "BMP, grey": (lambda: saved(Image.fromarray(GREY8), "BMP"), lambda: thrice(GREY8)),
    "BMP, 1 bit": (lambda: saved(Image.fromarray(GREY8 > 127), "BMP"), lambda: thrice(np.where(GREY8 > 127, 255, 0))),
    "BMP, 15 bits": (
        lambda: _bmp_555(FIVES),
        lambda: np.stack([FIVES >> 10, FIVES >> 5 & 31, FIVES & 31], axis=-1).astype(int) * 255 // 31,
    ),
    "GIF": (
        lambda: saved(_with_palette(in_mode("P", GREY8)), "GIF"),
        lambda: PALETTE[GREY8],
    ),
    "GIF, animated": (lambda: _frames("GIF"), lambda: RGB8 // 128 * 255),
    "PNG, animated": (lambda: _frames("PNG"), lambda: RGB8 // 128 * 255),
    "TIFF, pages": (lambda: _frames("TIFF"), lambda: RGB8 // 128 * 255),
    "WebP, animated": (lambda: _frames("WEBP"), lambda: RGB8 // 128 * 255),
    "WebP": (lambda: saved(Image.fromarray(RGB8), "WEBP", lossless=True), lambda: RGB8),
    "WebP, transparent": (
        lambda: saved(Image.fromarray(RGBA, "RGBA"), "WEBP", lossless=True, exact=True),
        lambda: RGB8,
    ),
}


@pytest.mark.parametrize("case", FORMATS)
def test_every_format_is_read_as_its_specification_says(case: str, tmp_path: Path) -> None:
    data, truth = FORMATS[case]
    picture = decode(written(tmp_path / "image.jpg", data()))  # whatever the ending says
    assert np.abs(picture.pixels.astype(float) - truth()).max() <= (3 if "CIELAB" in case else 0)
    assert picture.several == ("animated" in case or "pages" in case)
    assert picture.transparent == any(sign in case for sign in ("alpha", "RGBA", "transparent", "PNG, palette"))


SMOOTH = np.stack(np.broadcast_arrays(np.arange(32)[:, None] * 8, np.arange(32) * 8, 90), axis=-1).astype(np.uint8)


@pytest.mark.parametrize("mode", ["L", "RGB", "CMYK"])
@pytest.mark.parametrize("progressive", [False, True])
def test_jpeg_of_every_kind_is_about_what_was_saved(tmp_path: Path, mode: str, progressive: bool) -> None:
    image = Image.fromarray(SMOOTH).convert(mode)
    data = saved(image, "JPEG", quality=95, subsampling=0, progressive=progressive)
    truth = thrice(SMOOTH @ np.array([0.299, 0.587, 0.114])) if mode == "L" else SMOOTH
    assert np.abs(decode(written(tmp_path / "a.jpg", data)).pixels - truth.astype(float)).max() < 8


# --- what would be read wrongly, and is refused by name

FOREIGN = {
    "TIFF of signed 8 bits": (lambda: tiff(GREY8.astype(np.int8), 1), "numbers have a sign"),
    "TIFF of signed 16 bits": (lambda: tiff(DEEP.astype(np.int16), 1), "numbers have a sign"),
    "TIFF of 32 bits": (lambda: tiff(DEEP.astype(np.uint32), 1), "whole numbers .* no agreed range"),
    "TIFF of 16 bits, channel by channel": (lambda: tiff(DEEP_RGB, 2, separate=True), "lie one after the other"),
    "TIFF of floating point, compressed, MM": (lambda: tiff(UNIT, 1, "MM", deflated=True), "big-endian"),
    "TIFF of floating point, 0 is white": (lambda: tiff(UNIT, 0), "0 for white"),
    "TIFF of floating point, 0…255": (lambda: tiff(UNIT * 255, 1), r"in 0…1, from black to white; it has 0…255"),
    "TIFF of floating point, below 0": (lambda: tiff(UNIT - 0.5, 1), r"it has -0\.5…0\.5"),
    "TIFF of floating point, not a number": (lambda: tiff(UNIT * np.float32("nan"), 1), "it has nan"),
    "TIFF of doubles": (lambda: tiff(UNIT.astype(np.float64), 1), "TIFF in a form that Pillow does not read"),
    "PFM of another unit": (lambda: b"Pf 32 32 -100\n" + UNIT.tobytes(), "have the unit 100"),
    "HEIC": (lambda: b"\0\0\0\x18ftypheic" + bytes(90), "HEIC image"),
    "AVIF": (lambda: b"\0\0\0\x18ftypavif" + bytes(90), "AVIF image"),
    "PostScript": (lambda: b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 32 32\n", "it is PostScript"),
    "PDF": (lambda: b"%PDF-1.7\n", "it is a PDF"),
    "a web page": (lambda: b"\n<!DOCTYPE html><title>404</title>", "it is a web page"),
    "Git LFS": (lambda: b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n", "git lfs pull"),
    "AppleDouble": (lambda: b"\0\5\x16\7\0\2\0\0Mac OS X", "what macOS stores beside a file"),
    "nothing": (lambda: b"", "it is empty"),
    "zeros": (lambda: bytes(3000), "zeros only"),
    "JPEG 2000": (lambda: saved(Image.fromarray(RGB8), "JPEG2000"), "it is a JPEG 2000 image"),
    "a bomb": (lambda: b"P5 20000 20000 255\n", "decompression bomb"),
    "words": (lambda: b"no image", "not an image"),
}


@pytest.mark.parametrize("case", FOREIGN)
def test_what_is_no_image_or_has_no_rule_is_named_with_its_reason(case: str, tmp_path: Path) -> None:
    data, said = FOREIGN[case]
    path = written(tmp_path / "im\x1bage\udcff.png", data())
    with pytest.raises(DataError, match=rf"can't be decoded: .*/im\\x1bage\\xff\.png \(.*{said}"):
        decode_all([path], tmp_path)


CUT = {
    "JPEG": {},
    "progressive JPEG": {"progressive": True},
    "PNG": {},
    "TIFF": {},
    "deflated TIFF": {"compression": "tiff_deflate"},
    "BMP": {},
    "PPM": {},
    "GIF": {},
    "WEBP": {},
}


@pytest.mark.parametrize("kind", CUT)
@pytest.mark.parametrize("part", [0.3, 0.6, 0.95])
def test_a_file_cut_short_is_never_half_an_image(kind: str, part: float, tmp_path: Path) -> None:
    data = saved(Image.fromarray(RGB8), kind.split()[-1], **CUT[kind])
    path = written(tmp_path / "cut.png", data[: int(part * len(data))])
    with pytest.raises(DataError, match=r"can't be decoded: .*/cut\.png \(.+\)"):
        decode_all([path], tmp_path)


def _device(path: Path) -> None:
    path.symlink_to("/dev/zero")


def _socket(path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(os.path.relpath(path))


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (os.mkfifo, "it is a pipe, not a file"),
        (_device, "it is a device, not a file"),
        (_socket, "it is a socket, not a file"),
        (lambda path: path.symlink_to("nowhere"), "No such file"),
    ],
)
def test_what_is_no_file_is_named_and_not_waited_for(images: Path, make: Callable[[Path], None], said: str) -> None:
    make(images / "train" / "cat" / "0.jpg")
    for _ in range(2):
        with pytest.raises(DataError, match=rf"cat/0\.jpg \({said}"):
            load_dataset(f"images:{images}")
