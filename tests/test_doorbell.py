import os
import socket
import stat
import struct
import threading
import time

import pytest
from rings import ring_bell

from rapa_dist.fabric.doorbell import (
    Cycle,
    Ring,
    Status,
    TileDoorbell,
    answers_path,
    bell_path,
)
from rapa_dist.fabric.ringing import NodeDoorbell
from rapa_dist.fabric.scratch import Scratch

TOKEN, OTHER_TOKEN = 0x0123456789ABCDEF, 0x0123456789ABCDEE
A_RING = Ring(2**40 + 1, Cycle.INPUT_ERROR | Cycle.UPDATE, 70_000, 2**40, 2**41, 0.1, 1e-4, 2**41, 2**62, 2**39, 2**63)


@pytest.fixture
def folder():
    scratch = Scratch()  # its path is short enough for a socket's name
    yield scratch.path
    scratch.remove()


class Bells:
    """Makes both ends, and closes them after the test."""

    def __init__(self, folder):
        self._folder, self._open = folder, []

    def node(self, n_tiles=2, token=TOKEN):
        bell = NodeDoorbell(self._folder, n_tiles, token)
        bell.set_patience(5)
        self._open.append(bell)
        return bell

    def tile(self, tile=0, token=TOKEN):
        bell = TileDoorbell(self._folder, tile, token)
        bell._socket.settimeout(5)  # a test that fails must not hang
        self._open.append(bell._socket)
        return bell

    def send(self, message, path):
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sender:
            sender.sendto(message, str(path))

    def close(self):
        for end in self._open:
            end.close()


@pytest.fixture
def bells(folder):
    made = Bells(folder)
    yield made
    made.close()


# --- rings


def test_a_ring_arrives_as_it_was_given(bells):
    node, tile = bells.node(), bells.tile(1)
    ring_bell(node, 1, A_RING)
    heard = tile.wait()
    assert heard == A_RING


def test_a_ring_goes_to_its_tile_alone(bells):
    node, first, second = bells.node(), bells.tile(0), bells.tile(1)
    ring_bell(node, 0, A_RING._replace(number=1))
    ring_bell(node, 1, A_RING._replace(number=2))
    assert (first.wait().number, second.wait().number) == (1, 2)


def test_rings_that_come_while_a_tile_works_wait_for_it(bells):
    node, tile = bells.node(), bells.tile()
    for number in range(1, 6):
        ring_bell(node, 0, A_RING._replace(number=number))
    assert [tile.wait().number for _ in range(5)] == [1, 2, 3, 4, 5]


@pytest.mark.parametrize("count", [2, 3, 4])
def test_rings_that_are_sent_together_are_heard_one_after_the_other(bells, count):
    node, tile = bells.node(), bells.tile()
    rings = [A_RING._replace(number=number) for number in range(1, count + 1)]
    ring_bell(node, 0, *rings)
    assert [tile.wait() for _ in rings] == rings


def test_of_rings_sent_together_those_that_are_answered_are_left_out(bells):
    node, tile = bells.node(), bells.tile()
    ring_bell(node, 0, *(A_RING._replace(number=number) for number in (1, 2, 3)))
    assert tile.wait().number == 1
    tile.answer(2)
    assert tile.wait().number == 3


def test_a_sleeping_tile_is_woken(bells):
    node, tile = bells.node(), bells.tile()
    heard = []
    thread = threading.Thread(target=lambda: heard.append(tile.wait()))
    thread.start()
    time.sleep(0.05)
    ring_bell(node, 0, A_RING)
    thread.join(timeout=5)
    assert heard == [A_RING]


def test_a_ring_with_another_token_is_ignored(bells, folder):
    tile = bells.tile()
    stranger = bells.node(token=OTHER_TOKEN)
    ring_bell(stranger, 0, A_RING._replace(number=666))
    answers_path(folder).unlink()
    ring_bell(bells.node(), 0, A_RING)
    assert tile.wait() == A_RING


@pytest.mark.parametrize("length", [0, 1, 8, 63, 64, 65, 500])
def test_a_ring_of_the_wrong_size_is_ignored(bells, folder, length):
    node, tile = bells.node(), bells.tile()
    bells.send((struct.pack("<Q", TOKEN) + bytes(500))[:length], bell_path(folder, 0))
    ring_bell(node, 0, A_RING)
    assert tile.wait() == A_RING


