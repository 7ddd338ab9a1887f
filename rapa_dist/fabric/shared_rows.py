"""Fabrics whose tiles find their rows in an arena and are told of cycles one by one: `serial` and `ray`."""

from abc import abstractmethod
from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from rapa_dist.assignment import Assignment
from rapa_dist.fabric.arena import Arena, Lending, Place
from rapa_dist.fabric.base import Fabric
from rapa_dist.fabric.command import Way
from rapa_dist.fabric.doorbell import Cycle
from rapa_dist.fabric.in_tile_order import in_tile_order
from rapa_dist.fabric.passage import Passage
from rapa_dist.fabric.tree import Part, add_up, parts_of
from rapa_dist.geometry import Geometry
from rapa_dist.machine import Machine, TileArray
from rapa_dist.native.rows import pick_rows
from rapa_dist.tile import Matrix, Update


class SharedRowsFabric(Fabric):
    """Lends places of its arena to passages; what carries a cycle to the tiles is the subclass's business."""

    def __init__(self, machine: Machine, arena: Arena) -> None:
        super().__init__(machine)
        self.arena = arena
        """The memory that the tiles of this node share with the coordinator."""
        self._lending = Lending(len(arena.floats))

    @abstractmethod
    def begin(
        self,
        array: TileArray,
        cycle: int,
        place: Place,
        offsets: NDArray[np.int64],
        update: Update | None = None,
        way: Way | None = None,
        draw: int = 0,
    ) -> int:
        """Have every tile of an array do a cycle on its rows offsets[j] … offsets[j + 1] − 1 of a place.

        Args:
            array: whose tiles.
            cycle: flags of `Cycle`.
            place: where the rows are.
            offsets: (n_t + 1,) which rows are whose.
            update: λ and decay of a cycle with UPDATE.
            way: in a forward cycle how tiles on other nodes come by their patches.
            draw: 64-bit number of the passage, for what tiles draw.

        Returns:
            A number to `finish` the cycle with. Until then its rows belong to the tiles. Several cycles may be under
            way, on different rows; a tile does them in the order in which they were begun.
        """

    @abstractmethod
    def finish(self, cycle: int) -> None:
        """Return when a cycle that was begun is done by all tiles."""

    def here(self, array: TileArray) -> list[tuple[int, int]]:
        """Return the tiles of an array that read this arena, as runs of their places in it."""
        return [(0, array.n_tiles)]

    def from_elsewhere(self, cycle: int) -> dict[Part, Matrix]:
        """Return, by part of the tree, what other nodes have added up of the input errors of a cycle; once."""
        return {}

    def passage(self, array: TileArray, geometry: Geometry, planes: Tensor, assignment: Assignment) -> Passage:
        """Gather the patches of planes in a place of the arena."""
        return SharedRowsPassage(self, array, geometry, planes, assignment)

    @property
    def lending(self) -> Lending:
        """Who holds which place of the arena."""
        return self._lending

    def lend_anew(self) -> None:
        """Lend the whole arena again: nothing that was under way counts any more."""
        self._lending = Lending(len(self.arena.floats))

    def commit(self, arrays: Sequence[int]) -> None:
        """Have tiles put their kernels in force: an update without rows."""
        self._tell(arrays, Cycle.UPDATE | Cycle.COMMIT)

    def discard(self, arrays: Sequence[int]) -> None:
        """Have tiles forget what they have prepared."""
        self._tell(arrays, Cycle.DISCARD)

    def _tell(self, arrays: Sequence[int], cycle: int) -> None:
        under_way = []
        for index in arrays:
            array = self.machine.arrays[index]
            none = np.zeros(array.n_tiles + 1, np.int64)
            under_way.append(self.begin(array, cycle, Place(0, 0), none, Update(0.0, 0.0)))
        for number in under_way:
            self.finish(number)


