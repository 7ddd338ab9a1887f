import math

import numpy as np
import pytest
from factories import floats_of, tile_array
from hypothesis import given
from hypothesis import strategies as st
from rows import Rows

from rapa_dist.errors import UsageError
from rapa_dist.fabric.serial import SerialFabric
from rapa_dist.hardware import (
    Acceleration,
    CycleTimes,
    DeviceTime,
    Load,
    even_loads,
    inference_time,
    training_epoch_s,
    training_time,
)
from rapa_dist.machine import Machine
from rapa_dist.router import Router, loads
from rapa_dist.schemes import SCHEMES
from rapa_dist.streams import Purpose
from rapa_dist.tile import Update

ALIKE = CycleTimes(forward_ns=80, backward_ns=80, update_ns=80)
TILINGS = [(1, 1, 1), (16, 4, 1), (128, 32, 8)]


def paper_machine(tiles, scheme="random"):
    return Machine.build(channels=(32, 32, 64), tiles=tiles, scheme=scheme)


# --- the paper's numbers


@pytest.mark.parametrize(
    ("tiles", "factors"),
    [
        ((1, 1, 1), (1, 1, 1, 1, 1)),
        ((16, 4, 1), (16, 2048 / 192, 3008 / 512, 16, 7)),
        ((128, 32, 8), (128, 2048 / 24, 3008 / 64, 128, 56)),
    ],
)
@pytest.mark.parametrize("images", [1, 10])
def test_an_epoch_is_16_and_128_times_faster_as_the_paper_says(tiles, factors, images):
    """The paper counts every row alike; layer by layer, or without the first backward cycle, it is less."""
    got = Acceleration.of(even_loads(paper_machine(tiles), images), ALIKE)
    assert got.paper == factors[0]
    assert (
        got.training_pipelined,
        got.training_layer_by_layer,
        got.inference_pipelined,
        got.inference_layer_by_layer,
    ) == pytest.approx(factors[1:])


@pytest.mark.parametrize("tiles", TILINGS[1:])
def test_every_layer_takes_the_same_time_where_tiles_are_balanced(tiles):
    """§5 of the paper; in training the first layer is done earlier, as it has no backward cycle."""
    loads = even_loads(paper_machine(tiles), 10)
    first, second, third = inference_time(loads, ALIKE).layers_ns
    assert first == second == third == 80 * 64 / (tiles[2])
    first, second, third = training_time(loads, ALIKE).layers_ns
    assert second == third == 1.5 * first


def test_device_time_per_image_of_the_papers_network():
    """16,4,1: 64 rows per tile and layer, 2 + 3 + 3 cycles of 80 ns."""
    time = training_time(even_loads(paper_machine((16, 4, 1)), 10), ALIKE)
    assert time.layer_by_layer_ns == 64 * 8 * 80
    assert time.pipelined_ns == 64 * 3 * 80


def _train(machine: Machine, steps: int, images: int) -> list[list[list[int]]]:
    """Run the cycles of some steps on real tiles; return per cycle and layer the rows that each tile counted."""
    kernels = [np.zeros((layer.n_tiles, *layer.kernel_shape), np.float32) for layer in machine.arrays]
    router = Router(seed=3)
    with SerialFabric(machine, floats_of(machine, images), kernels) as fabric:
        for step in range(steps):
            for layer in machine.arrays:
                (assignment,) = assign(router, layer, step, images)
                with Rows(fabric, layer, images * layer.n_patches) as rows:
                    rows.forward(assignment.offsets)
                    rows.backward(assignment.offsets, Update(0.1, 0.0), input_error=layer.input_error)
        stats = fabric.stats()
    cycles = ("rows_forward", "rows_backward", "rows_update")
    return [
        [[getattr(tile, cycle) for tile in stats if tile.layer == layer.index] for layer in machine.arrays]
        for cycle in cycles
    ]


def assign(router: Router, layer, step: int, images: int):
    return router.assign(layer, layer.passages[0], Purpose.ASSIGN_TRAIN, (step,), (images,))


@pytest.mark.parametrize("tiles", TILINGS)
def test_the_counts_that_tiles_keep_give_the_same_device_time_as_even_shares(tiles):
    machine, steps, images = paper_machine(tiles), 2, 2
    forward, backward, update = _train(machine, steps, images)
    assert forward == update
    counted = [
        Load(rows=tuple(rows), images=steps * images, input_error=any(back))
        for rows, back in zip(forward, backward, strict=True)
    ]
    planned = even_loads(machine, images)
    assert training_time(counted, ALIKE) == training_time(planned, ALIKE)
    assert Acceleration.of(counted, ALIKE) == Acceleration.of(planned, ALIKE)
    assert Acceleration.of(counted, ALIKE).paper == tiles[0]
    busy = [
        max(ALIKE.tile_ns(forward=f, backward=b, update=u) for f, b, u in zip(*rows, strict=True))
        for rows in zip(forward, backward, update, strict=True)
    ]
    assert busy == [load.training_ns(ALIKE) for load in counted]


@pytest.mark.parametrize("scheme", [name for name in SCHEMES if name != "none"])
@pytest.mark.parametrize("images", [1, 3])
def test_loads_of_a_scheme_are_the_rows_of_its_assignments(scheme, images):
    machine = paper_machine((9, 4, 1), scheme)
    router = Router(seed=1)
    found = loads(machine, router, images, training=True)
    for step in (0, 1):
        for load, layer in zip(found, machine.arrays, strict=True):
            (assignment,) = assign(router, layer, step, images)
            rows = np.diff(assignment.offsets).tolist()
            if scheme == "perforated":  # 1024 patches don't divide by 9: in another step it may be one row more or less
                assert abs(load.rows[0] - rows[0]) <= step
            else:  # of "random" other tiles have the extra rows
                assert list(load.rows) == rows or (scheme == "random" and sorted(load.rows) == sorted(rows))
    assert [load.input_error for load in found] == [False, True, True]
    if scheme == "random":
        even = even_loads(machine, images)
        assert [sorted(load.rows) for load in found] == [sorted(load.rows) for load in even]


