"""The network is the paper's: against `oracle`, which is written from its page; and rows that are shared out fairly."""

import json

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from click.testing import CliRunner
from hypothesis import given, settings
from hypothesis import strategies as st
from oracle import SCHEMES, Oracle, map_of
from scipy.stats import chi2

from rapa_dist.analysis.reduction import count_wins, untiled
from rapa_dist.assignment import assign_perforated_in_parts, assign_random_in_parts
from rapa_dist.cli import main
from rapa_dist.config import POOLING_NAMES, resolve
from rapa_dist.coordinator.assigner import Assigner
from rapa_dist.coordinator.session import one_digital_thread
from rapa_dist.coordinator.trained import Trained
from rapa_dist.coordinator.trainer import initial_checkpoint
from rapa_dist.data import evaluation_batches, load_dataset
from rapa_dist.fabric.batched import BatchedFabric
from rapa_dist.fabric.serial import SerialFabric
from rapa_dist.hardware import Acceleration, CycleTimes, even_loads
from rapa_dist.machine import Layer, Machine
from rapa_dist.network.batched import BatchedNetwork
from rapa_dist.network.draws import pooling_draws
from rapa_dist.network.model import Network, initial_digital, initial_kernels
from rapa_dist.network.pipeline import Step
from rapa_dist.planning import lay_out
from rapa_dist.streams import Purpose, stream
from rapa_dist.tile import Update

CLASSES, IMAGES, STEPS = 5, 3, 20
RATE, DECAY = 0.02, 0.1
SIDES = {"small": (14, 7, 3), "paper": (32, 16, 8)}
"""Of the small network all three layers have edges that hang over, and rows that the tiles do not divide."""
ONE, UNEVEN, SQUARES = (1, 1, 1), (6, 3, 2), (9, 4, 1)
TILES = {"none": ONE, "enlarged": ONE, "random": UNEVEN, "random-fixed": UNEVEN, "perforated": UNEVEN}


@pytest.fixture(autouse=True)
def _one_thread():
    with one_digital_thread():
        yield


def machine_of(scheme, size="small"):
    """A network of few channels, but for `enlarged` with the paper's, which are all there is to that scheme."""
    channels = resolve(scheme=scheme, pooling="max", **REST).channels if scheme == "enlarged" else (3, 4, 5)
    tiles, c_ins = TILES.get(scheme, SQUARES), (3, *channels)
    perforated = scheme == "perforated"
    return Machine(
        tuple(
            Layer(
                index=index,
                side=SIDES[size][index],
                c_in=c_ins[index],
                c_out=channels[index],
                n_tiles=1 if perforated else tiles[index],
                perforation=tiles[index] if perforated else 1,
            )
            for index in range(3)
        )
    )


REST = {
    "dataset": None,
    "limit_train": None,
    "limit_test": None,
    "epochs": 1,
    "batch_size": 10,
    "lr_decay_every": 1,
    "warmup_epochs": 0,
    "weight_decay": 0.0,
    "augment": False,
    "seed": 0,
}


def tiles_of(assignment, n_tiles):
    tiles = np.full(assignment.n_patches, -1)
    tiles[assignment.order] = np.repeat(np.arange(n_tiles), np.diff(assignment.offsets))
    return tiles


