"""Schedules: the same step whatever the cut and the timing, and tiles that have work while the coordinator has some."""

import random
import time
from contextlib import closing, contextmanager

import numpy as np
import pytest
import torch
from learners import batch, learner, weights
from torch.testing import assert_close

from rapa_dist.assignment import assign_random, assign_random_in_parts
from rapa_dist.config import POOLING_NAMES
from rapa_dist.coordinator.session import one_digital_thread
from rapa_dist.fabric.doorbell import Cycle
from rapa_dist.fabric.serial import SerialFabric
from rapa_dist.nn.minibatch import MiniBatch
from rapa_dist.nn.schedule import Step, cut
from rapa_dist.schemes import SCHEMES

IMAGES, RATE = 5, 0.05
TILES = {"none": (1, 1, 1), "random": (6, 3, 1)}  # 6 and 3 divide no layer: the tiles take turns


@pytest.fixture(autouse=True)
def _one_thread():
    with one_digital_thread():
        yield


def run(parts, scheme="random", pooling="max", fabric="serial"):
    return learner(fabric, tiles=TILES.get(scheme, (4, 4, 1)), scheme=scheme, pooling=pooling, parts=parts)


def steps(*numbers, sizes=None):
    for number, size in zip(numbers, sizes or (IMAGES,) * len(numbers), strict=True):
        yield Step(number, *batch(number, size), RATE)


def train(ours, *numbers, sizes=None):
    return list(ours.train(steps(*numbers, sizes=sizes)))


def trained(parts, *numbers, fabric="serial", sizes=None, **network):
    """Return results and weights after some steps, which leave no place of the arena lent."""
    with run(parts, fabric=fabric, **network) as ours:
        results = train(ours, *numbers, sizes=sizes)
        if fabric != "batched":
            assert ours.session.fabric.lending.lent == 0
        return results, weights(ours)


def assert_same_bits(one, other):
    assert one[0] == other[0]
    assert one[1].keys() == other[1].keys()
    for name, weight in one[1].items():
        assert np.array_equal(weight, other[1][name]), name


# --- cuts


