"""The network is the paper's: against `oracle`, which is written from its page; and rows that are shared out fairly."""

import json

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from click.testing import CliRunner
from factories import initial_digital
from hypothesis import given, settings
from hypothesis import strategies as st
from learners import batch, learner, weights
from oracle import SCHEMES, Oracle, map_of
from scipy.stats import chi2

from rapa_dist.analysis.reduction import untiled
from rapa_dist.analysis.wins import count_wins
from rapa_dist.assignment import assign_perforated_in_parts, assign_random_in_parts
from rapa_dist.cli import main
from rapa_dist.config import POOLING_NAMES, resolve
from rapa_dist.coordinator.session import one_digital_thread
from rapa_dist.coordinator.trained import Trained
from rapa_dist.coordinator.trainer import initial_checkpoint
from rapa_dist.data import evaluation_batches, load_dataset
from rapa_dist.geometry import Geometry
from rapa_dist.hardware import Acceleration, CycleTimes, even_loads
from rapa_dist.initial import initial_kernels
from rapa_dist.layout import machine_of
from rapa_dist.machine import Machine, TileArray, pooled
from rapa_dist.nn.schedule import Step
from rapa_dist.planning import lay_out
from rapa_dist.router import Router
from rapa_dist.streams import Purpose, stream

CLASSES, IMAGES, STEPS = 5, 3, 20
RATE, DECAY = 0.02, 0.1
SIDES = {"small": 14, "paper": 32}
"""Of the small network all three layers have edges that hang over, and rows that the tiles do not divide."""
ONE, UNEVEN, SQUARES = (1, 1, 1), (6, 3, 2), (9, 4, 1)
TILES = {"none": ONE, "enlarged": ONE, "random": UNEVEN, "random-fixed": UNEVEN, "perforated": UNEVEN}


@pytest.fixture(autouse=True)
def _one_thread():
    with one_digital_thread():
        yield


def channels_of(scheme):
    """Few, but for `enlarged` the paper's, which are all there is to that scheme."""
    return resolve(scheme=scheme, pooling="max", **REST).channels if scheme == "enlarged" else (3, 4, 5)


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
        self.scheme = "none" if scheme == "enlarged" else scheme
        self.pooling, self.side = pooling, SIDES[size]
        self.network = {
            "tiles": TILES.get(scheme, SQUARES),
            "scheme": self.scheme,
            "channels": channels_of(scheme),
            "image": (3, self.side, self.side),
        }
        self.machine = Machine.build(**self.network)
        self.kernels = initial_kernels(self.machine, 0)
        self.digital = initial_digital(self.machine, CLASSES, 0, pooling)
        rng = np.random.default_rng(1)
        for of_layer in self.kernels:
            of_layer[:, -1] = rng.uniform(-0.1, 0.1, of_layer[:, -1].shape)  # a lost bias is seen
        self.oracle = Oracle(self.scheme, pooling, self.kernels, self.digital)

    def batch(self, number):
        return batch(number, IMAGES, side=self.side, classes=CLASSES, scale=0.5)

    def draws(self, number):
        if self.pooling != "stochastic":
            return None
        shapes = [(IMAGES, *map(pooled, array.passages[0].out), array.c_out) for array in self.machine.arrays[:-1]]
        rngs = [stream(0, Purpose.POOL_TRAIN, layer, number) for layer in range(len(shapes))]
        return [torch.from_numpy(rng.random(shape, "float32")) for rng, shape in zip(rngs, shapes, strict=True)]

    def tiles(self, purpose, *place):
        arrays = self.machine.arrays
        if self.scheme in ("none", "alternate", "image-overlap", "image-pad"):
            return [np.tile(map_of(self.scheme, one.n_tiles, one.passages[0].size[0]), IMAGES) for one in arrays]
        router = Router(0)
        assigned = [router.assign(array, array.passages[0], purpose, place, (IMAGES,)) for array in arrays]
        return [tiles_of(one, array.n_tiles) for (one,), array in zip(assigned, arrays, strict=True)]

    def train_oracle(self):
        losses = []
        for number in range(STEPS):
            tiles = self.tiles(Purpose.ASSIGN_TRAIN, number)
            losses.append(self.oracle.train(*self.batch(number), tiles, self.draws(number), RATE, DECAY))
        return losses

    def test_of_oracle(self):
        """Scores in a test, and the gradient of the loss with respect to the images that an attack goes by."""
        images, labels = self.batch(99)
        images.requires_grad_()
        scores = self.oracle.scores(images, self.tiles(Purpose.ASSIGN_TEST, STEPS, 0, 0))
        F.cross_entropy(scores, labels).backward()
        return scores.detach().numpy(), images.grad.numpy()

    def on(self, fabric, parts):
        """Train, test, and go back to the images, which changes no weight."""
        of_network = {name: value for name, value in self.network.items() if name != "image"} | {"side": self.side}
        of_network |= {"pooling": self.pooling, "classes": CLASSES, "images": IMAGES}
        start = {"kernels": self.kernels, "digital": self.digital}
        with learner(fabric, **of_network, **start, parts=parts, rate=RATE, decay=DECAY) as ours:
            steps = (Step(number, *self.batch(number), RATE) for number in range(STEPS))
            losses = [result.loss for result in ours.train(steps)]
            learnt = weights(ours)
            images, labels = self.batch(99)
            scores = ours.classify(images, (STEPS, 0, 0)).numpy()
            ours.model.requires_grad_(False)
            F.cross_entropy(ours.scores(images.requires_grad_(), (STEPS, 0, 0)), labels).backward()
            for name, weight in weights(ours).items():
                assert np.array_equal(weight, learnt[name])
            return Ended(losses, learnt, scores, images.grad.numpy())