class Paper:
    """The oracle beside a run's own draws; schemes without any follow the paper's rule."""

    def __init__(self, scheme, pooling, size="small"):
        self.pooling, self.machine = pooling, machine_of(scheme, size)
        self.scheme = "none" if scheme == "enlarged" else scheme
        self.kernels, self.digital = (
            initial_kernels(self.machine, 0),
            initial_digital(self.machine, CLASSES, 0, pooling),
        )
        rng = np.random.default_rng(1)
        for of_layer in self.kernels:
            of_layer[:, -1] = rng.uniform(-0.1, 0.1, of_layer[:, -1].shape)  # a lost bias is seen
        self.assigner = Assigner(self.machine, self.scheme, 0)
        self.oracle = Oracle(self.scheme, pooling, self.kernels, self.digital)

    def batch(self, number):
        rng = np.random.default_rng((3, number))
        side = self.machine.layers[0].side
        pixels = rng.normal(scale=0.5, size=(IMAGES, side, side, 3)).astype(np.float32)
        return torch.from_numpy(pixels), torch.from_numpy(rng.integers(0, CLASSES, IMAGES))

    def step(self, number, parts=1):
        draws = pooling_draws(self.machine, self.pooling, 0, number, IMAGES)
        routing = self.assigner.route_training(number, IMAGES, parts)
        return Step(*self.batch(number), routing, Update(RATE, DECAY), draws)

    def tiles(self, assignments):
        if self.scheme in ("none", "alternate", "image-overlap", "image-pad"):
            layers = self.machine.layers
            return [np.tile(map_of(self.scheme, layer.n_tiles, layer.side), IMAGES) for layer in layers]
        return [tiles_of(one, layer.n_tiles) for one, layer in zip(assignments, self.machine.layers, strict=True)]

    def train_oracle(self):
        losses = []
        for number in range(STEPS):
            step = self.step(number)
            tiles = self.tiles(self.assigner.for_training(number, IMAGES))
            losses.append(self.oracle.train(step.images, step.labels, tiles, step.draws, RATE, DECAY))
        return losses

    def test_of_oracle(self):
        """Scores in a test, and the gradient of the loss with respect to the images that an attack goes by."""
        images, labels = self.batch(99)
        images.requires_grad_()
        scores = self.oracle.scores(images, self.tiles(self.assigner.for_test(STEPS, 0, IMAGES)))
        F.cross_entropy(scores, labels).backward()
        return scores.detach().numpy(), images.grad.numpy()

    def on_serial(self, parts):
        with SerialFabric(self.machine, IMAGES, self.kernels) as fabric:
            network = Network(fabric, pooling=self.pooling, digital=self.digital)
            losses = [result.loss for result in network.train(self.step(n, parts) for n in range(STEPS))]
            images, labels = self.batch(99)
            scores = network.classify(images, self.assigner.route_test(STEPS, 0, IMAGES, 0, parts)).numpy()
            images.requires_grad_()
            through = network(images, self.assigner.for_test(STEPS, 0, IMAGES), None)
            F.cross_entropy(through, labels).backward()
            return Ended(losses, kernels_of(fabric) | network.digital_arrays(), scores, images.grad.numpy())

    def on_batched(self):
        fabric = BatchedFabric(self.machine, IMAGES, [self.kernels])
        network = BatchedNetwork(fabric, pooling=self.pooling, digital=[self.digital])
        losses = [result.loss for result in network.train(map(self.step, range(STEPS)))]
        scores = network.classify(self.batch(99)[0], self.assigner.route_test(STEPS, 0, IMAGES, 0, 1)).numpy()
        return Ended(losses, kernels_of(fabric) | network.digital_arrays(), scores, None)


class Ended:
    def __init__(self, losses, weights, scores, gradient):
        self.losses, self.weights, self.scores, self.gradient = losses, weights, scores, gradient


def kernels_of(fabric):
    return {f"layer {layer.index}": fabric.kernels(layer) for layer in fabric.machine.layers}


def assert_followed(paper, ended, losses):
    np.testing.assert_allclose(ended.losses, losses, rtol=1e-4)
    expected, start = paper.oracle.weights(), {f"layer {i}": kernels for i, kernels in enumerate(paper.kernels)}
    assert ended.weights.keys() == expected.keys()
    for name, weight in (start | paper.digital).items():
        learnt = abs(expected[name] - weight).max()
        assert learnt > 1e-3, name
        np.testing.assert_allclose(ended.weights[name], expected[name], atol=1e-3 * learnt, err_msg=name)
    scores, gradient = paper.test_of_oracle()
    np.testing.assert_allclose(ended.scores, scores, atol=1e-4)
    if ended.gradient is not None:
        np.testing.assert_allclose(ended.gradient, gradient, atol=1e-3 * abs(gradient).max())


@pytest.mark.parametrize("pooling", POOLING_NAMES)
@pytest.mark.parametrize("scheme", [*SCHEMES, "enlarged"])
def test_every_fabric_trains_the_network_of_the_paper_for_twenty_steps(scheme, pooling):
    """Training in parts and as a whole, in a test, and back to the images."""
    paper = Paper(scheme, pooling)
    losses = paper.train_oracle()
    assert_followed(paper, paper.on_serial(parts=2), losses)
    assert_followed(paper, paper.on_batched(), losses)


@pytest.mark.parametrize("pooling", POOLING_NAMES)
def test_the_same_with_planes_as_large_as_the_papers(pooling):
    paper = Paper("random", pooling, "paper")
    losses = paper.train_oracle()
    assert_followed(paper, paper.on_serial(parts=1), losses)
    assert_followed(paper, paper.on_batched(), losses)


@pytest.fixture(scope="module")
def data():
    return load_dataset("builtin", data_dir=None, limit_train=30, limit_test=10)


def trained_of(data, pooling, **settings):
    config = resolve(pooling=pooling, channels=(3, 4, 5), **REST | settings)
    checkpoint = initial_checkpoint(config, data)
    for kernels in checkpoint.kernels:
        kernels *= 3  # so that scores differ
    trained = Trained(path=None, name="start", checkpoint=checkpoint, data=data, same_images=True)
    return trained, Oracle(config.scheme, pooling, checkpoint.kernels, checkpoint.digital)


