"""`rapa-dist scale`: what more tiles gain, measured on this machine."""

import math
import sys
import time
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any

import click

from rapa_dist.checks import parse_image
from rapa_dist.cli.output import emit, json_option, outcome
from rapa_dist.cli.types import path, text
from rapa_dist.errors import UsageError
from rapa_dist.machine import IMAGE
from rapa_dist.networks import PAPER, PRESETS, USUAL_IMAGES

_DEFAULT = ("1,1,1", "2,1,1", "4,1,1", "8,2,1", "16,4,1", "32,8,2", "64,16,4", "128,32,8")
_BALANCED = ("1", "2", "4", "8", "16")
_TURNS, _STEPS, _BUDGET_S = 5, 20, 4.0
_LONGEST_HOLD_S = 30.0  # a tile that says nothing for a minute is given up
_TABLE_WIDTH = 140  # a cut-off number is worse than a broken line


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
    "--tiles",
    multiple=True,
    metavar="N,N,N",
    help="A configuration, as for `train`; repeat it.  "
    f"[default: {'  '.join(_DEFAULT)}; for other networks {'  '.join(_BALANCED)}]",
)
@click.option(
    "--time-dilation",
    "dilations",
    type=float,
    multiple=True,
    metavar="F",
    help="Measure paced, too: tiles take the arrays' time, slowed down F times. May be repeated.",
)
@click.option("--forward-ns", type=float, default=80.0, show_default=True, help="An array's time for a forward cycle.")
@click.option("--backward-ns", type=float, default=80.0, show_default=True, help="… for a backward cycle.")
@click.option("--update-ns", type=float, default=80.0, show_default=True, help="… for an update cycle.")
@click.option("--batch-size", type=int, default=10, show_default=True, help="Images in a mini-batch.")
@click.option("--turns", type=int, default=_TURNS, show_default=True, help="Turns that each configuration has.")
@click.option(
    "--steps",
    type=int,
    default=_STEPS,
    show_default=True,
    help=f"Steps of a turn, at most; it ends after {_BUDGET_S:g} s, but with one step at least.",
)
@click.option(
    "--address",
    type=text,
    metavar="HOST:PORT",
    help="Ray cluster to use, or “local” to start one.  "
    "[default: RAY_ADDRESS, else a cluster already running here, else one started for this]",
)
@click.option("--out", type=path, metavar="DIR", help="Where to write.  [default: scaling-<utc>]")
@click.option("--details", is_flag=True, help="Also print a line for each layer and cycle.")
@json_option
def scale(
    network: str | None,
    image: str | None,
    tiles: tuple[str, ...],
    dilations: tuple[float, ...],
    forward_ns: float,
    backward_ns: float,
    update_ns: float,
    batch_size: int,
    turns: int,
    steps: int,
    address: str | None,
    out: Path | None,
    details: bool,
    as_json: bool,
) -> None:
    """Measure how much faster training steps get with more tiles, and where their time goes.

    Every tile is a Ray actor. They are started once, for the largest configuration; then the configurations
    take turns with a few training steps each, the untiled one (1,1,1) always among them. There are two ways of
    measuring, never mixed:

    \b
      compute  tiles work as fast as this machine's cores let them; more tiles than
               cores can't be faster for it
      paced    (--time-dilation F) a tile holds its answer until its rows × cycle
               time × F have passed, as an array would, slowed down F times; a
               waiting tile costs no core, so that all of them truly work at once

    A cycle's wall time is from just before the first ring to after the last answer; speed-up is the untiled
    machine's wall time over this one's, for the same layer and cycle; efficiency is speed-up / n_t. Of a
    step, the coordinator has everything outside cycles; the data plane what the tiles' work does not explain of
    the cycles (compute: the longest busy time, or all busy time / cores; paced: the longest hold); the tiles the
    rest. The real-time factor is the smallest F with an efficiency of 0.9: for the first layer's cycles, and for
    all of them.

    Writes DIR/scaling.json, with all numbers and their definitions, and DIR/scaling.svg.

    \b
    Examples:
      rapa-dist scale
      rapa-dist scale --time-dilation 2000 --time-dilation 10000
      rapa-dist scale --tiles 4,1,1 --tiles 16,4,1 --time-dilation 2000 --details
    """  # noqa: D301 — click wants the backspace itself
    plan = _plan(
        network or PAPER,
        None if image is None else parse_image("--image", image),
        tiles,
        dilations,
        {"forward_ns": forward_ns, "backward_ns": backward_ns, "update_ns": update_ns},
        batch_size,
        {"turns": turns, "steps": steps},
    )
    from rapa_dist.scaling.run import run

    folder = out or Path(time.strftime("scaling-%Y%m%dT%H%M%SZ", time.gmtime()))
    with redirect_stdout(sys.stderr):  # Ray prints its warnings to stdout
        report = run(plan, folder, address)
    with outcome(0 if report["finished"] else 130, f"What was measured is in {report['out']}."):
        if as_json:
            emit(report)
        else:
            _show(report, details)


