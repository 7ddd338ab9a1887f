"""What is read from a tile's cells, and how it is summed up; no Ray, no processes but this one."""

import dataclasses
import os
import subprocess
import sys
import time

import numpy as np
import pytest

from rapa_dist.cells import Cells, State, Word
from rapa_dist.errors import UsageError
from rapa_dist.inspection import (
    SORT_KEYS,
    RunStats,
    TileStats,
    check_sort,
    read_kernel,
    read_tile,
    sort_tiles,
)
from rapa_dist.machine import TileArray
from rapa_dist.tile import AnalogTile, Update

K, C_OUT, ROWS = 12, 5, 9
ARRAY = TileArray(index=1, name="conv1", k=K, c_out=C_OUT, n_tiles=4)


def some_cells(*, pid: int | None = None, served_s: float = 10.0, step: int = 0) -> Cells:
    cells = Cells.volatile((K + 1, C_OUT))
    cells.program(np.random.default_rng(0).normal(size=(K + 1, C_OUT)).astype(np.float32), step)
    cells.words[Word.PID] = os.getpid() if pid is None else pid
    cells.words[Word.STARTS] = 1
    cells.words[Word.SINCE_NS] = time.monotonic_ns() - int(served_s * 1e9)
    return cells


def read(cells: Cells) -> TileStats:
    return read_tile(cells, ARRAY, 2, "some-node")


def a_dead_pid() -> int:
    process = subprocess.Popen(["true"])
    process.wait()
    return process.pid


def a_tile(**changes) -> TileStats:
    layer = changes.get("layer", ARRAY.index)
    return dataclasses.replace(read(some_cells()), **{"name": f"conv{layer}"} | changes)


# --- one tile


def test_a_tile_that_worked_says_what_it_did():
    cells = some_cells(step=40)
    tile, rng = AnalogTile(cells), np.random.default_rng(1)
    patches = rng.normal(size=(ROWS, K)).astype(np.float32)
    outputs = rng.normal(size=(ROWS, C_OUT)).astype(np.float32)
    tile.forward(patches, outputs)
    tile.forward(patches[:4], outputs[:4])
    tile.backward(patches, outputs, cycle=1, update=Update(0.1, 0.0), input_error=True)
    stats = read(cells)
    assert (stats.tile, stats.layer, stats.node, stats.pid) == ("L1/T002", 1, "some-node", os.getpid())
    assert (stats.rows_forward, stats.rows_backward, stats.rows_update, stats.updates) == (ROWS + 4, ROWS, ROWS, 1)
    assert (stats.last_step, stats.restarts, stats.state) == (41, 0, "idle")
    assert stats.bytes_in == 4 * ((ROWS + 4) * K + ROWS * C_OUT)
    assert stats.bytes_out == 4 * ((ROWS + 4) * C_OUT + ROWS * K)
    assert stats.kernel_norm == pytest.approx(np.sqrt((cells.kernel.astype(np.float64) ** 2).sum()), rel=1e-6)
    assert stats.device_time_s == pytest.approx((3 * ROWS + 4) * 80e-9)
    assert stats.resident_bytes > 10e6


def test_busy_and_waiting_add_up_to_the_time_since_the_process_began():
    cells = some_cells(served_s=10.0)
    cells.words[Word.BUSY_NS] = 2_500_000_000
    stats = read(cells)
    assert stats.busy_s == 2.5
    assert stats.busy_s + stats.waiting_s == pytest.approx(10.0, abs=0.5)
    assert stats.utilisation == pytest.approx(0.25, rel=0.05)


def test_a_tile_that_was_replaced_just_now_waited_no_negative_time():
    cells = some_cells(served_s=1.0)
    cells.words[Word.BUSY_NS] = 5_000_000_000  # of its earlier processes, too
    cells.words[Word.STARTS] = 3
    stats = read(cells)
    assert (stats.waiting_s, stats.utilisation, stats.restarts) == (0.0, 1.0, 2)


def test_a_tile_that_never_served_has_no_times_and_no_negative_restarts():
    cells = Cells.volatile((K + 1, C_OUT))
    stats = read(cells)
    assert (stats.waiting_s, stats.utilisation, stats.restarts, stats.pid) == (0.0, 0.0, 0, 0)
    assert stats.state == "restarting"


@pytest.mark.parametrize(
    ("word", "name"),
    [(State.IDLE, "idle"), (State.FORWARD, "forward"), (State.BACKWARD, "backward"), (State.HOLDING, "holding")],
)
def test_the_state_is_that_of_the_word(word, name):
    cells = some_cells()
    cells.words[Word.STATE] = word
    assert read(cells).state == name


def test_a_tile_whose_process_is_gone_is_being_restarted():
    cells = some_cells(pid=a_dead_pid())
    cells.words[Word.STATE] = State.FORWARD
    stats = read(cells)
    assert (stats.state, stats.resident_bytes) == ("restarting", 0)


def test_a_dead_process_that_nobody_has_buried_counts_as_gone():
    process = subprocess.Popen(["true"])
    try:
        os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT)  # it stays a zombie
        assert read(some_cells(pid=process.pid)).state == "restarting"
    finally:
        process.wait()


class OvertakenCells:
    """Cells whose kernel is replaced while it is copied, the first so many times."""

    def __init__(self, updates: int) -> None:
        self.words = {Word.COMMIT: 0}
        self.updates, self.reads = updates, 0

    @property
    def kernel(self) -> np.ndarray:
        kernel = np.full((2, 2), self.words[Word.COMMIT], np.float32)
        self.reads += 1
        if self.reads <= self.updates:
            self.words[Word.COMMIT] += 1
        return kernel


