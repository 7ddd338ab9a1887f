"""The built-in set: what it promises whatever machine draws it."""

import hashlib

import numpy as np
import pytest

from rapa_dist.data import builtin
from rapa_dist.data.shapes import SHAPES


def test_shapes_and_labels() -> None:
    images = builtin.draw(builtin.TRAIN, 50)
    assert images.images.shape == (50, 32, 32, 3)
    assert images.images.dtype == np.uint8
    assert images.labels.tolist() == [i % 10 for i in range(50)]
    assert len(builtin.CLASSES) == 10


def test_an_image_does_not_depend_on_how_many_are_drawn() -> None:
    many = builtin.draw(builtin.TRAIN, 2 * builtin.CHUNK + 7)
    for n in (1, 10, 33, builtin.CHUNK, builtin.CHUNK + 1):
        few = builtin.draw(builtin.TRAIN, n)
        assert np.array_equal(few.images, many.images[:n])
        assert np.array_equal(few.labels, many.labels[:n])


def test_train_and_test_share_no_image() -> None:
    parts = [builtin.draw(part, 300).images.reshape(300, -1) for part in (builtin.TRAIN, builtin.TEST)]
    assert len(np.unique(np.concatenate(parts), axis=0)) == 600


def test_the_same_bits_on_every_machine() -> None:
    """Every operation in the drawing is rounded exactly, so these digests hold for any processor."""
    digests = [hashlib.sha256(builtin.draw(part, 240).images.data).hexdigest()[:16] for part in (0, 1)]
    assert digests == ["7403494ea8664c92", "6fdd1dd52e21bce5"]


def test_pixels_use_their_range() -> None:
    images = builtin.draw(builtin.TRAIN, 200).images
    assert images.min() == 0
    assert images.max() == 255
    assert 60 < images.mean() < 190
    assert images.std() > 40


@pytest.mark.parametrize("name", SHAPES)
def test_a_shape_is_its_own_mirror_image(name: str) -> None:
    line = (np.arange(64, dtype=np.float32) - np.float32(31.5)) / np.float32(20)
    x, y = np.meshgrid(line, line)
    distance = SHAPES[name](x, y)
    assert distance.dtype == np.float32
    np.testing.assert_allclose(distance, SHAPES[name](-x, y), atol=1e-6)


@pytest.mark.parametrize("name", SHAPES)
def test_a_shape_fills_its_radius_and_no_more(name: str) -> None:
    line = (np.arange(100, dtype=np.float32) - np.float32(49.5)) / np.float32(25)
    x, y = np.meshgrid(line, line)
    inside = SHAPES[name](x, y) < 0
    assert 0.3 < inside.sum() / 25**2 < 4
    reach = np.sqrt(x * x + y * y)[inside].max()
    assert 0.85 < reach < 1.35


def test_progress_is_told() -> None:
    told: list[tuple[int, int]] = []
    builtin.draw(builtin.TEST, builtin.CHUNK + 5, lambda done, total: told.append((done, total)))
    assert told == [(builtin.CHUNK, builtin.CHUNK + 5), (builtin.CHUNK + 5, builtin.CHUNK + 5)]
