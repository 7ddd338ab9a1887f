"""What `train --dry-run` says of the data, and what it refuses."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from click.testing import Result
from small_runs import CLASSES, fingerprint, invoke, make_images, move, newest, nobody, train, train_twins

from rapa_dist.data import folder, load_dataset, official


@pytest.fixture(autouse=True)
def _home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    for name in ("RAPA_DIST_DATA", "RAY_ADDRESS"):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture
def images(tmp_path: Path) -> Path:
    return make_images(tmp_path / "images")


@pytest.fixture(scope="module")
def twins(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    return train_twins(tmp_path_factory.mktemp("twins"))


@pytest.fixture
def moved(twins: tuple[Path, Path], tmp_path: Path) -> tuple[Path, Path]:
    return move(twins, tmp_path)


def dry_run(*arguments: object) -> Result:
    return invoke("train", "--dry-run", "--json", *arguments)


def test_a_dry_run_says_what_the_data_are(images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(folder, "decode_all", lambda *_: pytest.fail("an image was decoded"))
    options = ["--dataset", f"images:{images}", "--limit-train", 7]
    seen = dry_run(*options)
    assert seen.exit_code == 0, seen.output
    assert json.loads(seen.stdout)["data"] == {
        "name": f"images:{images}",
        "state": "not decoded yet, headers read",
        "classes": list(CLASSES),
        "train_images": 7,
        "test_images": 6,
        "image": [3, 32, 32],
        "fingerprint": None,
    }
    assert not (images / ".rapa-dist-cache").exists()
    assert "Data: images:" in invoke("train", "--dry-run", *options).stdout
    monkeypatch.undo()
    data = load_dataset(f"images:{images}", limit_train=7)
    assert json.loads(dry_run(*options).stdout)["data"]["fingerprint"] == data.fingerprint
    assert json.loads(dry_run("--dataset", "builtin", "--limit-test", 30).stdout)["data"]["test_images"] == 30


def _no_folder(images: Path) -> None:
    shutil.rmtree(images)


def _no_test_images(images: Path) -> None:
    for path in (images / "test" / "cat").iterdir():
        path.unlink()


def _no_image(images: Path) -> None:
    (images / "train" / "dog" / "2.bmp").write_bytes(b"not an image")


def _empty_image(images: Path) -> None:
    (images / "test" / "newt" / "1.bmp").write_bytes(b"")


def _other_classes(images: Path) -> None:
    (images / "test" / "newt").rename(images / "test" / "owl")


@pytest.mark.parametrize("harm", [_no_folder, _no_test_images, _no_image, _empty_image, _other_classes])
def test_a_dry_run_finds_the_mistakes_in_the_data_that_a_run_would(images: Path, harm: Callable[[Path], None]) -> None:
    harm(images)
    dry = dry_run("--dataset", f"images:{images}")
    assert dry.exit_code == 1, dry.output
    assert dry.stdout == train("--dataset", f"images:{images}", "--json").stdout


@pytest.mark.parametrize("reachable", [False, True])
def test_a_dry_run_fetches_nothing_and_says_whether_a_run_could(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, reachable: bool
) -> None:
    monkeypatch.setattr(official, "reach", (lambda url: None) if reachable else nobody)
    dry = dry_run("--dataset", "svhn", "--data-dir", tmp_path)
    assert dry.exit_code == (0 if reachable else 1)
    assert ("to be fetched to" if reachable else "SVHN is not in") in dry.output
    assert list(tmp_path.iterdir()) == []
    if not reachable:
        assert json.loads(dry_run("--data-dir", tmp_path).stdout)["data"]["name"] == "builtin"


def test_a_dry_run_holds_the_data_against_the_run_that_is_to_be_resumed(
    moved: tuple[Path, Path], tmp_path: Path
) -> None:
    run, images = moved
    assert "have moved, say where they are" in dry_run("--resume", run).stderr
    resumed = dry_run("--resume", run, "--dataset", f"images:{images}", "--epochs", 5)
    assert resumed.exit_code == 0, resumed.output
    other = make_images(tmp_path / "other", seed=1)
    fingerprints = json.loads(newest(run).with_suffix(".json").read_text())["data_fingerprint"], fingerprint(other)
    refused = dry_run("--resume", run, "--dataset", f"images:{other}")
    assert refused.exit_code == 1
    assert all(each in refused.stderr for each in fingerprints)
    refused = dry_run("--resume", run, "--dataset", "builtin")
    assert "it has 10 classes, that of the run 3" in refused.stderr
    assert dry_run("--resume", run, "--dataset", f"images:{images}", "--epochs", 1).exit_code == 2


def test_a_dry_run_refuses_a_run_directory_that_a_run_would_refuse(twins: tuple[Path, Path], images: Path) -> None:
    refused = dry_run("--dataset", f"images:{images}", "--run-dir", twins[0])
    assert refused.exit_code == 1
    assert "There is a run in" in refused.stderr
