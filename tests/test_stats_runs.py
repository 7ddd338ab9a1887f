"""`rapa-dist stats`, `train --live` and tiles.json, from outside: runs that train, watched and lost."""

import fcntl
import json
import os
import pty
import re
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file

from rapa_dist.coordinator import checkpoint as checkpoints
from rapa_dist.fabric.registry import Registration, registrations
from rapa_dist.fabric.scratch import sweep

COMMAND = [sys.executable, "-m", "rapa_dist"]
TINY = ["--dataset", "builtin", "--limit-train", "120", "--limit-test", "60", "--tiles", "4,1,1", "--epochs", "3"]
LONGER = [*TINY, "--limit-train", "600", "--epochs", "7"]  # longer than joining a cluster takes
ENDLESS = [*TINY, "--epochs", "10000"]
_TIMEOUT_S = 120


def command(*arguments: object, **options) -> subprocess.CompletedProcess[str]:
    line = [*COMMAND, *map(str, arguments)]
    return subprocess.run(line, capture_output=True, text=True, timeout=_TIMEOUT_S, check=False, **options)


# --- training, and what it leaves


def newest_weights(directory: Path) -> dict[str, np.ndarray]:
    return load_file(max((directory / "checkpoints").glob("*.safetensors")))


def assert_same_weights(ours: Path, theirs: Path) -> None:
    mine, yours = newest_weights(ours), newest_weights(theirs)
    assert mine.keys() == yours.keys()
    for name, value in mine.items():
        np.testing.assert_array_equal(value, yours[name], err_msg=name)


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory) -> Path:
    """A run on fabric `serial` that nobody watches."""
    directory = tmp_path_factory.mktemp("runs") / "undisturbed"
    done = command("train", *TINY, "--fabric", "serial", "--run-dir", directory)
    assert done.returncode == 0, done.stderr
    return directory


def on_a_terminal(*arguments: object) -> tuple[int, str]:
    """Run a command with its stderr on a terminal of 140 × 30; return its exit code and what it showed."""
    ours, theirs = pty.openpty()
    fcntl.ioctl(theirs, 0x5414, b"\x1e\0\x8c\0\0\0\0\0")  # TIOCSWINSZ
    process = subprocess.Popen([*COMMAND, *map(str, arguments)], stdout=subprocess.DEVNULL, stderr=theirs)
    os.close(theirs)
    shown = []

    def read() -> None:
        try:
            while data := os.read(ours, 65536):
                shown.append(data)
        except OSError:  # how Linux says that the other end is closed
            pass

    reader = threading.Thread(target=read)
    reader.start()
    code = process.wait(timeout=_TIMEOUT_S)
    reader.join()
    os.close(ours)
    return code, b"".join(shown).decode()


@pytest.mark.slow
class TestSerial:
    def test_the_run_directory_has_what_its_tiles_did(self, undisturbed):
        stats = json.loads((undisturbed / "tiles.json").read_text())
        assert stats["run"] == "undisturbed"
        trained, tested = 3 * 120, 3 * 60
        rows = {layer["layer"]: layer["rows_forward"] for layer in stats["layers"]}
        assert rows == {0: 1024 * (trained + tested), 1: 256 * (trained + tested), 2: 64 * (trained + tested)}
        assert [layer["rows_backward"] for layer in stats["layers"]] == [0, 256 * trained, 64 * trained]
        assert {tile["updates"] for tile in stats["tiles"]} == {36}
        assert {tile["last_step"] for tile in stats["tiles"]} == {36}
        norms = [
            np.linalg.norm(kernel)
            for layer in range(3)
            for kernel in newest_weights(undisturbed)[f"conv{layer}.kernels"]
        ]
        assert [tile["kernel_norm"] for tile in stats["tiles"]] == pytest.approx(norms, rel=1e-6)

    def test_live_shows_the_table_and_changes_no_bit(self, undisturbed, tmp_path):
        arguments = ["train", *TINY, "--fabric", "serial", "--run-dir", tmp_path / "r", "--live"]
        code, shown = on_a_terminal(*arguments)
        assert code == 0, shown
        assert "r: 6 tiles on 1 node" in shown
        assert re.search(r"L0/T003 .*(idle|forward|backward)", shown)
        assert_same_weights(tmp_path / "r", undisturbed)

    def test_without_live_there_is_no_table(self, tmp_path):
        arguments = ["train", *TINY, "--epochs", "1", "--fabric", "serial", "--run-dir", tmp_path / "r"]
        code, shown = on_a_terminal(*arguments)
        assert code == 0, shown
        assert "L0/T003" not in shown

    def test_live_without_a_terminal_says_so_and_prints_a_line_per_epoch(self, undisturbed, tmp_path):
        done = command("train", *TINY, "--fabric", "serial", "--run-dir", tmp_path / "r", "--live")
        assert done.returncode == 0
        assert "--live needs a terminal" in done.stderr
        assert len(re.findall(r"^epoch +\d/3 .* test error", done.stderr, re.MULTILINE)) == 3
        assert_same_weights(tmp_path / "r", undisturbed)

    def test_resuming_a_finished_run_keeps_what_its_tiles_did(self, undisturbed):
        before = (undisturbed / "tiles.json").read_text()
        assert command("train", "--resume", undisturbed, "--fabric", "serial").returncode == 0
        assert (undisturbed / "tiles.json").read_text() == before

    def test_a_resumed_run_counts_steps_on(self, undisturbed, tmp_path):
        directory = tmp_path / "r"
        command("train", *TINY, "--epochs", 1, "--fabric", "serial", "--run-dir", directory)
        assert command("train", "--resume", directory, "--epochs", 3, "--fabric", "serial").returncode == 0
        stats = json.loads((directory / "tiles.json").read_text())
        assert {(tile["last_step"], tile["updates"]) for tile in stats["tiles"]} == {(36, 24)}


