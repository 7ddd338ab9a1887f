"""What something is, is told by its content: images by pixels, networks by weights, classes by names."""

import json
import os
import shutil
import tarfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from click.testing import Result
from small_runs import CLASSES, fingerprint, invoke, make_images, metrics, move, newest, nobody, train, train_twins

from rapa_dist.coordinator import checkpoint as checkpoints
from rapa_dist.coordinator.run_directory import RunDirectory
from rapa_dist.coordinator.trainer import initial_checkpoint
from rapa_dist.data import ImageSet, load_dataset, official, vision
from rapa_dist.data.classes import translate
from rapa_dist.errors import DataError, UsageError
from rapa_dist.experiments.cells import Protocol, cells_of
from rapa_dist.experiments.jobs import do
from rapa_dist.experiments.store import Store


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


# --- images that moved


def _resume(run: Path, *where: object) -> Result:
    return invoke("train", "--resume", run, "--epochs", 3, "--fabric", "serial", *where)


def _analyze(what: str, *options: object) -> Callable[..., Result]:
    def run_it(run: Path, *where: object) -> Result:
        return invoke("analyze", what, run, *options, *where)

    return run_it


def _evaluate(run: Path, *where: object) -> Result:
    return invoke("evaluate", run, *where)


COMMANDS = {
    "resume": _resume,
    "evaluate": _evaluate,
    "voting": _analyze("voting", "--votes", 2),
    "reduce": _analyze("reduce", "--by", "wins"),
    "attack": _analyze("attack", "--snr", 20),
}


@pytest.mark.parametrize("command", COMMANDS)
def test_images_that_moved_are_named_by_an_option(moved: tuple[Path, Path], command: str) -> None:
    run, images = moved
    lost = COMMANDS[command](run)
    assert lost.exit_code == 1
    assert f"If the images of the run in {run} have moved, say where they are, with --dataset" in lost.stderr
    found = COMMANDS[command](run, "--dataset", f"images:{images}", "--json")
    assert found.exit_code == 0, found.output
    assert "warning" not in found.stderr
    if command == "resume":  # from here on they are known to be there
        assert f'dataset = "images:{images}"' in (run / "config.toml").read_text()
        assert invoke("evaluate", run).exit_code == 0
    else:
        assert json.loads(found.stdout)["same_images"]


@pytest.mark.parametrize("command", COMMANDS)
def test_other_images_are_refused_with_both_fingerprints(
    moved: tuple[Path, Path], tmp_path: Path, command: str
) -> None:
    run, _ = moved
    other = make_images(tmp_path / "other", seed=1)
    if command == "evaluate":  # which may be told to test on others, but not find them unawares
        (tmp_path / "gone").mkdir()
        other = other.rename(tmp_path / "gone" / "images")
        refused = _evaluate(run)
    else:
        refused = COMMANDS[command](run, "--dataset", f"images:{other}")
    fingerprints = json.loads(newest(run).with_suffix(".json").read_text())["data_fingerprint"], fingerprint(other)
    assert refused.exit_code == 1
    assert all(each in refused.stderr for each in fingerprints)
    assert f"images:{other} is not the one that the run in {run} was trained on" in refused.stderr
    assert len(metrics(run)) == 2


def test_published_data_that_moved_are_found_by_their_folder(
    twins: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def read(kind: str, place: Path) -> tuple[tuple[str, ...], ImageSet, ImageSet]:
        data = load_dataset(f"images:{twins[0].parent / 'images'}")
        return data.classes, data.train, data.test

    monkeypatch.setattr(vision, "read_official", read)
    for place in ("before", "after"):
        (tmp_path / place).mkdir()
        for part in ("train", "test"):
            (tmp_path / place / f"{part}_32x32.mat").touch()
    run = tmp_path / "run"
    assert train("--dataset", "svhn", "--data-dir", tmp_path / "before", "--run-dir", run).exit_code == 0
    (tmp_path / "before").rename(tmp_path / "aside")
    monkeypatch.setattr(official, "reach", nobody)
    assert _evaluate(run).exit_code == 1
    assert _evaluate(run, "--data-dir", tmp_path / "after").exit_code == 0
    assert _resume(run, "--data-dir", tmp_path / "after").exit_code == 0
    assert _evaluate(run).exit_code == 0
    assert _evaluate(run, "--dataset", f"images:{twins[0].parent / 'images'}", "--json").exit_code == 0


def _reproduce(output: Path, images: Path, *options: object) -> Result:
    small = ["--dataset", f"images:{images}", "--limit-train", 12, "--epochs", 2, "--cells", "none", "--dry-run"]
    return invoke("reproduce", "table1", *small, "--output", output, *options)


def test_an_experiment_is_bound_to_its_images_and_not_to_their_place(
    twins: tuple[Path, Path], moved: tuple[Path, Path], tmp_path: Path
) -> None:
    before, now = twins[0].parent / "images", moved[1]
    protocol = json.loads(_reproduce(tmp_path / "out", before, "--json").stdout)["protocol"]
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "protocol.json").write_text(json.dumps(protocol))
    assert _reproduce(tmp_path / "out", now).exit_code == 0
    other = make_images(tmp_path / "other", seed=1)
    refused = _reproduce(tmp_path / "out", other)
    assert refused.exit_code == 2
    assert f"data_fingerprint: {fingerprint(before)} → {fingerprint(other)}" in refused.stderr


