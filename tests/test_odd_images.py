"""Pixels of every mode and format, what a folder's scan passes over, and names of any bytes.

Pixels are held against NumPy's arithmetic and against files that are written byte by byte.
"""

import colorsys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from rapa_dist.data import colour

DRAW = np.random.default_rng(0)
GREY8 = DRAW.integers(0, 256, (32, 32), dtype=np.uint8)
RGB8 = DRAW.integers(0, 256, (32, 32, 3), dtype=np.uint8)
DEEP = DRAW.integers(0, 65536, (32, 32), dtype=np.uint16)
DEEP[0, :4] = 0, 255, 256, 65535
DEEP_RGB = DRAW.integers(0, 65536, (32, 32, 3), dtype=np.uint16)
ALPHA = DRAW.integers(1, 256, (32, 32, 1), dtype=np.uint8)
PALETTE = DRAW.integers(0, 256, (256, 3), dtype=np.uint8)
UNIT = DRAW.random((32, 32), dtype=np.float32)
UNIT[0, :2] = 0, 1


@pytest.fixture(autouse=True)
def _home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.delenv("RAPA_DIST_DATA", raising=False)


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
