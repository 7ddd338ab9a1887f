"""Showing must not stop working: terminals that hang up, pipes that close, disks that are full, signs that are missing.

A run has real ones of these behind stdout and stderr. To be cheap, all of them are forked from one process that has
imported everything once.
"""

import errno
import json
import os
import pty
import shutil
import signal
import subprocess
import sys
import threading
import time
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import pytest
from click.testing import CliRunner
from test_runs import descendants

from rapa_dist.cli import main
from rapa_dist.cli.output import emit
from rapa_dist.cli.types import patience
from rapa_dist.config import TrainConfig, resolve
from rapa_dist.coordinator import checkpoint as checkpoints
from rapa_dist.coordinator.display import RunDisplay
from rapa_dist.coordinator.run import resume_run, start_run
from rapa_dist.coordinator.run_directory import RunDirectory
from rapa_dist.coordinator.saving import Saver
from rapa_dist.errors import CheckpointError
from rapa_dist.interrupts import NOTICES, asked_to_stop

TINY = ["--dataset", "builtin", "--limit-train", "20", "--limit-test", "10", "--tiles", "2,1,1", "--channels", "4,4,4"]
TRAIN = ["train", *TINY, "--fabric", "serial"]
_TIMEOUT_S = 60
_FORKS = """
import io, json, os, signal, sys, traceback
import rapa_dist.coordinator.run, rapa_dist.cli.train
from rapa_dist.cli import main, standard_streams

def play(job):
    os.setsid()
    for number, target in enumerate(job["streams"]):
        os.close(number)
        if target is not None:
            wanted = os.O_WRONLY if number else os.O_RDONLY
            opened = os.open(target, wanted | os.O_CREAT, 0o600)  # a terminal becomes the controlling one
            os.set_inheritable(opened, True)
            if opened != number:  # a lower one is closed
                os.dup2(opened, number)
                os.close(opened)
    for number, name in ((1, "stdout"), (2, "stderr")):
        closed = job["streams"][number] is None
        text = None if closed else io.TextIOWrapper(io.FileIO(number, "w", closefd=False), encoding=job["encoding"])
        setattr(sys, name, text)
        setattr(sys, f"__{name}__", text)
    for number in job["ignored"]:
        signal.signal(number, signal.SIG_IGN)
    standard_streams.PATIENCE_MS = 100
    try:
        main(job["arguments"])
    except SystemExit as end:
        code = end.code
    for text in (sys.stdout, sys.stderr):
        text.flush()
    os._exit(code)

for line in sys.stdin:
    child = os.fork()
    if child == 0:
        try:
            play(json.loads(line))
        except BaseException:
            traceback.print_exc()
        os._exit(99)
    print(child, flush=True)
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
"""


_MAIN = "from rapa_dist.cli import main; main()"


class Run:
    """A command line under way."""

    def __init__(self, forks: subprocess.Popen, directory: Path, job: dict) -> None:
        self._forks, self.directory = forks, directory
        forks.stdin.write(json.dumps(job) + "\n")
        forks.stdin.flush()
        self.pid = int(forks.stdout.readline())
        self.code: int | None = None

    def wait(self) -> int:
        if self.code is None:
            self.code = int(self._forks.stdout.readline())
        return self.code

    def until(self, condition) -> None:
        deadline = time.monotonic() + _TIMEOUT_S
        while not condition():
            assert time.monotonic() < deadline
            time.sleep(0.005)

    def until_epoch(self, number: int) -> None:
        self.until(lambda: len(epochs_in_metrics(self.directory)) >= number)

    @property
    def log(self) -> str:
        return (self.directory / "log").read_text()


@pytest.fixture(scope="module")
def forks():
    alone = dict.fromkeys(("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS"), "1")
    process = subprocess.Popen(
        [sys.executable, "-c", _FORKS], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=os.environ | alone
    )
    yield process
    process.stdin.close()
    process.wait(timeout=_TIMEOUT_S)
    process.stdout.close()


@pytest.fixture
def start(forks, tmp_path):
    """A function that starts a command line in a session of its own, its streams going to these files."""

    def start(*arguments, out="out", err="err", encoding="utf-8", ignored=()):
        streams = [None if name is None else str(tmp_path / name) for name in ("/dev/null", out, err)]
        job = {"arguments": [*map(str, arguments)], "streams": streams, "encoding": encoding, "ignored": list(ignored)}
        runs.append(Run(forks, tmp_path / "run", job))
        return runs[-1]

    runs: list[Run] = []
    yield start
    for run in runs:
        if run.code is None:
            with suppress(ProcessLookupError):
                os.kill(run.pid, signal.SIGKILL)
            run.wait()