def test_a_ring_to_a_tile_that_never_was_is_lost_without_an_error(bells):
    ring_bell(bells.node(), 1, A_RING)


def test_a_ring_to_a_tile_that_has_died_is_lost_without_an_error(bells):
    node, tile = bells.node(), bells.tile()
    tile._socket.close()
    ring_bell(node, 0, A_RING)


def test_a_tile_that_comes_up_again_takes_the_place_of_the_one_before(bells):
    node = bells.node()
    bells.tile()
    again = bells.tile()
    ring_bell(node, 0, A_RING)
    assert again.wait() == A_RING


def test_a_tile_does_no_cycle_twice_that_it_has_answered(bells):
    """Its HELLO and the first ring may cross: then the coordinator rings again for nothing."""
    node, tile = bells.node(), bells.tile()
    ring_bell(node, 0, A_RING)
    ring_bell(node, 0, A_RING)
    tile.answer(tile.wait().number)
    ring_bell(node, 0, A_RING._replace(number=A_RING.number + 1))
    assert tile.wait().number == A_RING.number + 1


# --- answers


def test_an_answer_names_tile_number_and_status(bells):
    node, tile = bells.node(), bells.tile(1)
    tile.answer(2**40 + 1)
    assert node.hear() == (1, 2**40 + 1, Status.DONE)


@pytest.mark.parametrize("status", [Status.HELLO, Status.FAILED])
def test_a_tile_tells_that_it_came_up_or_that_it_failed(bells, status):
    node, tile = bells.node(), bells.tile(1)
    tile.answer(0, status)
    assert node.hear() == (1, 0, status)


def test_answers_of_all_tiles_arrive(bells):
    node = bells.node(n_tiles=50)
    tiles = [bells.tile(number) for number in range(50)]
    threads = [threading.Thread(target=lambda bell=bell: bell.answer(bell.wait().number)) for bell in tiles]
    for thread in threads:
        thread.start()
    for number in range(50):
        ring_bell(node, number, A_RING)
    heard = {node.hear() for _ in range(50)}
    for thread in threads:
        thread.join()
    assert heard == {(number, A_RING.number, Status.DONE) for number in range(50)}


def test_an_answer_with_another_token_is_ignored(bells):
    node = bells.node()
    bells.tile(0, token=OTHER_TOKEN).answer(666)
    bells.tile(1).answer(1)
    assert node.hear() == (1, 1, Status.DONE)


def test_an_answer_of_a_tile_that_there_is_not_is_ignored(bells):
    node = bells.node(n_tiles=2)
    bells.tile(2).answer(666)
    bells.tile(1).answer(1)
    assert node.hear() == (1, 1, Status.DONE)


@pytest.mark.parametrize("length", [0, 1, 8, 23, 25, 64, 500])
def test_an_answer_of_the_wrong_size_is_ignored(bells, folder, length):
    node, tile = bells.node(), bells.tile()
    bells.send((struct.pack("<Q", TOKEN) + bytes(500))[:length], answers_path(folder))
    tile.answer(1)
    assert node.hear() == (0, 1, Status.DONE)


def test_patience_runs_out_when_nobody_answers(bells):
    node = bells.node()
    node.set_patience(0.1)
    started = time.monotonic()
    assert node.hear() is None
    assert 0.09 < time.monotonic() - started < 2


def test_an_answer_within_patience_is_heard(bells):
    node, tile = bells.node(), bells.tile()
    timer = threading.Timer(0.1, tile.answer, [1])
    timer.start()
    assert node.hear() == (0, 1, Status.DONE)
    timer.join()


def test_a_tile_notices_that_the_coordinator_has_gone(bells, folder):
    node, tile = bells.node(), bells.tile()
    node.close()
    with pytest.raises(OSError, match="refused"):
        tile.answer(1)
    answers_path(folder).unlink()
    with pytest.raises(OSError, match="No such file"):
        tile.answer(1)


def test_sockets_are_for_their_owner_alone(bells, folder):
    bells.node()
    bells.tile()
    for path in (answers_path(folder), bell_path(folder, 0)):
        assert stat.S_IMODE(os.stat(path).st_mode) == 0o600
