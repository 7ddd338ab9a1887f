"""How much of an arena a network needs at the same time, and how many images a test may have in a batch."""

from rapa_dist.fabric.arena import place_floats
from rapa_dist.machine import Machine, TileArray

_SPARE_PLACES = 8
"""Places of the largest passage of a single image: parts round up to whole pages, and what is lent leaves gaps."""
_MOST_TEST_IMAGES = 50
_TEST_FLOATS = 20_000_000
"""What a test may have even where training needs less: larger batches are faster, up to a point."""


def training_floats(machine: Machine, images: int) -> int:
    """Return the floats that passages of a mini-batch of `images` images hold until their errors come back.

    The first tile array may gather the next mini-batch beside the one under way.
    """
    under_way = sum(_floats(array, images) for array in machine.arrays)
    return under_way + _floats(machine.arrays[0], images) + _spare(machine)


def test_images(machine: Machine, batch_size: int) -> int:
    """Return the images in a batch of a test: a function of machine and mini-batches, as the draws depend on it.

    A test needs less for an image than training, as a passage ends with its outputs; so it has more images at a time.
    """
    room = max(training_floats(machine, batch_size), _TEST_FLOATS) - _spare(machine)
    return max(1, min(_MOST_TEST_IMAGES, room // _test_floats(machine, 1)))


def arena_floats(machine: Machine, batch_size: int) -> int:
    """Return the floats of an arena for mini-batches of `batch_size` images and tests between them."""
    tested = _test_floats(machine, test_images(machine, batch_size)) + _spare(machine)
    return max(training_floats(machine, batch_size), tested)


def _test_floats(machine: Machine, images: int) -> int:
    """Return what a batch of a test holds at most: all of the first tile array's rows, and those of one other."""
    first, *others = (_floats(array, images) for array in machine.arrays)
    return first + max(others, default=0)


def _spare(machine: Machine) -> int:
    return _SPARE_PLACES * max(_floats(array, 1) for array in machine.arrays)


def _floats(array: TileArray, images: int) -> int:
    return sum(place_floats(images * geometry.n_patches, array.k, array.c_out) for geometry in array.passages)