def test_a_run_on_other_images_is_not_adopted(moved: tuple[Path, Path], tmp_path: Path) -> None:
    _, images = moved
    run, (cell,) = tmp_path / "none", cells_of("table1", ["none"])
    settings = {"epochs": 2, "lr_decay_every": 1, "dataset": f"images:{images}"}
    protocol = Protocol(**settings, data_fingerprint=fingerprint(images))
    config = replace(cell.config(protocol, 0), dataset="images:/nowhere")
    directory = RunDirectory.create(run, config, None)
    directory.release()
    checkpoints.write(
        run / "checkpoints", checkpoints.name_of(0, 0), initial_checkpoint(config, load_dataset(f"images:{images}"))
    )
    assert Store(tmp_path / "out", protocol).place_for(run, [cell], range(1)).name == "none-0"
    others = Store(tmp_path / "out", replace(protocol, data_fingerprint="0123456789abcdef"))
    with pytest.raises(UsageError, match=f"trained on other images, {fingerprint(images)}.*0123456789abcdef"):
        others.place_for(run, [cell], range(1))


def test_an_analysis_of_an_experiment_finds_images_that_moved(moved: tuple[Path, Path]) -> None:
    run, images = moved
    config = replace(RunDirectory(run).config, dataset=f"images:{images}")
    result = do("votes5", (str(run), config.as_dict()), None, "serial", "cpu")
    assert result["votes"] == [1, 2, 3, 4, 5]


def test_a_run_without_a_checkpoint_takes_no_images_from_elsewhere(moved: tuple[Path, Path]) -> None:
    run, images = moved
    shutil.rmtree(run / "checkpoints")
    (run / "metrics.jsonl").unlink()
    refused = _resume(run, "--dataset", f"images:{images}")
    assert refused.exit_code == 2
    assert "stopped before its first checkpoint" in refused.stderr


# --- classes


@pytest.mark.parametrize(
    ("found", "table", "parts"),
    [
        (("cat", "dog", "newt"), None, ()),
        (("newt", "cat", "dog"), [2, 0, 1], ("matched by name", "cat, dog, newt", "newt, cat, dog")),
        (("Katze", "Hund", "Molch"), None, ("warning", "taken in order", "cat, dog, newt", "Katze, Hund, Molch")),
        (("cat", "dog", "owl"), None, ("warning", "other names", "cat, dog, owl")),
    ],
)
def test_labels_mean_what_their_names_say(found: tuple[str, ...], table: list[int] | None, parts: tuple[str]) -> None:
    translated, said = translate(CLASSES, found, "images:x")
    assert (None if translated is None else translated.tolist()) == table
    assert bool(said) == bool(parts)
    assert all(part in said for part in parts)


@pytest.mark.parametrize(
    ("found", "part"), [(("ape", "cat", "dog"), "cat, dog: in images:x not the same label"), (("cat", "dog"), "has 2")]
)
def test_classes_that_can_not_be_matched_are_refused_with_both_lists(found: tuple[str, ...], part: str) -> None:
    with pytest.raises(DataError) as error:
        translate(CLASSES, found, "images:x")
    assert part in str(error.value)
    assert "cat, dog, newt" in str(error.value)
    assert ", ".join(found) in str(error.value)


def test_evaluate_on_other_classes_says_so(twins: tuple[Path, Path], tmp_path: Path) -> None:
    run = twins[0]
    other = make_images(tmp_path / "other", ("ape", "bear", "cow"), seed=1)
    tested = invoke("evaluate", run, "--dataset", f"images:{other}", "--json")
    assert tested.exit_code == 0
    assert "have other names than the network's" in tested.stderr
    assert not json.loads(tested.stdout)["same_images"]
    assert json.loads(tested.stdout)["images"] == 6
    make_images(tmp_path / "shifted", ("ape", "cat", "dog"), seed=1)
    assert invoke("evaluate", run, "--dataset", f"images:{tmp_path / 'shifted'}").exit_code == 1


def test_classes_in_another_order_are_matched_by_name(
    twins: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The same pictures with the classes listed the other way round have the same error."""
    folder = twins[0].parent / "images"

    def read(kind: str, place: Path) -> tuple[tuple[str, ...], ImageSet, ImageSet]:
        data = load_dataset(f"images:{folder}")
        parts = (ImageSet(images=part.images, labels=2 - part.labels) for part in (data.train, data.test))
        return data.classes[::-1], *parts

    monkeypatch.setattr(vision, "read_official", read)
    for part in ("train", "test"):
        (tmp_path / f"{part}_32x32.mat").touch()
    same = invoke("evaluate", twins[0], "--json")
    other = invoke("evaluate", twins[0], "--dataset", "svhn", "--data-dir", tmp_path, "--json")
    assert other.exit_code == 0, other.output
    assert "they are matched by name" in other.stderr
    assert json.loads(other.stdout)["test_loss"] == json.loads(same.stdout)["test_loss"]


def test_classes_that_were_only_renamed_are_told_on_resuming(moved: tuple[Path, Path]) -> None:
    run, images = moved
    for part in ("train", "test"):
        (images / part / "newt").rename(images / part / "owl")
    resumed = _resume(run, "--dataset", f"images:{images}")
    assert resumed.exit_code == 0
    assert "its classes had other names: cat, dog, newt. They are now: cat, dog, owl" in resumed.stderr
