"""Small machines for tests."""

import numpy as np

from rapa_dist.config import MIXTURE_START
from rapa_dist.demand import training_floats
from rapa_dist.geometry import Geometry
from rapa_dist.initial import initial_head
from rapa_dist.machine import TileArray, pooled

IMAGES = 2


def tile_array(index=0, side=4, c_in=1, c_out=3, n_tiles=2, **rest):
    """Return the tiles of a 5 × 5 convolution, padded so that planes keep their size."""
    geometry = Geometry(size=(side, side), kernel=(5, 5), before=(2, 2), after=(2, 2))
    values = {"input_error": index > 0, "scheme": "random"} | rest
    return TileArray(
        index=index, name=f"conv{index}", k=25 * c_in, c_out=c_out, n_tiles=n_tiles, passages=(geometry,), **values
    )


def floats_of(machine, images=IMAGES):
    """Return the floats of an arena for mini-batches of so many images."""
    return training_floats(machine, images)


def features(machine):
    """Return the inputs of the fully connected layer of the paper's network."""
    last = machine.arrays[-1]
    h, w = (pooled(side) for side in last.passages[0].out)
    return h * w * last.c_out


def initial_digital(machine, classes, seed, pooling="max"):
    """Return what the digital side of the paper's network starts from, by name."""
    head = initial_head(classes, features(machine), seed, len(machine.arrays))
    mixed = machine.arrays[:-1] if pooling == "mixed" else ()
    beta = {f"stage{array.index}.beta": np.full(array.c_out, MIXTURE_START, np.float32) for array in mixed}
    return {"head.weight": head, "head.bias": np.zeros(classes, np.float32)} | beta