@pytest.mark.parametrize("pooling", POOLING_NAMES)
def test_the_untiled_network_that_a_run_is_reduced_to_is_the_papers(data, pooling):
    trained, oracle = trained_of(data, pooling, scheme="none")
    pixels, _ = next(evaluation_batches(data.test, trained.mean, 10))
    tiles = [np.zeros(10 * layer.n_patches, int) for layer in trained.config.machine.layers]
    network = untiled(trained, [of_layer[0] for of_layer in trained.checkpoint.kernels])
    with torch.no_grad():
        scores = network(torch.from_numpy(pixels).permute(0, 3, 1, 2)).numpy()
        expected = oracle.scores(torch.from_numpy(pixels), tiles).numpy()
    assert expected.std(axis=0).min() > 1e-3
    np.testing.assert_allclose(scores, expected, atol=1e-5)


@pytest.mark.parametrize("pooling", ["average", "stochastic"])
def test_wins_are_counted_in_the_papers_network(data, pooling):
    """Which window is won in the second layer depends on what stands behind the first convolution."""
    trained, oracle = trained_of(data, pooling, tiles=(4, 3, 2))
    pixels, _ = next(evaluation_batches(data.train.sample(30), trained.mean, 30))
    planes = torch.from_numpy(pixels).double().permute(0, 3, 1, 2)
    found = count_wins(trained, 30)
    assignments = trained.assigner().for_training(0, 30)
    for layer, assignment in zip(trained.config.machine.layers, assignments, strict=True):
        tiles = tiles_of(assignment, layer.n_tiles)
        with torch.no_grad():
            outputs = oracle.convolve(planes, layer.index, tiles)
            planes = oracle.behind_convolution(outputs, layer.index)
        largest, places = F.max_pool2d(outputs, 3, 2, ceil_mode=True, return_indices=True)
        winners = tiles.reshape(30, -1)[np.arange(30)[:, None, None, None], places.numpy()]
        expected = [((winners == tile) & (largest.numpy() > 0)).sum(axis=(0, 2, 3)) for tile in range(layer.n_tiles)]
        assert abs(found[layer.index] - np.array(expected)).max() <= 1  # rounding may settle a tie


# --- a plan reaches the acceleration that was asked for


def test_eighty_times_faster_is_eighty_times_faster():
    """With 80 tiles some would have 13 of ten images' rows: 76.9 times."""
    asked = ("plan", "--json", "--layer", "10,3,8,3", "--acceleration", "80")
    assert json.loads(CliRunner().invoke(main, asked).stdout)["acceleration"]["paper"] >= 80


@settings(deadline=None)
@given(st.lists(st.integers(1, 60), min_size=1, max_size=5), st.floats(0, 1), st.integers(1, 64))
def test_no_plan_falls_short_of_the_acceleration_that_was_asked_for(sides, place, images):
    network = [Layer(index=i, side=side, c_in=3, c_out=4, n_tiles=1) for i, side in enumerate(sides)]
    asked = 1 + place * (max(sides) ** 2 - 1)
    machine = lay_out(network, acceleration=asked, images=images)
    assert Acceleration.of(even_loads(machine, images), CycleTimes()).paper >= asked


# --- extra rows are dealt in turn

N_STEPS = 400
any_case = settings(max_examples=60, deadline=None)


def sizes_of(n_tiles, n_patches, images, step, purpose=Purpose.ASSIGN_TRAIN):
    """Rows of every tile in every part of a mini-batch, (parts, n_tiles)."""
    parts = assign_random_in_parts(n_tiles, n_patches, images, stream(0, purpose, 2, step))
    return np.array([np.diff(part.offsets) for part in parts])


@pytest.mark.parametrize("purpose", [Purpose.ASSIGN_TRAIN, Purpose.ASSIGN_TEST])
@pytest.mark.parametrize(("n_tiles", "n_patches"), [(48, 64), (1000, 1024), (3, 256)])
@pytest.mark.parametrize("images", [(10,), (4, 3, 3)])
def test_every_tile_gets_the_extra_rows_equally_often(n_tiles, n_patches, images, purpose):
    """In each of 400 steps of ten images; with 48 tiles the first 16 once had 14 rows in each, the others 13."""
    rows = np.array([sizes_of(n_tiles, n_patches, images, step, purpose) for step in range(N_STEPS)]).sum(axis=1)
    share, extra = divmod(10 * n_patches, n_tiles)
    assert set(np.unique(rows)) == {share, share + 1}
    assert set((rows > share).sum(axis=1)) == {extra}
    assert_uniform((rows > share).sum(axis=0), N_STEPS, extra / n_tiles)


def assert_uniform(times, steps, probability):
    """Tiles that are drawn without putting back: χ² of their counts, and no two steps alike on purpose."""
    spread = steps * probability * (1 - probability)
    statistic = ((times - steps * probability) ** 2).sum() / spread * (len(times) - 1) / len(times)
    low, high = chi2.ppf([1e-6, 1 - 1e-6], df=len(times) - 1)
    assert low < statistic < high