@pytest.fixture
def train(start, tmp_path):
    def train(*options, **streams):
        return start(*TRAIN, "--run-dir", tmp_path / "run", *options, **streams)

    return train


def epochs_in_metrics(directory: Path) -> list[int]:
    file = directory / "metrics.jsonl"
    return [json.loads(line)["epoch"] for line in file.read_text().splitlines()] if file.exists() else []


def assert_all_in_a_checkpoint(directory: Path, epochs: int | None = None) -> None:
    """Every epoch in metrics.jsonl is in the newest checkpoint, and no other."""
    newest = checkpoints.read(checkpoints.latest(directory / "checkpoints")).progress
    found = epochs_in_metrics(directory)
    assert found == list(range(1, newest.epoch + 1))
    assert newest.metrics_bytes == (directory / "metrics.jsonl").stat().st_size
    assert epochs is None or newest.epoch == epochs


# --- what is behind the streams


@dataclass
class Behind:
    """Something to print to that nobody will see."""

    target: str | None
    go_away: object = lambda: None


@pytest.fixture
def behind(tmp_path):
    opened: list[int] = []

    def pipe() -> int:
        os.mkfifo(tmp_path / "pipe")
        opened.append(os.open(tmp_path / "pipe", os.O_RDONLY | os.O_NONBLOCK))
        return opened[-1]

    def terminal() -> tuple[int, str]:
        master, slave = pty.openpty()
        name = os.ttyname(slave)
        os.close(slave)
        opened.append(master)
        return master, name

    def leave(number: int) -> None:
        opened.remove(number)
        os.close(number)

    def make(kind: str) -> Behind:
        if kind == "closed":
            return Behind(None)
        if kind == "full disk":
            return Behind("/dev/full")
        if kind == "closed pipe":
            reader = pipe()
            return Behind("pipe", lambda: leave(reader))
        if kind == "unread pipe":
            reader = pipe()
            writer = os.open(tmp_path / "pipe", os.O_WRONLY | os.O_NONBLOCK)
            opened.append(writer)
            for size in (4096, 1):
                while True:
                    try:
                        os.write(writer, b"x" * size)
                    except BlockingIOError:
                        break
            return Behind("pipe")
        master, name = terminal()
        if kind == "closed terminal":
            return Behind(name, lambda: leave(master))
        assert kind == "unread terminal"
        return Behind(name)

    yield make
    for number in opened:
        os.close(number)


WORDLESS = ["closed", "full disk", "closed pipe", "unread pipe", "closed terminal", "unread terminal"]


@pytest.mark.parametrize("kind", WORDLESS)
def test_a_run_whose_words_nobody_can_see_goes_on_to_its_end(train, behind, kind):
    where = behind(kind)
    run = train("--epochs", 20, "--live", "--json", err=where.target, ignored=[signal.SIGHUP])  # as under nohup
    run.until_epoch(1)
    where.go_away()
    assert run.wait() == 0
    assert json.loads((run.directory.parent / "out").read_text())["epochs"] == 20
    assert_all_in_a_checkpoint(run.directory, 20)
    assert "20 training and 10 test images" in run.log
    assert run.log.count(" done: ") == 20


@pytest.mark.parametrize("kind", ["closed", "full disk", "closed pipe", "closed terminal"])
@pytest.mark.parametrize("as_json", [False, True])
def test_a_run_whose_result_can_not_be_shown_says_where_it_is(train, behind, kind, as_json):
    where = behind(kind)
    run = train("--epochs", 1, *(["--json"] if as_json else []), out=where.target, ignored=[signal.SIGHUP])
    run.until(lambda: (run.directory / "config.toml").exists())
    where.go_away()
    assert run.wait() == 1
    said = (run.directory.parent / "err").read_text()
    assert said.count("Error: ") == 1
    assert f"stdout can't be written to: {WHY[kind]}. Nothing is lost: the run is in {run.directory}." in said
    assert "fault" not in said
    assert "Traceback" not in said
    assert_all_in_a_checkpoint(run.directory, 1)


WHY = {
    "closed": "it is closed",
    "full disk": "No space left on device",
    "closed pipe": "nobody reads it any more",
    "closed terminal": "Input/output error",
}


