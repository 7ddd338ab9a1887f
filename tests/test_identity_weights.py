"""Equal weights are known by a hash; two runs are compared, and many are listed, by their files alone."""

import json
import os
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from safetensors import safe_open
from small_runs import CLASSES, invoke, make_images, metrics, move, newest, train, train_twins

from rapa_dist.coordinator import checkpoint as checkpoints
from rapa_dist.coordinator.run_directory import RunDirectory
from rapa_dist.coordinator.weights import weights_sha256
from rapa_dist.errors import UsageError
from rapa_dist.fabric import watcher
from rapa_dist.fabric.registry import Registration
from rapa_dist.fabric.scratch import Scratch
from rapa_dist.runs.comparison import _tensor


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


# --- the hash


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
    assert (first["name"], first["differing"]) == ("conv0.kernels", 2)
    assert first["largest_difference"] == pytest.approx(np.abs(delta).max())
    assert first["relative_norm"] == pytest.approx(np.linalg.norm(delta) / np.linalg.norm(state.kernels[0]), rel=1e-6)
    text = invoke("compare", twins[0], run).stdout
    for part in (
        "weights        differ:",
        "conv0.kernels",
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
    assert shapes["conv0.kernels"] == [[4, 76, 2], [1, 76, 2]]
    assert shapes["stage0.beta"] == [None, [2]]
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


# --- runs of one name


def test_a_run_that_is_asked_for_by_its_directory_is_not_its_namesake(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[str] = []
    monkeypatch.setattr(watcher, "attach", lambda found, mode: asked.append(found[0]))
    scratches = [Scratch() for _ in "ab"]
    for place, scratch in zip("ab", scratches, strict=True):
        where = {"address": f"{place}:1", "run_dir": tmp_path / place / "run", "folder": scratch.path}
        Registration.of_this_process(run="run", **where).write()
    for place in "ab":
        watcher.find_run(str(tmp_path / place / "run"), None, pytest.fail)
    assert asked == ["a:1", "b:1"]
    with pytest.raises(UsageError, match=r"No run trains in .*/c/run\. One with the same name trains in .*/run"):
        watcher.find_run(str(tmp_path / "c" / "run"), None, pytest.fail)
    for scratch in scratches:
        scratch.remove()


def test_counters_of_batch_normalisation_are_compared_like_weights() -> None:
    seen = [np.array(7), np.array(8), np.array(7.0)]
    same, other, float64 = (_tensor("bn.num_batches_tracked", seen[0], value) for value in (seen[0].copy(), *seen[1:]))
    assert (same["identical"], same["differing"]) == (True, 0)
    assert (other["identical"], other["differing"], other["largest_difference"]) == (False, 1, 1.0)
    assert not float64["identical"], "another type is another tensor"
