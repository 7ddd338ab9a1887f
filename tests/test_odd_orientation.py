"""EXIF orientation is applied in every format that carries it; what was done to images is said."""

import struct
from pathlib import Path

import numpy as np
import pytest
from hand_made import png, saved, tiff, written
from PIL import Image

from rapa_dist.data import load_dataset
from rapa_dist.data.decode import decode, decode_all


def _exif(*entries: bytes) -> bytes:
    return b"Exif\0\0II*\0\x08\0\0\0" + struct.pack("<H", len(entries)) + b"".join(entries) + bytes(4)


def _orientation(value: int) -> bytes:
    return _exif(struct.pack("<HHIHH", 274, 3, 1, value, 0))


CORNERS = np.repeat(np.repeat(np.array([[[255, 0, 0], [0, 255, 0]], [[0, 0, 255], [90, 90, 90]]]), 16, 0), 16, 1)
CORNERS = CORNERS.astype(np.uint8)

# EXIF 2.3, 4.6.4.A: where the stored row 0 and column 0 are in what is to be seen
SEEN = {
    1: lambda stored: stored,  # top, left
    2: lambda stored: stored[:, ::-1],  # top, right
    3: lambda stored: stored[::-1, ::-1],  # bottom, right
    4: lambda stored: stored[::-1],  # bottom, left
    5: lambda stored: stored.swapaxes(0, 1),  # left, top
    6: lambda stored: stored[::-1].swapaxes(0, 1),  # right, top
    7: lambda stored: stored[::-1, ::-1].swapaxes(0, 1),  # right, bottom
    8: lambda stored: stored[:, ::-1].swapaxes(0, 1),  # left, bottom
}
CARRIERS = {
    "JPEG": lambda n: saved(Image.fromarray(CORNERS), "JPEG", quality=95, subsampling=0, exif=_orientation(n)),
    "PNG": lambda n: saved(Image.fromarray(CORNERS), "PNG", exif=_orientation(n)),
    "WebP": lambda n: saved(Image.fromarray(CORNERS), "WEBP", lossless=True, exif=_orientation(n)),
    "TIFF": lambda n: tiff(CORNERS, 2, orientation=n),
    "TIFF, deflated": lambda n: tiff(CORNERS, 2, deflated=True, orientation=n),
    "XMP": lambda n: saved(
        Image.fromarray(CORNERS), "JPEG", quality=95, subsampling=0, xmp=b'<x tiff:Orientation="%d"/>' % n
    ),
}


@pytest.mark.parametrize("orientation", SEEN)
@pytest.mark.parametrize("carrier", CARRIERS)
def test_exif_orientation_is_applied(carrier: str, orientation: int, tmp_path: Path) -> None:
    picture = decode(written(tmp_path / "a.jpg", CARRIERS[carrier](orientation)))
    assert np.abs(picture.pixels - SEEN[orientation](CORNERS).astype(float)).max() <= 4
    assert picture.turned == (orientation != 1)


def test_a_large_jpeg_is_turned_before_it_is_cropped(tmp_path: Path) -> None:
    stored = np.zeros((400, 800, 3), dtype=np.uint8)
    stored[:, 400:] = 200  # the right half, at the bottom when it is seen
    data = saved(Image.fromarray(stored), "JPEG", exif=_orientation(6))
    pixels = decode(written(tmp_path / "a.jpg", data), 32).pixels.astype(int)
    assert pixels[:14].max() < 20
    assert pixels[18:].min() > 180


@pytest.mark.parametrize(
    "exif",
    [
        _orientation(0),
        _orientation(9),
        b"Exif\0\0nonsense",
        b"Exif\0\0II*\0\xff\xff\xff\xff",
        _exif(struct.pack("<HHI4s", 274, 2, 4, b"six\0")),
        _exif(struct.pack("<HHII", 274, 3, 2**31, 2**31)),
        _orientation(6)[:-8],
    ],
)
def test_damaged_exif_data_spoil_no_image(exif: bytes, tmp_path: Path) -> None:
    path = written(tmp_path / "a.jpg", saved(Image.fromarray(CORNERS), "JPEG", quality=95, subsampling=0, exif=exif))
    pixels, note = decode_all([path], tmp_path)
    assert np.abs(pixels[0] - CORNERS.astype(float)).max() <= 4
    assert note == ""


def test_what_was_done_to_images_is_said_with_how_many_and_the_first(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    images = tmp_path / "images"
    for place in ("train/cat", "train/dog", "test/cat", "test/dog"):
        written(images / place / "1.png", png(np.full((32, 32, 3), 5), 8, 2))
    written(images / "train" / "cat" / "0.png", saved(Image.fromarray(CORNERS), "PNG", exif=_orientation(6)))
    written(images / "train" / "cat" / "2.png", png(np.full((32, 32, 4), 99), 8, 6))
    frames = [Image.new("RGB", (32, 32), colour) for colour in ("red", "blue")]
    written(images / "train" / "dog" / "0.webp", saved(frames[0], "WEBP", save_all=True, append_images=frames[1:]))
    written(images / "train" / "dog" / "2.png", png(np.full((32, 32, 4), 255), 8, 6))  # with alpha, and opaque
    for _ in range(2):  # decoded, then cached
        load_dataset(f"images:{images}")
        assert capsys.readouterr().err.splitlines() == [
            f"1 of 8 images in {images} have an EXIF orientation (the first, train/cat/0.png): turned upright by it",
            f"1 of 8 images in {images} are partly transparent (the first, train/cat/2.png): their transparency is "
            "dropped",
            f"1 of 8 images in {images} have several frames or pages (the first, train/dog/0.webp): only the first one "
            "is used",
        ]
