"""Nothing waits without an end: for tiles that are stopped, for Ray as it starts, for what ends."""

import os
import re
import resource
import signal
import socket
import subprocess
import sys
import threading
import time
from contextlib import suppress
from pathlib import Path

import pytest
from factories import floats_of, tile_array
from rings import ring

from rapa_dist import preconditions
from rapa_dist.cells import Word
from rapa_dist.doctor import CHECKS
from rapa_dist.errors import ClusterError
from rapa_dist.fabric import address, patience
from rapa_dist.fabric import chip as chip_module
from rapa_dist.fabric.board import Board
from rapa_dist.fabric.chip import Chip, cells_name
from rapa_dist.fabric.cluster import Cluster, connect
from rapa_dist.fabric.doorbell import Cycle, Ring, Status, TileDoorbell, answers_path
from rapa_dist.fabric.lookout import Lookout
from rapa_dist.fabric.patience import bounded
from rapa_dist.fabric.ray import RayFabric
from rapa_dist.fabric.tile_actors import TileActors
from rapa_dist.initial import initial_kernels
from rapa_dist.machine import Machine

MACHINE = Machine((tile_array(n_tiles=2),))
FLOATS = floats_of(MACHINE)
SLEEPS = (
    "import sys, time, mmap\nfile = open(sys.argv[1], 'r+b')\nmapped = mmap.mmap(file.fileno(), 0)\n"
    "print(flush=True)\ntime.sleep(60)"
)


# --- tiles that are stopped


@pytest.fixture
def chip(monkeypatch):
    monkeypatch.setattr(chip_module, "PATIENCE_S", 0.05)
    made = Chip(MACHINE, FLOATS)
    yield made
    made.close()


@pytest.fixture
def stopped(chip):
    """A process that has the cells of tile 0 mapped and is stopped; its bell is there, and nobody takes the rings."""
    command = [sys.executable, "-c", SLEEPS, str(chip.scratch.path / cells_name(0))]
    process = subprocess.Popen(command, stdout=subprocess.PIPE)
    process.stdout.readline()
    process.send_signal(signal.SIGSTOP)
    chip.cells[0].words[Word.PID], chip.cells[0].words[Word.STARTS] = process.pid, 1
    bell = TileDoorbell(chip.scratch.path, 0, chip.site(0).token)
    yield process
    bell._socket.close()
    process.kill()
    process.communicate()


def serve(chip: Chip, tile: int, last: int) -> list[int]:
    """Do what a tile does with its rings, up to the one with the number `last`; return the numbers in their order."""
    site, words, done = chip.site(tile), chip.cells[tile].words, []
    bell, board = TileDoorbell(site.directory, tile, site.token), Board(site.map_board())
    bell._socket.settimeout(10)
    bell.answer(0, Status.HELLO)
    while words[Word.ANSWERED] < last:
        ring = bell.wait()
        if ring.number > words[Word.ANSWERED] >= ring.after:
            done.append(ring.number)
            words[Word.ANSWERED] = ring.number
            if board.asks(tile):
                bell.answer(ring.number)
    bell._socket.close()
    return done


def owe(chip: Chip, tile: int, count: int) -> None:
    for number in range(1, count + 1):
        ring(chip, [(tile, Ring(number, Cycle.EMPTY, 0, 0, 0, after=number - 1))])


@pytest.mark.parametrize("together", [False, True])
def test_a_stopped_tile_that_owes_many_rings_is_replaced(chip, stopped, together):
    told, done, count = [], [], 60  # more than its socket has room for
    Lookout(chip, {0: None, 1: None}, told.append, hang_s=0.2)

    def replace() -> None:
        stopped.wait(timeout=20)
        chip.cells[0].words[Word.STARTS] = 2
        done.extend(serve(chip, 0, count))

    thread = threading.Thread(target=replace)
    thread.start()
    began = time.monotonic()
    if together:
        with chip.together():
            owe(chip, 0, count)
    else:
        owe(chip, 0, count)
    assert time.monotonic() - began < 2  # nobody waits for a tile while rings are sent
    chip.wait()
    thread.join()
    assert done == list(range(1, count + 1))
    assert [(restart.tile, restart.hung) for restart in told] == [("L0/T000", True)]


