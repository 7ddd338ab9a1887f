"""Device time: what the emulated arrays would take. Arithmetic on counts of rows; no clock is read here.

A tile computes one matrix-vector product (MVM) after the other, each in the same time whatever its size,
and all tiles of a layer work at once: a layer takes as long as its slowest tile. In training a row costs
three cycles, forward, backward and update; the first layer's rows cost two, as nobody wants the error of
its input. What this program itself takes is wall time, and is measured elsewhere.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from fractions import Fraction

from rapa_dist.errors import UsageError
from rapa_dist.machine import Machine, TileArray


@dataclass(frozen=True, slots=True, kw_only=True)
class CycleTimes:
    """Nanoseconds that an array takes for one MVM, in each of its cycles.

    The paper gives none. The default is the 80 ns of a resistive processing unit that are commonly cited
    from Gokmen & Vlasov (2016), a figure that could not be verified here. IBM's 3D-CiM-LLM simulator
    assumes 100 ns (and 10 nJ) per MVM.

    Raises:
        UsageError: a time is no finite number above 0 (the digital side's: from 0).
    """

    forward_ns: float = 80.0
    """One row of M = I K: 80 ns (Gokmen & Vlasov 2016, not verified)."""
    backward_ns: float = 80.0
    """One row of dI = D Kᵀ: 80 ns (as above)."""
    update_ns: float = 80.0
    """One rank-one update of K. No source; taken to last as long as the others, as the paper counts."""
    digital_ns: float = 0.0
    """One image in one layer on the digital side, in each direction; 0 neglects it, as the paper does."""

    def __post_init__(self) -> None:
        for field in fields(self):
            value, option = getattr(self, field.name), f"--{field.name.replace('_', '-')}"
            if field.name == "digital_ns":
                if not (math.isfinite(value) and value >= 0):
                    raise UsageError(
                        f"{option} needs a time in nanoseconds, like 500, or 0 to neglect it; it is {value}."
                    )
            elif not (math.isfinite(value) and value > 0):
                raise UsageError(f"{option} needs a time above 0 in nanoseconds, like 80; it is {value}.")

    def tile_ns(self, *, forward: int = 0, backward: int = 0, update: int = 0) -> float:
        """Return the device time of one tile in ns, given the rows of its cycles as it counts them."""
        return forward * self.forward_ns + backward * self.backward_ns + update * self.update_ns


@dataclass(frozen=True, slots=True)
class Pace:
    """How long a tile holds its answer, so that it takes the time that an array would, slowed down.

    A waiting tile costs no core: as many tiles as one likes then work truly at once, on any number of cores.

    Raises:
        UsageError: the dilation is no finite number above 0.
    """

    cycles: CycleTimes
    dilation: float
    """F: an array's nanosecond takes F nanoseconds here."""

    def __post_init__(self) -> None:
        if not (math.isfinite(self.dilation) and self.dilation > 0):
            raise UsageError(
                f"--time-dilation needs a factor above 0, like 2000: how much slower than the hardware the emulation "
                f"is to run; it is {self.dilation}."
            )

    def row_ns(self, *, forward: bool = False, backward: bool = False, update: bool = False) -> float:
        """Return the nanoseconds that one row takes in a ring for these cycles."""
        return self.dilation * self.cycles.tile_ns(forward=forward, backward=backward, update=update)


@dataclass(frozen=True, slots=True, kw_only=True)
class Load:
    """The rows that the tiles of one layer compute for some images: planned, or counted by the tiles.

    Raises:
        ValueError: there are no tiles, no rows or no images.
    """

    rows: tuple[int, ...]
    """Rows of every tile: |S_j|, summed over the images."""
    images: int
    """Images that the rows belong to; tiles wait for each other after them."""
    input_error: bool
    """Whether rows have a backward cycle in training: those of the first layer have none."""

    def __post_init__(self) -> None:
        if not any(self.rows) or self.images < 1:
            raise ValueError(f"a load needs rows and images; got {self.rows} for {self.images} images")

    @classmethod
    def even(cls, array: TileArray, images: int) -> "Load":
        """Return equal shares, as scheme `random` deals them: they differ by at most one row."""
        share, extra = divmod(images * array.n_patches, array.n_tiles)
        rows = (share + 1,) * extra + (share,) * (array.n_tiles - extra)
        return cls(rows=rows, images=images, input_error=array.input_error)

    @property
    def slowest(self) -> int:
        """Rows of the tile that has most: the layer waits for it."""
        return max(self.rows)

    @property
    def mean(self) -> float:
        """Rows per tile."""
        return sum(self.rows) / len(self.rows)

    @property
    def imbalance(self) -> float:
        """How much longer the slowest tile works than the mean: max / mean, 1 if all have the same."""
        return self.slowest / self.mean

    def untiled(self) -> "Load":
        """Return the same rows on a single tile."""
        return Load(rows=(sum(self.rows),), images=self.images, input_error=self.input_error)

    def training_ns(self, cycles: CycleTimes) -> float:
        """Return the device time of the layer for all its images in training."""
        rows = self.slowest
        arrays = cycles.tile_ns(forward=rows, backward=rows if self.input_error else 0, update=rows)
        return arrays + 2 * self.images * cycles.digital_ns

    def inference_ns(self, cycles: CycleTimes) -> float:
        """Return the device time of the layer for all its images in inference."""
        return cycles.tile_ns(forward=self.slowest) + self.images * cycles.digital_ns


Loads = Sequence[Load]
"""The loads of a whole machine, first layer first."""


@dataclass(frozen=True, slots=True)
class DeviceTime:
    """Device time per image, in every layer."""

    layers_ns: tuple[float, ...]
    """One number per layer, in ns per image."""

    @property
    def layer_by_layer_ns(self) -> float:
        """Per image if one layer works at a time: the sum over the layers."""
        return sum(self.layers_ns)

    @property
    def pipelined_ns(self) -> float:
        """Per image if every layer works on another mini-batch: the slowest layer sets the pace (§5).

        The time to fill and to drain the pipeline is neglected.
        """
        return max(self.layers_ns)


def even_loads(machine: Machine, images: int) -> tuple[Load, ...]:
    """Return the loads of a machine whose tiles have equal shares of a mini-batch of `images` images."""
    return tuple(Load.even(array, images) for array in machine.arrays)


def training_time(loads: Loads, cycles: CycleTimes) -> DeviceTime:
    """Return the device time per image of training."""
    return DeviceTime(tuple(load.training_ns(cycles) / load.images for load in loads))


def inference_time(loads: Loads, cycles: CycleTimes) -> DeviceTime:
    """Return the device time per image of inference."""
    return DeviceTime(tuple(load.inference_ns(cycles) / load.images for load in loads))


def training_epoch_s(load_of: Callable[[int], Loads], images: int, batch_size: int, cycles: CycleTimes) -> float:
    """Return the device time of an epoch's training steps in s, one layer at a time, one step after the other.

    Args:
        load_of: the loads of a mini-batch of so many images.
        images: training images; the last mini-batch has what is left over.
        batch_size: images in a mini-batch.
        cycles: times of the arrays.
    """
    return _layer_by_layer_s(lambda size: training_time(load_of(size), cycles), images, batch_size)


def testing_s(load_of: Callable[[int], Loads], images: int, batch_size: int, cycles: CycleTimes) -> float:
    """Return the device time of a test in s, in the same way; its rows have forward cycles only."""
    return _layer_by_layer_s(lambda size: inference_time(load_of(size), cycles), images, batch_size)


def _layer_by_layer_s(time_of: Callable[[int], DeviceTime], images: int, batch_size: int) -> float:
    """Return the device time in s of images in batches; `time_of` returns that of an image in one of so many."""
    batches, rest = divmod(images, batch_size)
    total_ns = sum(
        count * size * time_of(size).layer_by_layer_ns
        for count, size in ((batches, batch_size), (1, rest))
        if count * size
    )
    return round(total_ns * 1e-9, 12)


@dataclass(frozen=True, slots=True, kw_only=True)
class Acceleration:
    """How much faster a machine is than the one with a single tile per layer, in five ways to count.

    For the paper's network with 16,4,1 tiles and the default cycle times they are 16, 10.7, 5.9, 16
    and 7; with 128,32,8 tiles eight times as much.
    """

    paper: float
    """Rows of the slowest layer, untiled over tiled: 1024 / 64 = 16 and 1024 / 8 = 128.

    The paper's factor: "assuming parallel execution of all analog array tiles in a layer, would execute a
    training epoch 128 times faster than the original network" (§4), pipelined "because the duration of
    computation would be identical for each of the conv layers" (§5). A row costs the same in all layers.
    """
    training_pipelined: float
    """Training, slowest layer over slowest layer. Below `paper` where the first layer is the slowest of the
    untiled machine, as its rows have two cycles and not three: 2 · 1024 / (3 · 64)."""
    training_layer_by_layer: float
    """Training, one layer at a time."""
    inference_pipelined: float
    """Inference, slowest layer over slowest layer."""
    inference_layer_by_layer: float
    """Inference, one layer at a time: (1024 + 256 + 64) / (3 · 64) = 7."""

    @classmethod
    def of(cls, loads: Loads, cycles: CycleTimes) -> "Acceleration":
        """Compare a machine with the one that computes the same rows on one tile per layer."""
        single = [load.untiled() for load in loads]
        training, training_single = training_time(loads, cycles), training_time(single, cycles)
        inference, inference_single = inference_time(loads, cycles), inference_time(single, cycles)
        return cls(
            paper=float(_slowest_rows(single) / _slowest_rows(loads)),  # rounded once: 80 asked for is not 79.99…
            training_pipelined=training_single.pipelined_ns / training.pipelined_ns,
            training_layer_by_layer=training_single.layer_by_layer_ns / training.layer_by_layer_ns,
            inference_pipelined=inference_single.pipelined_ns / inference.pipelined_ns,
            inference_layer_by_layer=inference_single.layer_by_layer_ns / inference.layer_by_layer_ns,
        )


def _slowest_rows(loads: Loads) -> Fraction:
    """Return the rows per image of the slowest tile of all."""
    return max(Fraction(load.slowest, load.images) for load in loads)
