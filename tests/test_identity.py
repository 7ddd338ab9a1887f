"""What something is, is told by its content: images by pixels, networks by weights, classes by names."""

import json
import os
import shutil
import subprocess
import sys
import tarfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner, Result
from PIL import Image
from safetensors import safe_open

from rapa_dist.cli import main
from rapa_dist.coordinator import checkpoint as checkpoints
from rapa_dist.coordinator.run_directory import RunDirectory
from rapa_dist.coordinator.trainer import initial_checkpoint
from rapa_dist.coordinator.weights import weights_sha256
from rapa_dist.data import ImageSet, download, folder, load_dataset, official, vision
from rapa_dist.data.classes import translate
from rapa_dist.errors import DataError, UsageError
from rapa_dist.experiments.cells import Protocol, cells_of
from rapa_dist.experiments.jobs import do
from rapa_dist.experiments.store import Store

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


# --- images that moved


@pytest.fixture
def moved(twins: tuple[Path, Path], tmp_path: Path) -> tuple[Path, Path]:
    """A copy of a run, and the folder its images are in now: they are not where it found them."""
    run = shutil.copytree(twins[0], tmp_path / "run")
    config = (run / "config.toml").read_text()
    (run / "config.toml").write_text(config.replace(str(twins[0].parent), str(tmp_path / "gone")))
    return run, shutil.copytree(twins[0].parent / "images", tmp_path / "elsewhere")


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


def fingerprint(images: Path) -> str:
    return load_dataset(f"images:{images}").fingerprint


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
    monkeypatch.setattr(official, "reach", _nobody)
    assert _evaluate(run).exit_code == 1
    assert _evaluate(run, "--data-dir", tmp_path / "after").exit_code == 0
    assert _resume(run, "--data-dir", tmp_path / "after").exit_code == 0
    assert _evaluate(run).exit_code == 0
    assert _evaluate(run, "--dataset", f"images:{twins[0].parent / 'images'}", "--json").exit_code == 0


def _nobody(url: str) -> None:
    raise download.Unreachable("no connection")


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
    (result,) = do("votes5", [(str(run), config.as_dict())], None, "serial", "cpu")
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


# --- compare


def test_equal_runs_are_said_to_be_identical(twins: tuple[Path, Path]) -> None:
    compared = invoke("compare", *twins)
    assert compared.exit_code == 0, compared.output
    for line in (
        "configuration  identical",
        "images         identical, fing",
        "curves         identical in all 2 epochs",
    ):
        assert f"\n{line}" in compared.stdout
    assert compared.stdout.endswith("weights        identical, bit by bit\n")
    result = json.loads(invoke("compare", newest(twins[0]), newest(twins[1]).with_suffix(".json"), "--json").stdout)
    assert result["weights_identical"]
    assert result["curves"]["identical_epochs"] == 2
    assert result["a"]["weights_sha256"] == result["b"]["weights_sha256"]


