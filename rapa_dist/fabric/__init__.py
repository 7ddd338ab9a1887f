"""Fabrics: where the tiles live and how rows reach them.

    serial   the tiles are objects in this process          the reference
    ray      every tile is a Ray actor in its own process   the product
    batched  all tiles of a layer are one batched product   for experiments, also on a GPU

The first two give the same bits, the third is equal within rounding. `Fabric` hands out views of the memory its
tiles work on: the coordinator gathers patches straight into it, has a cycle run, and reads outputs and input
errors where they lie.
"""

from rapa_dist.fabric.base import Fabric, Tiles

FABRICS = ("ray", "serial", "batched")
"""The fabrics by their names on the command line."""

__all__ = ["FABRICS", "Fabric", "Tiles"]
