"""The weights of a network by name, and a hash by which equal ones are known."""

import hashlib
from collections.abc import Mapping, Sequence

import numpy as np

from rapa_dist.machine import Machine
from rapa_dist.tile import Matrix


def named(machine: Machine, kernels: Sequence[Matrix], digital: Mapping[str, Matrix]) -> dict[str, Matrix]:
    """Return all weights of a network by the names that they have in a checkpoint.

    Args:
        machine: its tile arrays.
        kernels: one array (n_t, k + 1, c_out) per layer.
        digital: the digital side's parameters.
    """
    arrays = zip(machine.arrays, kernels, strict=True)
    return {f"{array.name}.kernels": of_array for array, of_array in arrays} | dict(digital)


def weights_sha256(weights: Mapping[str, Matrix]) -> str:
    """Return 64 hexadecimal digits that are the same for two networks if and only if all their weights have equal bits.

    Nothing else goes in: neither when and where they were trained, nor how far, nor in which order they are listed.
    """
    digest = hashlib.sha256()
    for name, value in sorted(weights.items()):
        digest.update(f"{name} {value.shape} ".encode())
        digest.update(np.ascontiguousarray(value, "<f4").data)
    return digest.hexdigest()