def test_what_differs_is_measured(twins: tuple[Path, Path], tmp_path: Path) -> None:
    run = shutil.copytree(twins[1], tmp_path / "run")
    state = checkpoints.read(newest(run))
    kernels = [of_layer.copy() for of_layer in state.kernels]
    kernels[0][1, 2, 0] += 0.5
    kernels[0][0, 0, 0] = -kernels[0][0, 0, 0]
    checkpoints.write(run / "checkpoints", newest(run).stem, replace(state, kernels=kernels, classes=("a", "b", "c")))
    lines = metrics(run)
    lines[1] |= {"test_error_percent": lines[1]["test_error_percent"] + 25, "weights_sha256": "0"}
    (run / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    compared = invoke("compare", twins[0], run, "--json")
    assert compared.exit_code == 0, compared.output
    result = json.loads(compared.stdout)
    assert not result["weights_identical"]
    assert result["configuration"] == {}
    assert result["classes"] == [list(CLASSES), ["a", "b", "c"]]
    assert result["curves"]["identical_epochs"] == 1
    assert result["curves"]["differ_from_epoch"] == {"test_error_percent": 2, "weights_sha256": 2}
    assert result["curves"]["largest_test_error_difference_percent"] == 25
    first, *rest = result["tensors"]
    assert all(tensor["identical"] for tensor in rest)
    delta = kernels[0] - state.kernels[0]
    assert (first["name"], first["differing"]) == ("layers.0.tiles", 2)
    assert first["largest_difference"] == pytest.approx(np.abs(delta).max())
    assert first["relative_norm"] == pytest.approx(np.linalg.norm(delta) / np.linalg.norm(state.kernels[0]), rel=1e-6)
    text = invoke("compare", twins[0], run).stdout
    for part in (
        "weights        differ:",
        "layers.0.tiles",
        "largest difference 25.00 points",
        "cat, dog, newt → a, b, c",
    ):
        assert part in text


def test_networks_of_other_shapes_are_compared_as_far_as_they_go(twins: tuple[Path, Path], tmp_path: Path) -> None:
    dataset = ["--dataset", f"images:{twins[0].parent / 'images'}", "--limit-train", 6]
    assert train(*dataset, "--tiles", "1,1,1", "--pooling", "mixed", "--run-dir", tmp_path / "run").exit_code == 0
    result = json.loads(invoke("compare", twins[0], tmp_path / "run", "--json").stdout)
    assert result["configuration"]["tiles"] == [[4, 1, 1], [1, 1, 1]]
    assert not result["same_images"]
    shapes = {tensor["name"]: tensor["shapes"] for tensor in result["tensors"]}
    assert shapes["layers.0.tiles"] == [[4, 76, 2], [1, 76, 2]]
    assert shapes["pool.0.beta"] == [None, [2]]
    text = invoke("compare", twins[0], tmp_path / "run").stdout
    assert "tiles: (4, 1, 1) → (1, 1, 1)" in text
    assert "4×76×2 → 1×76×2" in text


@pytest.mark.parametrize("harm", ["nothing", "metrics", "pipe", "tensors", "file", "empty", "loose"])
def test_odd_files_are_compared_or_refused_with_a_sentence(twins: tuple[Path, Path], tmp_path: Path, harm: str) -> None:
    run = tmp_path / "run"
    if harm != "nothing":
        shutil.copytree(twins[1], run)
    match harm:
        case "metrics":
            (run / "metrics.jsonl").write_bytes(b"\0\0\0\n")
        case "pipe":
            (run / "config.toml").unlink()
            os.mkfifo(run / "config.toml")
        case "tensors":
            newest(run).write_bytes(b"\xff" * 100)
        case "file":
            run /= "log"
        case "empty":
            shutil.rmtree(run)
            run.mkdir()
        case "loose":
            run = newest(run).rename(tmp_path / "x.safetensors")
            shutil.copy(newest(twins[1]).with_suffix(".json"), run.with_suffix(".json"))
    compared = invoke("compare", twins[0], run)
    assert "Traceback" not in compared.stderr
    if harm in ("metrics", "loose"):
        assert compared.exit_code == 0, compared.output
        assert "curves         not compared: " in compared.stdout
        assert "identical, bit by bit" in compared.stdout
    else:
        assert compared.exit_code in (1, 2)
        assert compared.stderr.startswith("Error: ")


# --- runs


def test_runs_are_listed_with_how_they_stand(twins: tuple[Path, Path], tmp_path: Path) -> None:
    folder = tmp_path / "runs"
    for name in ("a-finished", "b-interrupted", "c-training", "d-no-checkpoint", "e-short", "f-unreadable"):
        shutil.copytree(twins[0], folder / name)
    for name in ("b-interrupted", "c-training"):
        config = folder / name / "config.toml"
        config.write_text(config.read_text().replace("epochs = 2", "epochs = 5"))
    shutil.rmtree(folder / "d-no-checkpoint" / "checkpoints")
    os.truncate(folder / "e-short" / "metrics.jsonl", (folder / "e-short" / "metrics.jsonl").stat().st_size // 3)
    (folder / "f-unreadable" / "config.toml").write_bytes(b"\xff")
    (folder / "no run").mkdir()
    (folder / "circle").symlink_to(folder / "circle")
    held = RunDirectory(folder / "c-training")
    held.take()
    listed = invoke("runs", folder, "--json")
    text = invoke("runs", folder)
    held.release()
    assert listed.exit_code == text.exit_code == 0, listed.output
    assert "1 other folder in" in listed.stderr
    found = {run["name"]: run for run in json.loads(listed.stdout)["runs"]}
    assert {name: (run["state"], run["resumable"]) for name, run in found.items()} == {
        "a-finished": ("finished", True),
        "b-interrupted": ("interrupted", True),
        "c-training": ("training", False),
        "d-no-checkpoint": ("finished", False),
        "e-short": ("interrupted", False),
        "f-unreadable": ("unreadable", False),
    }
    last = metrics(twins[0])[-1]
    assert found["b-interrupted"] | {"run_dir": None} == {
        "name": "b-interrupted",
        "run_dir": None,
        "state": "interrupted",
        "why": None,
        "dataset": f"images:{twins[0].parent / 'images'}",
        "tiles": [4, 1, 1],
        "scheme": "random",
        "pooling": "max",
        "fabric": "serial",
        "epochs": 2,
        "epochs_planned": 5,
        "test_error_percent": last["test_error_percent"],
        "best_test_error_percent": min(line["test_error_percent"] for line in metrics(twins[0])),
        "best_epoch": min(metrics(twins[0]), key=lambda line: line["test_error_percent"])["epoch"],
        "resumable": True,
        "not_resumable_because": None,
    }
    assert "config.toml" in found["f-unreadable"]["why"]
    assert "There is no checkpoint in" in found["d-no-checkpoint"]["not_resumable_because"]
    assert "2/5" in text.stdout
    assert "images:images" in text.stdout
    assert f"\nf-unreadable: {found['f-unreadable']['why']}\n" in text.stdout


def test_one_run_no_runs_and_no_folder(
    twins: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert [run["name"] for run in json.loads(invoke("runs", twins[0], "--json").stdout)["runs"]] == ["one"]
    nothing = invoke("runs")
    assert nothing.exit_code == 0
    assert "There are no runs in runs" in nothing.stderr
    assert invoke("runs", tmp_path / "nowhere").exit_code == 1
    assert "can't be read" in invoke("runs", newest(twins[0])).stderr


def test_neither_command_loads_torch_or_ray(twins: tuple[Path, Path]) -> None:
    code = (
        "import sys\nfrom rapa_dist.cli import main\n"
        "main(sys.argv[2:], standalone_mode=False)\n"
        "assert not {'torch', 'ray', 'torchvision'} & sys.modules.keys()"
    )
    for arguments in (["compare", *twins], ["runs", twins[0].parent]):
        subprocess.run([sys.executable, "-c", code, "x", *map(str, arguments)], check=True, capture_output=True)


# --- a dry run


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
    monkeypatch.setattr(official, "reach", (lambda url: None) if reachable else _nobody)
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
