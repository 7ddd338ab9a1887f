"""Runs on three nodes, of which some are killed or cut off: the bits of `serial`, or a clear end.

The nodes are raylets on this machine, and network namespaces where a network has to be cut.
"""

import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import datetime, timedelta
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file

# not side by side with other namespaces, which look for a free subnet, too
pytestmark = [pytest.mark.ray, pytest.mark.timeout(300), pytest.mark.xdist_group("namespaces")]

LOCAL = Path(__file__).parents[1] / "cluster" / "local.sh"
TILES_PER_NODE = 4  # of 7: two nodes are enough, one is not
TRAIN = ("train", "--tiles", "4,2,1", "--channels", "8,8,4", "--dataset", "builtin", "--limit-train", "300")
TRAIN += ("--limit-test", "50", "--epochs", "4", "--lr", "0.02", "--json")


class Nodes:
    """A cluster of three nodes, and what is done to it."""

    def __init__(self, state: Path) -> None:
        self.state = state
        self.env = dict(os.environ)

    def __call__(self, *arguments: str) -> str:
        done = subprocess.run(
            [LOCAL, "--state", self.state, *arguments],
            capture_output=True,
            text=True,
            timeout=150,
            check=False,
            env=self.env,
        )
        assert done.returncode == 0, done.stderr
        return done.stdout

    def start(self, *how: str, tiles_per_node: int = TILES_PER_NODE) -> None:
        if "--plain" not in how:
            self.env.pop("RAPA_DIST_SHM", None)  # a namespace has a /dev/shm of its own
        self("start", *how, "--nodes", "3", "--tiles-per-node", str(tiles_per_node))
        exported = (line.removeprefix("export ").partition("=") for line in self("env").splitlines())
        self.env |= {name: value.strip("'\"") for name, _, value in exported}

    def on(self, node: int) -> list[str]:
        """Return what stands before a command on some node."""
        return [str(LOCAL), "--state", str(self.state), "run", "--node", str(node), "--"]

    def train(self, *arguments: str, node: int = 0) -> subprocess.Popen[str]:
        """Start a run whose coordinator is on some node."""
        there = self.on(node)
        if node:  # Ray looks for its files where the head has them, which a machine of its own would have there, too
            mount = 'mount --bind "$0/n$1" "$0/n0" && shift && exec "$@"'
            there += ["sh", "-c", mount, str(self.state), str(node)]
        return subprocess.Popen(
            [*there, sys.executable, "-m", "rapa_dist", *TRAIN, *arguments],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env=self.env,
        )


@contextmanager
def three_nodes(*how: str, tiles_per_node: int = TILES_PER_NODE) -> Iterator[Nodes]:
    folder = Path(tempfile.mkdtemp(prefix="rn", dir="/tmp"))  # short: Ray's sockets lie below it
    made = Nodes(folder / "c")
    try:
        made.start(*how, tiles_per_node=tiles_per_node)
        yield made
    finally:
        made("stop")
        folder.rmdir()


@pytest.fixture(scope="module")
def nodes():
    with three_nodes("--plain") as made:
        yield made


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    """The same run on `serial`: its directory."""
    path = tmp_path_factory.mktemp("serial") / "run"
    command = [sys.executable, "-m", "rapa_dist", *TRAIN, "--fabric", "serial", "--run-dir", str(path)]
    subprocess.run(command, check=True, capture_output=True, timeout=120)
    return path


def epochs_done(run_dir: Path) -> int:
    try:
        return (run_dir / "metrics.jsonl").read_bytes().count(b"\n")
    except FileNotFoundError:
        return 0


def wait_for_epoch(run_dir: Path, epoch: int, process: subprocess.Popen[str]) -> None:
    deadline = time.monotonic() + 120
    while epochs_done(run_dir) < epoch:
        assert time.monotonic() < deadline, "the run does not get on"
        assert process.poll() is None, process.communicate()[1]
        time.sleep(0.02)


def weights(run_dir: Path) -> dict[str, np.ndarray]:
    return load_file(max((run_dir / "checkpoints").glob("*.safetensors")))


def lines_of(run_dir: Path) -> list[dict]:
    return [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]


def metrics(run_dir: Path) -> tuple[list[dict], list[dict]]:
    """Return the lines of a run's metrics without what is wall time, and the recoveries in them."""
    lines = lines_of(run_dir)
    recoveries = [recovery for line in lines for recovery in line["wall"]["recoveries"]]
    return [{name: value for name, value in line.items() if name != "wall"} for line in lines], recoveries


def same_weights(one: Path, other: Path) -> bool:
    ours, theirs = weights(one), weights(other)
    return ours.keys() == theirs.keys() and all(np.array_equal(ours[name], theirs[name]) for name in ours)


class TestCut:
    @pytest.fixture(scope="class")
    @classmethod
    def namespaces(cls):
        if os.geteuid() != 0 or shutil.which("ip") is None:
            pytest.skip("network namespaces need root and iproute2")
        with three_nodes() as nodes:
            if "namespaces" not in nodes("status"):
                pytest.skip("this system lets nobody make network namespaces")
            yield nodes

    @pytest.mark.parametrize(
        ("coordinator", "cut"), [(0, 2), (1, 0), (1, 1)], ids=["another node", "the head", "the coordinator's node"]
    )
    def test_a_network_that_is_cut_for_ten_seconds_changes_no_bit(
        self, namespaces, undisturbed, tmp_path, coordinator, cut
    ):
        run_dir = tmp_path / "run"
        process = namespaces.train("--run-dir", str(run_dir), node=coordinator)
        wait_for_epoch(run_dir, 1, process)
        namespaces("cut", str(cut), "10")
        _, errors = process.communicate(timeout=200)
        assert process.returncode == 0, errors
        assert "7 tiles on 3 nodes" in errors
        assert same_weights(run_dir, undisturbed)
        assert metrics(run_dir)[0] == metrics(undisturbed)[0]
        finished = [datetime.fromisoformat(line["wall"]["finished"]) for line in lines_of(run_dir)]
        longest = max(after - before for before, after in pairwise(finished))
        assert longest > timedelta(seconds=5), "the cut came too late"


