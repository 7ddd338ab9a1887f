"""`rapa-dist plan`: lay out a machine before it is built."""

from typing import Any

import click

from rapa_dist.checks import parse_image
from rapa_dist.cli.output import emit, json_option
from rapa_dist.errors import UsageError
from rapa_dist.networks import PAPER, PRESETS


@click.command()
@click.option(
    "--network",
    metavar="NAME",
    help=f"{', '.join(PRESETS)}, or package.module:factory.  [default: {PAPER}, the paper's]",
)
@click.option(
    "--image",
    metavar="CHANNELS,H,W",
    help="Shape of an image.  [default: that of the network: 3,224,224 for alexnet, 1,28,28 for lenet, else 3,32,32]",
)
@click.option(
    "--layer",
    "layers",
    metavar="OUT_SIZE,CHANNELS_IN,CHANNELS_OUT,KERNEL",
    multiple=True,
    help="Instead of a network, a convolution: pixels along one side of its output, channels, pixels along one side of "
    "the kernel. Repeat it for every layer, first layer first.",
)
@click.option("--last-tiles", type=int, metavar="N", help="Tiles n_t of the last layer.  [default: 1]")
@click.option(
    "--acceleration",
    type=float,
    metavar="F",
    help="Instead: how much faster than untiled at least, as the paper counts.",
)
@click.option("--crossbar", default="512x512", show_default=True, metavar="ROWSxCOLUMNS", help="Physical array.")
@click.option("--forward-ns", type=float, default=80.0, show_default=True, help="Device time of a forward cycle.")
@click.option("--backward-ns", type=float, default=80.0, show_default=True, help="Device time of a backward cycle.")
@click.option("--update-ns", type=float, default=80.0, show_default=True, help="Device time of an update cycle.")
@click.option(
    "--digital-ns",
    type=float,
    default=0.0,
    show_default=True,
    help="Digital side, per image and layer and direction; 0 neglects it.",
)
@click.option("--images", type=int, default=50_000, show_default=True, help="Training images in an epoch.")
@click.option("--batch-size", type=int, default=10, show_default=True, help="Images in a mini-batch.")
@click.option("--fabric", default="ray", show_default=True, metavar="NAME", help="How to emulate it: ray or serial.")
@json_option
def plan(
    network: str | None,
    image: str | None,
    layers: tuple[str, ...],
    last_tiles: int | None,
    acceleration: float | None,
    crossbar: str,
    forward_ns: float,
    backward_ns: float,
    update_ns: float,
    digital_ns: float,
    images: int,
    batch_size: int,
    fabric: str,
    as_json: bool,
) -> None:
    """Lay out a machine: tiles for load balance, crossbars, device time, and what emulating it takes.

    Times are device time: what arrays with these cycle times would take. Cycle times default to the 80 ns
    commonly cited from Gokmen & Vlasov 2016; 100 ns is what IBM's 3D-CiM-LLM simulator assumes.

    \b
    Examples:
      rapa-dist plan --last-tiles 8
      rapa-dist plan --network alexnet --crossbar 256x256
      rapa-dist plan --layer 28,1,16,5 --layer 14,16,32,5 --acceleration 10
    """  # noqa: D301 — click wants the backspace itself
    from rapa_dist.config import check_fabric
    from rapa_dist.hardware import CycleTimes
    from rapa_dist.layout import arrays_of
    from rapa_dist.planning import Crossbar, describe, lay_out, parse_layers

    if layers and network is not None:
        raise UsageError("--network and --layer exclude each other: a network is named, or given layer by layer.")
    check_fabric(fabric)
    cycles = CycleTimes(forward_ns=forward_ns, backward_ns=backward_ns, update_ns=update_ns, digital_ns=digital_ns)
    name = "given" if layers else network or PAPER
    if layers and image is not None:
        raise UsageError("--layer says how large its planes are: leave --image out, or name a --network.")
    shape = None if image is None else parse_image("--image", image)
    convolutions = parse_layers(layers) if layers else arrays_of(name, shape)
    machine = lay_out(convolutions, last_tiles=last_tiles, acceleration=acceleration, images=batch_size)
    described = {"network": name} | describe(
        machine,
        crossbar=Crossbar.parse(crossbar),
        cycles=cycles,
        images=images,
        batch_size=batch_size,
        fabric=fabric,
    )
    if as_json:
        emit(described)
    else:
        _show(described)


