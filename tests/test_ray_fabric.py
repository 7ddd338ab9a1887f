"""Fabric `ray` with real actors: the bits of `serial`, whatever happens to the tiles' processes."""

import os
import signal
import threading
import time
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import pytest
import torch
from factories import initial_digital
from rings import ring_bell
from rows import Rows

from rapa_dist.assignment import assign_random
from rapa_dist.cells import Word
from rapa_dist.config import resolve
from rapa_dist.coordinator.learner import learner
from rapa_dist.demand import training_floats
from rapa_dist.errors import ClusterError, NodeLostError
from rapa_dist.fabric.arena import Place
from rapa_dist.fabric.base import Fabric
from rapa_dist.fabric.cluster import NAMESPACE, connect
from rapa_dist.fabric.command import Command
from rapa_dist.fabric.doorbell import Cycle, Ring
from rapa_dist.fabric.far import FarChip
from rapa_dist.fabric.nodes import find_rooms
from rapa_dist.fabric.ray import RayFabric
from rapa_dist.fabric.registry import registrations
from rapa_dist.fabric.scratch import shared_memory_root
from rapa_dist.fabric.serial import SerialFabric
from rapa_dist.hardware import CycleTimes, Pace
from rapa_dist.initial import initial_kernels
from rapa_dist.machine import Machine
from rapa_dist.nn.schedule import Step
from rapa_dist.streams import Purpose, stream
from rapa_dist.tile import Update

pytestmark = [pytest.mark.ray, pytest.mark.timeout(240)]

MACHINE = Machine.build(channels=(8, 8, 4), tiles=(4, 2, 1))
IMAGES = 3
FLOATS = training_floats(MACHINE, IMAGES)
RUN = "some-run"
REST = {
    "dataset": None,
    "limit_train": None,
    "limit_test": None,
    "epochs": 1,
    "batch_size": IMAGES,
    "lr_decay_every": 1,
    "warmup_epochs": 0,
    "weight_decay": 1e-4,
    "augment": False,
}


@pytest.fixture(scope="module")
def restarted():
    return []


@pytest.fixture(scope="module")
def ray_fabric(restarted):
    kernels = initial_kernels(MACHINE, 0)
    cluster = connect("local", len(MACHINE.tiles))
    with RayFabric(MACHINE, FLOATS, kernels, run=RUN, cluster=cluster, on_restart=restarted.append) as fabric:
        yield fabric


@pytest.fixture(scope="module")
def serial_fabric(ray_fabric):
    """The reference; goes through the same cycles as `ray_fabric`, so it may fail only with it."""
    with SerialFabric(MACHINE, FLOATS, initial_kernels(MACHINE, 0)) as fabric:
        yield fabric


def run_cycles(fabric: Fabric, steps: Iterable[int]) -> list[np.ndarray]:
    """Run forward and backward cycles with random numbers for rows, and return all that came out."""
    out = []
    for step in steps:
        rng = np.random.default_rng(step)
        for layer in fabric.machine.arrays:
            assignment = assign_random(
                layer.n_tiles, layer.n_patches, IMAGES, stream(0, Purpose.ASSIGN_TRAIN, layer.index, step)
            )
            with Rows(fabric, layer, IMAGES * layer.n_patches) as rows:
                rows.patches[:] = rng.standard_normal(rows.patches.shape)
                rows.forward(assignment.offsets)
                out.append(rows.outputs.copy())
                rows.outputs[:] = rng.standard_normal(rows.outputs.shape) * 1e-3
                rows.backward(assignment.offsets, Update(0.05, 1e-4), input_error=layer.index > 0)
                out += [rows.patches.copy(), fabric.kernels(layer)]
    return out


def assert_same_bits(ours: list[np.ndarray], theirs: list[np.ndarray]) -> None:
    for mine, yours in zip(ours, theirs, strict=True):
        np.testing.assert_array_equal(mine, yours)


def actors(name: str = "") -> dict[str, object]:
    import ray

    names = [f"{RUN}/L{layer}/T{tile:03d}" for layer, tile in MACHINE.tiles]
    return {full: ray.get_actor(full, namespace=NAMESPACE) for full in names if name in full}