def test_a_slow_tile_gets_all_rings_in_their_order(chip):
    count, done = 60, []
    thread = threading.Thread(target=lambda: done.extend(serve(chip, 0, count)))
    bell = TileDoorbell(chip.scratch.path, 0, chip.site(0).token)  # takes nothing, until the thread takes its place
    owe(chip, 0, count)
    thread.start()
    chip.wait()
    thread.join()
    bell._socket.close()
    assert done == list(range(1, count + 1))


@pytest.mark.parametrize("message", [b"", b"nonsense", bytes(24), "of another tile"], ids=repr)
def test_a_stopped_tile_is_noticed_while_messages_keep_coming(chip, stopped, message):
    class NoticedError(Exception):
        pass

    def notice(tiles, seconds):
        assert tiles == [0]
        if seconds > 0.2:
            raise NoticedError

    chip.on_silence = notice
    over = threading.Event()
    other = TileDoorbell(chip.scratch.path, 1, chip.site(1).token)

    def keep_talking() -> None:
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as stranger:
            while not over.wait(0.005):
                if isinstance(message, bytes):
                    stranger.sendto(message, str(answers_path(chip.scratch.path)))
                else:
                    other.answer(1)

    owe(chip, 0, 1)
    thread = threading.Thread(target=keep_talking)
    thread.start()
    try:
        began = time.monotonic()
        with pytest.raises(NoticedError):
            chip.wait()
        assert 0.2 <= time.monotonic() - began < 2
    finally:
        over.set()
        thread.join()
        other._socket.close()


def test_a_tile_that_says_hello_again_and_again_does_not_hide_one_that_is_lost(chip, monkeypatch):
    from rapa_dist.fabric import lookout as module

    monkeypatch.setattr(module, "_RESTART_TIMEOUT_S", 0.1)
    monkeypatch.setattr(module, "_LOOPS", 0.0)
    lookout = Lookout(chip, {}, [].append)
    monkeypatch.setattr(module, "_ASK_AFTER_S", 0.1)
    for number in range(3):
        lookout.hello(1)
        lookout.silence([0], 0.05 * number)
    lookout.hello(1)
    with pytest.raises(ClusterError, match=r"No answer from 1 tiles \(L0/T000\)"):
        lookout.silence([0], 0.2)


# --- Ray that does not start


def run_python(program: str, *before: str) -> subprocess.CompletedProcess[str]:
    command = [*before, sys.executable, "-c", program]
    return subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)


def test_without_a_loopback_interface_a_run_fails_within_seconds_and_says_why(tmp_path):
    if subprocess.run(["unshare", "-n", "true"], capture_output=True, check=False).returncode:
        pytest.skip("network namespaces can't be made here")
    train = ["train", "--dataset", "builtin", "--limit-train", "20", "--limit-test", "10", "--tiles", "1,1,1"]
    command = ["unshare", "-n", sys.executable, "-m", "rapa_dist", *train, "--run-dir", str(tmp_path / "run")]
    began = time.monotonic()
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert time.monotonic() - began < 20
    assert done.returncode == 1, done.stderr
    assert re.search(r"Error: Ray can't be started .* 127\.0\.0\.1 can't be reached .*`ip link set lo up`", done.stderr)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("limit", "value", "said"),
    [
        (resource.RLIMIT_NOFILE, 100, r"Open files: 100, may be raised to 100\. .*`ulimit -Hn 222`"),
        (resource.RLIMIT_NPROC, 400, r"Processes: \d+ more may be started.*`ulimit -u`"),
    ],
    ids=["open files", "processes"],
)
def test_limits_that_are_too_low_are_named_before_ray_is_started(monkeypatch, limit, value, said):
    asked = resource.getrlimit
    limits = {limit: (value, value)}
    monkeypatch.setattr(preconditions.resource, "getrlimit", lambda which: limits.get(which) or asked(which))
    monkeypatch.setattr(preconditions.os, "geteuid", lambda: 1)
    with pytest.raises(ClusterError, match=f"Ray can't be started on this machine.*{said}"):
        connect("local", 21)
    check = CHECKS[said.partition(":")[0].lower()]()  # doctor looks at the same
    assert check.status == "failed"
    assert re.match(said, f"{check.name.capitalize()}: {check.value}. {check.fix}")