@pytest.mark.parametrize(
    ("scheme", "pooling"),
    [*((scheme, "max") for scheme in SCHEMES), *(("random", pooling) for pooling in POOLING_NAMES if pooling != "max")],
)
@pytest.mark.parametrize("parts", [2, 3, 99])
def test_steps_are_the_same_within_rounding_whatever_the_cut(parts, scheme, pooling):
    results, found = trained(parts, 0, 1, 2, scheme=scheme, pooling=pooling)
    whole, expected = trained(1, 0, 1, 2, scheme=scheme, pooling=pooling)
    for (loss, *counts), (expected_loss, *expected_counts) in zip(results, whole, strict=True):
        assert loss == pytest.approx(expected_loss, rel=1e-5)
        assert counts == expected_counts
    for name, weight in found.items():
        assert_close(weight, expected[name], rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("parts", [1, 2, 5])
def test_classifying_in_parts_gives_the_scores_of_the_whole(parts):
    with run(parts) as ours:
        images, _ = batch(0)
        expected = ours.scores(images, (3, 0, 0)).detach()
        assert_close(ours.classify(images, (3, 0, 0)), expected, rtol=1e-4, atol=1e-5)
        assert ours.session.fabric.lending.lent == 0


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
    assert MiniBatch(True, (0,), cut(IMAGES, 3), 0).edges == [(0, 2), (2, 4), (4, 5)]


# --- timing


class Dawdler(SerialFabric):
    """Takes some time, another one each time, for cycles and for saying that they are done."""

    def __init__(self, *arguments):
        super().__init__(*arguments)
        self._rng = random.Random(0)

    def begin(self, *arguments, **named):
        time.sleep(self._rng.choice((0, 0, 1e-3)))
        return super().begin(*arguments, **named)

    def finish(self, cycle):
        time.sleep(self._rng.choice((0, 0, 3e-3)))
        super().finish(cycle)


@pytest.mark.parametrize("parts", [1, 2, 3])
def test_the_bits_of_a_step_do_not_depend_on_timing(parts):
    assert_same_bits(trained(parts, 0, 1, 2, fabric=Dawdler), trained(parts, 0, 1, 2))


@pytest.mark.parametrize("parts", [1, 2, 3])
@pytest.mark.parametrize("fabric", ["serial", "batched"])
def test_steps_that_overlap_have_the_bits_of_steps_by_themselves(parts, fabric):
    """The next step begins before the one before it has ended."""
    with run(parts, fabric=fabric) as alone:
        one_by_one = [result for number in range(4) for result in train(alone, number)], weights(alone)
    assert_same_bits(trained(parts, 0, 1, 2, 3, fabric=fabric), one_by_one)


@pytest.mark.parametrize("sizes", [(5, 2, 5, 3), (2, 5), (1, 5, 1)])
def test_mini_batches_of_different_sizes_do_not_get_into_each_others_way(sizes):
    numbers = range(len(sizes))
    with run(2) as alone:
        one_by_one = [train(alone, n, sizes=sizes[n : n + 1])[0] for n in numbers], weights(alone)
    assert_same_bits(trained(2, *numbers, sizes=sizes), one_by_one)


# --- what is under way


class Recorder(SerialFabric):
    """Takes down when cycles begin, when somebody waits for them, and what is begun at once."""

    def __init__(self, *arguments):
        super().__init__(*arguments)
        self.events = []

    def begin(self, array, cycle, *arguments, **named):
        number = super().begin(array, cycle, *arguments, **named)
        what = "forward" if cycle == Cycle.FORWARD else "backward"
        self.events.append((f"{what} {array.index}{', last' if cycle & Cycle.COMMIT else ''}", number))
        return number

    def finish(self, cycle):
        self.events.append(("wait", cycle))

    @contextmanager
    def together(self):
        self.events.append(("together", 0))
        yield
        self.events.append(("apart", 0))

    @property
    def begun(self):
        return {cycle: what for what, cycle in self.events if cycle and what != "wait"}

    @property
    def waited(self):
        return {cycle for what, cycle in self.events if what == "wait"}


def test_while_the_coordinator_works_on_one_part_the_tiles_have_the_other():
    with run(2, fabric=Recorder) as ours:
        train(ours, 0, 1, 2)
        fabric = ours.session.fabric
    under_way, idle_behind = set(), []
    for what, cycle in fabric.events:
        if cycle and what != "wait":
            under_way.add(cycle)
        elif cycle in under_way:
            under_way.remove(cycle)
            if not under_way:
                idle_behind.append(fabric.begun[cycle])
    # in every step where the whole mini-batch has to come out of the first layer, or back to it; and at the end
    assert idle_behind == ["forward 0", "backward 1, last"] * 3 + ["backward 0, last"]


def test_only_the_last_part_puts_the_new_kernels_in_force():
    with run(3, fabric=Recorder) as ours:
        train(ours, 0)
        begun = list(ours.session.fabric.begun.values())
    for layer in range(3):
        mine = [what for what in begun if what.startswith(f"backward {layer}")]
        parts_before = [f"backward {layer}"] * 2 if layer else []  # the first layer is not cut
        assert mine == [*parts_before, f"backward {layer}, last"]


@pytest.mark.parametrize("parts", [1, 2])
def test_the_first_cycle_of_the_next_mini_batch_goes_out_together_with_the_last_of_this_one(parts):
    with run(parts, fabric=Recorder) as ours:
        train(ours, 0, 1, 2)
        events = [what for what, _ in ours.session.fabric.events]
    edges = [number for number, what in enumerate(events) if what == "together"]
    together = [events[edge + 1 : events.index("apart", edge)] for edge in edges]
    assert together == [["backward 0, last", "forward 0"]] * 2 + [["backward 0, last"]]


@pytest.mark.parametrize("parts", [1, 2])
def test_the_next_mini_batch_is_asked_for_while_tiles_are_at_work(parts):
    under_way = []

    def counted(fabric):
        for step in steps(0, 1, 2):
            under_way.append(len(fabric.begun.keys() - fabric.waited))
            yield step

    with run(parts, fabric=Recorder) as ours:
        list(ours.train(counted(ours.session.fabric)))
    assert under_way[0] == 0
    assert all(under_way[1:])


@pytest.mark.parametrize("parts", [1, 2])
def test_a_generator_that_is_closed_early_leaves_nothing_under_way(parts):
    with run(parts, fabric=Recorder) as ours:
        with closing(ours.train(steps(*range(9)))) as training:
            result = next(training)
        fabric = ours.session.fabric
        assert fabric.begun.keys() == fabric.waited
        assert fabric.lending.lent == 0
        ended = [result], weights(ours)
        later = train(ours, 1)
        after = later, weights(ours)
    assert_same_bits(ended, trained(parts, 0))  # the next step has only looked ahead
    assert_same_bits((ended[0] + after[0], after[1]), trained(parts, 0, 1))


# --- failure


class Failing(torch.nn.Module):
    """Fails behind some module, in one part, on the way forward or backward."""

    def __init__(self, inner, part, backward):
        super().__init__()
        self.inner, self.part, self.backward, self.calls = inner, part, backward, 0

    def forward(self, planes):
        mine = self.calls == self.part
        self.calls += 1
        planes = self.inner(planes)
        if mine and not self.backward:
            raise ZeroDivisionError("mine")
        if mine:
            planes.register_hook(self._fail)
        return planes

    @staticmethod
    def _fail(errors):
        raise ZeroDivisionError("mine")


@pytest.mark.parametrize("fabric", ["serial", "batched"])
@pytest.mark.parametrize("backward", [False, True])
@pytest.mark.parametrize("part", [0, 1, 2])
def test_an_exception_in_one_part_ends_the_others_and_reaches_the_caller(part, backward, fabric):
    with run(3, fabric=fabric) as ours:
        inner = ours.model.stage1
        ours.model.stage1 = Failing(inner, part, backward)
        with pytest.raises(ZeroDivisionError, match="mine"):
            train(ours, 0, 1)
        ours.model.stage1 = inner
        ended = train(ours, 0, 1), weights(ours)
        if fabric == "serial":
            assert ours.session.fabric.lending.lent == 0
    if fabric == "serial" and backward:
        assert np.isfinite(ended[0]).all()  # the layer behind had put its new kernels in force
    else:
        assert_same_bits(ended, trained(3, 0, 1, fabric=fabric))  # what was begun has left no trace


def test_an_exception_in_a_test_leaves_nothing_under_way():
    with run(3) as ours:
        ours.model.stage1 = Failing(ours.model.stage1, 1, backward=False)
        with pytest.raises(ZeroDivisionError, match="mine"):
            ours.classify(batch(0)[0], (0, 0, 0))
        assert ours.session.fabric.lending.lent == 0


def test_an_exception_of_who_yields_the_steps_comes_when_the_steps_before_are_done():
    def some():
        yield from steps(0, 1)
        raise ZeroDivisionError("mine")

    results = []
    with run(2) as ours:
        with pytest.raises(ZeroDivisionError, match="mine"):
            results.extend(ours.train(some()))
        assert ours.session.fabric.lending.lent == 0
        ended = weights(ours)
        for result in ours.train(steps(2)):
            assert result.images == IMAGES
    whole = trained(2, 0, 1)
    assert_same_bits((whole[0], ended), whole)