# --- real runs on Ray


def start(*arguments: object, **options) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [*COMMAND, "train", *map(str, arguments)],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
        **options,
    )


def wait_until(condition, process: subprocess.Popen, what: str):
    deadline = time.monotonic() + _TIMEOUT_S
    while not (value := condition()):
        assert process.poll() is None, f"ended before {what}: {process.stderr and process.stderr.read()}"
        assert time.monotonic() < deadline, f"no {what}"
        time.sleep(0.05)
    return value


def stop(process: subprocess.Popen[str]) -> None:
    if process.poll() is None:
        process.send_signal(signal.SIGINT)
    process.communicate(timeout=_TIMEOUT_S)


def registered(run: str) -> Registration | None:
    found = registrations(Path(os.environ["RAPA_DIST_SHM"]))
    return next((entry for entry in found if entry.run == run), None)


@pytest.fixture(scope="class")
def two_runs(tmp_path_factory):
    """Two runs that train at the same time, each on a cluster of its own, as (name → process, registration).

    They take all cores, hence no longer than for the tests that look at them.
    """
    folder = tmp_path_factory.mktemp("two")
    processes = {name: start(*ENDLESS, "--run-dir", folder / name) for name in ("one", "two")}
    try:
        yield {
            name: (process, wait_until(lambda name=name: registered(name), process, "registration"))
            for name, process in processes.items()
        }
    finally:
        for process in processes.values():
            stop(process)


@pytest.mark.ray
@pytest.mark.timeout(400)
class TestTwoRuns:
    def test_several_runs_have_to_be_named(self, two_runs):
        done = command("stats")
        assert done.returncode == 2
        assert "2 runs train on this node. Name one with --run:\n" in done.stderr
        assert {"  one", "  two"} <= set(done.stderr.splitlines())  # the older first; they start in the same second

    @pytest.mark.parametrize("run", ["one", "two"])
    def test_every_tile_of_a_run_is_shown_while_it_works(self, two_runs, run):
        def look():
            return json.loads(command("stats", "--run", run, "--json").stdout)

        process, _ = two_runs[run]
        first = wait_until(lambda: (found := look())["total"]["last_step"] > 0 and found, process, "first step")
        second = look()
        assert first["run"] == run
        assert first["silent"] == []
        tiles = {tile["tile"]: tile for tile in first["tiles"]}
        assert list(tiles) == ["L0/T000", "L0/T001", "L0/T002", "L0/T003", "L1/T000", "L2/T000"]
        assert len({tile["pid"] for tile in tiles.values()}) == 6
        for tile in tiles.values():
            assert 0 < tile["busy_s"] < tile["busy_s"] + tile["waiting_s"]
            assert tile["resident_bytes"] == pytest.approx(110e6, rel=0.5)
            assert tile["state"] in ("idle", "forward", "backward", "holding")
        for now, then in zip(second["tiles"], first["tiles"], strict=True):
            for name in ("rows_forward", "updates", "last_step", "busy_s", "waiting_s", "bytes_in", "bytes_out"):
                assert now[name] > then[name], name

    def test_the_table_and_one_layer_of_it(self, two_runs):
        done = command("stats", "--run", "one", "--layer", "0", "--sort", "busy")
        assert done.returncode == 0, done.stderr
        assert done.stderr == ""
        lines = done.stdout.splitlines()
        assert lines[0] == "one: conv0, 4 of 6 tiles on 1 node"
        assert sorted(line.split()[0] for line in lines[3:]) == [f"L0/T00{number}" for number in range(4)]
        refused = command("stats", "--run", "one", "--layer", "7")
        assert (refused.returncode, refused.stdout) == (2, "")

    def test_the_cluster_can_be_named_instead_of_the_run(self, two_runs):
        address = two_runs["two"][1].address
        assert json.loads(command("stats", "--address", address, "--json").stdout)["run"] == "two"

    def test_it_answers_within_a_second_of_attaching(self, two_runs):
        # The best of three: what other tests beside this one take is not the watcher's.
        code = (
            "import time; from rapa_dist.fabric.watcher import find_run\n"
            "for _ in range(3):\n"
            "    watcher = find_run('one', None, print); began = time.monotonic(); watcher.read()\n"
            "    print(time.monotonic() - began); watcher.close()"
        )
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
        assert min(float(line) for line in done.stdout.splitlines()[-3:]) < 1.0

    def test_a_killed_tile_is_seen_to_be_replaced(self, two_runs):
        def tile() -> dict:
            return json.loads(command("stats", "--run", "two", "--json").stdout)["tiles"][0]

        before = tile()
        os.kill(before["pid"], signal.SIGKILL)
        after = wait_until(
            lambda: (now := tile())["state"] != "restarting" and now["pid"] != before["pid"] and now,
            two_runs["two"][0],
            "new process of the tile",
        )
        assert after["restarts"] == 1
        assert after["rows_forward"] >= before["rows_forward"]


