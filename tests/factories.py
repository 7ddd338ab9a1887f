"""Small machines for tests."""

from rapa_dist.demand import training_floats
from rapa_dist.geometry import Geometry
from rapa_dist.machine import TileArray

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
