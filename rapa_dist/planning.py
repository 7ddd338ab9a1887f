"""Laying out a machine before it is built: tiles per layer for load balance, crossbars, and what emulating it takes."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from fractions import Fraction
from math import ceil, floor, isfinite
from typing import Any

from rapa_dist.errors import UsageError
from rapa_dist.footprint import RAY_PROCESSES, TILE_BYTES, Footprint, tiles_that_fit
from rapa_dist.geometry import Geometry
from rapa_dist.hardware import Acceleration, CycleTimes, DeviceTime, Load, even_loads, inference_time, training_time
from rapa_dist.machine import Machine, TileArray
from rapa_dist.memory import memory

_MOST = {"OUT_SIZE": 10_000, "CHANNELS_IN": 100_000, "CHANNELS_OUT": 100_000, "KERNEL": 1_000}
_MOST_TILES = 1_000_000

Network = tuple[TileArray, ...]
"""The convolutions of a network, first layer first, on one tile each."""


def _network(*shapes: tuple[int, int, int, int]) -> Network:
    return tuple(
        TileArray(
            index=index,
            name=f"conv{index}",
            k=kernel_side * kernel_side * c_in,
            c_out=c_out,
            n_tiles=1,
            passages=(_geometry(side, kernel_side),),
            input_error=index > 0,
        )
        for index, (side, c_in, c_out, kernel_side) in enumerate(shapes)
    )


def _geometry(side: int, kernel_side: int) -> Geometry:
    """Return a geometry whose output has this side: as large a plane, padded so that the kernel fits everywhere."""
    before = (kernel_side - 1) // 2
    after = kernel_side - 1 - before
    return Geometry(size=(side, side), kernel=(kernel_side, kernel_side), before=(before, before), after=(after, after))


@dataclass(frozen=True, slots=True, kw_only=True)
class Crossbar:
    """A physical array of memory cells. The default, 512 × 512, is also that of IBM's aihwkit."""

    rows: int = 512
    """Inputs."""
    columns: int = 512
    """Outputs."""

    @classmethod
    def parse(cls, text: str) -> "Crossbar":
        """Parse "512x512".

        Raises:
            UsageError: it isn't two numbers above 0.
        """
        parts = text.replace("×", "x").split("x")
        if len(parts) == 2 and all(part.isascii() and part.isdigit() and len(part) < 10 for part in parts):
            rows, columns = map(int, parts)
            if rows and columns:
                return cls(rows=rows, columns=columns)
        raise UsageError(f"--crossbar needs rows x columns, both above 0, like 512x512; it is “{text}”.")

    def grid(self, layer: TileArray) -> tuple[int, int]:
        """Return how many crossbars, down and across, hold one kernel matrix; their outputs are added digitally."""
        rows, columns = layer.kernel_shape
        return -(-rows // self.rows), -(-columns // self.columns)

    def utilisation(self, layer: TileArray) -> float:
        """Return the share of cells in use on the crossbars of one tile."""
        (rows, columns), (down, across) = layer.kernel_shape, self.grid(layer)
        return rows * columns / (down * self.rows * across * self.columns)


def parse_layers(texts: Sequence[str]) -> Network:
    """Parse layers like "55,3,96,11": pixels along one side of the output, channels in and out, kernel side.

    Raises:
        UsageError: a layer isn't four numbers that can be.
    """
    shapes = []
    for text in texts:
        parts = [part.strip() for part in text.split(",")]
        if len(parts) != len(_MOST) or not all(p.isascii() and p.isdigit() and len(p) < 10 for p in parts):
            raise UsageError(f"--layer needs {','.join(_MOST)}, four numbers like 55,3,96,11; it is “{text}”.")
        side, c_in, c_out, kernel_side = map(int, parts)
        for (name, most), value in zip(_MOST.items(), (side, c_in, c_out, kernel_side), strict=True):
            if not 1 <= value <= most:
                raise UsageError(f"--layer {text}: {name} is from 1 to {most:,}; it is {value:,}.")
        shapes.append((side, c_in, c_out, kernel_side))
    return _network(*shapes)


def balanced_tiles(patches: Sequence[int], last_tiles: int = 1) -> tuple[int, ...]:
    """Return n_t of every layer for load balance, given n_t of the last one (n_t ∝ n_p, §5 of the paper).

    Every layer gets the whole number of tiles nearest to its proportional share (at least 1; halves are rounded
    up). The layer that then has most rows per tile sets the pace, and every layer but the last gives back the
    tiles that it doesn't need to keep it. So 1024, 256, 64 patches give 16, 4, 1; and 3025, 729, 169, 169, 169
    give the paper's 17, 4, 1, 1, 1: layer 1's share is 17.9, but layer 2, with 729 / 4 rows, makes 17 enough.

    Args:
        patches: n_p of every layer.
        last_tiles: n_t of the last layer.

    Raises:
        UsageError: the last layer can't have so many tiles.
    """
    if not 1 <= last_tiles <= patches[-1]:
        raise UsageError(
            f"--last-tiles needs a number from 1 to {patches[-1]:,}, the patches of the last layer; "
            f"it is {last_tiles:,}."
        )
    share = Fraction(last_tiles, patches[-1])
    nearest = [max(1, floor(n_patches * share + Fraction(1, 2))) for n_patches in patches]
    pace = max(Fraction(n_patches, n_tiles) for n_patches, n_tiles in zip(patches, nearest, strict=True))
    return (*(ceil(n_patches / pace) for n_patches in patches[:-1]), last_tiles)


def tiles_for_acceleration(patches: Sequence[int], acceleration: float, images: int) -> tuple[int, ...]:
    """Return the fewest n_t with which the network is `acceleration` times faster than untiled, as the paper counts.

    No tile of any layer may have more rows of a mini-batch than images · max n_p / acceleration. Where n_t doesn't
    divide the rows some tiles have one row more than others, and these count.

    Args:
        patches: n_p of every layer.
        acceleration: how many times faster.
        images: images in a mini-batch.

    Raises:
        UsageError: no number of tiles gives this acceleration.
    """
    most = max(patches)
    if not (isfinite(acceleration) and 1 <= acceleration <= most):
        raise UsageError(
            f"--acceleration needs a factor from 1 to {most:,}, the patches of the largest layer; "
            f"it is {acceleration:g}."
        )
    rows = floor(images * most / Fraction(str(acceleration)))  # at least one of every image, as acceleration ≤ most
    return tuple(ceil(Fraction(images * n_patches, rows)) for n_patches in patches)


def lay_out(
    network: Network, *, last_tiles: int | None = None, acceleration: float | None = None, images: int
) -> Machine:
    """Return the machine for a wished number of tiles of the last layer (by default 1), or a wished acceleration.

    Args:
        network: its convolutions.
        last_tiles: n_t of the last layer.
        acceleration: how many times faster than untiled; it excludes `last_tiles`.
        images: images in a mini-batch, whose rows the tiles of a layer share.

    Raises:
        UsageError: both are given, or what is wished can't be had.
    """
    if last_tiles is not None and acceleration is not None:
        raise UsageError("--last-tiles and --acceleration exclude each other: each gives all numbers of tiles.")
    patches = [layer.n_patches for layer in network]
    if acceleration is not None:
        _check_at_least_one("--batch-size", images)
        tiles = tiles_for_acceleration(patches, acceleration, images)
    else:
        tiles = balanced_tiles(patches, 1 if last_tiles is None else last_tiles)
    if sum(tiles) > _MOST_TILES:
        wished = {"--last-tiles": last_tiles, "--acceleration": acceleration}
        given = [f"a smaller {option}" for option, value in wished.items() if value is not None]
        raise UsageError(
            f"That is a machine of {sum(tiles):,} tiles; up to {_MOST_TILES:,} can be planned. "
            f"Use {given[0] if given else 'layers whose sizes differ less'}."
        )
    return Machine(
        tuple(
            replace(layer, n_tiles=n_tiles, scheme="random" if n_tiles > 1 else "none")
            for layer, n_tiles in zip(network, tiles, strict=True)
        )
    )


def describe(
    machine: Machine, *, crossbar: Crossbar, cycles: CycleTimes, images: int, batch_size: int, fabric: str
) -> dict[str, Any]:
    """Return all there is to say about a machine, as plain values; every time is device time.

    Args:
        machine: the machine.
        crossbar: what its tiles are made of.
        cycles: times of its arrays.
        images: training images of an epoch.
        batch_size: images in a mini-batch.
        fabric: how it would be emulated.

    Raises:
        UsageError: `images` or `batch_size` is below 1.
    """
    _check_at_least_one("--images", images)
    _check_at_least_one("--batch-size", batch_size)
    loads = even_loads(machine, batch_size)
    training, inference = training_time(loads, cycles), inference_time(loads, cycles)
    return {
        "tiles": len(machine.tiles),
        "tiles_per_layer": [layer.n_tiles for layer in machine.arrays],
        "weights": machine.n_weights,
        "weights_untiled": sum(layer.n_weights // layer.n_tiles for layer in machine.arrays),
        "layers": [
            _describe_layer(layer, load, crossbar)
            | {
                "device_time_training_us_per_image": training.layers_ns[layer.index] / 1e3,
                "device_time_inference_us_per_image": inference.layers_ns[layer.index] / 1e3,
                "busy_percent_training": 100 * training.layers_ns[layer.index] / training.pipelined_ns,
                "busy_percent_inference": 100 * inference.layers_ns[layer.index] / inference.pipelined_ns,
            }
            for layer, load in zip(machine.arrays, loads, strict=True)
        ],
        "crossbar": asdict(crossbar),
        "crossbars": sum(layer.n_tiles * _product(crossbar.grid(layer)) for layer in machine.arrays),
        "cycle_times": asdict(cycles),
        "device_time": {
            "training": _describe_time(training, images),
            "inference": _describe_time(inference, images),
        },
        "images_per_epoch": images,
        "acceleration": asdict(Acceleration.of(loads, cycles)),
        "emulation": _describe_emulation(machine, batch_size, fabric),
    }


def _describe_layer(layer: TileArray, load: Load, crossbar: Crossbar) -> dict[str, Any]:
    return {
        "layer": layer.index,
        "name": layer.name,
        "out": list(layer.passages[0].out),
        "channels_in": layer.k // layer.passages[0].places,
        "channels_out": layer.c_out,
        "kernel": list(layer.passages[0].kernel),
        "patches_per_image": layer.n_patches,
        "tiles": layer.n_tiles,
        "kernel_shape": list(layer.kernel_shape),
        "weights": layer.n_weights,
        "crossbar_grid_per_tile": list(crossbar.grid(layer)),
        "crossbars": layer.n_tiles * _product(crossbar.grid(layer)),
        "crossbar_utilisation_percent": 100 * crossbar.utilisation(layer),
        "rows_per_tile_and_image": load.mean / load.images,
        "slowest_tile_rows_per_image": load.slowest / load.images,
        "load_imbalance": load.imbalance,
    }


def _describe_time(time: DeviceTime, images: int) -> dict[str, float]:
    return {
        "layer_by_layer_us_per_image": time.layer_by_layer_ns / 1e3,
        "pipelined_us_per_image": time.pipelined_ns / 1e3,
        "layer_by_layer_s_per_epoch": images * time.layer_by_layer_ns / 1e9,
        "pipelined_s_per_epoch": images * time.pipelined_ns / 1e9,
    }


def _describe_emulation(machine: Machine, batch_size: int, fabric: str) -> dict[str, Any]:
    """Return the processes and the memory that emulating a machine takes, beside what there is here."""
    needed, available = Footprint.of(machine, batch_size, fabric), memory().available
    actors = len(machine.tiles) if fabric == "ray" else 0
    return {
        "fabric": fabric,
        "batch_size": batch_size,
        "actors": actors,
        "processes": 1 + (actors + RAY_PROCESSES if fabric == "ray" else 0),
        "shared_memory_bytes": needed.shared,
        "tile_processes_bytes": actors * TILE_BYTES,
        "memory_bytes": needed.total,
        "memory_available_bytes": available,
        "fits": needed.total <= available,
        "tiles_that_fit": tiles_that_fit(machine, batch_size, available) if fabric == "ray" else None,
    }


def _product(grid: tuple[int, int]) -> int:
    return grid[0] * grid[1]


def _check_at_least_one(option: str, value: int) -> None:
    if value < 1:
        raise UsageError(f"{option} needs at least 1; it is {value:,}.")