@pytest.mark.parametrize("kind", ["closed", "full disk", "closed pipe"])
def test_a_run_is_saved_although_neither_stream_is_there(train, behind, kind):
    where = behind(kind)
    run = train("--epochs", 20, out=where.target, err=where.target)
    run.until_epoch(1)
    where.go_away()
    assert run.wait() == 1
    assert_all_in_a_checkpoint(run.directory, 20)


def test_a_disk_that_fills_up_under_run_and_streams_leaves_a_whole_run(start, small_disk):
    directory, filler = small_disk / "run", small_disk / "filler"
    options = ["--epochs", 10000, "--save-patience", 0.2, "--run-dir", directory]
    run = start(*TRAIN, *options, out=small_disk / "out", err=small_disk / "err")
    run.until(lambda: epochs_in_metrics(directory))
    with suppress(OSError), filler.open("wb", buffering=0) as file:
        while True:
            file.write(bytes(1 << 12))
    assert run.wait() == 1
    filler.unlink()
    assert_all_in_a_checkpoint(directory)


@pytest.mark.parametrize("kind", ["closed", "full disk", "closed pipe"])
def test_an_interrupted_run_without_stdout_has_the_exit_code_of_an_interrupted_run(train, behind, kind):
    where = behind(kind)
    run = train("--epochs", 10000, out=where.target, err=where.target)
    run.until_epoch(1)
    where.go_away()
    os.kill(run.pid, signal.SIGTERM)
    assert run.wait() == 130
    assert f"--resume {run.directory}" in run.log
    assert_all_in_a_checkpoint(run.directory)


def test_a_terminal_that_is_closed_has_the_run_save_and_end(train, behind):
    """Its kernel sends SIGHUP, and the shell in it sends another one to its jobs."""
    where = behind("closed terminal")
    run = train("--epochs", 10000, "--live", err=where.target)
    run.until_epoch(1)
    where.go_away()
    os.kill(run.pid, signal.SIGHUP)
    assert run.wait() == 130
    assert f"--resume {run.directory}" in run.log
    assert_all_in_a_checkpoint(run.directory)


@pytest.mark.parametrize("kind", ["closed", "full disk", "closed pipe"])
def test_a_run_that_diverges_ends_as_ever_where_nobody_can_be_told(train, behind, kind):
    where = behind(kind)
    options = ["--lr", "1e38", "--weight-decay", 0, "--warmup-epochs", 0, "--epochs", 3]
    run = train(*options, out=where.target, err=where.target)
    run.until(lambda: (run.directory / "config.toml").exists())
    where.go_away()
    assert run.wait() == 1
    assert "stopped: DivergedError" in run.log
    newest = checkpoints.read(checkpoints.latest(run.directory / "checkpoints"))
    assert len(epochs_in_metrics(run.directory)) == newest.progress.epoch


@pytest.mark.parametrize(
    "command", [["plan"], ["plan", "--json"], ["--help"], ["train", *TINY, "--dry-run"], ["evaluate"]]
)
@pytest.mark.parametrize("kind", ["closed", "full disk"])
def test_every_command_says_in_a_sentence_that_its_data_was_not_taken(start, behind, trained, tmp_path, command, kind):
    command = [*command, trained] if command == ["evaluate"] else command
    assert start(*command, out=behind(kind).target).wait() == 1
    said = (tmp_path / "err").read_text()
    assert said.splitlines()[-1] == f"Error: stdout can't be written to: {WHY[kind]}. What it was to show is lost."
    assert "Traceback" not in said


@pytest.mark.parametrize("command", [["plan"], ["nonsense"], ["evaluate", "/nowhere"]])
@pytest.mark.parametrize("kind", ["closed", "full disk", "unread terminal"])
def test_every_command_has_its_exit_code_where_it_can_not_be_heard(start, behind, command, kind):
    assert start(*command, err=behind(kind).target).wait() == {"plan": 0, "nonsense": 2, "evaluate": 1}[command[0]]


def test_what_is_drawn_is_drawn_although_its_numbers_can_not_be_shown(start, trained, tmp_path):
    pytest.importorskip("matplotlib")
    plot = tmp_path / "plot.svg"
    assert start("analyze", "voting", trained, "--votes", 1, "--plot", plot, out="/dev/full").wait() == 1
    assert plot.exists()


@pytest.mark.parametrize("columns", ["0", "", "1"])
def test_a_width_that_is_no_width_hides_nothing(columns):
    environment = os.environ | {"COLUMNS": columns}
    program = "from rapa_dist.console import stdout; stdout.print('words', markup=False)"
    command = [sys.executable, "-c", program]
    assert subprocess.run(command, env=environment, capture_output=True, check=True).stdout == b"words\n"


