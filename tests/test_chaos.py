"""`rapa-dist chaos`: what it draws, what it would find, and a small campaign of each kind."""

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from rapa_dist.cells import Word
from rapa_dist.chaos.campaign import differences, summary
from rapa_dist.chaos.disturbance import Deed
from rapa_dist.chaos.mischief import COORDINATOR_KILL, KINDS, SAVING, STARTING, TRAINING, check_kinds, draw
from rapa_dist.chaos.nodes import LocalNodes
from rapa_dist.chaos.remains import remains
from rapa_dist.chaos.subject import Subject
from rapa_dist.coordinator import checkpoint as checkpoints
from rapa_dist.errors import UsageError

COMMAND = [sys.executable, "-m", "rapa_dist"]
SMALL = ["--channels", "8,8,4", "--limit-train", "200", "--limit-test", "20", "--epochs", "2", "--tiles", "2,1,1"]


def test_the_same_seed_draws_the_same_deeds_and_another_one_others():
    options = {"tiles": 7, "epochs": 3, "steps": 100}
    deeds = draw("5/0", list(KINDS), 200, **options)
    assert deeds == draw("5/0", list(KINDS), 200, **options)
    assert deeds != draw("5/1", list(KINDS), 200, **options)
    assert {deed.kind for deed in deeds} == set(KINDS)
    assert {deed.victim for deed in deeds} == set(range(7))
    assert [deed.step for deed in deeds] == sorted(deed.step for deed in deeds)
    assert max(deed.step for deed in deeds if deed.moment == TRAINING) < 299


def test_the_coordinator_is_killed_in_every_moment_and_saving_is_at_the_end_of_an_epoch():
    deeds = draw("0", [COORDINATOR_KILL], 100, tiles=1, epochs=3, steps=10)
    assert {deed.moment for deed in deeds} == {STARTING, TRAINING, SAVING}
    assert {deed.step for deed in deeds if deed.moment == SAVING} == {10, 20}


def test_unknown_kinds_are_refused():
    check_kinds(list(KINDS), several_nodes=True)
    with pytest.raises(UsageError, match=r"--kinds is a list of tile-kill.*not “tile-kil”"):
        check_kinds(["tile-stop", "tile-kil"])


def test_mischief_to_nodes_needs_nodes(tmp_path):
    with pytest.raises(UsageError, match=r"node-cut, chip-kill needs several nodes.*--local-cluster DIR"):
        check_kinds(["tile-kill", "node-cut", "chip-kill"])
    with pytest.raises(UsageError, match=r"folder that cluster/local\.sh keeps a cluster in"):
        LocalNodes(tmp_path)
    for name, content in (("nodes", "1"), ("address", "127.0.0.1:1"), ("kind", "plain")):
        (tmp_path / name).write_text(content)
    with pytest.raises(UsageError, match="no node besides its head"):
        LocalNodes(tmp_path)
    (tmp_path / "nodes").write_text("2")
    with pytest.raises(UsageError, match="node-cut needs nodes with networks of their own"):
        LocalNodes(tmp_path).check_can_cut()


def test_the_processes_of_a_node_are_those_below_its_holder(tmp_path, monkeypatch):
    for name, content in (("nodes", "2"), ("address", "127.0.0.1:1"), ("kind", "plain")):
        (tmp_path / name).write_text(content)
    chip = [sys.executable, "-c", "import sys; print(flush=True); sys.stdin.read()"]
    title = 'exec -a ray::RemoteChip "$@"; true'
    holder = subprocess.Popen(
        ["bash", "-c", f"({title}); true", "holder", *chip], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )
    try:
        holder.stdout.readline()
        assert LocalNodes(tmp_path).chips() == {}
        (tmp_path / "n1").mkdir()
        (tmp_path / "n1" / "holder").write_text(str(holder.pid))
        found = LocalNodes(tmp_path).chips()
        assert found.keys() == {1}
        assert Path(f"/proc/{found[1]}/cmdline").read_bytes().startswith(b"ray::RemoteChip")
        monkeypatch.setattr("rapa_dist.chaos.nodes._LEAVING_S", 0.1)
        with pytest.raises(UsageError, match=r"are in use: .*node 1: process .*ray::RemoteChip.*for chaos alone"):
            LocalNodes(tmp_path).check_unused()
    finally:
        holder.communicate()