def test_a_run_on_three_nodes_that_loses_two_ends_with_the_bits_of_serial(nodes, undisturbed, tmp_path):
    """The second loss leaves too little room, until a killed node is back."""
    run_dir = tmp_path / "run"
    process = nodes.train("--run-dir", str(run_dir))
    wait_for_epoch(run_dir, 1, process)
    nodes("kill", "2")
    wait_for_epoch(run_dir, 2, process)
    nodes("kill", "1")
    nodes("revive", "2")
    output, errors = process.communicate(timeout=150)
    assert process.returncode == 0, errors
    assert "7 tiles on 3 nodes" in errors
    assert json.loads(output)["finished"]
    assert same_weights(run_dir, undisturbed)
    ours, recoveries = metrics(run_dir)
    assert ours == metrics(undisturbed)[0]
    assert [recovery["kind"] for recovery in recoveries] == ["node", "node"]
    assert all(recovery["lost_steps"] >= 0 and recovery["seconds"] > 0 for recovery in recoveries)
    nodes("revive", "1")


def chip_process(shared: Path) -> int:
    """Return the process of the only chip that another node than the first has; their memory lies below a folder."""
    for entry in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):  # it has gone, or belongs to somebody else
            is_chip = (entry / "cmdline").read_bytes().startswith(b"ray::RemoteChip")
            if is_chip and f" {shared}/n" in (entry / "maps").read_text():
                return int(entry.name)
    raise AssertionError("no such process")


def test_a_chip_whose_process_alone_is_killed_changes_no_bit(nodes, undisturbed, tmp_path):
    """Its node is taken for lost, tiles and all, and is needed again at once."""
    run_dir = tmp_path / "run"
    process = nodes.train("--run-dir", str(run_dir), "--nodes", "2", "--node-patience", "0")
    wait_for_epoch(run_dir, 1, process)
    os.kill(chip_process(Path((nodes.state / "shm").read_text().strip())), signal.SIGKILL)
    _, errors = process.communicate(timeout=150)
    assert process.returncode == 0, errors
    assert "its chip does not answer any more" in errors
    assert same_weights(run_dir, undisturbed)
    ours, recoveries = metrics(run_dir)
    assert ours == metrics(undisturbed)[0]
    assert [recovery["kind"] for recovery in recoveries] == ["node"]


def left_behind(shared: Path) -> list[str]:
    """Return what runs have left in the nodes' shared memory, once those that are ending had time to."""
    deadline = time.monotonic() + 30
    while (found := [str(path) for path in shared.glob("n*/rapa-dist-*")]) and time.monotonic() < deadline:
        time.sleep(0.1)
    return found


def test_a_node_that_is_needed_no_more_once_its_chip_was_killed_is_left_clean(nodes, tmp_path):
    run_dir = tmp_path / "run"
    process = nodes.train("--run-dir", str(run_dir))
    wait_for_epoch(run_dir, 1, process)
    shared = Path((nodes.state / "shm").read_text().strip())
    os.kill(chip_process(shared), signal.SIGKILL)
    _, errors = process.communicate(timeout=150)
    assert process.returncode == 0, errors
    assert not left_behind(shared), errors


def test_chaos_kills_nodes_and_chips(nodes):
    train = [*TRAIN[1 : TRAIN.index("--epochs")], "--epochs", "2"]
    options = ["--local-cluster", str(nodes.state), "--kinds", "node-kill,chip-kill", "--kills", "2", "--seed", "1"]
    done = subprocess.run(
        [sys.executable, "-m", "rapa_dist", "chaos", *train, *options, "--json"],
        capture_output=True,
        text=True,
        timeout=200,
        check=False,
        env=nodes.env,
    )
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout)
    assert report["verdict"] == "identical"
    assert {kind: found["number"] for kind, found in report["kinds"].items()} == {"node-kill": 1, "chip-kill": 1}


def test_a_run_that_has_no_room_left_saves_and_says_how_to_go_on(nodes, undisturbed, tmp_path):
    run_dir = tmp_path / "run"
    process = nodes.train("--run-dir", str(run_dir), "--nodes", "2", "--node-patience", "1")
    wait_for_epoch(run_dir, 1, process)
    status = nodes("status")
    assert "alive" in status
    nodes("kill", "1")
    nodes("kill", "2")
    _, errors = process.communicate(timeout=150)
    assert process.returncode == 1, errors
    assert "7 tiles on 2 nodes" in errors
    assert "is lost" in errors
    assert "--node-patience" in errors
    assert "Traceback" not in errors
    assert f"rapa-dist train --resume {run_dir}" in errors
    resume = [sys.executable, "-m", "rapa_dist", "train", "--resume", str(run_dir), "--fabric", "serial"]
    subprocess.run(resume, check=True, capture_output=True, timeout=120)
    assert same_weights(run_dir, undisturbed)