def test_a_start_that_takes_too_long_is_ended():
    ended = threading.Event()
    with pytest.raises(ClusterError, match=r"Starting it takes longer than 0 s\. Look\."):  # noqa: SIM117
        with bounded("Starting it", "Look.", limit_s=0.2, end=ended.set):
            assert ended.wait(10)
    with bounded("Ending it", "Look.", limit_s=0.2, end=ended.clear, needed=False):
        while ended.is_set():
            time.sleep(0.01)


def test_what_fails_because_it_was_ended_is_no_error_where_nothing_depends_on_it():
    ended = threading.Event()
    with bounded("Ending it", "Look.", limit_s=0.2, end=ended.set, needed=False):
        ended.wait(10)
        raise RuntimeError("its process has gone")
    with pytest.raises(RuntimeError), bounded("Ending it", "Look.", needed=False):
        raise RuntimeError("it fails by itself")


def test_where_no_thread_can_be_started_that_is_the_error(monkeypatch):
    def refuse(thread: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    monkeypatch.setattr(threading.Thread, "start", refuse)
    before = len(os.listdir("/proc/self/fd"))
    with pytest.raises(RuntimeError, match="can't start new thread"), bounded("Starting it", "Look."):
        pass
    assert len(os.listdir("/proc/self/fd")) == before


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
@pytest.mark.parametrize("returns", [True, False], ids=["returns", "does not return"])
def test_a_signal_is_heard_while_ray_starts(monkeypatch, number, returns):
    def interrupt(number, frame):
        raise KeyboardInterrupt

    monkeypatch.setattr(patience, "_GRACE_S", 10.0 if returns else 0.3)
    before, ended = signal.signal(number, interrupt), threading.Event()
    try:
        began = time.monotonic()
        with pytest.raises(KeyboardInterrupt), bounded("Starting it", "Look.", end=ended.set):  # noqa: PT012
            os.kill(os.getpid(), number)
            assert returns or ended.wait(10)
        assert 0.3 * (not returns) <= time.monotonic() - began < 5
        assert ended.is_set() != returns
        assert signal.getsignal(number) is interrupt
    finally:
        signal.signal(number, before)


def test_a_start_that_never_returns_ends_the_process_and_leaves_nothing(tmp_path):
    program = (
        "import ctypes, shutil\nfrom rapa_dist import cli\nfrom rapa_dist.fabric import patience\n"
        "@cli.main.command('wait')\ndef wait():\n"
        f"    end = lambda: shutil.rmtree({str(tmp_path)!r})\n"
        "    with patience.bounded('Starting Ray', 'Look.', limit_s=0.2, end=end):\n"
        "        ctypes.CDLL(None).sleep(50)\n"
        "patience._UNWIND_S = 0.3\n"
        "cli.CommandLine.get_command = lambda self, ctx, name: wait\n"
        "cli.main(['wait'])\n"
    )
    done = run_python(program)
    assert (done.returncode, done.stderr) == (1, "Error: Starting Ray takes longer than 0 s. Look.\n")
    assert not tmp_path.exists()


def test_ray_puts_no_handlers_of_its_own_in_place_of_ours():
    """As a worker's core is made, which is the last that a start does: that ended runs by the signal itself."""
    program = (
        "import ctypes, os, signal, sys, ray\nfrom rapa_dist.fabric import patience\n"
        "from rapa_dist.interrupts import end_like_ctrl_c\n"
        "end_like_ctrl_c()\n"
        "try:\n    with patience.bounded('Starting Ray', 'Look.'):\n"
        "        getattr(ctypes.CDLL(ray._raylet.__file__), patience._INSTALL)(b'', False)\n"
        "        ray._private.utils.set_sigterm_handler(lambda number, frame: sys.exit(77))\n"
        "        os.kill(os.getpid(), signal.SIGTERM)\n        print('there')\n"
        "except KeyboardInterrupt:\n    print('heard')\n"
    )
    done = run_python(program)
    assert done.stdout.split() == ["there", "heard"], (done.returncode, done.stderr)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_signal_at_any_moment_leaves_no_folder(number, tmp_path):
    """As the folder is made, and between two lines that know nothing of it."""
    program = (
        "import os, sys, threading, time\nfrom pathlib import Path\nfrom rapa_dist.fabric.scratch import Scratch\n"
        "from rapa_dist.interrupts import end_like_ctrl_c\n"
        "end_like_ctrl_c()\nroot = Path(sys.argv[1])\nmade = Path.mkdir\n"
        f"def mkdir(self, mode):\n    made(self, mode)\n    os.kill(os.getpid(), {int(number)})\n    time.sleep(0)\n"
        f"kept = Scratch(root)\nPath.mkdir = mkdir\nScratch(root)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", program, str(tmp_path)], capture_output=True, text=True, timeout=60, check=False
    )
    assert "KeyboardInterrupt" in done.stderr
    assert not list(tmp_path.iterdir())