def test_image_overlap_is_out_of_balance_where_the_plane_does_not_divide():
    """32 pixels in three bands are 11, 11 and 10; the largest region has 121 of 1024 pixels."""
    load = loads(paper_machine((9, 4, 1), "image-overlap"), Router(seed=0), 1, training=True)[0]
    assert load.slowest == 121
    assert load.imbalance == pytest.approx(121 * 9 / 1024)


# --- closed forms


@given(
    side=st.integers(1, 60),
    n_tiles=st.integers(1, 200),
    images=st.integers(1, 20),
    index=st.integers(0, 1),
)
def test_even_shares_cover_all_rows_and_differ_by_at_most_one(side, n_tiles, images, index):
    n_tiles = min(n_tiles, side * side)
    load = Load.even(tile_array(index, side=side, n_tiles=n_tiles), images)
    assert len(load.rows) == n_tiles
    assert sum(load.rows) == images * side * side
    assert max(load.rows) - min(load.rows) <= 1
    assert load.slowest == math.ceil(images * side * side / n_tiles)
    assert load.imbalance >= 1
    assert load.input_error == (index > 0)
    assert load.untiled().rows == (images * side * side,)


def test_the_slowest_tile_sets_the_time_of_a_layer():
    load = Load(rows=(10, 30, 20), images=2, input_error=True)
    cycles = CycleTimes(forward_ns=1, backward_ns=100, update_ns=10_000)
    assert (load.slowest, load.mean, load.imbalance) == (30, 20, 1.5)
    assert load.training_ns(cycles) == 30 * 10_101
    assert load.inference_ns(cycles) == 30
    first = Load(rows=(10, 30, 20), images=2, input_error=False)
    assert first.training_ns(cycles) == 30 * 10_001
    assert training_time([load, first], cycles) == DeviceTime((15 * 10_101.0, 15 * 10_001.0))


def test_the_digital_side_is_passed_once_in_inference_and_twice_in_training():
    cycles = CycleTimes(digital_ns=500)
    load = Load(rows=(40,), images=4, input_error=True)
    assert inference_time([load], cycles).layers_ns == (10 * 80 + 500,)
    assert training_time([load], cycles).layers_ns == (10 * 240 + 1000,)


def test_a_slow_digital_side_takes_the_acceleration_away():
    loads = even_loads(paper_machine((16, 4, 1)), 1)
    got = Acceleration.of(loads, CycleTimes(digital_ns=1e9))
    assert got.training_pipelined == pytest.approx(1, abs=1e-3)
    assert got.paper == 16


def test_layer_by_layer_is_the_sum_and_pipelined_the_slowest():
    time = DeviceTime((1.0, 4.0, 2.0))
    assert time.layer_by_layer_ns == 7.0
    assert time.pipelined_ns == 4.0


@pytest.mark.parametrize(
    ("images", "batch_size", "rows"), [(20, 10, 5 + 5), (25, 10, 5 + 5 + 3), (4, 10, 2), (3, 1, 1 + 1 + 1)]
)
def test_an_epoch_is_the_sum_over_its_steps_the_last_one_smaller(images, batch_size, rows):
    """One pixel on two tiles: a mini-batch of b images gives ⌈b · 1 / 2⌉ rows to the slower one."""
    layer = tile_array(1, side=1, n_tiles=2)
    cycles = CycleTimes(forward_ns=1, backward_ns=2, update_ns=4)
    took = training_epoch_s(lambda size: [Load.even(layer, size)], images, batch_size, cycles)
    assert took == pytest.approx(rows * 7e-9)


@pytest.mark.parametrize("factor", [1e-3, 2.0, 1e6])
def test_acceleration_does_not_depend_on_the_unit_of_time(factor):
    loads = even_loads(paper_machine((16, 4, 1)), 10)
    scaled = CycleTimes(forward_ns=80 * factor, backward_ns=80 * factor, update_ns=80 * factor)
    ours, theirs = Acceleration.of(loads, scaled), Acceleration.of(loads, ALIKE)
    assert ours.training_pipelined == pytest.approx(theirs.training_pipelined)
    assert ours.training_layer_by_layer == pytest.approx(theirs.training_layer_by_layer)


# --- what is refused


@pytest.mark.parametrize("name", ["forward_ns", "backward_ns", "update_ns"])
@pytest.mark.parametrize("value", [0, 0.0, -1.0, -80, math.nan, math.inf, -math.inf])
def test_a_cycle_time_that_is_no_time_is_refused(name, value):
    with pytest.raises(UsageError) as caught:
        CycleTimes(**{name: value})
    message = str(caught.value)
    assert f"--{name.replace('_', '-')} needs a time above 0 in nanoseconds" in message
    assert f"it is {value}." in message


@pytest.mark.parametrize("value", [-1.0, math.nan, math.inf])
def test_a_digital_time_that_is_no_time_is_refused(value):
    with pytest.raises(UsageError, match=rf"--digital-ns .* or 0 to neglect it; it is {value}\."):
        CycleTimes(digital_ns=value)


@pytest.mark.parametrize(("rows", "images"), [((), 1), ((0, 0), 1), ((3, 4), 0)])
def test_a_load_without_rows_or_images_is_refused(rows, images):
    with pytest.raises(ValueError, match="rows and images"):
        Load(rows=rows, images=images, input_error=True)
