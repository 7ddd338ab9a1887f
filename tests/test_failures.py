"""Bad moments: tiles that die or hang, disks that are full, signals; without Ray where it can be."""

import json
import os
import re
import signal
import stat
import subprocess
import sys
import threading
import time
from contextlib import suppress
from pathlib import Path

import pytest
from factories import floats_of, tile_array
from rings import ring

from rapa_dist import files
from rapa_dist.cells import Word
from rapa_dist.coordinator import checkpoint as checkpoints
from rapa_dist.coordinator import saving
from rapa_dist.coordinator.recoveries import Recoveries
from rapa_dist.coordinator.run_directory import RunDirectory
from rapa_dist.coordinator.saving import Saver
from rapa_dist.errors import CheckpointError, ClusterError
from rapa_dist.fabric.chip import Chip, cells_name
from rapa_dist.fabric.doorbell import Cycle, Ring, Status
from rapa_dist.fabric.lookout import Lookout, Restart, work_s_of
from rapa_dist.fabric.processes import end, look
from rapa_dist.fabric.registry import registrations
from rapa_dist.fabric.scratch import Scratch, check_shared_memory, map_existing, shared_memory_root, sweep
from rapa_dist.machine import Machine

MACHINE = Machine((tile_array(n_tiles=2),))
FLOATS = floats_of(MACHINE)
SLEEPS = (
    "import sys, time, mmap\nfile = open(sys.argv[1], 'r+b')\nmapped = mmap.mmap(file.fileno(), 0)\n"
    "print(flush=True)\ntime.sleep(60)"
)
LOOPS = SLEEPS.replace("time.sleep(60)", "while True: pass")


# --- tiles that die or hang


@pytest.fixture
def chip():
    made = Chip(MACHINE, FLOATS)
    yield made
    made.close()


@pytest.fixture
def process(chip):
    """Start a process with the cells of tile 0 mapped, as that tile's."""
    started = []

    def start(program: str) -> subprocess.Popen:
        file = chip.scratch.path / cells_name(0)
        command = [sys.executable, "-c", program, str(file)]
        started.append(subprocess.Popen(command, stdout=subprocess.PIPE))
        started[-1].stdout.readline()
        words = chip.cells[0].words
        words[Word.PID], words[Word.STARTS] = started[-1].pid, words[Word.STARTS] + 1
        return started[-1]

    yield start
    for one in started:
        one.kill()
        one.communicate()


def lookout_of(chip, told, **options) -> Lookout:
    return Lookout(chip, {0: None, 1: None}, told.append, **options)


def be_silent(lookout, looks: int, tiles=(0,), pause_s: float = 0.01) -> None:
    for number in range(1, looks + 1):
        time.sleep(pause_s)
        lookout.silence(list(tiles), 0.5 * number)


@pytest.mark.parametrize("stopped", [True, False], ids=["stopped", "asleep"])
def test_a_process_that_does_nothing_is_killed_after_its_allowance_and_not_before(chip, process, stopped):
    tile, told = process(SLEEPS), []
    if stopped:
        tile.send_signal(signal.SIGSTOP)
    lookout = lookout_of(chip, told)
    be_silent(lookout, 3)
    assert tile.poll() is None
    be_silent(lookout, 4)
    assert tile.wait(timeout=10) == -signal.SIGKILL
    assert chip.cells[0].words[Word.HANGS] == 1
    process(SLEEPS)
    lookout.hello(0)
    lookout.calm()
    assert [(restart.tile, restart.hung) for restart in told] == [("L0/T000", True)]


def test_a_process_that_loops_is_killed_and_one_that_gets_on_is_not(chip, process):
    tile, words = process(LOOPS), chip.cells[0].words
    lookout = lookout_of(chip, [], hang_s=0.05)
    for number in range(1, 30):
        time.sleep(0.05)
        words[Word.ROWS_FORWARD] += 1
        lookout.silence([0], 0.5 * number)
    assert tile.poll() is None
    deadline = time.monotonic() + 30
    while tile.poll() is None and time.monotonic() < deadline:
        be_silent(lookout, 4, pause_s=0.1)
    assert tile.wait(timeout=10) == -signal.SIGKILL