class SharedRowsPassage(Passage):
    """A passage whose rows lie in the arena until its errors have come back."""

    def __init__(
        self, fabric: SharedRowsFabric, array: TileArray, geometry: Geometry, planes: Tensor, assignment: Assignment
    ) -> None:
        self._fabric, self._array, self._geometry, self._assignment = fabric, array, geometry, assignment
        self._place: Place | None = None
        self._cycle: int | None = None
        self._lending, rows = fabric.lending, assignment.rows
        self._place = place = self._lending.lend(rows, array.k, array.c_out)
        self._patches = fabric.arena.rows(place.patches, rows, array.k)
        self._outputs = fabric.arena.rows(place.outputs, rows, array.c_out)
        self._im2col = in_tile_order(geometry, planes.shape[3])
        as_array = planes.detach().to(torch.float32).contiguous().numpy()
        self._here, self._way = fabric.here(array), Way(geometry, as_array, assignment) if fabric.spread else None
        for run in self._here:
            self._im2col.gather(as_array, assignment, self._patches, *assignment.offsets[list(run)].tolist())
        self._row_of_patch: NDArray[np.int64] | None = None  # (n_patches,)
        self._begun = self._input_error = False

    def begin(self) -> None:
        """Ring the tiles, and while they work find out where every patch went."""
        if not self._begun:
            assert self._place is not None
            self._begun = True
            offsets, draw = self._assignment.offsets, self._assignment.draw
            self._cycle = self._fabric.begin(self._array, Cycle.FORWARD, self._place, offsets, way=self._way, draw=draw)
            self._way = None
        if self._row_of_patch is None:
            self.prepare()

    def prepare(self) -> None:
        """Work out where every patch went, by which outputs and input errors find their way back."""
        self._row_of_patch = self._im2col.rows_of_patches(self._assignment)

    def outputs(self, first: int = 0, last: int | None = None) -> Tensor:
        """Wait, and return the outputs in the order of the pixels."""
        self._finish()
        geometry, outputs = self._geometry, self._outputs
        assert self._row_of_patch is not None
        rows = self._row_of_patch
        if first or last is not None:
            rows = rows[first * geometry.n_patches : None if last is None else last * geometry.n_patches]
        found = torch.empty(len(rows), outputs.shape[1])
        pick_rows(outputs, rows, found.numpy())  # zeros for dropped patches
        return found.view(-1, *geometry.out, outputs.shape[1])

    def send_errors(self, errors: Tensor, update: Update | None, *, input_error: bool, commit: bool) -> None:
        """Put the errors in the place of the outputs, and ring the tiles."""
        assert self._place is not None
        of_patches = errors.detach().reshape(-1, self._outputs.shape[1]).contiguous().numpy()
        pick_rows(of_patches, self._assignment.order, self._outputs)
        cycle = Cycle.INPUT_ERROR if input_error else 0
        if update is not None:
            cycle |= Cycle.UPDATE | (Cycle.COMMIT if commit else 0)
        self._input_error = input_error
        offsets, draw = self._assignment.offsets, self._assignment.draw
        self._cycle = None
        if cycle:
            self._cycle = self._fabric.begin(self._array, cycle, self._place, offsets, update, draw=draw)

    def input_errors(self) -> Tensor | None:
        """Wait, and add the input errors up to those of the planes."""
        cycle = self._cycle
        self._finish()
        back = None
        if self._input_error:
            assert self._row_of_patch is not None
            assert cycle is not None
            back = self._add_up(cycle, self._row_of_patch)
        self.release()
        return back

    def _add_up(self, cycle: int, rows: NDArray[np.int64]) -> Tensor:
        n_tiles, patches = self._array.n_tiles, self._patches
        parts = self._fabric.from_elsewhere(cycle)
        for run in self._here:
            for part in parts_of(*run, n_tiles):
                parts[part] = self._im2col.scatter(patches, self._assignment, rows, part)
        return torch.from_numpy(add_up(parts, n_tiles))

    def _finish(self) -> None:
        cycle, self._cycle = self._cycle, None
        if cycle is not None:
            self._fabric.finish(cycle)

    def release(self) -> None:
        """Return the place to the arena, once no tile is at work on it."""
        place, self._place = self._place, None
        if place is not None:
            try:
                self._finish()
            finally:
                self._lending.take_back(place)

    def __del__(self) -> None:
        if self._cycle is None:  # else something failed, and tiles may still be at work there
            self.release()
