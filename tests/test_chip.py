"""A chip with tiles that are threads here: everything of fabric `ray` but Ray."""

import os
import pickle
import threading
from pathlib import Path

import numpy as np
import pytest
from factories import IMAGES, floats_of, tile_array
from rings import ring
from rows import Rows

from rapa_dist.cells import Cells, Word
from rapa_dist.errors import ClusterError
from rapa_dist.fabric import chip as chip_module
from rapa_dist.fabric.arena import Arena, Place
from rapa_dist.fabric.board import Board
from rapa_dist.fabric.chip import Chip, shared_bytes
from rapa_dist.fabric.command import Command
from rapa_dist.fabric.doorbell import Cycle, Ring, Status, TileDoorbell
from rapa_dist.fabric.ringing import RING
from rapa_dist.fabric.scratch import shared_memory_root
from rapa_dist.fabric.serial import SerialFabric
from rapa_dist.machine import Machine, tile_name
from rapa_dist.native import tile_on
from rapa_dist.native.rings import writer
from rapa_dist.tile import AnalogTile, Update

MACHINE = Machine((tile_array(), tile_array(1, side=2, c_in=3, c_out=2, n_tiles=1)))
FLOATS = floats_of(MACHINE)
EMPTY = Ring(1, Cycle.EMPTY, 0, 0, 0)
STOP = 1 << 20  # no cycle of a tile's: ends its thread


@pytest.fixture(autouse=True)
def _impatient(monkeypatch):
    monkeypatch.setattr(chip_module, "PATIENCE_S", 0.05)


@pytest.fixture
def chip():
    made = Chip(MACHINE, FLOATS)
    yield made
    made.close()


class TileThread:
    """Does with a site what the actor does, in a thread."""

    def __init__(self, site, status=Status.DONE):
        self.rings = []
        self._site, self._status = site, status
        self.bell = TileDoorbell(site.directory, site.tile, site.token)
        self.bell._socket.settimeout(5)
        self._up = threading.Event()
        self._thread = threading.Thread(target=self._serve)

    def start(self):
        self._thread.start()
        self._up.wait()
        return self

    def _serve(self):
        site = self._site
        arena, board, tile = Arena(site.map_arena()), Board(site.map_board()), tile_on(site.open_cells())
        words = tile.cells.words
        self.bell.answer(0, Status.HELLO)
        self._up.set()
        while (ring := self.bell.wait()).cycle != STOP:
            if ring.number <= words[Word.ANSWERED] or ring.after > words[Word.ANSWERED]:
                continue
            self.rings.append(ring)
            patches = arena.rows(ring.patches, ring.rows, site.array.k)
            outputs = arena.rows(ring.outputs, ring.rows, site.array.c_out)
            if ring.cycle == Cycle.FORWARD:
                tile.forward(patches, outputs)
            elif ring.cycle:
                update = Update(ring.learning_rate, ring.weight_decay) if ring.cycle & Cycle.UPDATE else None
                tile.backward(
                    patches,
                    outputs,
                    cycle=ring.number,
                    update=update,
                    input_error=bool(ring.cycle & Cycle.INPUT_ERROR),
                    commit=bool(ring.cycle & Cycle.COMMIT),
                )
            if self._status == Status.DONE:
                words[Word.ANSWERED] = ring.number
            if board.asks(site.tile) or self._status != Status.DONE:
                self.bell.answer(ring.number, self._status)

    def stop(self):
        self._thread.join()
        self.bell._socket.close()


@pytest.fixture
def tiles(chip):
    """Start a thread for a tile of the chip; all of them are stopped after the test."""
    started = {}

    def start(tile, status=Status.DONE):
        started[tile] = TileThread(chip.site(tile), status).start()
        return started[tile]

    yield start
    for tile, thread in started.items():
        ring(chip, [(tile, Ring(2**60, STOP, 0, 0, 0))])
        thread.stop()


def test_a_tile_that_is_adopted_again_keeps_its_cells(chip):
    cells = chip.cells[0]
    chip.adopt([0])
    assert chip.cells[0] is cells


# --- waiting


def test_waiting_ends_when_every_tile_has_answered(chip, tiles):
    threads = [tiles(tile) for tile in range(3)]
    ring(chip, [(tile, EMPTY) for tile in range(3)])
    chip.wait()
    assert [thread.rings for thread in threads] == [[EMPTY]] * 3


