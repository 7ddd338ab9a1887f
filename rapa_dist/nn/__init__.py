"""Tiled layers as PyTorch modules, and what trains them."""
