"""Whole runs of the command line, as a user starts, kills, interrupts and resumes them."""

import json
import os
import re
import signal
import subprocess
import sys
import time
import tomllib
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file

from rapa_dist.fabric.processes import look

COMMAND = [sys.executable, "-m", "rapa_dist"]
TINY = ["--dataset", "builtin", "--limit-train", "120", "--limit-test", "60", "--tiles", "4,1,1", "--epochs", "3"]
AGENTS = {"ray::DashboardA", "ray::RuntimeEnv"}  # of Ray's: they look for their cluster for a minute before they end
_TIMEOUT_S = 150


def run(*arguments: object, **options) -> subprocess.CompletedProcess[str]:
    command = [*COMMAND, *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=_TIMEOUT_S, check=False, **options)


def newest_weights(directory: Path) -> dict[str, np.ndarray]:
    return load_file(max((directory / "checkpoints").glob("*.safetensors")))


def assert_same_run(ours: Path, theirs: Path) -> None:
    mine, yours = newest_weights(ours), newest_weights(theirs)
    assert mine.keys() == yours.keys()
    for name, value in mine.items():
        np.testing.assert_array_equal(value, yours[name], err_msg=name)
    assert metrics(ours) == metrics(theirs)


def metrics(directory: Path) -> list[dict]:
    """Return the lines of metrics.jsonl without what depends on the clock."""
    lines = [json.loads(line) for line in (directory / "metrics.jsonl").read_text().splitlines()]
    return [{key: value for key, value in line.items() if key != "wall"} for line in lines]


def wait_for(condition, process: subprocess.Popen, what: str) -> None:
    deadline = time.monotonic() + _TIMEOUT_S
    while not condition():
        assert process.poll() is None, f"ended before {what}"
        assert time.monotonic() < deadline, f"no {what}"
        time.sleep(0.01)


def descendants(pid: int) -> dict[int, str]:
    """Return the processes that a process started, directly or not, as {pid: name}."""
    listed = subprocess.run(["ps", "-e", "-o", "pid=,ppid=,comm="], capture_output=True, text=True, check=True).stdout
    found = {pid: ""}
    for _ in range(5):
        for one, parent, name in (line.split(maxsplit=2) for line in listed.splitlines()):
            if int(parent) in found:
                found[int(one)] = name
    del found[pid]
    return found


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory) -> Path:
    """The same run on fabric `serial`, from beginning to end."""
    directory = tmp_path_factory.mktemp("runs") / "undisturbed"
    done = run("train", *TINY, "--fabric", "serial", "--run-dir", directory)
    assert done.returncode == 0, done.stderr
    return directory