@pytest.mark.ray
@pytest.mark.timeout(400)
class TestOneRun:
    def test_a_cluster_that_goes_away_while_it_is_watched_and_trained_on(self, start_head, tmp_path):
        """Watch as from another node: the run's registration is out of sight, its actors are not."""
        address, head, token = start_head(tiles=6)
        (tmp_path / "elsewhere").mkdir()
        far = token | {"RAPA_DIST_SHM": str(tmp_path / "elsewhere"), "RAY_AUTH_MODE": "token"}
        empty = command("stats", "--address", address, env=far)
        assert empty.returncode == 1
        assert f"No run trains on the cluster at {address} (--address)" in empty.stderr

        process = start(
            *ENDLESS,
            "--address",
            address,
            "--run-dir",
            tmp_path / "three",
            env=far | {"RAPA_DIST_SHM": os.environ["RAPA_DIST_SHM"]},
        )
        try:
            wait_until(lambda: registered("three"), process, "registration")
            near = command("stats", "--run", "three", "--json", env=token)  # knows of the token mode from the run
            assert json.loads(near.stdout)["run"] == "three", near.stderr
            unknown = command("stats", "--run", "four", "--address", address, env=far)
            assert unknown.returncode == 2
            assert "No run named four trains on the cluster" in unknown.stderr
            by_environment = command("stats", "--json", env=far | {"RAY_ADDRESS": address})
            assert json.loads(by_environment.stdout)["run"] == "three", by_environment.stderr

            watching = subprocess.Popen(
                [*COMMAND, "stats", "--address", address, "--watch", "--interval", "0.5"],
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
                env=far,
            )
            assert watching.stdout.readline().startswith("three: 6 tiles")
            wait_until((tmp_path / "three" / "metrics.jsonl").exists, process, "first epoch")
            os.killpg(head.pid, signal.SIGTERM)
            stderr = watching.communicate(timeout=60)[1]
            assert watching.returncode == 1, stderr
            assert f"The Ray cluster at {address} went away" in stderr

            stderr = process.communicate(timeout=30)[1]
            assert process.returncode == 1, stderr
            assert f"The head of the Ray cluster at {address} is gone" in stderr
            assert "Traceback" not in stderr
            assert f"rapa-dist train --resume {tmp_path / 'three'}" in stderr
            newest = checkpoints.read(checkpoints.latest(tmp_path / "three" / "checkpoints"))
            more = ["--epochs", newest.progress.epoch + 1, "--fabric", "serial"]
            resumed = command("train", "--resume", tmp_path / "three", *more)
            assert resumed.returncode == 0, resumed.stderr
        finally:
            process.kill()
            process.communicate(timeout=_TIMEOUT_S)
            sweep(Path(os.environ["RAPA_DIST_SHM"]))

    def test_a_watched_run_ends_with_the_bits_of_one_that_nobody_watched(self, tmp_path):
        directory, unwatched = tmp_path / "watched", tmp_path / "unwatched"
        assert command("train", *LONGER, "--fabric", "serial", "--run-dir", unwatched).returncode == 0
        process = start(*LONGER, "--run-dir", directory)
        try:
            wait_until(lambda: registered("watched"), process, "registration")
            watching = command("stats", "--run", "watched", "--watch", "--interval", "0.05")
        finally:
            stderr = process.communicate(timeout=_TIMEOUT_S)[1]
        assert process.returncode == 0, stderr
        assert watching.returncode == 0, watching.stderr
        assert "The run watched has ended. These were its last numbers." in watching.stderr
        assert watching.stdout.count("watched: 6 tiles on 1 node") > 3
        assert_same_weights(directory, unwatched)
        ours, theirs = (json.loads((path / "tiles.json").read_text()) for path in (directory, unwatched))
        for mine, yours in zip(ours["tiles"], theirs["tiles"], strict=True):
            for name in ("tile", "rows_forward", "rows_backward", "rows_update", "updates", "last_step", "kernel_norm"):
                assert mine[name] == yours[name], name
        assert {tile["pid"] for tile in ours["tiles"]}.isdisjoint({process.pid})
