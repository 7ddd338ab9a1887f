"""Files that are quietly something else: of a run's directory, of shared memory, on file systems that lack a call.

A short form of scripts/fuzz_run_directory.py is in here; the instances that people met are cases of their own.
"""

import errno
import fcntl
import hashlib
import json
import os
import shutil
import socket
import subprocess
import sys
from pathlib import Path

import pytest
from click.testing import CliRunner
from factories import floats_of, tile_array
from rings import ring

from rapa_dist import files
from rapa_dist.cli import main
from rapa_dist.coordinator.checkpoint import checkpoints, prune
from rapa_dist.coordinator.metrics import parse_metrics
from rapa_dist.coordinator.run_directory import RunDirectory
from rapa_dist.errors import ClusterError, RapaError, RunDirectoryError
from rapa_dist.experiments.cells import Protocol
from rapa_dist.experiments.store import Store
from rapa_dist.fabric.chip import Chip
from rapa_dist.fabric.doorbell import Cycle, Ring
from rapa_dist.files import append_whole, parse_json, read_file, write_whole
from rapa_dist.machine import Machine

sys.path.append(str(Path(__file__).parent.parent / "scripts"))

from fuzz_run_directory import SMALL, Result, World, fingerprint

MACHINE = Machine((tile_array(n_tiles=2),))
FLOATS = floats_of(MACHINE)


def invoke(arguments: list[str], as_nobody: bool = False) -> Result:
    """Run a command line in this process."""
    done = CliRunner().invoke(main, arguments)
    return Result(done.exit_code, done.stdout + done.stderr, 0.0)


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """A finished run, and another one's files beside it that nobody may touch."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HOME", str(tmp_path_factory.mktemp("home")))
        yield World.make(tmp_path_factory.mktemp("world"), invoke)


@pytest.fixture
def others(world):
    """The other run; nothing in it, and nothing around it, may have changed at the end."""
    before = fingerprint(world.path)
    yield world.path / "others" / "run"
    assert fingerprint(world.path) == before


@pytest.fixture
def run(world, tmp_path):
    """A copy of the finished run, to do harm to."""
    return Path(shutil.copytree(world.path / "run", tmp_path / "run"))


def resumed(run, *options) -> str:
    """Assert that a run can't be resumed, and that the try leaves it as it was; return what is said."""
    before = fingerprint(run, leave_out={"log", ".lock"})
    done = invoke(["train", "--resume", str(run), "--fabric", "serial", "--epochs", "6", *options])
    assert done.code in (1, 2), done.text
    assert "Traceback" not in done.text
    assert fingerprint(run, leave_out={"log", ".lock"}) == before
    return done.text


def newest(run):
    return max((run / "checkpoints").glob("*.safetensors"))


# --- a run directory changed at random


@pytest.mark.parametrize("number", range(8))
def test_mutations_of_a_run_end_in_sentences_and_touch_nothing_outside(world, number):
    world.report = number == 0
    done, wrong = world.try_case(16, number, invoke)
    assert not wrong, "\n".join([done, *wrong])


def test_the_fuzzer_sees_a_traceback_and_what_is_touched(world, monkeypatch):
    secret = world.path / "others" / "secret.txt"

    def command(arguments, as_nobody):
        secret.write_text("touched")
        return Result(1, "Traceback (most recent call last)", 0.0)

    _, wrong = world.try_case(16, 0, command)
    secret.write_text("theirs")
    assert "Traceback" in wrong[0]
    assert wrong[-1] == "touched others/secret.txt"


# --- something else in the place of a file or folder


def pipe(path, others):
    os.mkfifo(path)


def a_socket(path, others):
    with socket.socket(socket.AF_UNIX) as made:
        os.chdir(path.parent)
        made.bind(path.name)


def folder(path, others):
    path.mkdir()


def link(path, others):
    path.symlink_to(others / path.name)


def dangling(path, others):
    path.symlink_to(others / "new")


