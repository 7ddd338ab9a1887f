"""Where the patches of a mini-batch lie in the batched product of the fabric `batched`."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from rapa_dist.assignment import Assignment
from rapa_dist.machine import Layer


@dataclass(frozen=True, slots=True)
class Slots:
    """Which patch is where in the batched product. Every tile has as many slots; some may be empty."""

    patch_of_slot: Tensor
    """(tiles · width,) int64: the patch, or `n_patches` for an empty slot."""
    slot_of_patch: Tensor
    """(n_patches,) int64: the slot, or `n_slots` for a dropped patch."""
    seen: Tensor | None
    """(tiles · width, kh · kw, 1) float32: 0 where a patch must see zero; None: all is seen."""
    some_empty: bool
    """Whether there are empty slots."""
    some_dropped: bool
    """Whether there are dropped patches."""
    plain: bool
    """Whether one tile has all patches in their order: then the layer is an ordinary convolution."""

    def tensors(self) -> tuple[Tensor, ...]:
        """Return what may change from step to step."""
        return self.patch_of_slot, self.slot_of_patch


def lay_out(assignments: Sequence[Assignment], layer: Layer) -> Slots:
    """Lay the assignments of several networks side by side, each tile's rows filled up to the longest of all."""
    width = max(int(np.diff(assignment.offsets).max()) for assignment in assignments)
    n_patches, rows = assignments[0].n_patches, sum(assignment.rows for assignment in assignments)
    total = len(assignments) * n_patches
    some_empty = rows < len(assignments) * layer.n_tiles * width
    if len(assignments) == 1 and not some_empty:
        patch_of_slot = assignments[0].order
    else:
        patch_of_slot = np.full((len(assignments), layer.n_tiles, width), total, np.int64)
        for network, assignment in enumerate(assignments):
            sizes = np.diff(assignment.offsets)
            filled = np.arange(width) < sizes[:, None]  # (n_t, width)
            patch_of_slot[network][filled] = assignment.order + network * n_patches
        patch_of_slot = patch_of_slot.ravel()
    plain = len(assignments) * layer.n_tiles == 1 and np.array_equal(patch_of_slot, np.arange(total))
    slot_of_patch = np.full(total + 1, patch_of_slot.size, np.int64)
    slot_of_patch[patch_of_slot] = np.arange(patch_of_slot.size)
    mask = assignments[0].mask
    seen = None
    if mask is not None:
        padded = np.concatenate((np.tile(mask, (total // len(mask), 1)), np.ones((1, mask.shape[1]), bool)))
        seen = torch.from_numpy(padded[patch_of_slot].astype(np.float32)).unsqueeze(2)
    return Slots(
        torch.from_numpy(patch_of_slot),
        torch.from_numpy(slot_of_patch[:-1]),
        seen,
        some_empty,
        rows < total,
        plain and mask is None,
    )