class TestSerial:
    pytestmark = pytest.mark.slow

    def test_a_run_leaves_what_the_readme_promises(self, undisturbed):
        names = {path.name for path in undisturbed.iterdir()}
        assert names == {
            "config.toml",
            "environment.json",
            "metrics.jsonl",
            "tiles.json",
            "checkpoints",
            "log",
            ".lock",
        }
        config = tomllib.loads((undisturbed / "config.toml").read_text())
        assert config["dataset"] == "builtin"
        assert config["lr"] == 0.05
        (environment,) = json.loads((undisturbed / "environment.json").read_text())["sessions"]
        assert environment["packages"].keys() >= {"torch", "ray", "numpy", "rapa-dist"}
        assert [line["epoch"] for line in metrics(undisturbed)] == [1, 2, 3]

    def test_device_time_stands_beside_wall_time(self, undisturbed):
        """With 4,1,1 tiles: 256 rows of two cycles, 256 and 64 rows of three, of 80 ns, for 120 images."""
        expected = 120 * (256 * 2 + 256 * 3 + 64 * 3) * 80e-9
        assert [line["device_time_s"] for line in metrics(undisturbed)] == pytest.approx(3 * [expected], rel=1e-9)

    def test_device_time_is_what_the_tiles_own_counts_give(self, undisturbed):
        """Layer by layer the slowest tile's rows in training; forward rows of tests do not count."""
        tiles = json.loads((undisturbed / "tiles.json").read_text())["tiles"]
        in_training = [80e-9 * (2 * tile["rows_update"] + tile["rows_backward"]) for tile in tiles]
        slowest = [max(s for s, t in zip(in_training, tiles, strict=True) if t["layer"] == layer) for layer in range(3)]
        told = sum(line["device_time_s"] for line in metrics(undisturbed))
        assert sum(slowest) == pytest.approx(told, rel=1e-9)

    def test_the_same_seed_gives_the_same_run_on_any_number_of_threads(self, undisturbed, tmp_path):
        threads = {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "3"}
        done = run("train", *TINY, "--fabric", "serial", "--run-dir", tmp_path / "r", env=os.environ | threads)
        assert done.returncode == 0, done.stderr
        assert_same_run(tmp_path / "r", undisturbed)

    def test_another_seed_gives_another_run(self, undisturbed, tmp_path):
        run("train", *TINY, "--seed", 1, "--epochs", 1, "--fabric", "serial", "--run-dir", tmp_path / "r")
        assert metrics(tmp_path / "r")[0] != metrics(undisturbed)[0]

    def test_json_is_one_object_and_nothing_else_on_stdout(self, tmp_path):
        arguments = [*TINY, "--epochs", 1, "--fabric", "serial", "--run-dir", tmp_path / "r", "--json"]
        result = json.loads(run("train", *arguments).stdout)
        assert result["finished"]
        assert result["run_dir"] == str(tmp_path / "r")

    def test_one_line_per_epoch_where_stderr_is_no_terminal(self, tmp_path):
        done = run("train", *TINY, "--fabric", "serial", "--run-dir", tmp_path / "r")
        assert len(re.findall(r"^epoch +\d/3 .* test error +[\d.]+ %", done.stderr, re.MULTILINE)) == 3

    def test_more_epochs_go_on_where_the_run_ended(self, undisturbed, tmp_path):
        directory = tmp_path / "r"
        run("train", *TINY, "--epochs", 1, "--fabric", "serial", "--run-dir", directory)
        done = run("train", "--resume", directory, "--epochs", 3, "--fabric", "serial")
        assert done.returncode == 0, done.stderr
        assert_same_run(directory, undisturbed)

    def test_a_finished_run_resumed_has_nothing_to_do(self, undisturbed):
        before = metrics(undisturbed)
        done = run("train", "--resume", undisturbed, "--fabric", "serial")
        assert done.returncode == 0, done.stderr
        assert metrics(undisturbed) == before

    def test_evaluate_repeats_the_test_of_the_last_epoch(self, undisturbed):
        result = json.loads(run("evaluate", undisturbed, "--json").stdout)
        last = metrics(undisturbed)[-1]
        assert result["test_error_percent"] == last["test_error_percent"]
        assert result["test_loss"] == last["test_loss"]

    def test_evaluate_by_vote_and_on_other_images(self, undisturbed):
        result = json.loads(run("evaluate", undisturbed, "--votes", 5, "--limit-test", 100, "--json").stdout)
        assert (result["votes"], result["images"]) == (5, 100)

    def test_a_diverging_run_says_where_and_stops(self, tmp_path):
        directory = tmp_path / "r"
        arguments = [*TINY, "--lr", "1e38", "--weight-decay", 0, "--warmup-epochs", 0, "--fabric", "serial"]
        done = run("train", *arguments, "--run-dir", directory)
        assert done.returncode == 1
        assert re.search(r"loss is (nan|inf) in step \d+ .*λ = 1e\+38.*step-000000000", done.stderr), done.stderr
        assert all(np.isfinite(value).all() for value in newest_weights(directory).values())


class TestBatched:
    pytestmark = pytest.mark.slow

    def test_a_run_that_was_resumed_has_the_bits_of_one_that_was_not(self, tmp_path):
        options = ["--scheme", "perforated", "--pooling", "mixed", "--fabric", "batched"]
        whole, resumed = tmp_path / "whole", tmp_path / "resumed"
        for done in (
            run("train", *TINY, *options, "--run-dir", whole),
            run("train", *TINY, *options, "--epochs", 1, "--run-dir", resumed),
            run("train", "--resume", resumed, "--epochs", 3, "--fabric", "batched", "--device", "cpu"),
        ):
            assert done.returncode == 0, done.stderr
        assert_same_run(resumed, whole)

    def test_a_run_ends_near_where_serial_ends_and_can_be_tested_there(self, undisturbed, tmp_path):
        done = run("train", *TINY, "--fabric", "batched", "--run-dir", tmp_path / "r")
        assert done.returncode == 0, done.stderr
        for ours, theirs in zip(metrics(tmp_path / "r"), metrics(undisturbed), strict=True):
            assert ours["train_loss"] == pytest.approx(theirs["train_loss"], rel=1e-3)
            assert ours["device_time_s"] == theirs["device_time_s"]
        result = json.loads(run("evaluate", tmp_path / "r", "--json").stdout)
        assert result["test_loss"] == pytest.approx(metrics(tmp_path / "r")[-1]["test_loss"], rel=1e-4)
        mine, theirs = (json.loads((d / "tiles.json").read_text())["tiles"] for d in (tmp_path / "r", undisturbed))
        counts = ("rows_forward", "rows_backward", "rows_update", "updates", "last_step")
        for tile, other in zip(mine, theirs, strict=True):
            assert [tile.get(name) for name in counts] == [other.get(name) for name in counts]