@pytest.mark.parametrize(("n_tiles", "n_patches"), [(48, 64), (1000, 1024)])
@pytest.mark.parametrize("image", [0, 9])
def test_every_tile_gets_the_extra_rows_of_an_image_equally_often(n_tiles, n_patches, image):
    one_by_one = (1,) * 10
    rows = np.array([sizes_of(n_tiles, n_patches, one_by_one, step)[image] for step in range(N_STEPS)])
    share, extra = divmod(n_patches, n_tiles)
    assert_uniform((rows > share).sum(axis=0), N_STEPS, extra / n_tiles)


@any_case
@given(st.integers(1, 80), st.integers(1, 80), st.lists(st.integers(1, 4), min_size=1, max_size=4), st.integers(0, 999))
def test_parts_of_an_image_and_of_a_mini_batch_differ_by_one_row_at_most_however_it_is_cut(tiles, more, images, step):
    n_patches = tiles + more
    one_by_one = sizes_of(tiles, n_patches, (1,) * sum(images), step)
    assert np.ptp(one_by_one, axis=1).max() <= 1
    assert np.ptp(one_by_one.sum(axis=0)) <= 1
    assert np.array_equal(sizes_of(tiles, n_patches, tuple(images), step).sum(axis=0), one_by_one.sum(axis=0))


@any_case
@given(st.integers(1, 80), st.integers(1, 80), st.lists(st.integers(1, 4), min_size=1, max_size=4), st.integers(0, 999))
def test_perforated_keeps_as_many_patches_as_a_tile_would_get(times, more, images, step):
    n_patches = times + more

    def kept(images):
        rng = stream(0, Purpose.ASSIGN_TRAIN, 2, step)
        return [part.rows for part in assign_perforated_in_parts(times, n_patches, images, rng)]

    one_by_one = kept((1,) * sum(images))
    assert abs(np.array(one_by_one) - n_patches / times).max() < 1
    assert abs(sum(one_by_one) - sum(images) * n_patches / times) < 1
    assert sum(kept(tuple(images))) == sum(one_by_one)


def test_perforated_keeps_its_share_in_the_mean_over_steps():
    """64 / 48 patches of an image: rounded down, a quarter of them would never be trained on."""
    rows = [
        assign_perforated_in_parts(48, 64, (1,), stream(0, Purpose.ASSIGN_TRAIN, 2, step))[0].rows
        for step in range(N_STEPS)
    ]
    assert set(rows) == {1, 2}
    assert abs(np.mean(rows) - 64 / 48) < 5 * np.sqrt(1 / 3 * 2 / 3 / N_STEPS)


def test_where_the_tiles_divide_the_rows_nothing_is_drawn_beside_the_partition():
    """Such runs, all of the paper's among them, have the bits that they had before extra rows took turns."""
    one, other = stream(0, Purpose.ASSIGN_TRAIN, 0, 7), stream(0, Purpose.ASSIGN_TRAIN, 0, 7)
    (assignment,) = assign_random_in_parts(16, 1024, (2,), one)
    pixels = other.permuted(np.tile(np.arange(1024, dtype=np.int32), (2, 1)), axis=1)
    for tile in range(16):
        expected = [image * 1024 + pixels[image, place] for image in (0, 1) for place in range(tile, 1024, 16)]
        assert assignment.order[assignment.offsets[tile] : assignment.offsets[tile + 1]].tolist() == expected
    assert one.random() == other.random()


def test_networks_whose_slots_are_all_full_share_no_graph_with_those_that_have_empty_ones():
    """Two perforated networks: as many slots, whether one of them or both have an extra row."""
    machine = Machine((Layer(index=0, side=3, c_in=3, c_out=2, n_tiles=1, perforation=2),))
    fabric = BatchedFabric(machine, 1, [initial_kernels(machine, seed) for seed in (0, 1)])
    digital = [initial_digital(machine, CLASSES, seed) for seed in (0, 1)]
    network = BatchedNetwork(fabric, pooling="max", digital=digital)
    image, label = torch.zeros(1, 3, 3, 3), torch.zeros(1, dtype=torch.int64)
    shapes = {}
    for number in range(20):
        routes = [Assigner(machine, "perforated", seed).route_training(number, 1, 1) for seed in (0, 1)]
        inputs = network._inputs([Step(image, label, route, Update(RATE, DECAY)) for route in routes])
        shapes.setdefault(tuple(sorted(route.whole.rows for route in routes)), set()).add(inputs.shape)
    assert set(shapes) == {(4, 4), (4, 5), (5, 5)}
    assert all(len(of_rows) == 1 for of_rows in shapes.values())
    assert len(set.union(*shapes.values())) == 3