def test_files_and_sockets_do_not_land_where_words_go():
    program = (
        "import os, sys\nfrom rapa_dist.cli import standard_streams\nfor number in range(3): os.close(number)\n"
        "standard_streams.prepare()\nsys.exit(min(os.open('/dev/null', os.O_RDONLY), *os.pipe()))\n"
    )
    assert subprocess.run([sys.executable, "-c", program], check=False).returncode == 3


# --- signs that an encoding lacks


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> Path:
    directory = tmp_path_factory.mktemp("showing") / "trained"
    start_run(resolved(epochs=1), fabric="serial", address=None, data_dir=None, run_dir=directory)
    return directory


def resolved(epochs: int) -> TrainConfig:
    sizes = {"tiles": (2, 1, 1), "channels": (4, 4, 4), "limit_train": 20, "limit_test": 10, "batch_size": 10}
    rest = {"pooling": "max", "lr_decay_every": 25, "warmup_epochs": 1, "weight_decay": 1e-4, "augment": True}
    return resolve(**sizes, **rest, dataset="builtin", epochs=epochs, seed=0)


@pytest.mark.parametrize(("encoding", "sign"), [("ascii", b"lambda"), ("latin-1", b"lambda"), ("utf-8", "λ".encode())])
def test_a_run_whose_streams_lack_signs_spells_them_out(train, tmp_path, encoding, sign):
    run = train("--epochs", 1, encoding=encoding)
    assert run.wait() == 0, (tmp_path / "err").read_bytes()
    assert b"epoch   1/1  " + sign + b" 0.001" in (tmp_path / "err").read_bytes()
    assert b"test error" in (tmp_path / "out").read_bytes()


def test_what_is_no_text_is_printed_as_it_was_typed(start, tmp_path):
    assert start("plan", "--network", os.fsdecode(b"\xff\xc3\xbc"), "--json").wait() == 2
    assert "not “".encode() + b"\xff\xc3\xbc" in (tmp_path / "err").read_bytes()
    assert "\\u201c\\udcff\\u00fc\\u201d" in (tmp_path / "out").read_text("ascii")


def test_json_is_ascii(capsys):
    emit({"θ": "λ \udcff", "path": Path("ü")})
    printed = capsys.readouterr().out
    assert printed.isascii()
    assert json.loads(printed) == {"θ": "λ \udcff", "path": "ü"}


# --- what is saved before it is told


def test_an_epoch_is_in_metrics_and_in_a_checkpoint_before_it_is_told(tmp_path, monkeypatch):
    told = []

    def look(self, metrics):
        assert_all_in_a_checkpoint(tmp_path / "run", metrics["epoch"])
        told.append(metrics["epoch"])

    monkeypatch.setattr(RunDisplay, "finished_epoch", look)
    start_run(resolved(epochs=2), fabric="serial", address=None, data_dir=None, run_dir=tmp_path / "run")
    assert told == [1, 2]


def test_signals_between_a_line_of_metrics_and_its_checkpoint_wait(tmp_path, monkeypatch):
    """Also those that don't wait for the step: three of them here, some time apart."""
    write = checkpoints.write

    def disturbed(folder, name, checkpoint):
        if checkpoint.progress.epoch == 1:
            assert len(epochs_in_metrics(tmp_path / "run")) == 1
            for _ in range(3):
                signal.raise_signal(signal.SIGTERM)
                time.sleep(0.11)
        return write(folder, name, checkpoint)

    monkeypatch.setattr(checkpoints, "write", disturbed)
    result = start_run(resolved(epochs=9), fabric="serial", address=None, data_dir=None, run_dir=tmp_path / "run")
    assert not result.finished
    assert_all_in_a_checkpoint(tmp_path / "run", 1)


def test_an_epoch_whose_checkpoint_finds_no_room_is_in_neither_until_both_are(tmp_path, monkeypatch):
    directory = RunDirectory(tmp_path)
    directory.checkpoint_folder.mkdir()
    saver = Saver(directory, "first", patience_s=0)

    def full(folder, name, checkpoint):
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(checkpoints, "write", full)
        for epoch in (1, 2):
            saver.append({"epoch": epoch})
            with suppress(CheckpointError):
                saver.save(f"save-{epoch}", None, None)
            assert epochs_in_metrics(tmp_path) == []
        with pytest.raises(CheckpointError, match="for too long: No space"):
            saver.settle(lambda: True)
        assert epochs_in_metrics(tmp_path) == []
    monkeypatch.setattr(checkpoints, "write", lambda folder, name, checkpoint: None)
    saver.save("save-2", None, None)
    assert epochs_in_metrics(tmp_path) == [1, 2]