def _show(described: dict[str, Any]) -> None:
    from rapa_dist.console import stdout

    stdout.print(_layers_table(described))
    crossbar, emulation = described["crossbar"], described["emulation"]
    names = ", ".join(f"L{layer['layer']} {layer['name']}" for layer in described["layers"])
    stdout.print(f"layers: {names}", markup=False)
    stdout.print(
        "n_p: patches per image; used: cells of the crossbars; device time: per image in training; busy: that of the "
        "slowest layer, which sets the pace of a pipeline, is 100 %"
    )
    stdout.print(
        f"{described['tiles']:,} tiles ({','.join(map(str, described['tiles_per_layer']))}) on "
        f"{described['crossbars']:,} crossbars of {crossbar['rows']:,} × {crossbar['columns']:,}; "
        f"{described['weights']:,} weights, {described['weights_untiled']:,} without tiling\n",
        markup=False,
    )
    stdout.print(_times_table(described))
    stdout.print(
        "As the paper counts (pipelined across batches, every row alike): "
        f"{described['acceleration']['paper']:,.4g} times faster than untiled.\n",
        markup=False,
    )
    stdout.print(_emulation_line(emulation), markup=False)


def _layers_table(described: dict[str, Any]) -> Any:
    from rich.table import Table

    table = Table(box=None, pad_edge=False, collapse_padding=True, header_style="bold")
    for name in ("", "n_p", "kernel", "tiles", "weights", "crossbars", "used", "rows/tile", "device time", "busy"):
        table.add_column(name, justify="right", no_wrap=True)
    for layer in described["layers"]:
        table.add_row(
            f"L{layer['layer']}",
            f"{layer['patches_per_image']:,}",
            "×".join(f"{size:,}" for size in layer["kernel_shape"]),
            f"{layer['tiles']:,}",
            f"{layer['weights']:,}",
            f"{layer['crossbars']:,}",
            f"{layer['crossbar_utilisation_percent']:.1f} %",
            f"{layer['slowest_tile_rows_per_image']:,.5g}",
            f"{layer['device_time_training_us_per_image']:,.4g} µs",
            f"{layer['busy_percent_training']:.0f} %",
        )
    return table


def _times_table(described: dict[str, Any]) -> Any:
    from rich.table import Table

    table = Table(box=None, pad_edge=False, header_style="bold")
    table.add_column("device time")
    for name in ("per image", f"per {described['images_per_epoch']:,} images", "faster than untiled"):
        table.add_column(name, justify="right")
    for purpose in ("training", "inference"):
        times = described["device_time"][purpose]
        for way, label in (("layer_by_layer", "layer by layer"), ("pipelined", "pipelined")):
            table.add_row(
                f"{purpose}, {label}",
                f"{times[f'{way}_us_per_image']:,.4g} µs",
                f"{times[f'{way}_s_per_epoch']:,.4g} s",
                f"{described['acceleration'][f'{purpose}_{way}']:,.4g} ×",
            )
    return table


def _emulation_line(emulation: dict[str, Any]) -> str:
    needed, available = emulation["memory_bytes"] / 1e6, emulation["memory_available_bytes"] / 1e6
    line = (
        f"Emulating it (fabric {emulation['fabric']}, mini-batch {emulation['batch_size']:,}) takes "
        f"{emulation['processes']:,} process{'es' if emulation['processes'] > 1 else ''}, {emulation['actors']:,} of "
        f"them tiles, and about {needed:,.0f} MB of memory, {emulation['shared_memory_bytes'] / 1e6:,.0f} MB of it "
        f"shared; {available:,.0f} MB are available here."
    )
    if emulation["fits"]:
        return line
    if emulation["tiles_that_fit"]:
        return f"{line} That is too little: about {emulation['tiles_that_fit']:,} tiles would fit."
    return f"{line} That is too little for this network even on few tiles; use a smaller --batch-size."