def loop(path, others):
    path.symlink_to(path.name)


@pytest.mark.parametrize("what", [pipe, a_socket, folder, link, dangling, loop])
@pytest.mark.parametrize("name", ["metrics.jsonl", "log", "checkpoints", "config.toml", ".lock"])
def test_what_is_no_file_or_folder_of_the_run_itself_is_refused_by_its_name(run, others, monkeypatch, name, what):
    monkeypatch.chdir(run.parent)  # and back
    path = run / name
    shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)
    if name == "checkpoints" and what is folder:
        path.write_text("a file")
    else:
        what(path, others)
    said = resumed(run)
    kinds = {pipe: "a pipe", a_socket: "a socket", folder: "a file" if name == "checkpoints" else "a folder"}
    assert (kinds.get(what, "a link") in said and str(path) in said) or "config.toml can't be read" in said, said


def test_checkpoints_of_another_run_that_a_link_leads_to_are_not_pruned(run, others):
    """What happened: `checkpoints/` was a link, and another run's files were deleted."""
    shutil.rmtree(run / "checkpoints")
    (run / "checkpoints").symlink_to(others / "checkpoints")
    assert "is a link; expected a folder" in resumed(run)
    prune(run / "checkpoints", best=None)
    assert len(checkpoints(others / "checkpoints")) >= 3


def test_a_run_is_read_through_a_link_and_by_one(run, others):
    """Whoever looks at a run changes nothing, so links do no harm; a run's directory may be one itself."""
    (run / "metrics.jsonl").unlink()
    (run / "metrics.jsonl").symlink_to(others / "metrics.jsonl")
    (run.parent / "name").symlink_to(run)
    assert invoke(["evaluate", str(run.parent / "name")]).code == 0


def test_a_refused_run_whose_metrics_have_a_second_name_is_as_it_was(run, others):
    (run / "metrics.jsonl").unlink()
    os.link(others / "log", run / "metrics.jsonl")
    assert "damaged" in resumed(run)


def test_a_backup_by_hard_links_stays_as_it_is(run, tmp_path):
    backup = Path(shutil.copytree(run, tmp_path / "backup", copy_function=os.link))
    before = fingerprint(backup)
    assert invoke(["train", "--resume", str(run), "--fabric", "serial", "--epochs", "5"]).code == 0
    assert fingerprint(backup) == before
    assert len(RunDirectory(run).metrics()) == 5


@pytest.mark.parametrize("name", ["metrics.jsonl", "checkpoints"])
def test_what_can_not_be_written_to_is_said_before_anything_is_written(run, others, monkeypatch, name):
    """Read-only, or immutable, which holds for root, too."""
    allowed = os.access
    monkeypatch.setattr(os, "access", lambda path, how: Path(path).name != name and allowed(path, how))
    assert f"{run / name} can't be written to" in resumed(run)


def test_what_can_not_be_pruned_stays_and_stops_nothing(run):
    (run / "checkpoints" / "step-000000000-epoch-00000.safetensors").mkdir()
    prune(run / "checkpoints", best=None)
    assert len(checkpoints(run / "checkpoints")) == 3


def test_a_file_of_a_terabyte_is_not_read(run):
    for name in ("config.toml", "metrics.jsonl", "environment.json", "tiles.json"):
        os.truncate(run / name, 1 << 40)
        with pytest.raises(OSError, match=r"1,099,511,627,776 bytes, where at most 10 are expected"):
            read_file(run / name, 10)
    assert "1,099,511,627,776 bytes" in resumed(run)


def test_a_device_is_not_opened(monkeypatch):
    monkeypatch.setattr(os, "open", lambda *arguments, **options: pytest.fail("a device acts on being opened"))
    with pytest.raises(OSError, match="it is a device, not a file"):
        read_file(Path("/dev/zero"), 10)


