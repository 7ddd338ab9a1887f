"""What something is, is told by its content: images by pixels, networks by weights, classes by names."""

import json
import os
import shutil
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner, Result
from PIL import Image
from safetensors import safe_open

from rapa_dist.cli import main
from rapa_dist.coordinator.weights import weights_sha256
from rapa_dist.data import ImageSet, load_dataset, vision

CLASSES = ("cat", "dog", "newt")


def make_images(folder: Path, classes: tuple[str, ...] = CLASSES, seed: int = 0) -> Path:
    """Make images that differ from other such folders in their pixels alone: names, sizes and times are the same."""
    rng = np.random.default_rng(seed)
    for part, n in (("train", 4), ("test", 2)):
        for name in classes:
            (folder / part / name).mkdir(parents=True)
            for i in range(n):
                path = folder / part / name / f"{i}.bmp"
                Image.fromarray(rng.integers(0, 256, (32, 32, 3), dtype=np.uint8)).save(path)
                os.utime(path, (10**9, 10**9))
    return folder


@pytest.fixture(autouse=True)
def _home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    for name in ("RAPA_DIST_DATA", "RAY_ADDRESS"):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture
def images(tmp_path: Path) -> Path:
    return make_images(tmp_path / "images")


# --- images and their cache


def _swap_classes(images: Path) -> None:
    for part in ("train", "test"):
        cat, dog, aside = (images / part / name for name in ("cat", "dog", "aside"))
        cat.rename(aside)
        dog.rename(cat)
        aside.rename(dog)


def _swap_files(images: Path) -> None:
    cat, dog, aside = images / "train/cat/0.bmp", images / "train/dog/0.bmp", images / "aside"
    cat.rename(aside)
    dog.rename(cat)
    aside.rename(dog)


def _restore_from_archive(images: Path) -> None:
    """Unpack an archive of other images over these; it brings their times along."""
    other = make_images(images.with_name("other"), seed=1)
    with tarfile.open(images.with_name("other.tar"), "w") as archive:
        for part in ("train", "test"):
            archive.add(other / part, part)
    with tarfile.open(images.with_name("other.tar")) as archive:
        archive.extractall(images, filter="data")


def _write_in_place(images: Path) -> None:
    path = images / "test/newt/1.bmp"
    with path.open("r+b") as file:
        file.seek(-3, os.SEEK_END)
        file.write(b"\1\2\3")
    os.utime(path, (10**9, 10**9))


def _lead_links_elsewhere(images: Path) -> None:
    """Parts may be links; here they lead to another version of the same names, sizes and times."""
    other = make_images(images.with_name("other"), seed=1)
    for part in ("train", "test"):
        shutil.rmtree(images / part)
        (images / part).symlink_to(other / part)


@pytest.mark.parametrize(
    "change", [_swap_classes, _swap_files, _restore_from_archive, _write_in_place, _lead_links_elsewhere]
)
def test_images_that_took_the_place_of_others_are_decoded(images: Path, change: Callable[[Path], None]) -> None:
    def stamps() -> list[tuple[str, int, int]]:
        files = (path for part in ("train", "test") for path in (images / part).rglob("*.bmp"))
        return sorted((str(path), path.stat().st_size, path.stat().st_mtime_ns) for path in files)

    before, seen = load_dataset(f"images:{images}"), stamps()
    change(images)
    assert stamps() == seen  # by these marks nothing has changed
    after = load_dataset(f"images:{images}")
    assert after.fingerprint != before.fingerprint
    shutil.rmtree(images / ".rapa-dist-cache")
    assert load_dataset(f"images:{images}").fingerprint == after.fingerprint


@pytest.mark.parametrize("while_reading", [False, True])
def test_official_files_that_changed_places_are_read_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, while_reading: bool
) -> None:
    train, test = (tmp_path / f"{part}_32x32.mat" for part in ("train", "test"))
    for path, grey in ((train, 10), (test, 200)):
        path.write_bytes(bytes([grey]))
        os.utime(path, (10**9, 10**9))
    swaps = [while_reading, not while_reading]

    def swap() -> None:
        if swaps.pop(0):
            train.rename(tmp_path / "aside")
            test.rename(train)
            (tmp_path / "aside").rename(test)

    def read(kind: str, place: Path) -> tuple[tuple[str, ...], ImageSet, ImageSet]:
        parts = [np.full((1, 32, 32, 3), path.read_bytes()[0], np.uint8) for path in (train, test)]
        if swaps:
            swap()
        return ("0",), *(ImageSet(images=part, labels=np.zeros(1, np.int64)) for part in parts)

    monkeypatch.setattr(vision, "read_official", read)
    assert load_dataset("svhn", data_dir=tmp_path).train.images[0, 0, 0, 0] == 10
    if swaps:
        swap()
    assert load_dataset("svhn", data_dir=tmp_path).train.images[0, 0, 0, 0] == 200


# --- weights


def train(*arguments: object) -> Result:
    """Train a small network for two epochs, or as the arguments say."""
    small = ["--channels", "2,2,2", "--tiles", "4,1,1", "--epochs", 2, "--fabric", "serial"]
    return invoke("train", *small, *arguments)


def invoke(*arguments: object) -> Result:
    return CliRunner().invoke(main, [str(argument) for argument in arguments])


@pytest.fixture(scope="module")
def twins(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Two runs of the same configuration; the second was stopped after an epoch, its step being another time's."""
    folder = tmp_path_factory.mktemp("twins")
    dataset = ["--dataset", f"images:{make_images(folder / 'images')}"]
    for arguments in (
        [*dataset, "--run-dir", folder / "one"],
        [*dataset, "--run-dir", folder / "other", "--epochs", 1],
        ["--resume", folder / "other"],
    ):
        result = train(*arguments)
        assert result.exit_code == 0, result.output
    return folder / "one", folder / "other"


def newest(run: Path) -> Path:
    return max((run / "checkpoints").glob("*.safetensors"))


def metrics(run: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def test_equal_runs_have_checkpoints_of_the_same_bytes(twins: tuple[Path, Path]) -> None:
    one, other = twins
    assert (one / "metrics.jsonl").read_bytes() != (other / "metrics.jsonl").read_bytes()
    assert newest(one).read_bytes() == newest(other).read_bytes()
    sidecars = [json.loads(newest(run).with_suffix(".json").read_text()) for run in twins]
    assert sidecars[0]["sha256"] == sidecars[1]["sha256"]
    assert sidecars[0]["weights_sha256"] == sidecars[1]["weights_sha256"]


def test_the_hash_of_the_weights_is_in_summary_json_sidecar_and_metrics(twins: tuple[Path, Path]) -> None:
    one, _ = twins
    with safe_open(newest(one), "numpy") as file:
        weights = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (it is no dictionary)
    digest = weights_sha256(dict(reversed(weights.items())))
    assert json.loads(newest(one).with_suffix(".json").read_text())["weights_sha256"] == digest
    assert [line["weights_sha256"] for line in metrics(one)][-1] == digest
    assert len({line["weights_sha256"] for line in metrics(one)}) == 2
    assert f"weights      sha256 {digest}" in train("--resume", one).stdout
    assert json.loads(train("--resume", one, "--json").stdout)["weights_sha256"] == digest
    weights["head.bias"] = np.nextafter(weights["head.bias"], 9)
    assert weights_sha256(weights) != digest