class Ended:
    def __init__(self, losses, weights, scores, gradient):
        self.losses, self.weights, self.scores, self.gradient = losses, weights, scores, gradient


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
    np.testing.assert_allclose(ended.gradient, gradient, atol=1e-3 * abs(gradient).max())


@pytest.mark.parametrize("pooling", POOLING_NAMES)
@pytest.mark.parametrize("scheme", [*SCHEMES, "enlarged"])
def test_every_fabric_trains_the_network_of_the_paper_for_twenty_steps(scheme, pooling):
    """Training in parts and as a whole, in a test, and back to the images."""
    paper = Paper(scheme, pooling)
    losses = paper.train_oracle()
    assert_followed(paper, paper.on("serial", parts=2), losses)
    assert_followed(paper, paper.on("batched", parts=1), losses)


@pytest.mark.parametrize("pooling", POOLING_NAMES)
def test_the_same_with_planes_as_large_as_the_papers(pooling):
    paper = Paper("random", pooling, "paper")
    losses = paper.train_oracle()
    assert_followed(paper, paper.on("serial", parts=1), losses)
    assert_followed(paper, paper.on("batched", parts=1), losses)


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
    tiles = [np.zeros(10 * layer.n_patches, int) for layer in machine_of(trained.config).arrays]
    network = untiled(trained, [of_layer[0] for of_layer in trained.checkpoint.kernels])
    with torch.no_grad():
        scores = network(torch.from_numpy(pixels).permute(0, 3, 1, 2)).numpy()
        expected = oracle.scores(torch.from_numpy(pixels).permute(0, 3, 1, 2), tiles).numpy()
    assert expected.std(axis=0).min() > 1e-3
    np.testing.assert_allclose(scores, expected, atol=1e-5)


@pytest.mark.parametrize("pooling", ["max", "mixed"])
def test_wins_are_counted_in_the_papers_network(data, pooling):
    """Which window is won in the second layer depends on what stands behind the first convolution."""
    trained, oracle = trained_of(data, pooling, tiles=(4, 3, 2))
    pixels, _ = next(evaluation_batches(data.train.sample(30), trained.mean, 30))
    planes = torch.from_numpy(pixels).double().permute(0, 3, 1, 2)
    found = count_wins(trained, 30)
    assert trained.test_images >= 30
    assert found[2] is None, "an average follows"
    for layer in machine_of(trained.config).arrays[:2]:
        (assignment,) = Router(0).assign(layer, layer.passages[0], Purpose.ASSIGN_TRAIN, (0,), (30,))
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
    network = [
        TileArray(index=i, name=f"conv{i}", k=3, c_out=4, n_tiles=1, passages=(Geometry(size=(side, side)),))
        for i, side in enumerate(sides)
    ]
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
