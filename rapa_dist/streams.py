"""Counter-based randomness: a stream is a function of what it is for, never of who drew before.

Because of this a run can be resumed, repeated or spread over processes without a bit changing.
"""

from enum import IntEnum
from hashlib import blake2b

import numpy as np


class Purpose(IntEnum):
    """What a stream is for. The values are part of a run's meaning: never renumber them."""

    INIT = 0  # initial kernels; index (layer, tile); the head is layer n
    ASSIGN_TRAIN = 1  # index (layer, step)
    ASSIGN_TEST = 2  # index (layer, step, first image, vote)
    ASSIGN_FIXED = 3  # index (layer,)
    SHUFFLE = 4  # index (epoch,)
    AUGMENT = 5  # index (step,)
    SUBSET = 6  # index (0 for train, 1 for test, 2 for an analysis); seeded by 0: every seed sees the same images
    BUILTIN = 7  # index (0 for train, 1 for test, image)
    POOL_TRAIN = 8  # index (layer, step)
    INIT_DIGITAL = 9  # what the modules of a network draw when they are made
    DIGITAL = 10  # index (step,): what they draw in training, dropout say


def stream(seed: int, purpose: Purpose, *index: int) -> np.random.Generator:
    """Return the generator of one purpose at one place of the run.

    Args:
        seed: the run's seed, at least 0.
        purpose: what the numbers are for.
        index: where in the run, as documented at the purpose.
    """
    sequence = np.random.SeedSequence(seed, spawn_key=(int(purpose), *index))
    return np.random.Generator(np.random.Philox(sequence))


def torch_seed(seed: int, purpose: Purpose, *index: int) -> int:
    """Return a seed for PyTorch's generator, which modules draw from that know nothing of streams; as for `stream`."""
    place = ",".join(map(str, (seed, int(purpose), *index)))
    return int.from_bytes(blake2b(place.encode(), digest_size=8).digest())
