"""Nothing waits without an end: for tiles that are stopped, for Ray, for files that are none, for slow servers."""

import signal
import socket
import subprocess
import sys
import threading
import time

import pytest

from rapa_dist.fabric import chip as chip_module
from rapa_dist.fabric.chip import Chip, cells_name
from rapa_dist.fabric.doorbell import Cycle, Ring, Status, TileDoorbell, answers_path
from rapa_dist.fabric.lookout import Lookout
from rapa_dist.machine import Layer, Machine
from rapa_dist.tile import Word

MACHINE = Machine((Layer(index=0, side=4, c_in=1, c_out=3, n_tiles=2),))
SLEEPS = (
    "import sys, time, mmap\nfile = open(sys.argv[1], 'r+b')\nmapped = mmap.mmap(file.fileno(), 0)\n"
    "print(flush=True)\ntime.sleep(60)"
)


# --- tiles that are stopped


@pytest.fixture
def chip(monkeypatch):
    monkeypatch.setattr(chip_module, "PATIENCE_S", 0.05)
    made = Chip(MACHINE, 2)
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
    bell, board = TileDoorbell(site.directory, tile, site.token), site.open_board()
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
        chip.ring([(tile, Ring(number, Cycle.EMPTY, 0, 0, after=number - 1))])


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
    from rapa_dist.errors import ClusterError
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
