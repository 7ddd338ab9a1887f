"""Rings, given one by one."""

import numpy as np

from rapa_dist.fabric.ringing import RING, Rings


def ring(chip, rings):
    """Ring tiles of a chip, given as (tile, ring)."""
    chip.ring(Rings.of(rings))


def ring_bell(bell, tile, *rings):
    """Ring one tile by its node's bell; return whether it had no room for it."""
    return bell.ring(np.array([tile], np.uint32), [np.array([(0, *ring)], RING) for ring in rings]) is not None
