"""MNIST and Fashion-MNIST, on small files in their official format; torchvision reads the same files."""

import gzip
import struct
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from rapa_dist.data import find_datasets, load, load_dataset, look, official, vision
from rapa_dist.data.download import Unreachable
from rapa_dist.errors import DataError

COUNTS = {"train": 9, "t10k": 4}


def idx(array: np.ndarray) -> bytes:
    return bytes((0, 0, 8, array.ndim)) + struct.pack(f">{array.ndim}I", *array.shape) + array.tobytes()


@pytest.fixture(params=[True, False], ids=["packed", "unpacked"])
def folder(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Return a folder with both sets in the places that torchvision and Debian have for them."""
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    for place in ("MNIST/raw", "fashion-mnist"):
        write(tmp_path / place, packed=request.param, seed=len(place))
    return tmp_path


def write(place: Path, *, packed: bool = False, seed: int = 0, side: int = 28) -> None:
    place.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(seed)
    for part, n in COUNTS.items():
        images = rng.integers(0, 256, (n, side, side), dtype=np.uint8)
        labels = rng.integers(0, 10, n, dtype=np.uint8)
        for name, array in ((f"{part}-images-idx3-ubyte", images), (f"{part}-labels-idx1-ubyte", labels)):
            data = idx(array)
            (place / (f"{name}.gz" if packed else name)).write_bytes(gzip.compress(data) if packed else data)


def test_images_are_those_that_torchvision_reads(folder: Path) -> None:
    data = load_dataset("mnist", data_dir=folder)
    assert data.image == (1, 28, 28)
    assert data.classes == tuple("0123456789")
    raw = folder / "MNIST" / "raw"
    if not (raw / "train-images-idx3-ubyte").exists():
        for path in raw.glob("*.gz"):
            path.with_suffix("").write_bytes(gzip.decompress(path.read_bytes()))
    for train, ours in ((True, data.train), (False, data.test)):
        theirs = vision.torchvision().datasets.MNIST(str(folder), train=train)
        np.testing.assert_array_equal(ours.images[..., 0], theirs.data.numpy())
        np.testing.assert_array_equal(ours.labels, theirs.targets.numpy())


def test_the_two_sets_are_told_apart_by_their_folders_and_cached(folder: Path) -> None:
    fashion = load_dataset("fashion-mnist", data_dir=folder)
    assert fashion.classes[9] == "Ankle boot"
    assert load_dataset("mnist", data_dir=folder).fingerprint != fashion.fingerprint
    seen = look.look("fashion-mnist", data_dir=folder)
    assert (seen.image, seen.fingerprint) == ((1, 28, 28), fashion.fingerprint)
    assert {found.name for found in find_datasets(folder) if found.found} == {"builtin", "mnist", "fashion-mnist"}
    assert load_dataset("mnist", data_dir=folder / "fashion-mnist").fingerprint == fashion.fingerprint, "files alone"
    assert load_dataset("fashion-mnist", data_dir=folder, image_size=16).image == (1, 16, 16)


def test_packages_of_the_system_are_looked_at_last(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RAPA_DIST_DATA", raising=False)
    monkeypatch.setattr(load, "SYSTEM", folder)
    assert load_dataset("fashion-mnist").image == (1, 28, 28)


def _cut(place: Path) -> None:
    path = place / "train-images-idx3-ubyte"
    path.write_bytes(path.read_bytes()[:-1])


def _no_idx(place: Path) -> None:
    (place / "t10k-labels-idx1-ubyte").write_bytes(b"\x89PNG something else")


def _fewer_labels(place: Path) -> None:
    (place / "train-labels-idx1-ubyte").write_bytes(idx(np.zeros(8, np.uint8)))


def _unknown_class(place: Path) -> None:
    (place / "train-labels-idx1-ubyte").write_bytes(idx(np.full(9, 10, np.uint8)))


def _other_size(place: Path) -> None:
    (place / "t10k-images-idx3-ubyte").write_bytes(idx(np.zeros((4, 27, 28), np.uint8)))


def _half_packed(place: Path) -> None:
    path = place / "train-images-idx3-ubyte"
    path.with_suffix(".gz").write_bytes(gzip.compress(path.read_bytes())[:50])
    (place / "train-images-idx3-ubyte.gz").write_bytes(gzip.compress(path.read_bytes())[:50])
    path.unlink()


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (_cut, "train-images-idx3-ubyte needs 7,056 bytes behind its head, and has 7,055"),
        (_no_idx, "t10k-labels-idx1-ubyte is no idx file of unsigned bytes with 1 dimensions"),
        (_fewer_labels, "train-images-idx3-ubyte has 9 images, and its labels are 8"),
        (_unknown_class, "the labels of train-images-idx3-ubyte go up to 10, and there are 10 classes"),
        (_other_size, r"its images are \(28, 28\) to train on and \(27, 28\) to test on"),
        (_half_packed, "train-images-idx3-ubyte.gz is damaged: Compressed file ended before"),
    ],
)
def test_damage_is_named(
    damage: Callable[[Path], None], said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def offline(url: str) -> None:
        raise Unreachable("no connection")

    monkeypatch.setattr(official, "reach", offline)
    write(tmp_path / "mnist")
    damage(tmp_path / "mnist")
    with pytest.raises(DataError, match=said):
        load_dataset("mnist", data_dir=tmp_path)