def test_results_of_an_experiment_that_are_no_files_are_not_waited_for(tmp_path):
    """The folder of `reproduce`, and what `report` is given by an option."""
    os.mkfifo(tmp_path / "protocol.json")
    with pytest.raises(RapaError, match=r"protocol\.json can't be read: it is a pipe, not a file"):
        Store(tmp_path, Protocol(dataset="builtin", epochs=1, lr_decay_every=1))


@pytest.mark.parametrize("what", [pipe, folder, dangling])
def test_measurements_to_report_that_are_no_file_are_refused(run, others, what):
    what(run / "odd.json", others)
    done = invoke(["report", str(run), "--scaling", str(run / "odd.json")])
    assert done.code == 2
    assert "is no scaling.json" in done.text


# --- lines of metrics


def test_a_zeroed_line_of_metrics_is_named_before_training(run, others):
    path = run / "metrics.jsonl"
    first, second, *rest = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(b"".join([first, bytes(len(second) - 1) + b"\n", *rest]))
    assert "line 2 is damaged: it holds zeros or blanks alone" in resumed(run)
    done = invoke(["report", str(run)])
    assert done.code == 1
    assert "line 2 is damaged" in done.text


def test_a_cut_line_of_metrics_is_named_before_training(run, others):
    path = run / "metrics.jsonl"
    first, second, *rest = path.read_bytes().splitlines(keepends=True)
    pad = b" " * (len(second) - 21)
    path.write_bytes(b"".join([first, second[:20] + b"\n" + pad, *rest]))
    assert "line 2 is damaged" in resumed(run)


def test_what_a_crash_left_behind_the_metrics_is_cut_off(run, others):
    """Zeros after the last line that a checkpoint counts, as a power cut leaves them."""
    with (run / "metrics.jsonl").open("ab") as file:
        file.write(bytes(300))
    done = invoke(["train", "--resume", str(run), "--fabric", "serial", "--epochs", "5"])
    assert done.code == 0, done.text
    assert [line["epoch"] for line in RunDirectory(run).metrics()] == [1, 2, 3, 4, 5]


def change_line(**fields):
    return lambda line: line | fields


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (change_line(epoch=1), "it is of epoch 1, expected 2"),
        (change_line(epoch="2"), "epoch is '2', expected a whole number from 1"),
        (change_line(epoch=True), "epoch is True"),
        (change_line(test_error_percent=None), "test_error_percent is None, expected a finite number from 0"),
        (change_line(train_loss=float("nan")), "NaN is no number that JSON knows"),
        (change_line(test_loss=10**400), "test_loss is 1000000000"),
        (change_line(similarity=["x"]), "similarity is ['x'], expected a list of a finite number, or null"),
        (change_line(wall=3), "wall is 3, expected an object"),
        (change_line(wall={"train_s": "1", "test_s": 1}), "train_s is '1'"),
        (lambda line: {key: line[key] for key in line if key != "wall"}, "it lacks wall"),
        (lambda line: [line], "an object is expected, not ["),
    ],
)
def test_a_forged_line_of_metrics_is_named(run, change, said):
    first, second, *_ = (run / "metrics.jsonl").read_bytes().splitlines(keepends=True)
    forged = json.dumps(change(json.loads(second))).encode() + b"\n"
    assert len(parse_metrics(first + second + b'{"half')) == 2
    with pytest.raises(ValueError, match=r"^line 2 is damaged: ") as caught:
        parse_metrics(first + forged)
    assert said in str(caught.value)


# --- forged fields of what vouches for itself