# --- ends


def descendants(pid: int) -> dict[int, str]:
    """Return what a process has started, and what that has, as {pid: command line}."""
    parents, titles = {}, {}
    for entry in Path("/proc").iterdir():
        with suppress(OSError, ValueError):
            state, parent, *_ = (entry / "stat").read_text().rpartition(")")[2].split()
            if state not in "ZX":
                parents[int(entry.name)] = int(parent)
                titles[int(entry.name)] = (entry / "cmdline").read_bytes().decode(errors="replace")
    found = {pid}
    while more := {child for child, parent in parents.items() if parent in found} - found:
        found |= more
    return {child: titles[child] for child in found - {pid}}


@pytest.mark.ray
def test_what_ends_on_a_cluster_that_stays_ends_whatever_is_killed_or_stopped_meanwhile(start_head, monkeypatch):
    head, machine = start_head(3), Machine.build(channels=(4, 4, 4), tiles=(1, 1, 1))
    monkeypatch.setenv("RAY_AUTH_TOKEN", head.token["RAY_AUTH_TOKEN"])
    monkeypatch.setenv("RAY_AUTH_MODE", "token")

    def tiles() -> dict[int, str]:
        return {pid: title for pid, title in descendants(head.process.pid).items() if "Tile" in title}

    fabric = RayFabric(
        machine, floats_of(machine), initial_kernels(machine, 0), run="ends", cluster=connect(head.address, 3)
    )
    assert len(tiles()) == 3
    killed, stopped, _ = fabric.pids()
    ask = TileActors.ask_to_leave

    def ask_to_leave(actors: TileActors) -> list:
        os.kill(killed, signal.SIGKILL)
        time.sleep(0.2)  # Ray has noticed, and begins to restart it
        os.kill(stopped, signal.SIGSTOP)
        return ask(actors)

    monkeypatch.setattr(TileActors, "ask_to_leave", ask_to_leave)
    with monkeypatch.context() as patch:
        patch.setattr(Cluster, "close", lambda cluster: None)  # Ray is left connected, so that nothing else ends them
        began = time.monotonic()
        fabric.close()
        assert time.monotonic() - began < 20
    for _ in range(25):
        assert not tiles()
        time.sleep(0.1)
    fabric.cluster.close()
    (raylet,) = (pid for pid, title in descendants(head.process.pid).items() if "/raylet\0" in title)
    os.kill(raylet, signal.SIGSTOP)
    monkeypatch.setattr(address, "_CONNECT_TIMEOUT_S", 1.0)
    with pytest.raises(ClusterError, match=r"the raylet at .* does not answer\. Look whether .* are stopped"):
        connect(head.address, 3)