@pytest.mark.parametrize("updates", [0, 1, 3])
def test_a_kernel_that_an_update_may_have_overtaken_is_read_again(updates):
    cells = OvertakenCells(updates)
    np.testing.assert_array_equal(read_kernel(cells), np.full((2, 2), updates, np.float32))
    assert cells.reads == updates + 1


def test_a_kernel_that_was_read_is_a_copy():
    cells = some_cells()
    kernel = read_kernel(cells)
    cells.kernels[0] += 1
    assert not np.array_equal(kernel, cells.kernel)


def test_stats_survive_the_way_as_plain_values():
    stats = read(some_cells())
    values = stats.as_dict()
    assert TileStats.from_dict(values) == stats
    assert {type(value) for value in values.values()} <= {int, float, str}


# --- sums


def a_run() -> RunStats:
    return RunStats.of(
        "some-run",
        [
            a_tile(tile="L1/T000", layer=1, pid=4, rows_forward=50, device_time_s=0.5, last_step=9),
            a_tile(tile="L0/T001", layer=0, pid=2, rows_forward=30, device_time_s=3.0, last_step=7, updates=2),
            a_tile(tile="L0/T000", layer=0, pid=1, rows_forward=10, device_time_s=1.0, last_step=8, updates=3),
            a_tile(tile="L0/T002", layer=0, pid=3, rows_forward=20, device_time_s=2.0, last_step=8, state="restarting"),
        ],
    )


def test_layers_sum_up_their_tiles():
    first, second = a_run().layers
    assert (first.layer, first.tiles, first.rows_forward, first.updates) == (0, 3, 60, 5)
    assert (second.layer, second.tiles, second.rows_forward) == (1, 1, 50)
    assert first.states == {"idle": 2, "restarting": 1}
    assert first.last_step == 7


def test_load_imbalance_is_the_busiest_tile_over_the_mean():
    first, second = a_run().layers
    assert first.load_imbalance == 30 / 20
    assert second.load_imbalance == 1.0
    assert a_run().total.load_imbalance is None


def test_load_imbalance_counts_all_cycles():
    tiles = [
        a_tile(tile="L0/T000", layer=0, rows_forward=10, rows_backward=0, rows_update=0),
        a_tile(tile="L0/T001", layer=0, rows_forward=10, rows_backward=10, rows_update=10),
    ]
    assert RunStats.of("r", tiles).layers[0].load_imbalance == 30 / 20


def test_without_rows_there_is_no_imbalance():
    assert RunStats.of("r", [a_tile(rows_forward=0, layer=0)]).layers[0].load_imbalance is None


def test_device_time_is_the_slowest_tile_of_a_layer_and_the_sum_over_layers():
    run = a_run()
    assert [layer.device_time_s for layer in run.layers] == [3.0, 0.5]
    assert run.total.device_time_s == 3.5


def test_utilisation_of_a_layer_weighs_its_tiles_by_their_time():
    tiles = [
        a_tile(tile="L0/T000", layer=0, busy_s=1.0, waiting_s=0.0, utilisation=1.0),
        a_tile(tile="L0/T001", layer=0, busy_s=1.0, waiting_s=8.0, utilisation=1 / 9),
    ]
    assert RunStats.of("r", tiles).layers[0].utilisation == pytest.approx(0.2)


def test_tiles_of_one_process_count_its_memory_once():
    tiles = [a_tile(tile=f"L0/T{number:03}", layer=0, pid=7, resident_bytes=100) for number in range(5)]
    elsewhere = a_tile(tile="L0/T005", layer=0, pid=7, node="another", resident_bytes=10)
    assert RunStats.of("r", [*tiles, elsewhere]).total.resident_bytes == 110


def test_tiles_stand_in_the_order_of_their_names_also_beyond_a_thousand():
    names = [f"L0/T{number:03d}" for number in (999, 1000, 2)]
    run = RunStats.of("r", [a_tile(tile=name, layer=0) for name in names])
    assert [tile.tile for tile in run.tiles] == ["L0/T002", "L0/T999", "L0/T1000"]


def test_one_layer_of_a_run():
    part = a_run().only("0")
    assert [tile.tile for tile in part.tiles] == ["L0/T000", "L0/T001", "L0/T002"]
    assert (len(part.layers), part.total.tiles) == (1, 3)


def test_all_layers_of_a_run_are_the_run():
    run = a_run()
    assert run.only(None) is run


def test_a_layer_that_is_not_there_is_refused_with_those_that_are():
    with pytest.raises(UsageError, match=r"one of 0 .conv0., 1 .conv1.; not “2”"):
        a_run().only("2")


# --- sorting


def test_quantities_are_sorted_from_the_largest_down_names_upwards():
    tiles = a_run().tiles
    assert [tile.tile for tile in sort_tiles(tiles, "forward")] == ["L1/T000", "L0/T001", "L0/T002", "L0/T000"]
    assert [tile.tile for tile in sort_tiles(tiles, "tile")] == ["L0/T000", "L0/T001", "L0/T002", "L1/T000"]
    assert sort_tiles(tiles, "state")[-1].tile == "L0/T002"


@pytest.mark.parametrize("column", SORT_KEYS)
def test_every_column_can_be_sorted_by(column):
    check_sort(column)
    assert len(sort_tiles(a_run().tiles, column)) == 4


def test_a_column_that_is_not_there_is_refused_with_those_that_are():
    with pytest.raises(UsageError, match=r"--sort is one of tile, .*memory, .*; not “colour”"):
        check_sort("colour")


def test_a_tiles_process_gets_neither_torch_nor_rich_from_here():
    code = "import sys, rapa_dist.fabric.inspector; print({'torch', 'rich', 'ray'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"
