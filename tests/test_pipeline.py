"""Micro-batches: the same step whatever the cut, and tiles that have work while the coordinator has some."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch.testing import assert_close

from rapa_dist.assignment import SCHEMES, assign_random, assign_random_in_parts
from rapa_dist.config import POOLING_NAMES
from rapa_dist.coordinator.assigner import Assigner, cut
from rapa_dist.fabric.serial import SerialFabric
from rapa_dist.machine import Machine
from rapa_dist.network.draws import pooling_draws
from rapa_dist.network.model import Network, initial_digital, initial_kernels
from rapa_dist.network.pipeline import Step, classify, train
from rapa_dist.tile import Update

CHANNELS, CLASSES, IMAGES = (4, 5, 6), 7, 5
TILES = {"none": (1, 1, 1), "random": (6, 3, 1)}  # 6 and 3 divide no layer: the tiles take turns
UPDATE = Update(learning_rate=0.05, weight_decay=1e-2)


class Run:
    """A small network in training, its mini-batches cut into so many parts."""

    def __init__(self, micro_batches, scheme="random", pooling="max", fabric_class=SerialFabric, room=2 * IMAGES):
        tiles = TILES.get(scheme, (4, 4, 1))
        self.machine = Machine.build(channels=CHANNELS, tiles=tiles, perforated=scheme == "perforated")
        self.fabric = fabric_class(self.machine, room, initial_kernels(self.machine, 0))
        digital = initial_digital(self.machine, CLASSES, 0, pooling)
        self.network = Network(self.fabric, pooling=pooling, digital=digital)
        self.pooling = pooling
        self.assigner = Assigner(self.machine, scheme, seed=0)
        self.micro_batches = micro_batches

    def step(self, number):
        images, labels = a_batch(number)
        routing = self.assigner.route_training(number, IMAGES, self.micro_batches)
        draws = pooling_draws(self.machine, self.pooling, 0, number, IMAGES)
        return Step(images, labels, routing, UPDATE, draws)

    def train(self, *numbers):
        return list(train(self.network, map(self.step, numbers)))

    def weights(self):
        kernels = [torch.from_numpy(self.fabric.kernels(layer)) for layer in self.machine.layers]
        return [*kernels, *map(torch.from_numpy, self.network.digital_arrays().values())]


def a_batch(number=0):
    generator = np.random.default_rng(number)
    pixels = generator.normal(size=(IMAGES, 32, 32, 3)).astype(np.float32)
    return torch.from_numpy(pixels), torch.from_numpy(generator.integers(0, CLASSES, IMAGES))


@pytest.fixture
def make_run():
    runs = []

    def make(*arguments, **options):
        runs.append(Run(*arguments, **options))
        return runs[-1]

    yield make
    for run in runs:
        run.fabric.close()


@pytest.mark.parametrize("pooling", POOLING_NAMES)
@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("micro_batches", [2, 3, 5, 99])
def test_steps_are_the_same_within_rounding_whatever_the_cut(make_run, micro_batches, scheme, pooling):
    whole, parts = make_run(1, scheme, pooling), make_run(micro_batches, scheme, pooling)
    for (loss, *counts), (expected_loss, *expected) in zip(parts.train(0, 1, 2), whole.train(0, 1, 2), strict=True):
        assert loss == pytest.approx(expected_loss, rel=1e-5)
        assert counts == expected
    for weight, expected in zip(parts.weights(), whole.weights(), strict=True):
        assert_close(weight, expected, rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("micro_batches", [1, 2])
def test_a_step_is_the_one_that_autograd_goes_back_through(make_run, micro_batches):
    ours, theirs = make_run(micro_batches), make_run(1)
    images, labels = a_batch()
    assignments = theirs.assigner.for_training(0, IMAGES)
    scores = theirs.network(images, assignments, UPDATE)
    loss = F.cross_entropy(scores, labels)
    loss.backward()
    theirs.network.update_digital(UPDATE)
    wrong = int((scores.argmax(dim=1) != labels).sum())
    assert ours.train(0) == [(pytest.approx(loss.item(), rel=1e-6), wrong, IMAGES)]
    for weight, expected in zip(ours.weights(), theirs.weights(), strict=True):
        assert_close(weight, expected, rtol=1e-4, atol=1e-7)


def test_the_same_cut_gives_the_same_bits(make_run):
    one, other = make_run(2), make_run(2)
    assert one.train(0, 1, 2) == other.train(0, 1, 2)
    assert all(map(torch.equal, one.weights(), other.weights()))


@pytest.mark.parametrize("room", [IMAGES, 2 * IMAGES - 1, 2 * IMAGES, 9 * IMAGES])
@pytest.mark.parametrize("micro_batches", [1, 2, 3])
def test_steps_that_overlap_have_the_bits_of_steps_by_themselves(make_run, micro_batches, room):
    """The next step begins before the one before it has ended, if there is memory for both."""
    together, alone = make_run(micro_batches, room=room), make_run(micro_batches)
    assert together.train(0, 1, 2, 3) == [result for number in range(4) for result in alone.train(number)]
    assert all(map(torch.equal, together.weights(), alone.weights()))


@pytest.mark.parametrize("room", [5, 7, 10])
@pytest.mark.parametrize("sizes", [(5, 2, 5, 3), (2, 5), (1, 5, 1)])
def test_mini_batches_of_different_sizes_do_not_get_into_each_others_way(make_run, sizes, room):
    together, alone = make_run(2, room=room), make_run(2)

    def steps(run):
        for number, size in enumerate(sizes):
            images, labels = a_batch(number)
            yield Step(images[:size], labels[:size], run.assigner.route_training(number, size, 2), UPDATE)

    expected = [result for step in steps(alone) for result in train(alone.network, [step])]
    assert list(train(together.network, steps(together))) == expected
    assert all(map(torch.equal, together.weights(), alone.weights()))


def test_leaving_in_the_middle_leaves_nothing_under_way(make_run):
    run, undisturbed = make_run(2, fabric_class=Recorder), make_run(2)
    training = train(run.network, map(run.step, range(9)))
    next(training)
    training.close()
    begun = {cycle for what, cycle in run.fabric.events if what != "wait"}
    waited = {cycle for what, cycle in run.fabric.events if what == "wait"}
    assert begun == waited
    undisturbed.train(0)
    assert all(map(torch.equal, run.weights(), undisturbed.weights())), "the next step has only looked ahead"


@pytest.mark.parametrize("micro_batches", [1, 2, 5])
def test_classifying_in_parts_gives_the_scores_of_the_whole(make_run, micro_batches):
    run = make_run(micro_batches)
    images, _ = a_batch()
    with torch.no_grad():
        expected = run.network(images, run.assigner.for_test(3, 0, IMAGES), None)
    scores = classify(run.network, images, run.assigner.route_test(3, 0, IMAGES, 0, micro_batches))
    assert_close(scores, expected, rtol=1e-4, atol=1e-5)


def what_is(fabric, cycle):
    return next(what for what, number in fabric.events if number == cycle and what != "wait")


class Recorder(SerialFabric):
    """Takes down when cycles begin and when somebody waits for them."""

    def __init__(self, *arguments):
        super().__init__(*arguments)
        self.events = []

    def begin_forward(self, layer, offsets):
        return self._note(f"forward {layer.index}", super().begin_forward(layer, offsets))

    def begin_backward(self, layer, offsets, **how):
        last = ", last" if how["commit"] else ""
        return self._note(f"backward {layer.index}{last}", super().begin_backward(layer, offsets, **how))

    def _note(self, what, cycle):
        self.events.append((what, cycle))
        return cycle

    def finish(self, cycle):
        self.events.append(("wait", cycle))


def test_while_the_coordinator_works_on_one_part_the_tiles_have_the_other(make_run):
    run = make_run(2, fabric_class=Recorder)
    run.train(0, 1, 2)
    under_way, idle_behind = {}, []
    for what, cycle in run.fabric.events:
        if what != "wait":
            under_way[cycle] = what
        elif under_way.pop(cycle, None) and not under_way:
            idle_behind.append(what_is(run.fabric, cycle))
    # in every step where the whole mini-batch has to come out of the first layer, or back to it; and at the end
    assert idle_behind == ["forward 0", "backward 1, last"] * 3 + ["backward 0, last"]


def test_only_the_last_part_puts_the_new_kernels_in_force(make_run):
    run = make_run(3, fabric_class=Recorder)
    run.train(0)
    for layer in run.machine.layers:
        mine = [what for what, _ in run.fabric.events if what.startswith(f"backward {layer.index}")]
        parts_before = [f"backward {layer.index}"] * 2 if layer.index else []  # the first layer is not cut
        assert mine == [*parts_before, f"backward {layer.index}, last"]


@pytest.mark.parametrize(("n_tiles", "n_patches"), [(4, 16), (3, 16), (7, 9), (1, 4)])
@pytest.mark.parametrize("sizes", [(5,), (3, 2), (1, 1, 3)])
def test_a_patch_goes_to_the_same_tile_however_the_mini_batch_is_cut(n_tiles, n_patches, sizes):
    def tile_of_patch(assignment):
        tiles = np.empty(assignment.n_patches, int)
        tiles[assignment.order] = np.repeat(np.arange(n_tiles), np.diff(assignment.offsets))
        return tiles

    whole = assign_random(n_tiles, n_patches, 5, np.random.default_rng(3))
    parts = assign_random_in_parts(n_tiles, n_patches, sizes, np.random.default_rng(3))
    assert [part.n_patches for part in parts] == [size * n_patches for size in sizes]
    assert np.array_equal(np.concatenate([tile_of_patch(part) for part in parts]), tile_of_patch(whole))


@pytest.mark.parametrize(
    ("images", "parts", "sizes"),
    [(10, 1, (10,)), (10, 2, (5, 5)), (10, 3, (4, 3, 3)), (3, 5, (1, 1, 1)), (1, 2, (1,)), (7, 2, (4, 3))],
)
def test_parts_differ_by_at_most_one_image(images, parts, sizes):
    assert cut(images, parts) == sizes


def test_parts_follow_each_other_without_a_gap():
    parts = Run(3).assigner.route_training(0, IMAGES, 3).parts
    assert [(part.first, part.last) for part in parts] == [(0, 2), (2, 4), (4, 5)]