def test_a_tile_has_time_in_proportion_to_what_it_owes(chip):
    lookout, layer = lookout_of(chip, []), MACHINE.arrays[0]
    nothing = lookout.allowance_s(0)
    ring(chip, [(0, Ring(1, Cycle.FORWARD, 16, 0, 1024, hold_ns=3_000_000_000))])
    assert lookout.allowance_s(0) == pytest.approx(nothing + 3, abs=0.01)
    assert lookout.allowance_s(1) == nothing
    both = Ring(1, Cycle.INPUT_ERROR | Cycle.UPDATE, 10**6, 0, 0)
    assert work_s_of(both, layer) == pytest.approx(2 * work_s_of(both._replace(cycle=Cycle.FORWARD), layer))


def test_nobody_but_the_tiles_own_process_is_killed(chip, process):
    stranger = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
    try:
        file = chip.scratch.path / cells_name(0)
        assert not end(stranger.pid, file)
        assert not end(0, file)
        assert not end(2**22 + 1, file)
        assert not end(process(SLEEPS).pid, chip.scratch.path / cells_name(1))
        assert stranger.poll() is None
        assert look(stranger.pid) is not None
    finally:
        stranger.kill()
        stranger.wait()
    assert look(stranger.pid) is None


def test_a_tile_is_known_by_its_cells_behind_a_link_too(tmp_path, monkeypatch):
    (tmp_path / "place").mkdir()
    (tmp_path / "link").symlink_to("place")
    monkeypatch.setenv("RAPA_DIST_SHM", str(tmp_path / "link"))
    scratch = Scratch()
    scratch.map_file(cells_name(0), 4096)
    file = scratch.path / cells_name(0)
    tile = subprocess.Popen([sys.executable, "-c", SLEEPS, str(file)], stdout=subprocess.PIPE)
    try:
        tile.stdout.readline()
        assert end(tile.pid, file)
        assert tile.wait(timeout=10) == -signal.SIGKILL
    finally:
        tile.kill()
        tile.communicate()
        scratch.remove()


def test_a_tile_that_dies_again_and_again_is_given_up(chip):
    lookout, words = lookout_of(chip, [], restarts=3), chip.cells[0].words
    words[Word.STARTS] = 1
    lookout.hello(0)
    for _ in range(3):
        words[Word.STARTS] += 1
        lookout.hello(0)
    words[Word.ANSWERED] += 1  # it gets on, so it is counted anew
    for _ in range(3):
        words[Word.STARTS] += 1
        lookout.hello(0)
    words[Word.STARTS] += 1
    with pytest.raises(ClusterError, match=r"L0/T000 does not get on: .* 4 times .*--max-restarts 3"):
        lookout.hello(0)


def test_a_wait_tells_of_a_restart_when_it_is_over(chip):
    from rapa_dist.fabric.doorbell import TileDoorbell

    told, words = [], chip.cells[0].words
    lookout_of(chip, told)
    words[Word.STARTS] = 2
    bell = TileDoorbell(chip.site(0).directory, 0, chip.site(0).token)
    ring(chip, [(0, Ring(1, Cycle.EMPTY, 0, 0, 0))])
    bell.answer(0, Status.HELLO)
    heard, hello = threading.Event(), chip.on_hello

    def hear(tile):
        hello(tile)
        heard.set()

    chip.on_hello = hear

    def answer():
        heard.wait()  # the wait has begun
        time.sleep(0.2)
        assert not told
        words[Word.ANSWERED] = 1
        bell.answer(1)

    thread = threading.Thread(target=answer)
    thread.start()
    chip.wait()
    thread.join()
    assert [(restart.tile, restart.hung) for restart in told] == [("L0/T000", False)]
    assert told[0].seconds >= 0.2
    bell._socket.close()


def test_recoveries_are_in_the_log_and_in_the_next_line_of_metrics(tmp_path, capsys):
    recoveries = Recoveries(RunDirectory(tmp_path))
    recoveries.step = 7
    recoveries.restarted(Restart("L0/T003", True, 2.5))
    assert re.search(r"L0/T003 hung, was killed and is back.*\(2\.5 s, in step 8\)", (tmp_path / "log").read_text())
    (told,) = recoveries.take()
    assert (told["kind"], told["what"], told["step"], told["seconds"]) == ("hung tile", "L0/T003", 7, 2.5)
    assert recoveries.take() == []


