"""Networks of every kind on `ray`, with a tile and then the coordinator killed, and resumed: the bits of `serial`."""

import json
import os
import signal
import subprocess
import sys
from itertools import product
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from test_nodes import Nodes, epochs_done, metrics, same_weights, three_nodes, wait_for_epoch

pytestmark = [pytest.mark.ray, pytest.mark.timeout(300)]

HERE = Path(__file__).parent  # where small_networks.py is
TILES = {"resnet18": "4", "alexnet": "4,2,1,1,1"}
EPOCHS = {"resnet18": 8, "alexnet": 60}  # longer than finding a tile takes


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    """Noise of 64 × 64 pixels."""
    folder = tmp_path_factory.mktemp("images")
    rng = np.random.default_rng(0)
    for part, label in product(("train", "test"), "ab"):
        (folder / part / label).mkdir(parents=True)
        for number in range(20 if part == "train" else 5):
            pixels = rng.integers(0, 256, (64, 64, 3), np.uint8)
            Image.fromarray(pixels).save(folder / part / label / f"{number}.png")
    return folder


def command_of(network, images, parts, *more):
    options = ["--network", f"small_networks:{network}", "--tiles", TILES[network], "--micro-batches", str(parts)]
    options += ["--dataset", f"images:{images}", "--epochs", str(EPOCHS[network]), "--lr", "0.01", "--json"]
    return [sys.executable, "-m", "rapa_dist", "train", *options, *more]


def start(command, nodes=None):
    inside = [] if nodes is None else nodes.on(0)
    env = os.environ if nodes is None else nodes.env
    return subprocess.Popen(
        [*inside, *command], cwd=HERE, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


def a_tile_of(run_dir, nodes=None):
    """Return the process of the first tile of the second layer."""
    command = [sys.executable, "-m", "rapa_dist", "stats", "--run", str(run_dir), "--json"]
    env = os.environ if nodes is None else nodes.env
    done = subprocess.run(command, cwd=HERE, env=env, capture_output=True, text=True, timeout=60, check=True)
    return next(tile["pid"] for tile in json.loads(done.stdout)["tiles"] if tile["tile"] == "L1/T000")


def disturb(network, images, parts, run_dir, nodes=None):
    """Train with a tile killed after the first epoch and the coordinator after the second, and resume."""
    process = start(command_of(network, images, parts, "--run-dir", str(run_dir)), nodes)
    try:
        wait_for_epoch(run_dir, 1, process)
        process.send_signal(signal.SIGSTOP)  # on a fast machine it would be at its end before a tile is found
        os.kill(a_tile_of(run_dir, nodes), signal.SIGKILL)
        process.send_signal(signal.SIGCONT)
        wait_for_epoch(run_dir, epochs_done(run_dir) + 2, process)
    finally:
        process.kill()
        process.communicate()
    assert epochs_done(run_dir) < EPOCHS[network], "it was over before it was killed"
    process = start([sys.executable, "-m", "rapa_dist", "train", "--resume", str(run_dir), "--json"], nodes)
    _, errors = process.communicate(timeout=200)
    assert process.returncode == 0, errors


def check_against_serial(network, images, parts, run_dir, reference):
    command = command_of(network, images, parts, "--fabric", "serial", "--run-dir", str(reference))
    subprocess.run(command, cwd=HERE, check=True, capture_output=True, timeout=120)
    assert same_weights(run_dir, reference)
    assert metrics(run_dir)[0] == metrics(reference)[0]


@pytest.mark.parametrize(("network", "parts"), [("resnet18", 2)])  # so do resnet18 1, alexnet 1 and 2
def test_a_run_that_is_killed_and_resumed_has_the_bits_of_serial(network, parts, images, tmp_path):
    disturb(network, images, parts, tmp_path / "run")
    check_against_serial(network, images, parts, tmp_path / "run", tmp_path / "serial")


@pytest.fixture(scope="module")
def nodes():
    with three_nodes("--plain", tiles_per_node=11) as made:
        yield made


@pytest.mark.parametrize(("network", "parts"), [("alexnet", 1)])
def test_so_it_has_on_three_nodes(network, parts, images, tmp_path, nodes: Nodes):
    disturb(network, images, parts, tmp_path / "run", nodes)
    check_against_serial(network, images, parts, tmp_path / "run", tmp_path / "serial")