@pytest.mark.ray
@pytest.mark.timeout(400)
class TestRay:
    def test_ray_gives_the_bits_of_serial_after_a_whole_run(self, undisturbed, tmp_path):
        done = run("train", *TINY, "--run-dir", tmp_path / "r", "--json")
        assert done.returncode == 0, done.stderr
        assert json.loads(done.stdout)["finished"]
        assert "started for this run" in done.stderr
        assert_same_run(tmp_path / "r", undisturbed)

    def test_perforated_and_stochastic_pooling_have_the_bits_of_serial_too(self, tmp_path):
        options = [*TINY, "--epochs", 1, "--scheme", "perforated", "--pooling", "stochastic"]
        for fabric in ("ray", "serial"):
            done = run("train", *options, "--fabric", fabric, "--run-dir", tmp_path / fabric)
            assert done.returncode == 0, done.stderr
        assert_same_run(tmp_path / "ray", tmp_path / "serial")

    def test_the_coordinator_killed_and_resumed_gives_the_same_bits(self, undisturbed, tmp_path):
        directory = tmp_path / "r"
        process = subprocess.Popen([*COMMAND, "train", *TINY, "--run-dir", str(directory)], stderr=subprocess.PIPE)
        wait_for(lambda: (directory / "metrics.jsonl").exists(), process, "first epoch")
        started = descendants(process.pid)
        names = list(started.values())
        assert "gcs_server" in names
        assert "raylet" in names
        assert names.count("ray::Tile") == 6
        process.kill()
        process.communicate(timeout=_TIMEOUT_S)
        deadline = time.monotonic() + 10
        while (left := {started[pid] for pid in started if look(pid)}) - AGENTS and time.monotonic() < deadline:
            time.sleep(0.1)
        assert not left - AGENTS
        done = run("train", "--resume", directory)
        assert done.returncode == 0, done.stderr
        assert_same_run(directory, undisturbed)

    @pytest.mark.parametrize(
        ("moment", "presses", "number", "to"),
        [
            ("starting", 1, signal.SIGINT, "group"),
            ("starting", 1, signal.SIGTERM, "process"),
            ("training", 4, signal.SIGINT, "group"),
            ("training", 1, signal.SIGTERM, "group"),
        ],
    )
    def test_ctrl_c_saves_says_how_to_resume_and_leaves_nothing(
        self, undisturbed, tmp_path, moment, presses, number, to
    ):
        """A terminal sends it to every process in the group, as `timeout` does, and batch systems do."""
        directory = tmp_path / "r"
        process = subprocess.Popen(
            [*COMMAND, "train", *TINY, "--run-dir", str(directory)],
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )
        sign = directory / ("config.toml" if moment == "starting" else "metrics.jsonl")
        wait_for(sign.exists, process, moment)
        for _ in range(presses):
            if to == "group":
                os.killpg(process.pid, number)
            else:
                process.send_signal(number)
            time.sleep(0.1)
        stderr = process.communicate(timeout=_TIMEOUT_S)[1]
        assert process.returncode == 130, stderr
        assert f"train --resume {directory}" in stderr
        assert not list(Path(os.environ["RAPA_DIST_SHM"]).glob("rapa-dist-*"))
        assert not list(Path(os.environ["TMPDIR"]).glob("rapa-dist-*"))
        done = run("train", "--resume", directory, "--fabric", "serial")
        assert done.returncode == 0, done.stderr
        assert_same_run(directory, undisturbed)

    def test_a_cluster_that_runs_already_is_used_and_left_running(self, start_head, tmp_path):
        """Start a cluster by hand with too few tiles for one run, and enough for another."""
        address, head, token = start_head(tiles=3)
        environment = token | {"RAY_AUTH_MODE": "token"}
        at = ["--address", address, "--epochs", "1", "--limit-train", "40"]
        refused = run("train", *TINY, *at, "--run-dir", tmp_path / "a", env=environment)
        assert refused.returncode == 1
        assert re.search(r"needs 6 analog_tile.*3 are free.*this node\): 3", refused.stderr, re.DOTALL)
        assert not (tmp_path / "a").exists()
        for name in "bc":
            arguments = [*TINY, *at, "--tiles", "1,1,1", "--scheme", "none"]
            done = run("train", *arguments, "--run-dir", tmp_path / name, env=environment)
            assert done.returncode == 0, done.stderr
            assert f"{address} (--address)" in done.stderr
        assert head.poll() is None
