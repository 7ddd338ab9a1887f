"""The weights that a run starts from. Pure NumPy: who only wants to know them need not load PyTorch."""

import numpy as np

from rapa_dist.machine import Machine
from rapa_dist.streams import Purpose, stream
from rapa_dist.tile import Matrix


def initial_kernels(machine: Machine, seed: int) -> list[Matrix]:
    """Draw every tile's kernel independently: uniform in ±√(3 / k), biases 0 (Caffe2's Xavier)."""
    kernels = []
    for array in machine.arrays:
        kernel_of_tile = np.zeros((array.n_tiles, *array.kernel_shape), np.float32)
        bound = np.sqrt(3 / array.k)
        for tile in range(array.n_tiles):
            rng = stream(seed, Purpose.INIT, array.index, tile)
            kernel_of_tile[tile, : array.k] = rng.uniform(-bound, bound, (array.k, array.c_out))
        kernels.append(kernel_of_tile)
    return kernels


def initial_head(classes: int, features: int, seed: int, layers: int) -> Matrix:
    """Draw the fully connected layer behind `layers` tile arrays like a kernel: (classes, features); its bias is 0."""
    bound = np.sqrt(3 / features)
    weight = stream(seed, Purpose.INIT, layers).uniform(-bound, bound, (classes, features))
    return np.asarray(weight, np.float32)
