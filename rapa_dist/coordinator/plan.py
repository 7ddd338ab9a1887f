"""What a run would take, worked out before anything is started."""

from typing import Any

from rich.table import Column, Table

from rapa_dist.config import TrainConfig
from rapa_dist.console import stdout
from rapa_dist.footprint import TILE_BYTES, Footprint
from rapa_dist.hardware import CycleTimes, training_time
from rapa_dist.layout import machine_of
from rapa_dist.router import Router, loads


def plan(config: TrainConfig, fabric: str) -> dict[str, Any]:
    """Return the machine of a run and what the emulation of it needs, as plain values."""
    machine = machine_of(config)
    layers = []
    for layer in machine.arrays:
        rows = config.batch_size * (layer.n_patches // layer.perforation)
        layers.append(
            {
                "layer": layer.index,
                "name": layer.name,
                "tiles": layer.n_tiles,
                "kernel_shape": list(layer.kernel_shape),
                "weights": layer.n_weights,
                "patches_per_image": layer.n_patches,
                "rows_per_tile_and_step": rows / layer.n_tiles,
                "bytes_per_step": 4 * rows * ((1 + layer.input_error) * layer.k + 2 * layer.c_out),
            }
        )
    needed = Footprint.of(machine, config.batch_size, fabric)
    actors = len(machine.tiles) if fabric == "ray" else 0
    of_step = loads(machine, Router(config.seed), config.batch_size, training=True)
    device_time = training_time(of_step, CycleTimes())
    return {
        "config": config.as_dict(),
        "fabric": fabric,
        "layers": layers,
        "tiles": len(machine.tiles),
        "actors": actors,
        "weights": machine.n_weights,
        "shared_memory_bytes": needed.shared,
        "tile_processes_bytes": actors * TILE_BYTES,
        "memory_bytes": needed.total,
        "bytes_per_step": sum(layer["bytes_per_step"] for layer in layers),
        "device_time_training_us_per_image": {
            "layer_by_layer": device_time.layer_by_layer_ns / 1e3,
            "pipelined": device_time.pipelined_ns / 1e3,
        },
    }


def print_plan(described: dict[str, Any]) -> None:
    """Print what `plan` returned as a table on stdout."""
    table = Table(
        Column("layer", no_wrap=True), "tiles", "kernel", "weights", "patches/image", "rows/tile and step", "MB/step"
    )
    for layer in described["layers"]:
        table.add_row(
            layer["name"],
            str(layer["tiles"]),
            "×".join(map(str, layer["kernel_shape"])),
            f"{layer['weights']:,}",
            f"{layer['patches_per_image']:,}",
            f"{layer['rows_per_tile_and_step']:,.0f}",
            f"{layer['bytes_per_step'] / 1e6:.1f}",
        )
    stdout.print(table)
    device_time = described["device_time_training_us_per_image"]
    stdout.print(
        f"{described['tiles']} tiles, {described['weights']:,} weights; fabric {described['fabric']}: "
        f"{described['actors']} actors with about {described['tile_processes_bytes'] / 1e6:,.0f} MB of their own, "
        f"{described['shared_memory_bytes'] / 1e6:,.0f} MB of shared memory, "
        f"{described['memory_bytes'] / 1e6:,.0f} MB in all with Ray and coordinator; "
        f"{described['bytes_per_step'] / 1e6:.1f} MB moved per step.\n"
        f"Device time in training: {device_time['layer_by_layer']:.4g} µs per image layer by layer, "
        f"{device_time['pipelined']:.4g} µs pipelined.\nNothing was started."
    )