def _plan(
    network: str,
    image: tuple[int, int, int] | None,
    tiles: tuple[str, ...],
    dilations: tuple[float, ...],
    cycle_times: dict[str, float],
    batch_size: int,
    effort: dict[str, int],
) -> Any:
    """Return what is to be measured.

    Raises:
        UsageError: a value can't work.
    """
    from rapa_dist.checks import parse_list
    from rapa_dist.config import resolve
    from rapa_dist.hardware import CycleTimes, Pace
    from rapa_dist.layout import CLASSES

    cycles = CycleTimes(**cycle_times)
    paces = tuple(Pace(cycles, dilation) for dilation in dict.fromkeys(dilations))
    for name, value in effort.items():
        if value < 1:
            raise UsageError(f"--{name} needs at least 1; it is {value}.")
    paper = network == PAPER
    lists = [parse_list("--tiles", text) for text in tiles or (_DEFAULT if paper else _BALANCED)]
    rest: dict[str, Any] = {
        "network": network,
        "image": image or USUAL_IMAGES.get(network, IMAGE),
        "classes": CLASSES,
        "batch_size": batch_size,
    }
    untiled = (1, 1, 1) if paper else (1,)
    configurations = [resolve(tiles=numbers, **rest) for numbers in dict.fromkeys((untiled, *lists))]
    if not paper:
        from rapa_dist.coordinator.learner import build

        configurations = list(dict.fromkeys(build(config).config for config in configurations))
    from rapa_dist.scaling.measure import Effort
    from rapa_dist.scaling.run import Plan

    plan = Plan(
        configurations=tuple(configurations), cycles=cycles, paces=paces, effort=Effort(budget_s=_BUDGET_S, **effort)
    )
    for pace in paces:
        if (longest_s := plan.longest_hold_s(pace)) > _LONGEST_HOLD_S:
            largest = math.floor(pace.dilation * _LONGEST_HOLD_S / longest_s)
            raise UsageError(
                f"--time-dilation {pace.dilation:,g} has a tile hold its answer for {longest_s:,.0f} s, and "
                f"{_LONGEST_HOLD_S:.0f} s are allowed. Use at most {largest:,}, a smaller --batch-size, or shorter "
                "cycle times."
            )
    return plan


def _show(report: dict[str, Any], details: bool) -> None:
    from rich.console import Console

    from rapa_dist.console import stdout

    wide = Console(highlight=False, width=max(stdout.width, _TABLE_WIDTH))
    factors = {tuple(factor["tiles"]): factor for factor in report["real_time_factors"]}
    for block in report["blocks"]:
        for table in (_table(block, factors), *([_details(block)] if details else [])):
            wide.print(table)
            wide.print()
    start = report["start"]
    stdout.print(
        f"{start['actors']} actors, up after {start['actors_up_s']:.1f} s; memory of its own: at most "
        f"{start['own_memory_per_actor_mb']['max']:.1f} MB each; {report['cores']} cores; mini-batches of "
        f"{report['batch_size']:,}\nwritten to {report['out']}",
        markup=False,
    )


def _table(block: dict[str, Any], factors: dict[tuple[int, ...], Any]) -> Any:
    from rich.table import Table

    from rapa_dist.scaling.plot import PARTS, block_title

    paced = block["mode"] == "paced" and bool(factors)
    far = any(configuration.get("network_percent") for configuration in block["configurations"])
    table = Table(
        title=block_title(block["time_dilation"]),
        title_justify="left",
        title_style="bold",
        box=None,
        pad_edge=False,
        header_style="bold",
    )
    first_name = block["configurations"][0]["layers"][0]["name"]
    names = [
        "tiles",
        "n",
        "step ms",
        f"{first_name} ms",
        "speed-up",
        "efficiency",
        "coordinator %",
        "data plane %",
        "tiles %",
    ]
    names += ["network %"] if far else []
    for name in [*names, *([f"F, {first_name}", "F, machine"] if paced else [])]:
        table.add_column(name, justify="right", no_wrap=True)
    for configuration in block["configurations"]:
        first, shares = configuration["layers"][0]["cycles"]["all"], configuration["shares_percent"]
        cells = [
            ",".join(map(str, configuration["tiles"])),
            str(configuration["step"]["wall_ms"]["n"]),
            f"{configuration['step']['wall_ms']['median']:,.1f}",
            f"{first['wall_ms']['median']:,.2f}",
            f"{first['speed_up']:.2f}",
            f"{first['efficiency']:.3f}",
            *(f"{shares[part]:.1f}" for part in PARTS),
        ]
        if far:
            cells.append(f"{configuration['network_percent']:.1f}")
        if paced:
            factor = factors.get(tuple(configuration["tiles"]))
            cells += [_factor(factor[name]) if factor else "" for name in ("first_layer", "machine")]
        table.add_row(*cells)
    return table


def _factor(found: dict[str, Any]) -> str:
    return f"{found['time_dilation']:,g}" if found["time_dilation"] is not None else "not reached"


def _details(block: dict[str, Any]) -> Any:
    from rich.table import Table

    table = Table(box=None, pad_edge=False, header_style="bold")
    names = ("tiles", "layer", "cycle", "n", "wall ms", "quartiles", "ideal ms", "speed-up", "efficiency")
    for name in (*names, "data plane ms", "busy ms: longest", "all"):
        table.add_column(name, justify="left" if name in ("layer", "cycle") else "right", no_wrap=True)
    for configuration in block["configurations"]:
        for layer in configuration["layers"]:
            for kind, cycle in layer["cycles"].items():
                if kind != "all":
                    table.add_row(*_detail(configuration, layer, kind, cycle))
    return table


def _detail(configuration: dict[str, Any], layer: dict[str, Any], kind: str, cycle: dict[str, Any]) -> list[str]:
    wall = cycle["wall_ms"]
    return [
        ",".join(map(str, configuration["tiles"])),
        layer["name"],
        kind.replace("_", " + "),
        str(wall["n"]),
        f"{wall['median']:,.2f}",
        f"{wall['q25']:,.2f} to {wall['q75']:,.2f}",
        f"{cycle['ideal_ms']:,.2f}",
        f"{cycle['speed_up']:.2f}",
        f"{cycle['efficiency']:.3f}",
        f"{cycle['data_plane_ms']['median']:,.2f}",
        f"{cycle['busy_ms']['longest']['median']:,.2f}",
        f"{cycle['busy_ms']['total']['median']:,.2f}",
    ]