def forge(run, **fields):
    """Change the newest checkpoint's progress, with a sidecar that vouches for it."""
    sidecar = newest(run).with_suffix(".json")
    about = json.loads(sidecar.read_text())
    about["progress"] |= fields
    del about["sidecar_sha256"]
    about["sidecar_sha256"] = hashlib.sha256(json.dumps(about, sort_keys=True).encode()).hexdigest()
    sidecar.write_text(json.dumps(about))


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"metrics_bytes": "all"}, "metrics_bytes is 'all', expected a whole number"),
        ({"loss_sum": [1]}, "loss_sum is [1], expected a finite number from 0"),
        ({"best_epoch": -1}, "best_epoch is -1"),
        ({"best_epoch": 7}, "no run can be as far"),
        ({"epoch": 3, "best_epoch": 1}, "by what it holds: it was renamed"),
        ({"step_in_epoch": 1, "seen": 5}, "has come to step 8, by 4 epochs and 1 step; an epoch has 2 steps"),
        ({"seen": 10**30}, "seen is 1000000000"),
        ({"surprise": 1}, "'surprise' is unknown"),
        ({"metrics_bytes": 5}, "hold 0 epochs up to its newest checkpoint, which has finished 4"),
    ],
)
def test_forged_progress_is_refused_with_its_field(run, others, fields, said):
    forge(run, **fields)
    assert said in resumed(run)


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("seed = 0x" + "f" * 5000, "seed is an integer of thousands of digits"),
        ("limit_train = " + "[" * 5000 + "]" * 5000, "can't be understood"),
        ('dataset = "images:\\u0000"', "there is no folder"),
    ],
)
def test_odd_values_in_a_configuration_are_refused(run, others, line, said):
    path = run / "config.toml"
    name = line.partition(" ")[0]
    kept = [old for old in path.read_text().splitlines() if not old.startswith(f"{name} ")]
    path.write_text("\n".join([*kept, line, ""]))
    assert said in resumed(run)


@pytest.mark.parametrize("value", [3, ["a"], {"a": 1}, "x" * 5000, "a\0b"])
def test_odd_places_of_data_in_the_environment_are_not_followed(run, value):
    path = run / "environment.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"data_dir": value}))
    done = invoke(["evaluate", str(run)])
    assert done.code == 0, done.text


@pytest.mark.parametrize("data", [b"[" * 100_000 + b"]" * 100_000, b'{"a": ' * 50_000, b"NaN", b"1" * 5000, b"\xff"])
def test_json_that_no_program_here_writes_is_an_error_of_values(data):
    with pytest.raises(ValueError, match=r"nested|NaN|limit|utf-8|codec"):
        parse_json(data)


# --- file systems that lack a call


@pytest.mark.parametrize("number", [errno.EINVAL, errno.ENOTSUP, errno.ENOSYS])
def test_a_file_system_without_fsync_of_folders_keeps_files(tmp_path, monkeypatch, number):
    def no_sync(descriptor):
        if os.path.isdir(f"/proc/self/fd/{descriptor}"):
            raise OSError(number, os.strerror(number))

    monkeypatch.setattr(os, "fsync", no_sync)
    write_whole(tmp_path / "file", b"data")
    assert (tmp_path / "file").read_bytes() == b"data"


def test_a_file_system_without_any_fsync_keeps_lines(tmp_path, monkeypatch):
    def no_sync(descriptor):
        raise OSError(errno.ENOSYS, os.strerror(errno.ENOSYS))

    monkeypatch.setattr(os, "fsync", no_sync)
    assert append_whole(tmp_path / "file", b"line\n", durable=True) == 5


def test_a_disk_that_fails_is_still_said(tmp_path, monkeypatch):
    def broken(descriptor):
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr(os, "fsync", broken)
    with pytest.raises(OSError, match="Input/output"):
        write_whole(tmp_path / "file", b"data")


@pytest.mark.parametrize("number", [errno.ENOLCK, errno.ENOTSUP, errno.ENOSYS])
def test_a_file_system_without_locks_is_warned_of_and_trained_on(run, monkeypatch, number):
    def no_lock(descriptor, operation):
        raise OSError(number, os.strerror(number))

    with monkeypatch.context() as patch:
        patch.setattr(fcntl, "flock", no_lock)
        done = invoke(["train", "--resume", str(run), "--fabric", "serial", "--epochs", "5"])
    assert done.code == 0, done.text
    assert "has no locks" in done.text
    assert "no other process" in done.text