def test_cycles_begun_together_reach_a_tile_in_one_message_and_in_their_order(chip, tiles, monkeypatch):
    sent = []

    def note(tiles, messages):
        for place, tile in enumerate(tiles.tolist()):
            sent.append((tile, [int(rings["number"][place]) for rings in messages]))

    monkeypatch.setattr(chip._bell, "ring", note)
    with chip.together():
        ring(chip, [(0, EMPTY), (1, EMPTY)])
        ring(chip, [(0, EMPTY._replace(number=2, after=1))])
        assert not sent
    ring(chip, [(2, EMPTY._replace(number=3))])
    assert sorted(sent) == [(0, [1, 2]), (1, [1]), (2, [3])]
    monkeypatch.undo()
    threads = [tiles(tile) for tile in range(3)]  # nobody has heard them: their tiles are rung again
    chip.wait()
    assert [[ring.number for ring in thread.rings] for thread in threads] == [[1, 2], [1], [3]]


@pytest.mark.parametrize("count", [5, 9])
def test_more_cycles_than_a_message_holds_may_be_begun_together(chip, tiles, count):
    threads = [tiles(tile) for tile in range(2)]
    with chip.together():
        for number in range(1, count + 1):
            ring(chip, [(tile, EMPTY._replace(number=number)) for tile in range(1 + number % 2)])
    chip.wait()
    assert [ring.number for ring in threads[0].rings] == list(range(1, count + 1))
    assert [ring.number for ring in threads[1].rings] == list(range(1, count + 1, 2))


def test_rings_are_the_same_with_the_library_and_without(monkeypatch):
    edges = np.array([5, 9, 9, 20, 31], np.int64)
    tiles, last_ring = np.array([3, 0, 2, 6], np.uint32), np.arange(10, 18, dtype=np.uint64)
    command = Command(7, 0, Cycle.UPDATE, Place(1000, 2000), 26, 25, 3, 0.1, 1e-4, 12.5)
    written = command.rings(tiles, edges[:-1], edges[1:], last_ring).messages
    monkeypatch.setattr("rapa_dist.fabric.command.writer", lambda: None)
    expected = command.rings(tiles, edges[:-1], edges[1:], last_ring).messages
    for field in set(RING.names) - {"token", "rung_ns"}:
        assert written[field].tolist() == expected[field].tolist(), field
    assert written["rows"].tolist() == [4, 0, 11, 11]
    assert written["after"].tolist() == [13, 10, 12, 16]


@pytest.mark.skipif(writer() is None, reason="without the library any do")
def test_rows_that_do_not_lie_in_one_piece_are_refused():
    first, last = np.array([(0, 4), (4, 8)]).T
    with pytest.raises(ValueError, match=r"have to lie in one piece, not \(16,\) and \(16,\) bytes apart"):
        Command(7, 0, Cycle.FORWARD, Place(0, 0), 8, 25, 3).rings(
            np.arange(2, dtype=np.uint32), first, last, np.zeros(2, np.uint64)
        )


def test_waiting_for_nobody_ends_at_once(chip):
    chip.wait()


def test_a_tile_that_comes_up_late_is_rung_again(chip, tiles):
    ring(chip, [(0, EMPTY)])  # nobody is there to hear it
    late = []
    timer = threading.Timer(0.2, lambda: late.append(tiles(0)))
    timer.start()
    chip.wait()
    timer.join()
    assert late[0].rings == [EMPTY]


def test_a_tile_whose_hello_crosses_a_ring_does_the_cycle_once(chip, tiles):
    thread = tiles(0)
    ring(chip, [(0, EMPTY)])  # its HELLO lies there, unheard
    chip.wait()
    ring(chip, [(0, EMPTY._replace(number=2))])
    chip.wait()
    assert [ring.number for ring in thread.rings] == [1, 2]


def test_a_hello_of_a_tile_that_owes_nothing_is_told_and_not_answered(chip, tiles):
    up = []
    chip.on_hello = up.append
    idle = tiles(1)
    ring(chip, [(0, EMPTY)])  # nobody hears it: the chip has to hear of tile 0, and so before it of tile 1
    tiles(0)
    chip.wait()
    assert sorted(up) == [0, 1]
    assert idle.rings == []


