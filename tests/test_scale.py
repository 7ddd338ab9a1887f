"""`rapa-dist scale`, through the command line: its mistakes, and small real runs. Its arithmetic is tested apart."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
from click.testing import CliRunner

from rapa_dist.cli import main
from rapa_dist.memory import Memory
from rapa_dist.scaling import run as running
from rapa_dist.scaling.stopwatch import BACKWARD_UPDATE, FORWARD, UPDATE

# --- mistakes, through the command line


@pytest.fixture
def refused(tmp_path, monkeypatch):
    """Return a function that asserts that a command line is refused before Ray starts or anything is written."""

    def start(**options):
        raise AssertionError("Ray was started")

    monkeypatch.setattr("ray.init", start)
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    monkeypatch.chdir(tmp_path)

    def check(arguments: list, code: int, *parts: str) -> None:
        before = sorted(tmp_path.rglob("*"))
        result = CliRunner().invoke(main, ["scale", *map(str, arguments), "--json"])
        assert result.exit_code == code, result.output
        assert "Traceback" not in result.stderr
        message = json.loads(result.stdout)["error"]["message"]
        for part in parts:
            assert part in message
        assert sorted(tmp_path.rglob("*")) == before

    return check


@pytest.mark.parametrize(
    ("arguments", "parts"),
    [
        (["--time-dilation", 0], ("--time-dilation needs a factor above 0", "it is 0")),
        (["--time-dilation", 2000, "--time-dilation", -1], ("--time-dilation needs a factor above 0", "it is -1")),
        (["--time-dilation", "nan"], ("--time-dilation needs a factor above 0",)),
        (["--time-dilation", "inf"], ("--time-dilation needs a factor above 0",)),
        (["--time-dilation", "fast"], ("'fast' is not a valid float",)),
        (["--time-dilation", 1e20], ("hold its answer for", "30 s are allowed", "at most 36,")),
        (["--time-dilation", 1e5, "--batch-size", 100], ("hold its answer for 819 s", "Use at most 3,662")),
        (["--forward-ns", 0], ("--forward-ns needs a time above 0", "it is 0")),
        (["--backward-ns", -80], ("--backward-ns needs a time above 0", "it is -80")),
        (["--update-ns", "nan"], ("--update-ns needs a time above 0",)),
        (["--turns", 0], ("--turns needs at least 1; it is 0",)),
        (["--steps", -3], ("--steps needs at least 1; it is -3",)),
        (["--batch-size", 0], ("--batch-size needs at least 1",)),
        (["--tiles", "16,4"], ("--tiles", "3 layers", "16,4")),
        (["--tiles", "1,1,1", "--tiles", "16,four,1"], ("“four”", "16,4,1")),
        (["--tiles", "1025,4,1"], ("Layer conv0", "at most 1,024")),
        (["--tile", "16,4,1"], ("No such option", "--tiles")),
        (["--address", "nowhere"], ("--address needs host:port",)),
    ],
)
def test_values_that_can_not_work(refused, arguments, parts):
    refused(arguments, 2, *parts)


def test_more_tiles_than_memory_has_room_for(refused, monkeypatch):
    """The largest number of every layer counts, wherever it stands: 1024 + 256 + 64 actors."""
    monkeypatch.setattr(running, "memory", lambda: Memory(8 * 10**9, 4 * 10**9, False))
    parts = ("Too little memory: 1,344 tiles", "4,000 MB are available", "About 59 tiles would fit", "--tiles")
    refused(["--tiles", "1024,256,1", "--tiles", "1,1,64"], 1, *parts)


def test_a_place_for_the_results_that_is_none(refused, tmp_path):
    (tmp_path / "file").write_text("")
    refused(["--out", tmp_path / "file" / "below"], 1, "is no folder", "--out")
    (tmp_path / "scaling.json").write_text("{}")
    refused(["--out", tmp_path], 1, "already", "--out")


def test_a_cluster_that_is_too_small(refused, monkeypatch):
    """More than the cluster of test_bad_input.py offers; what it is short of is said before a tile starts."""
    nodes = [{"NodeID": "a", "Alive": True, "NodeManagerAddress": "10.0.0.1", "Resources": {"analog_tile": 5.0}}]
    left = []
    monkeypatch.setattr("rapa_dist.fabric.address.answers", lambda address: True)
    monkeypatch.setattr("ray.init", lambda **options: None)
    monkeypatch.setattr("ray.shutdown", lambda: left.append(True))
    monkeypatch.setattr("ray.nodes", lambda: nodes)
    monkeypatch.setattr("ray._private.state.available_resources_per_node", lambda: {"a": {"analog_tile": 5.0}})
    monkeypatch.setattr("ray.get_runtime_context", lambda: SimpleNamespace(get_node_id=lambda: "a"))
    arguments = ["--tiles", "4,1,1", "--tiles", "2,2,1", "--address", "10.0.0.1:6379"]
    refused(arguments, 1, "needs 7 analog_tile", "5 are free", "10.0.0.1 (this node): 5", "fewer --tiles")
    assert left, "still connected"


# --- for real

SCALE = [sys.executable, "-m", "rapa_dist", "scale", "--address", "local"]


@pytest.mark.ray
def test_a_small_measurement(tmp_path):
    """Times are the machine's own business, but no answer comes before its hold is over."""
    options = ["--tiles", "4,2,1", "--time-dilation", "20", "--turns", "2", "--steps", "2", "--out", tmp_path / "s"]
    done = subprocess.run([*SCALE, *options, "--json"], capture_output=True, text=True, timeout=150, check=False)
    assert done.returncode == 0, done.stderr
    (line,) = done.stdout.splitlines()
    report = json.loads(line)
    assert json.loads((tmp_path / "s" / "scaling.json").read_text()) == {k: v for k, v in report.items() if k != "out"}
    assert report["finished"]
    assert report["start"]["actors"] == 7
    assert report["start"]["actors_up_s"] > 0
    own = report["start"]["own_memory_per_actor_mb"]
    assert 1 < own["median"] <= own["max"] < 200
    assert report["start"]["memory_of_all_processes_mb"] > report["start"]["own_memory_of_actors_mb"] > 7 * 1
    compute, paced = report["blocks"]
    assert [block["mode"] for block in (compute, paced)] == ["compute", "paced"]
    for block in (compute, paced):
        assert [configuration["tiles"] for configuration in block["configurations"]] == [[1, 1, 1], [4, 2, 1]]
        for configuration in block["configurations"]:
            assert configuration["step"]["wall_ms"]["n"] == 4
            assert sum(configuration["shares_percent"].values()) == pytest.approx(100)
            for layer in configuration["layers"]:
                assert all(cycle["busy_ms"]["longest"]["median"] > 0 for cycle in list(layer["cycles"].values())[:2])
    for configuration in paced["configurations"]:
        for layer in configuration["layers"]:
            rows = 10 * (1024, 256, 64)[layer["layer"]] / layer["n_tiles"]
            for kind, cycles in (
                (FORWARD, 1),
                (BACKWARD_UPDATE if layer["layer"] else UPDATE, 1 + bool(layer["layer"])),
            ):
                hold_ms = rows * cycles * 80 * 20 * 1e-6
                assert layer["cycles"][kind]["ideal_ms"] == pytest.approx(hold_ms, abs=1e-3)
                assert layer["cycles"][kind]["wall_ms"]["q25"] >= hold_ms - 1e-3
    for factor in report["real_time_factors"]:
        assert factor["first_layer"]["time_dilation"] or factor["first_layer"]["reason"]
        assert all(probe["first_layer_efficiency"] <= 1 for probe in factor["probes"])
    assert not list(Path(os.environ["RAPA_DIST_SHM"]).iterdir())


@pytest.mark.ray
def test_interrupted_it_writes_what_it_has(tmp_path):
    options = ["--tiles", "2,1,1", "--time-dilation", "2000", "--steps", "1", "--out", tmp_path / "s"]
    process = subprocess.Popen([*SCALE, *options, "--json"], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 100
    while not (tmp_path / "s" / "scaling.json").exists():
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    stdout, stderr = process.communicate(timeout=60)
    assert process.returncode == 130, stderr
    assert "what was measured so far" in stderr
    assert "Traceback" not in stderr
    report = json.loads(stdout)
    assert not report["finished"]
    assert report["blocks"][0]["mode"] == "compute"
    assert {entry.name for entry in (tmp_path / "s").iterdir()} >= {"scaling.json", "scaling.svg"}
    assert not list(Path(os.environ["RAPA_DIST_SHM"]).iterdir())
