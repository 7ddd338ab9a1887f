"""Mini-batches against a slow, explicit reference."""

import itertools
import subprocess
import sys

import numpy as np
import pytest

from rapa_dist.data import Batches, DataSet, ImageSet, evaluation_batches
from rapa_dist.data.sets import make_dataset
from rapa_dist.streams import Purpose, stream


def _images(n: int, seed: int = 0) -> ImageSet:
    rng = np.random.default_rng(seed)
    images = rng.integers(0, 256, (n, 32, 32, 3), dtype=np.uint8)
    return ImageSet(images=images, labels=rng.integers(0, 10, n))


MEAN = np.array([0.3, 0.5, 0.7], dtype=np.float32)


def _reference(images: ImageSet, batch_size: int, seed: int, epoch: int, augment: bool):
    n = len(images)
    steps = -(-n // batch_size)
    order = stream(seed, Purpose.SHUFFLE, epoch).permutation(n)
    for step in range(steps):
        rows = order[step * batch_size : (step + 1) * batch_size]
        draws = stream(seed, Purpose.AUGMENT, epoch * steps + step)
        mirrored = draws.random(len(rows)) < 0.5
        shifts = draws.uniform(-0.05, 0.05, len(rows)).astype(np.float32)
        x = np.empty((len(rows), 32, 32, 3), dtype=np.float32)
        for i, row in enumerate(rows):
            image = images.images[row]
            if augment and mirrored[i]:
                image = image[:, ::-1]
            for channel in range(3):
                x[i, :, :, channel] = image[:, :, channel].astype(np.float32) / np.float32(255) - MEAN[channel]
            if augment:
                x[i] += shifts[i]
        yield x, images.labels[rows]


@pytest.mark.parametrize("augment", [False, True])
@pytest.mark.parametrize("batch_size", [1, 4, 23, 50])
def test_epochs_equal_the_reference(batch_size: int, augment: bool) -> None:
    images = _images(23)
    batches = Batches(images, MEAN, batch_size=batch_size, seed=5, augment=augment)
    for epoch in (0, 3):
        expected = list(_reference(images, batch_size, 5, epoch, augment))
        got = list(batches.epoch(epoch))
        assert len(got) == len(expected) == len(batches)
        for (x, labels), (x_expected, labels_expected) in zip(got, expected, strict=True):
            assert x.dtype == np.float32
            assert labels.dtype == np.int64
            assert x.flags.c_contiguous
            np.testing.assert_array_equal(x, x_expected)
            np.testing.assert_array_equal(labels, labels_expected)


def test_a_later_first_step_gives_the_rest() -> None:
    batches = Batches(_images(25), MEAN, batch_size=4, seed=1, augment=True)
    whole, rest = list(batches.epoch(2)), list(batches.epoch(2, first_step=3))
    assert len(whole) == 7
    assert len(rest) == 4
    for (x, labels), (x_expected, labels_expected) in zip(rest, whole[3:], strict=True):
        assert np.array_equal(x, x_expected)
        assert np.array_equal(labels, labels_expected)
    assert list(batches.epoch(0, first_step=7)) == []


def test_every_image_once_an_epoch_and_another_order_in_the_next() -> None:
    images = ImageSet(images=_images(30).images, labels=np.arange(30))
    batches = Batches(images, MEAN, batch_size=7, seed=0, augment=True)
    orders = [np.concatenate([labels for _, labels in batches.epoch(epoch)]) for epoch in (0, 1)]
    assert all(sorted(order) == list(range(30)) for order in orders)
    assert not np.array_equal(*orders)


def test_augmentation_mirrors_half_and_shifts_evenly() -> None:
    image = np.zeros((1, 32, 32, 3), dtype=np.uint8)
    image[:, :, :16] = 255
    images = ImageSet(images=np.repeat(image, 2000, axis=0), labels=np.zeros(2000, dtype=np.int64))
    batches = Batches(images, np.zeros(3, dtype=np.float32), batch_size=100, seed=0, augment=True)
    x = np.concatenate([x for x, _ in batches.epoch(0)])
    mirrored = x[:, 0, 0, 0] < 0.5
    assert abs(mirrored.mean() - 0.5) < 0.05
    shifts = np.where(mirrored, x[:, 0, 0, 0], x[:, 0, -1, 0])
    assert -0.05 <= shifts.min() < -0.049
    assert 0.049 < shifts.max() <= 0.05
    assert abs(shifts.mean()) < 0.003
    assert abs(shifts.std() - 0.1 / np.sqrt(12)) < 0.002
    assert abs(np.corrcoef(mirrored, shifts)[0, 1]) < 0.1


def test_batches_are_the_callers_to_keep() -> None:
    images = _images(12)
    before = images.images.copy(), images.labels.copy()
    batches = Batches(images, MEAN, batch_size=4, seed=0, augment=True)
    kept = [(x, x.copy()) for x, _ in batches.epoch(0)]
    assert all(np.array_equal(x, copy) for x, copy in kept)
    for x, labels in itertools.chain(batches.epoch(0), evaluation_batches(images, MEAN, 5)):
        x[:], labels[:] = 0, 0
    assert np.array_equal(images.images, before[0])
    assert np.array_equal(images.labels, before[1])


def test_evaluation_goes_through_all_images_in_order() -> None:
    images = _images(11)
    parts = list(evaluation_batches(images, MEAN, 4))
    assert [len(labels) for _, labels in parts] == [4, 4, 3]
    x = np.concatenate([x for x, _ in parts])
    np.testing.assert_array_equal(x, images.images.astype(np.float32) / np.float32(255) - MEAN)
    np.testing.assert_array_equal(np.concatenate([labels for _, labels in parts]), images.labels)


def test_batch_sizes_below_one() -> None:
    with pytest.raises(ValueError, match="at least 1 image; got 0"):
        Batches(_images(3), MEAN, batch_size=0, seed=0, augment=False)
    with pytest.raises(ValueError, match="at least 1 image; got -1"):
        evaluation_batches(_images(3), MEAN, -1)


def test_image_sets_check_their_arrays() -> None:
    with pytest.raises(ValueError, match=r"uint8 of \(2, h, w, 1 or 3\); got uint8 of \(2, 32, 32\)"):
        ImageSet(images=np.zeros((2, 32, 32), dtype=np.uint8), labels=np.zeros(2, dtype=np.int64))
    with pytest.raises(ValueError, match="got float64"):
        ImageSet(images=np.zeros((2, 32, 32, 3)), labels=np.zeros(2, dtype=np.int64))
    with pytest.raises(ValueError, match="labels must be int64"):
        ImageSet(images=np.zeros((2, 32, 32, 3), dtype=np.uint8), labels=np.zeros(2, dtype=np.int32))


CLASSES = tuple("abcdefghij")


def _dataset(train: ImageSet, test: ImageSet) -> DataSet:
    return make_dataset("x", CLASSES, train, test)


def test_mean_and_fingerprint() -> None:
    train, test = _images(9), _images(4, seed=1)
    data = _dataset(train, test)
    assert data.mean.dtype == np.float32
    np.testing.assert_allclose(data.mean, (train.images / 255).mean(axis=(0, 1, 2)), rtol=1e-6)
    assert len(data.fingerprint) == 16
    assert data.fingerprint == _dataset(_images(9), _images(4, seed=1)).fingerprint
    other_pixel, other_label = _images(9), _images(9)
    other_pixel.images[8, 31, 31, 2] ^= 1
    other_label.labels[0] = (other_label.labels[0] + 1) % 10
    others = [_dataset(other_pixel, test), _dataset(other_label, test), _dataset(test, train), _dataset(train, train)]
    assert len({data.fingerprint, *(other.fingerprint for other in others)}) == 5


def test_datasets_check_their_labels() -> None:
    train = _images(5)
    train.labels[3] = 10
    with pytest.raises(ValueError, match="beyond its 10 classes"):
        _dataset(train, _images(2))
    with pytest.raises(ValueError, match="empty"):
        _dataset(_images(2), _images(0))


def test_importing_needs_no_torch() -> None:
    code = "import sys, rapa_dist.data; print(sorted({'torch', 'torchvision', 'ray', 'scipy'} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60)
    assert done.stdout.strip() == "[]"