# --- new directories


def test_a_name_that_is_not_utf_8_is_refused_at_once(tmp_path, run):
    odd = os.fsdecode(os.fsencode(tmp_path) + b"/r\xff")
    done = invoke(["train", "--dataset", "builtin", *SMALL, "--run-dir", odd])
    assert (done.code, os.listdir(tmp_path)) == (1, ["run"])
    assert "r\\xff is not named in UTF-8" in done.text
    os.rename(run, odd)
    listed = invoke(["runs", str(tmp_path), "--json"])
    assert listed.code == 0, listed.text
    assert json.loads(listed.text)["runs"][0]["state"] == "unreadable"
    for command in (["evaluate"], ["report"], ["analyze", "similarity"], ["train", "--resume"]):
        done = invoke([*command, odd])
        assert done.code == 1
        assert "Rename it" in done.text


def test_a_directory_whose_making_fails_leaves_nothing_above_it_or_in_it(tmp_path, monkeypatch):
    config = RunDirectory(Path("/nowhere"))

    def full(self, config):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(RunDirectory, "write_config", full)
    (tmp_path / "empty").mkdir()
    for path in (tmp_path / "a" / "b" / "run", tmp_path / "empty"):
        with pytest.raises(RunDirectoryError, match="No space left"):
            RunDirectory.create(path, config, None)
    assert [str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*")] == ["empty"]


def test_checkpoints_without_their_run_are_not_mixed_with_a_new_one(run):
    for path in run.iterdir():
        if path.name != "checkpoints":
            path.unlink()
    done = invoke(["train", "--dataset", "builtin", *SMALL, "--run-dir", str(run)])
    assert done.code == 1
    assert "it has checkpoints" in done.text


# --- files in shared memory


def test_a_process_whose_mapped_file_is_cut_short_ends_with_a_sentence(tmp_path):
    program = (
        "import os, sys\n"
        "from rapa_dist.fabric.chip import Chip\n"
        "from rapa_dist.machine import Machine\n"
        "chip = Chip(Machine.build(channels=(3,), tiles=(2,)), 100_000)\n"
        "os.truncate(chip.scratch.path / sys.argv[1], 0)\n"
        "chip.arena.rows(0, 10, 10)[:] = 1\n"
        "chip.cells[1].words[0]\n"
    )
    for name in ("arena", "cells-1"):
        command = [sys.executable, "-c", program, name]
        around = os.environ | {"RAPA_DIST_SHM": str(tmp_path)}
        done = subprocess.run(command, capture_output=True, text=True, timeout=60, env=around, check=False)
        assert done.returncode == 1, done.stderr
        assert f"{name} in shared memory was cut short by another program: it has 0 of" in done.stderr
        assert len(done.stderr.splitlines()) == 1
        assert not list(tmp_path.iterdir())


def test_a_tile_that_died_of_a_file_cut_short_is_not_waited_for():
    chip = Chip(MACHINE, FLOATS)
    try:
        ring(chip, [(0, Ring(1, Cycle.FORWARD, 1, 0, 1024))])
        os.truncate(chip.scratch.path / "board", 100)
        with pytest.raises(ClusterError, match=r"board in shared memory was cut short.*100 of 4,096 bytes"):
            chip.site(0).map_board()
        os.truncate(chip.scratch.path / "arena", 5000)  # nobody touches the rest here
        os.truncate(chip.scratch.path / "board", 4096)
        with pytest.raises(ClusterError, match="arena in shared memory was cut short"):
            chip.wait(1)
    finally:
        chip.close()


def test_files_are_what_they_are_called():
    kinds = {files.kind_of(os.lstat(path).st_mode) for path in ("/", "/dev/null", __file__)}
    assert kinds == {"a folder", "a device", "a file"}