def test_several_cycles_may_be_under_way_and_are_waited_for_one_by_one(chip, tiles):
    threads = [tiles(tile) for tile in range(2)]
    for number in (1, 2, 3):
        ring(chip, [(tile, EMPTY._replace(number=number)) for tile in range(2)])
    chip.wait(2)
    chip.wait(1)  # is done already
    chip.wait(3)
    assert [[ring.number for ring in thread.rings] for thread in threads] == [[1, 2, 3]] * 2


def test_a_tile_that_comes_up_late_gets_everything_it_owes_in_order(chip, tiles):
    for number in (1, 2, 3):
        ring(chip, [(0, EMPTY._replace(number=number))])
    late = []
    timer = threading.Timer(0.2, lambda: late.append(tiles(0)))
    timer.start()
    chip.wait()
    timer.join()
    assert [ring.number for ring in late[0].rings] == [1, 2, 3]


def test_a_ring_that_comes_between_a_new_sockets_birth_and_its_hello_does_not_overtake_a_missed_one(chip):
    ring(chip, [(0, EMPTY)])  # the tile is dead
    thread = TileThread(chip.site(0))  # its socket is there, and it has not said HELLO yet
    ring(chip, [(0, EMPTY._replace(number=2, after=int(chip.last_ring[0])))])
    thread.start()
    chip.wait(1)
    chip.wait(2)
    ring(chip, [(0, Ring(2**60, STOP, 0, 0, 0))])
    thread.stop()
    assert [ring.number for ring in thread.rings] == [1, 2]


def test_what_was_rung_after_a_cycle_that_failed_is_not_done(chip, tiles):
    thread = tiles(1, Status.FAILED)
    ring(chip, [(1, Ring(1, Cycle.FORWARD, 4, 0, 1024))])
    ring(chip, [(1, Ring(2, Cycle.FORWARD, 4, 0, 1024, after=1))])
    with pytest.raises(ClusterError, match=r"L0/T001 failed in its forward cycle"):
        chip.wait(1)
    assert [ring.number for ring in thread.rings] == [1]


def test_an_answer_to_an_earlier_cycle_is_not_taken_for_this_ones(chip):
    site, answered = chip.site(0), []
    bell = TileDoorbell(site.directory, site.tile, site.token)

    def answer():
        answered.append(7)
        chip.cells[0].words[Word.ANSWERED] = 7
        bell.answer(7)

    bell.answer(6)
    timer = threading.Timer(0.2, answer)
    timer.start()
    ring(chip, [(0, EMPTY._replace(number=7))])
    chip.wait()
    assert answered == [7]
    timer.join()
    bell._socket.close()


def test_a_tile_that_fails_is_named_with_its_cycle(chip, tiles):
    tiles(1, Status.FAILED)
    ring(chip, [(1, Ring(1, Cycle.FORWARD, 4, 0, 1024))])
    with pytest.raises(ClusterError, match=r"L0/T001 failed in its forward cycle"):
        chip.wait()


def test_silence_is_told_with_who_owes_an_answer_and_for_how_long(chip, tiles):
    class GaveUpError(Exception):
        pass

    told = []

    def on_silence(silent, seconds):
        told.append((silent, round(seconds, 3)))
        if seconds > 0.14:
            raise GaveUpError

    chip.on_silence = on_silence
    tiles(0)
    ring(chip, [(0, EMPTY), (2, EMPTY)])  # nobody is there for number 2
    with pytest.raises(GaveUpError):
        chip.wait()
    assert told[-3:] == [([2], 0.05), ([2], 0.1), ([2], 0.15)]


# --- what the tiles find


def test_a_site_can_be_sent_to_another_process(chip):
    assert pickle.loads(pickle.dumps(chip.site(1))) == chip.site(1)


def test_a_tile_finds_the_kernel_that_was_programmed(chip):
    for tile, (layer, number) in enumerate(MACHINE.tiles):
        kernel = np.full(MACHINE.arrays[layer].kernel_shape, 10 * layer + number, np.float32)
        chip.program(tile, kernel)
    for tile, (layer, number) in enumerate(MACHINE.tiles):
        cells = chip.site(tile).open_cells()
        assert (cells.kernel == 10 * layer + number).all()