def stats(name: str = "") -> list[dict]:
    import ray

    return ray.get([actor.stats.remote() for actor in actors(name).values()], timeout=60)


def test_every_cycle_gives_the_bits_of_serial(ray_fabric, serial_fabric):
    assert_same_bits(run_cycles(ray_fabric, range(20)), run_cycles(serial_fabric, range(20)))


def test_every_tile_is_a_named_actor_in_a_process_of_its_own(ray_fabric):
    pids = {entry["pid"] for entry in stats()}
    assert len(pids) == len(MACHINE.tiles) == 7
    assert os.getpid() not in pids
    assert [entry["tile"] for entry in stats("L1/")] == ["L1/T000", "L1/T001"]


def test_no_tile_process_has_torch(ray_fabric):
    for entry in stats():
        assert "libtorch" not in Path(f"/proc/{entry['pid']}/maps").read_text()


def test_tiles_sleep_while_nobody_rings_them(ray_fabric):
    """Ray has the main thread of each wake a hundred times a second, if it is let."""

    def wake_ups():
        return sum(
            int(line.split()[1])
            for entry in entries
            for line in Path(f"/proc/{entry['pid']}/task/{entry['pid']}/status").read_text().splitlines()
            if line.startswith("voluntary_ctxt_switches")
        )

    entries = stats()
    before, started = wake_ups(), time.monotonic()
    time.sleep(1)
    per_second = (wake_ups() - before) / (time.monotonic() - started)
    assert per_second < 20 * len(entries)


def test_stats_of_a_chip_come_at_once_when_its_tiles_are_idle(ray_fabric):
    """Threads other than the doorbell's may sleep for seconds longer than they ask for."""
    import ray

    (actor,) = actors("L2/T000").values()
    ray.get(actor.chip_stats.remote(), timeout=60)  # its first call maps the cells
    started = time.monotonic()
    assert len(ray.get(actor.chip_stats.remote(), timeout=60)) == len(MACHINE.tiles)
    assert time.monotonic() - started < 3  # not four seconds for every tile


def test_stats_count_rows_and_updates(ray_fabric):
    before = stats("L0/")
    run_cycles(ray_fabric, range(0))
    layer = MACHINE.arrays[0]
    assignment = assign_random(layer.n_tiles, layer.n_patches, IMAGES, np.random.default_rng(0))
    with Rows(ray_fabric, layer, IMAGES * layer.n_patches) as rows:
        rows.forward(assignment.offsets)
    after = stats("L0/")
    rows = [now["rows_forward"] - then["rows_forward"] for now, then in zip(after, before, strict=True)]
    assert rows == np.diff(assignment.offsets).tolist()


def test_weights_of_an_actor_are_its_kernel(ray_fabric):
    import ray

    for layer in MACHINE.arrays:
        told = ray.get([a.weights.remote() for a in actors(f"/L{layer.index}/").values()], timeout=60)
        np.testing.assert_array_equal(np.stack(told), ray_fabric.kernels(layer))


def test_a_tile_answers_questions_while_it_works(ray_fabric):
    stop = threading.Event()
    layer = MACHINE.arrays[0]
    offsets = np.linspace(0, IMAGES * layer.n_patches, layer.n_tiles + 1).astype(np.int64)

    def work():
        with Rows(ray_fabric, layer, IMAGES * layer.n_patches) as rows:
            while not stop.is_set():
                rows.forward(offsets)

    worker = threading.Thread(target=work)
    worker.start()
    try:
        assert len(stats("L0/")) == layer.n_tiles
    finally:
        stop.set()
        worker.join()


def test_arena_and_doorbells_are_private(ray_fabric):
    folder = ray_fabric._chip.scratch.path
    assert folder.stat().st_mode & 0o777 == 0o700
    assert {path.stat().st_mode & 0o777 for path in folder.iterdir()} == {0o600}