def test_a_run_is_not_taken_for_the_one_before_that_it_sweeps_up(tmp_path, monkeypatch):
    runs = [SimpleNamespace(pid=pid, folder=tmp_path / str(pid)) for pid in (1, 2)]
    for run, step in zip(runs, (100, 7), strict=True):
        run.folder.mkdir()
        words = np.zeros(512, np.uint64)
        words[[Word.PID, Word.STEP]] = run.pid, step
        (run.folder / "cells-0").write_bytes(words.tobytes())
    monkeypatch.setattr("rapa_dist.chaos.subject.registrations", lambda root: runs)
    subject = Subject(tmp_path / "run", tmp_path, [], {})
    subject._process = SimpleNamespace(pid=2)
    assert subject.step() == 7
    subject._process, subject._words = SimpleNamespace(pid=3), []
    assert subject.step() == -1


def test_the_summary_has_the_median_and_the_longest_of_what_was_lost():
    deed = Deed(run=0, kind="tile-kill", moment=TRAINING, step=1, seconds=1.0)
    deeds = [deed, replace(deed, seconds=3.0), replace(deed, seconds=1.5), replace(deed, seconds=None)]
    found = summary(deeds)["tile-kill"]
    assert found == {"number": 4, "moments": {TRAINING: 4}, "median_s": 1.5, "longest_s": 3.0}


def test_what_is_left_behind_is_found(tmp_path, monkeypatch):
    monkeypatch.setattr("rapa_dist.chaos.remains._PATIENCE_S", 0.3)
    folder = tmp_path / "of-the-run"
    folder.mkdir()
    assert remains([folder]) == []
    program = "import sys, time; file = open(sys.argv[1], 'w'); print(flush=True); time.sleep(60)"
    left = subprocess.Popen([sys.executable, "-c", program, str(folder / "log")], stdout=subprocess.PIPE)
    left.stdout.readline()
    found = remains([folder])
    left.kill()
    left.communicate()
    assert [line.partition(" /")[0] for line in found] == [f"process {left.pid}", str(folder / "log")]


@pytest.fixture(scope="module")
def finished(tmp_path_factory) -> Path:
    directory = tmp_path_factory.mktemp("chaos") / "run"
    options = [*SMALL, "--dataset", "builtin", "--fabric", "serial", "--run-dir", str(directory)]
    subprocess.run([*COMMAND, "train", *options], check=True, capture_output=True, timeout=120)
    return directory


def copied(finished: Path, to: Path) -> Path:
    subprocess.run(["cp", "-r", str(finished), str(to)], check=True)
    return to


@pytest.mark.slow
def test_a_difference_of_one_bit_is_found(finished, tmp_path):
    other = copied(finished, tmp_path / "other")
    assert differences(other, finished) == []
    newest = checkpoints.latest(other / "checkpoints")
    found = checkpoints.read(newest)
    found.kernels[1].view(np.uint32)[0, 0, 0] ^= 1
    checkpoints.write(newest.parent, newest.stem, found)
    assert differences(other, finished) == ["weights differ: conv1.kernels"]


@pytest.mark.slow
def test_other_metrics_are_found_and_another_time_is_none(finished, tmp_path):
    other = copied(finished, tmp_path / "other")
    lines = [json.loads(line) for line in (finished / "metrics.jsonl").read_text().splitlines()]
    lines[0]["wall"]["train_s"] += 1
    (other / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert differences(other, finished) == []
    lines[0]["train_loss"] += 1e-9
    (other / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert differences(other, finished) == ["metrics differ"]


@pytest.mark.ray
@pytest.mark.timeout(400)
def test_a_campaign_ends_with_the_bits_of_an_undisturbed_run():
    """Tiles killed and stopped, all of them at once, the coordinator killed while it saves, and ended by SIGTERM."""
    kinds = "tile-kill,tile-stop,all-tiles,coordinator-kill,coordinator-term"
    options = ["--kills", "5", "--seed", "72", "--kinds", kinds]
    done = subprocess.run(
        [*COMMAND, "chaos", *SMALL, *options, "--json"], capture_output=True, text=True, timeout=380, check=False
    )
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout)
    assert report["verdict"] == "identical"
    assert report["wrong"] == []
    assert sum(found["number"] for found in report["kinds"].values()) == len(report["deeds"]) > 0
    assert not [path for path in Path(os.environ["RAPA_DIST_SHM"]).iterdir() if "chaos" in path.name]