def test_a_stopped_tile_of_a_coordinator_that_was_killed_is_ended_by_the_next_run(chip, process):
    tile = process(SLEEPS)
    tile.send_signal(signal.SIGSTOP)
    sweep(chip.scratch.root)
    assert tile.poll() is None  # its coordinator is there
    os.close(chip.scratch._lock)  # as when it is killed
    sweep(chip.scratch.root)
    assert tile.wait(timeout=10) == -signal.SIGKILL
    assert not chip.scratch.path.exists()


def kill_whenever_it_comes_up(cells: Path, process: subprocess.Popen) -> None:
    """Kill a tile's process, and each that takes its place, until a run has ended."""
    words = memoryview(map_existing(cells, 4096))[: 8 * (Word.PID + 1)].cast("Q")
    killed = 0
    while process.poll() is None:
        if words[Word.PID] != killed:
            killed = words[Word.PID]
            with suppress(ProcessLookupError):
                os.kill(killed, signal.SIGKILL)
        time.sleep(0.001)


@pytest.mark.ray
@pytest.mark.timeout(200)
def test_a_run_whose_tile_dies_whenever_it_comes_up_ends_and_can_be_resumed(tmp_path):
    directory, rapa_dist = tmp_path / "run", [sys.executable, "-m", "rapa_dist"]
    train = ["train", "--dataset", "builtin", "--limit-train", "60", "--limit-test", "20", "--tiles", "1,2,1"]
    train += ["--epochs", "10000", "--max-restarts", "1", "--address", "local", "--run-dir", str(directory)]
    process = subprocess.Popen([*rapa_dist, *train], stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    try:
        deadline = time.monotonic() + 60
        while not (directory / "metrics.jsonl").exists():
            assert process.poll() is None, process.communicate()[1]
            assert time.monotonic() < deadline
            time.sleep(0.02)
        (run,) = registrations(shared_memory_root())
        kill_whenever_it_comes_up(run.folder / cells_name(2), process)
    finally:
        process.kill()
        stderr = process.communicate(timeout=60)[1]
    assert process.returncode == 1, stderr
    assert re.search(r"L1/T001 does not get on: .* replaced \d times .*\(--max-restarts 1\)", stderr), stderr
    assert "Traceback" not in stderr
    assert f"rapa-dist train --resume {directory}" in stderr
    newest = checkpoints.read(checkpoints.latest(directory / "checkpoints"))
    assert newest.progress.epoch >= 1
    resume = ["train", "--resume", str(directory), "--epochs", str(newest.progress.epoch + 1), "--fabric", "serial"]
    resumed = subprocess.run([*rapa_dist, *resume], capture_output=True, text=True, timeout=60, check=False)
    assert resumed.returncode == 0, resumed.stderr


# --- disks that are full


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def full(monkeypatch):
    """Whether the disk is full."""
    state = {"full": True}
    write = os.write

    def nearly(descriptor, data):
        if state["full"]:
            return write(descriptor, data[: len(data) // 2])  # what still fits
        return write(descriptor, data)

    def whole(path, data, then=files.write_whole):
        if state["full"]:
            raise OSError(28, "No space left on device")
        then(path, data)

    monkeypatch.setattr(os, "write", nearly)
    monkeypatch.setattr(files, "write_whole", whole)
    return state


@pytest.fixture
def saver(tmp_path, monkeypatch):
    clock = Clock()
    directory = RunDirectory(tmp_path)
    directory.checkpoint_folder.mkdir()
    monkeypatch.setattr(checkpoints, "write", lambda folder, name, it: files.write_whole(folder / name, it))
    made = Saver(directory, "first", patience_s=100, clock=clock)
    made.time = clock
    return made


def written(run):
    """Return the lines of metrics.jsonl, whatever they hold."""
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def test_what_a_full_disk_does_not_take_is_written_later_in_its_order(saver, tmp_path, full, capsys):
    lines = [{"epoch": 1}, {"epoch": 2}]
    lengths = []
    for number, line in enumerate(lines):
        lengths.append(saver.append(line))
        saver.save(f"save-{number}", b"weights", None)
        assert saver.newest == "first"
        assert not (tmp_path / "metrics.jsonl").read_bytes()  # no half of a line
    full["full"] = False
    saver.retry()  # too early
    assert saver.newest == "first"
    saver.time.now = 20
    saver.retry()
    assert saver.newest == "save-1"
    assert (tmp_path / "checkpoints" / "save-1").read_bytes() == b"weights"
    assert written(tmp_path) == lines
    assert lengths == [13, 26]
    warnings = capsys.readouterr().err
    assert warnings.count("can't be saved") == 1
    assert "is saved again" in warnings


def test_a_run_that_can_not_be_saved_for_long_stops_and_says_how_to_go_on(saver, full):
    saver.append({"epoch": 1})
    saver.save("save-1", b"weights", None)
    for now in (50, 99):
        saver.time.now = now
        saver.retry()
    saver.time.now = 120
    with pytest.raises(CheckpointError, match=r"No space left.* newest checkpoint is first.*--resume"):
        saver.retry()


def test_lines_of_metrics_are_taken_back_whether_they_are_written_or_not(saver, tmp_path, full):
    full["full"] = False
    one, two = saver.append({"epoch": 1}), saver.append({"epoch": 2})
    saver.save("save-2", b"weights", None)
    full["full"] = True
    three = saver.append({"epoch": 3})
    saver.save("save-3", b"weights", None)
    saver.append({"epoch": 4})
    saver.rewind(three)
    assert saver.append({"epoch": 4}) == 4 * one
    saver.rewind(two)
    assert saver.append({"epoch": 30}) == 2 * one + 14
    saver.rewind(one)
    saver.time.now = 99
    saver.retry()
    saver.time.now = 120  # the patience is that of the whole time
    with pytest.raises(CheckpointError, match="No space left"):
        saver.retry()
    full["full"] = False
    assert saver.append({"epoch": 2}) == two
    saver.save("again", b"weights", None)
    assert written(tmp_path) == [{"epoch": 1}, {"epoch": 2}]
    assert saver.newest == "again"


def test_a_line_of_metrics_for_which_there_is_no_room_only_when_it_is_flushed_is_written_once(
    saver, tmp_path, monkeypatch
):
    def no_room(descriptor):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", no_room)
        length = saver.append({"epoch": 1})
        saver.save("save-1", b"weights", None)
        assert not (tmp_path / "metrics.jsonl").read_bytes()
    assert saver.append({"epoch": 2}) == 2 * length
    saver.save("save-2", b"weights", None)
    assert written(tmp_path) == [{"epoch": 1}, {"epoch": 2}]


@pytest.mark.parametrize("asked_at", [0, 30])
def test_whoever_asks_a_run_to_end_that_can_not_be_saved_waits_ten_seconds(saver, full, monkeypatch, asked_at):
    def sleep(seconds):
        saver.time.now += seconds

    monkeypatch.setattr(saving.time, "sleep", sleep)
    saver.append({"epoch": 1})
    saver.save("save-1", b"weights", None)
    with pytest.raises(CheckpointError, match="No space left"):
        saver.settle(lambda: saver.time.now >= asked_at)
    assert asked_at + 10 <= saver.time.now <= asked_at + 12


def test_a_log_on_a_full_disk_tears_no_line(tmp_path, full):
    full["full"] = False
    directory = RunDirectory(tmp_path)
    directory.log("one")
    full["full"] = True
    directory.log("two")
    full["full"] = False
    directory.log("three")
    assert [line.split()[1] for line in (tmp_path / "log").read_text().splitlines()] == ["one", "three"]


def test_shared_memory_that_is_too_small_is_noticed_before_and_when_it_is_taken(small_disk):
    with pytest.raises(ClusterError, match=r"Too little shared memory: the run needs 8 MB .* 4 MB are free"):
        check_shared_memory(8_000_000, small_disk)
    scratch = Scratch(small_disk)
    with pytest.raises(ClusterError, match="Too little shared memory"):
        scratch.map_file("arena", 8_000_000)
    scratch.remove()
    assert not list(small_disk.iterdir())


def fill(path: Path) -> None:
    with path.open("wb") as file, suppress(OSError):
        while True:
            os.write(file.fileno(), b"x" * 4096)


@pytest.mark.slow
@pytest.mark.parametrize("heals", [True, False])
def test_a_run_on_a_disk_that_is_full_goes_on_until_it_can_be_saved_or_stops(small_disk, tmp_path, heals):
    tiny = ["--dataset", "builtin", "--limit-train", "120", "--limit-test", "60", "--tiles", "2,1,1", "--epochs", "3"]
    directory = small_disk / "run"
    command = [sys.executable, "-m", "rapa_dist", "train", *tiny, "--fabric", "serial", "--run-dir", str(directory)]
    process = subprocess.Popen([*command, "--save-patience", "60" if heals else "2"], stderr=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 60
    while not list((directory / "checkpoints").glob("*.json")) and time.monotonic() < deadline:
        time.sleep(0.005)
    filler = small_disk / "filler"
    fill(filler)
    said = []
    while "can't be saved" not in (line := process.stderr.readline()):
        assert line
        said.append(line)
    if heals:
        filler.unlink()
    said.append(process.communicate(timeout=120)[1])
    assert process.returncode == (0 if heals else 1), said
    assert "Traceback" not in "".join(said)
    filler.unlink(missing_ok=True)
    newest = checkpoints.read(checkpoints.latest(directory / "checkpoints"))
    assert [line["epoch"] for line in RunDirectory(directory).metrics()] == list(range(1, newest.progress.epoch + 1))
    if heals:
        assert newest.progress.epoch == 3
    else:
        assert f"--resume {directory}" in "".join(said)


# --- signals


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
def test_signals_of_batch_systems_end_a_command_as_ctrl_c_does(number):
    program = (
        "import os, sys, time, click\nfrom rapa_dist import cli\n"
        "@cli.main.command('wait')\ndef wait():\n"
        f"    os.kill(os.getpid(), {int(number)}); time.sleep(30)\n"
        "cli.CommandLine.get_command = lambda self, ctx, name: wait\n"
        "cli.main(['wait'])\n"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=30, check=False)
    assert done.returncode == 130, done.stderr
    assert "Interrupted." in done.stderr


def test_under_nohup_a_hangup_stops_nothing():
    program = (
        "import os, signal\nfrom rapa_dist.interrupts import asked_to_stop, end_like_ctrl_c\n"
        "end_like_ctrl_c()\n"
        "with asked_to_stop() as stop:\n    os.kill(os.getpid(), signal.SIGHUP); print(stop())\n"
        "    os.kill(os.getpid(), signal.SIGTERM); print(stop())\n"
    )
    command = ["nohup", sys.executable, "-c", program]
    done = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=30, check=False)
    assert done.stdout.split() == ["False", "True"], done.stderr


def test_a_signal_that_waited_is_heard_although_ctrl_c_is_ignored():
    program = (
        "import os, signal\nfrom rapa_dist.interrupts import end_like_ctrl_c, uninterrupted\n"
        "signal.signal(signal.SIGINT, signal.SIG_IGN)\nend_like_ctrl_c()\n"
        "try:\n    with uninterrupted():\n        os.kill(os.getpid(), signal.SIGTERM)\n        print('clean')\n"
        "except KeyboardInterrupt:\n    print('heard')\n"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=30, check=False)
    assert done.stdout.split() == ["clean", "heard"], done.stderr


# --- who may look in


def test_everything_that_a_chip_puts_on_a_node_is_for_its_owner_alone(chip):
    folder = chip.scratch.path
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700
    assert {stat.S_IMODE(path.stat().st_mode) for path in folder.iterdir()} == {0o600}
    assert folder.stat().st_uid == os.getuid()


def test_no_file_is_unpickled_by_the_package():
    """(torchvision unpickles CIFAR's archives, after it has held them against their published checksums.)"""
    package = Path(checkpoints.__file__).parent.parent
    source = "".join(path.read_text() for path in package.rglob("*.py"))
    reads = r"pickle\.loads?\(|Unpickler\(|allow_pickle=True|[^`]torch\.load\(|marshal\.load|shelve\.open"
    assert not re.findall(reads, source)
    assert re.search("allow_pickle=False", source)