@pytest.mark.parametrize("stopped", [True, False], ids=["with its ring unread", "at any moment"])
def test_a_killed_tile_changes_no_bit(ray_fabric, serial_fabric, restarted, stopped):
    """Kill tiles while cycles run: each comes back with its kernel, and the cycle is repeated."""
    known = len(restarted)
    victims = [stats("L0/T001")[0], stats("L1/T000")[0], stats("L2/T000")[0]]
    if stopped:
        for victim in victims:
            os.kill(victim["pid"], signal.SIGSTOP)  # so that its next ring finds it in the middle of a step

    def kill():
        for victim in victims:
            time.sleep(0.02)
            os.kill(victim["pid"], signal.SIGKILL)

    killer = threading.Thread(target=kill)
    killer.start()
    steps = range(100, 140) if stopped else range(200, 240)
    ours = run_cycles(ray_fabric, steps)
    killer.join()
    ours += run_cycles(ray_fabric, range(300, 301))  # for a tile that was killed after its last cycle
    assert_same_bits(ours, run_cycles(serial_fabric, [*steps, 300]))
    assert sorted(restart.tile for restart in restarted[known:]) == ["L0/T001", "L1/T000", "L2/T000"]
    assert stats("L0/T001")[0]["restarts"] == stats("L2/T000")[0]["restarts"] >= 1


def test_a_tile_does_no_cycle_before_one_that_it_missed(ray_fabric):
    chip, first = ray_fabric._chip, ray_fabric._number + 1
    words, done = chip.cells[0].words, chip.cells[0].words[Word.ANSWERED]
    missed = Ring(first, Cycle.EMPTY, 0, 0, 0, after=done)
    early = Ring(first + 1, Cycle.EMPTY, 0, 0, 0, after=first)
    ray_fabric._number += 2
    ring_bell(chip._bell, 0, early)
    time.sleep(0.3)
    assert words[Word.ANSWERED] == done
    ring_bell(chip._bell, 0, missed)
    ring_bell(chip._bell, 0, early)
    deadline = time.monotonic() + 30
    while words[Word.ANSWERED] != first + 1:
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_a_dead_ring_and_a_foreign_message_do_no_harm(ray_fabric, serial_fabric):
    import socket

    folder = ray_fabric._chip.scratch.path
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as stranger:
        for target in [*folder.glob("bell-*"), folder / "answers"]:
            stranger.sendto(b"nonsense", str(target))
    assert_same_bits(run_cycles(ray_fabric, range(400, 402)), run_cycles(serial_fabric, range(400, 402)))


def test_a_run_registers_with_an_address_that_other_nodes_know(ray_fabric, monkeypatch, tmp_path):
    cluster = ray_fabric.cluster
    known = cluster.address
    monkeypatch.setattr(cluster, "address", "127.0.0.1:" + known.rpartition(":")[2])  # as a user may write it
    ray_fabric.register(RUN, tmp_path)
    (found,) = registrations(shared_memory_root())
    assert found.address == known


@pytest.fixture
def far_chip(ray_fabric):
    """Start a chip as on another node; all of them are closed after the test."""
    import ray

    started, (room,) = [], find_rooms()

    def start(floats: int = FLOATS) -> FarChip:
        started.append(FarChip(room, f"far-{len(started)}", MACHINE, floats, ray_fabric.arena, 1))
        return started[-1]

    yield start
    ray.wait([far.close() for far in started], num_returns=len(started), timeout=30)
    for far in started:
        far.kill()


def test_a_far_chip_closes_in_the_middle_of_a_cycle_that_does_not_end(far_chip):
    import ray

    far = far_chip()
    sites = far.adopt([0])
    assert far.adopt([0]) == sites  # as in a second attempt to recover
    far.use([[(0, 0)], [], []])
    far.send(Command(1, 0, Cycle.EMPTY, Place(0, 0), 0, 75, 8), [0, 0])  # nobody is there to do it
    assert not ray.wait(far._under_way[1].references, timeout=0.5)[0]
    assert sites[0].directory.exists()
    assert ray.wait([far.close()], timeout=3)[0]
    assert not sites[0].directory.exists()


def test_what_fails_on_a_far_chip_is_told_and_its_node_is_not_taken_for_lost(far_chip):
    far, large = far_chip(), far_chip(floats=10**12)
    with pytest.raises(ClusterError, match=r"On the node .*: Too little shared memory: the run needs") as caught:
        large.adopt([0])
    assert not isinstance(caught.value, NodeLostError)
    far.adopt([0])
    with pytest.raises(ClusterError, match=r"On the node .*: KeyError: 3; "):
        far.receive(far.ask_kernels([3]))


