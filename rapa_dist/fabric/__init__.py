"""Where the tiles live, and how a coordinator reaches them."""

FABRICS = ("ray", "serial", "batched")
"""The fabrics by their names on the command line."""