def test_a_run_killed_between_a_line_of_metrics_and_its_checkpoint_trains_the_epoch_again(tmp_path, trained):
    directory = tmp_path / "run"
    shutil.copytree(trained, directory)
    with (directory / "metrics.jsonl").open("a") as file:
        file.write('{"epoch": 2}\n')
    resume_run(directory, epochs=2, fabric="serial", address=None, data_dir=None)
    assert_all_in_a_checkpoint(directory, 2)


# --- notices, which batch systems send before they kill


@pytest.mark.parametrize("number", [signal.SIGUSR1, signal.SIGUSR2, signal.SIGXCPU])
def test_a_notice_has_a_run_save_and_end_however_often_it_comes(train, number):
    run = train("--epochs", 10000)
    run.until_epoch(1)
    for _ in range(5):
        with suppress(ProcessLookupError):
            os.kill(run.pid, number)
        time.sleep(0.005)
    assert run.wait() == 130, (run.directory.parent / "err").read_text()
    assert f"Resume with: rapa-dist train --resume {run.directory}" in (run.directory.parent / "err").read_text()
    assert_all_in_a_checkpoint(run.directory)


def test_only_a_second_ctrl_c_or_sigterm_some_time_later_does_not_wait():
    with asked_to_stop() as stop:
        assert not stop()
        for number in (signal.SIGTERM, signal.SIGTERM, signal.SIGINT):  # of one deed
            signal.raise_signal(number)
        assert stop()
        time.sleep(0.11)
        for number in NOTICES:
            signal.raise_signal(number)
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGTERM)


@pytest.mark.parametrize("option", ["--save-patience", "--node-patience"])
@pytest.mark.parametrize("value", ["nan", "-1", "-inf", "long"])
def test_patience_is_a_time(option, value):
    done = CliRunner().invoke(main, ["train", "--dry-run", option, value])
    assert done.exit_code == 2
    assert f"it needs seconds, 0 or more (inf: for ever); it is {value}." in done.stderr


def test_patience_may_have_no_end(tmp_path, capsys, monkeypatch):
    saver = Saver(RunDirectory(tmp_path), "first", patience_s=patience("inf"))
    monkeypatch.setattr(checkpoints, "write", lambda *_: os.open(tmp_path / "none" / "none", os.O_RDONLY))
    saver.save("second", None, None)
    assert "Training goes on, and it is tried again. The newest" in " ".join(capsys.readouterr().err.split())


# --- tiles on Ray


@pytest.mark.ray
@pytest.mark.timeout(240)
@pytest.mark.parametrize("event", ["terminal", "notice"])
def test_tiles_outlive_what_their_coordinator_is_told_to_save_for(tmp_path, event):
    """A terminal that hangs up, with stdout and stderr on it; or a notice to all processes of a job, as Slurm sends."""
    directory, (master, slave) = tmp_path / "run", pty.openpty()
    arguments = ["train", *TINY, "--epochs", "10000", "--address", "local", "--run-dir", str(directory)]
    process = subprocess.Popen(
        [sys.executable, "-c", "import fcntl, termios; fcntl.ioctl(2, termios.TIOCSCTTY, 0)\n" + _MAIN, *arguments],
        stdin=subprocess.DEVNULL,
        stdout=slave,
        stderr=slave,
        start_new_session=True,
    )
    os.close(slave)
    reader = threading.Thread(target=_drain, args=(master,), daemon=True)
    deadline = time.monotonic() + 120
    try:
        while not epochs_in_metrics(directory):
            assert process.poll() is None
            assert time.monotonic() < deadline
            time.sleep(0.02)
        if event == "terminal":
            os.close(master)
        else:
            reader.start()
            for pid in [*descendants(process.pid), process.pid]:
                os.kill(pid, signal.SIGUSR1)
        assert process.wait(timeout=100) == 130
    finally:
        process.kill()
        process.wait()
        if event == "notice":
            reader.join(timeout=10)
            os.close(master)
    assert f"--resume {directory}" in (directory / "log").read_text()
    assert_all_in_a_checkpoint(directory)


def _drain(master: int) -> None:
    with suppress(OSError):  # the other side is closed
        while os.read(master, 4096):
            pass