def test_a_chip_of_threads_has_the_bits_of_fabric_serial(chip, tiles):
    """Three steps with both layers, rows written by the coordinator and read by it."""
    generator = np.random.default_rng(0)
    kernels = [
        generator.normal(size=(layer.n_tiles, *layer.kernel_shape)).astype(np.float32) for layer in MACHINE.arrays
    ]
    for tile, (layer, number) in enumerate(MACHINE.tiles):
        chip.program(tile, kernels[layer][number])
        tiles(tile)
    number = 0
    with SerialFabric(MACHINE, FLOATS, kernels) as serial:
        for _ in range(3):
            for layer in MACHINE.arrays:
                rows = IMAGES * layer.n_patches
                edges = np.linspace(0, rows, layer.n_tiles + 1).astype(np.int64)
                here = [t for t, (of_array, _) in enumerate(MACHINE.tiles) if of_array == layer.index]
                ours = Place(0, FLOATS // 2)
                patches = generator.normal(size=(rows, layer.k)).astype(np.float32)
                errors = generator.normal(size=(rows, layer.c_out)).astype(np.float32)

                def run(cycle, rates=(), edges=edges, layer=layer, rows=rows, here=here, ours=ours):
                    nonlocal number
                    number += 1
                    command = Command(number, layer.index, cycle, ours, rows, layer.k, layer.c_out, *rates)
                    chip.ring(command.rings(np.array(here, np.uint32), edges[:-1], edges[1:], chip.last_ring))
                    chip.wait()

                with Rows(serial, layer, rows) as theirs:
                    chip.arena.rows(ours.patches, rows, layer.k)[:] = theirs.patches[:] = patches
                    run(Cycle.FORWARD)
                    theirs.forward(edges)
                    assert chip.arena.rows(ours.outputs, rows, layer.c_out).tobytes() == theirs.outputs.tobytes()

                    chip.arena.rows(ours.outputs, rows, layer.c_out)[:] = theirs.outputs[:] = errors
                    run(Cycle.INPUT_ERROR | Cycle.UPDATE | Cycle.COMMIT, (0.05, 1e-3))
                    theirs.backward(edges, Update(0.05, 1e-3), input_error=True)
                    assert chip.arena.rows(ours.patches, rows, layer.k).tobytes() == theirs.patches.tobytes()
                    kernels_here = np.stack([chip.cells[tile].kernel for tile in here])
                    assert kernels_here.tobytes() == serial.kernels(layer).tobytes()


# --- files


def files_of_runs():
    return [path for path in shared_memory_root().iterdir() if "rapa-dist-" in path.name]


def test_a_chip_takes_the_memory_that_was_foreseen(chip):
    mapped = [path for path in chip.scratch.path.iterdir() if path.name.startswith(("arena", "board", "cells"))]
    assert sum(path.stat().st_size for path in mapped) == shared_bytes(MACHINE, FLOATS)
    assert len(mapped) == 2 + 3


def test_a_closed_chip_leaves_nothing(tiles, chip):
    assert len(files_of_runs()) == 1
    chip.close()
    assert files_of_runs() == []
    chip.close()


@pytest.mark.parametrize("fits", [0, 1, 3])
def test_a_chip_that_does_not_fit_leaves_nothing(monkeypatch, fits):
    reserved = []

    def nearly_full(descriptor, offset, size):
        if len(reserved) == fits:
            raise OSError(28, "No space left on device")
        reserved.append(size)

    monkeypatch.setattr(os, "posix_fallocate", nearly_full)
    monkeypatch.setattr("rapa_dist.fabric.scratch.mmap.mmap", lambda descriptor, size: memoryview(bytearray(size)))
    with pytest.raises(ClusterError, match="Too little shared memory"):
        Chip(MACHINE, FLOATS)
    assert files_of_runs() == []


def test_tiles_are_named_by_layer_and_place(chip):
    assert tile_name(0, 3) == "L0/T003"
    assert [chip.name_of(tile) for tile in range(3)] == ["L0/T000", "L0/T001", "L1/T000"]


def test_cells_outlive_whoever_used_them(chip):
    """What a restarted process relies on."""
    shape = MACHINE.arrays[0].kernel_shape
    chip.program(0, np.ones(shape, np.float32))
    first = AnalogTile(chip.site(0).open_cells())
    errors, patches = np.ones((4, 3), np.float32), np.ones((4, 25), np.float32)
    first.backward(patches, errors, cycle=1, update=Update(0.5, 0), input_error=False)
    kernel = first.cells.kernel.copy()
    del first
    path = Path(chip.scratch.path / "cells-0")
    assert path.stat().st_size == Cells.size(shape)
    assert np.array_equal(chip.site(0).open_cells().kernel, kernel)
    assert np.array_equal(chip.cells[0].kernel, kernel)
