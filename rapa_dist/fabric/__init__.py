"""Fabrics: where the tiles live and how rows reach them.

    serial   the tiles are objects in this process          the reference
    ray      every tile is a Ray actor in its own process   the product

Both give the same bits. A fabric hands out views of the memory its tiles work on: the coordinator
gathers patches straight into it, has a cycle run, and reads outputs and input errors where they lie.
"""

from rapa_dist.fabric.base import Fabric

FABRICS = ("ray", "serial")
"""The fabrics by their names on the command line."""

__all__ = ["FABRICS", "Fabric"]