def some_steps(fabric: Fabric, micro_batches: int, seed: int) -> list[np.ndarray]:
    """Train a network for some steps, cut into parts, and return the kernels."""
    torch.set_num_threads(1)
    machine = fabric.machine
    config = resolve(
        tiles=(4, 2, 1),
        channels=(8, 8, 4),
        pooling="average",
        micro_batches=micro_batches,
        seed=seed,
        lr=0.05,
        classes=10,
        **REST,
    )
    network = learner(config, fabric, initial_digital(machine, 10, seed), step=0)
    rng = np.random.default_rng(seed)

    def steps() -> Iterable[Step]:
        for number, size in enumerate((1, 2, 1, 2, IMAGES) * 6):
            images = rng.standard_normal((size, 3, 32, 32)).astype(np.float32)
            yield Step(number, torch.from_numpy(images), torch.from_numpy(rng.integers(0, 10, size)), 0.05)

    losses = [result.loss for result in network.train(steps())]
    return [np.array(losses), *(fabric.kernels(layer) for layer in machine.arrays)]


@pytest.mark.parametrize("micro_batches", [1, 2, 3])
def test_steps_in_parts_have_the_bits_of_serial_although_a_tile_is_killed(ray_fabric, restarted, micro_batches):
    kernels, known = initial_kernels(MACHINE, micro_batches), len(restarted)
    ray_fabric.use(MACHINE, kernels)
    victim = stats(("L0/T001", "L1/T000", "L2/T000")[micro_batches - 1])[0]
    killer = threading.Timer(0.03, os.kill, [victim["pid"], signal.SIGKILL])
    killer.start()
    ours = some_steps(ray_fabric, micro_batches, seed=micro_batches)
    killer.join()
    run_cycles(ray_fabric, range(1))  # for a tile that was killed after its last cycle
    assert [restart.tile for restart in restarted[known:]] == [victim["tile"]]
    with SerialFabric(MACHINE, FLOATS, kernels) as serial:
        assert_same_bits(ours, some_steps(serial, micro_batches, seed=micro_batches))


def test_part_of_a_machine_is_used_like_one_of_its_own(ray_fabric):
    smaller = Machine.build(channels=(8, 8, 4), tiles=(3, 1, 1))
    kernels = initial_kernels(smaller, 7)
    ray_fabric.use(smaller, kernels)
    with SerialFabric(smaller, FLOATS, kernels) as serial:
        assert_same_bits(run_cycles(ray_fabric, range(3)), run_cycles(serial, range(3)))
    with pytest.raises(ValueError, match="is not part of"):
        ray_fabric.use(Machine.build(channels=(8, 8, 4), tiles=(5, 1, 1)), kernels)


def test_tiles_that_are_paced_take_an_arrays_time_and_change_no_bit(ray_fabric):
    kernels = initial_kernels(MACHINE, 0)
    ray_fabric.use(MACHINE, kernels)
    ray_fabric.pace = Pace(CycleTimes(), 1000.0)
    layer = MACHINE.arrays[0]
    offsets = np.linspace(0, IMAGES * layer.n_patches, layer.n_tiles + 1).astype(np.int64)
    try:
        with Rows(ray_fabric, layer, IMAGES * layer.n_patches) as rows:
            started = time.monotonic()
            rows.forward(offsets)
            once = time.monotonic() - started
            started = time.monotonic()
            first, second = rows.begin(offsets), rows.begin(offsets)
            ray_fabric.finish(second)
            twice = time.monotonic() - started
            ray_fabric.finish(first)
        with SerialFabric(MACHINE, FLOATS, kernels) as serial:
            assert_same_bits(run_cycles(ray_fabric, range(2)), run_cycles(serial, range(2)))
    finally:
        ray_fabric.pace = None
    hold = max(np.diff(offsets)) * 80e-9 * 1000
    assert once >= hold  # never earlier; how much later is the machine's business
    assert twice >= 1.9 * hold  # an array does one cycle after the other
