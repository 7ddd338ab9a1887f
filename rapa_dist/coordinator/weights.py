"""The weights of a network by name, and a hash by which equal ones are known."""

import hashlib
from collections.abc import Mapping, Sequence
from types import MappingProxyType

import numpy as np

from rapa_dist.tile import Matrix


def named(
    arrays: Sequence[str],
    kernels: Sequence[Matrix],
    digital: Mapping[str, Matrix],
    stored: Mapping[int, Matrix] = MappingProxyType({}),
) -> dict[str, Matrix]:
    """Return all weights of a network by the names that they have in a checkpoint.

    Args:
        arrays: names of the layers on tiles.
        kernels: one array (n_t, k + 1, c_out) for each.
        digital: the digital side's parameters and buffers.
        stored: by number of a layer what its devices store, where writing is noisy.
    """
    hidden = {stored_of(arrays[index]): of_array for index, of_array in stored.items()}
    return {kernels_of(name): of_array for name, of_array in zip(arrays, kernels, strict=True)} | hidden | dict(digital)


def kernels_of(array: str) -> str:
    """Return the name that the kernels of a layer have in a checkpoint."""
    return f"{array}.kernels"


def stored_of(array: str) -> str:
    """Return the name that what the devices of a layer store has in a checkpoint."""
    return f"{array}.stored"


def weights_sha256(weights: Mapping[str, Matrix]) -> str:
    """Return 64 hexadecimal digits that are the same for two networks if and only if all their weights have equal bits.

    Nothing else goes in: neither when and where they were trained, nor how far, nor in which order they are listed.
    """
    digest = hashlib.sha256()
    for name, value in sorted(weights.items()):
        digest.update(f"{name} {value.shape} ".encode())
        digest.update(np.ascontiguousarray(value, value.dtype.newbyteorder("<")).data)
    return digest.hexdigest()
