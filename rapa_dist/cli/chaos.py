"""`rapa-dist chaos`: kill, stop and interrupt a run at random, and see whether its result is the undisturbed one."""

from pathlib import Path
from typing import Any

import click

from rapa_dist.cli.output import emit, json_option, outcome
from rapa_dist.cli.types import path, text
from rapa_dist.errors import UsageError

_TILES = "4,2,1"
_KINDS = "tile-kill,tile-stop,all-tiles,coordinator-kill"


@click.command()
@click.option("--tiles", metavar="N,N,N", help=f"Tiles n_t of every layer.  [default: {_TILES}]")
@click.option("--channels", metavar="N,N,N", help="Output channels of every layer.  [default: 32,32,64]")
@click.option("--physics", type=text, metavar="NAME", help="What the tiles are like, as for train.  [default: ideal]")
@click.option("--dataset", metavar="NAME", default="builtin", show_default=True, help="As for train.")
@click.option("--data-dir", type=path, help="As for train.")
@click.option("--limit-train", type=int, metavar="N", default=1000, show_default=True, help="Training images.")
@click.option("--limit-test", type=int, metavar="N", default=200, show_default=True, help="Test images.")
@click.option("--epochs", type=int, default=3, show_default=True, help="Passes over the training images.")
@click.option("--kills", type=int, default=20, show_default=True, help="Deeds in all.")
@click.option("--runs", type=int, default=1, show_default=True, help="Runs that they are spread over.")
@click.option("--seed", type=int, default=0, show_default=True, help="Of what is done when, and to whom.")
@click.option(
    "--kinds",
    metavar="LIST",
    default=_KINDS,
    show_default=True,
    help="What is done: of tile-kill, tile-stop, all-tiles, coordinator-kill, coordinator-term; on several nodes, too: "
    "node-kill, node-cut, chip-kill.",
)
@click.option(
    "--address",
    type=text,
    metavar="HOST:PORT",
    help="Ray cluster that this machine is a node of; tiles are hit on this node.  [default: one started for each run]",
)
@click.option(
    "--local-cluster",
    type=path,
    metavar="DIR",
    help="Nodes that cluster/local.sh --state DIR has started, and nobody else uses: they may be killed, too.",
)
@json_option
def chaos(
    as_json: bool,
    kinds: str,
    kills: int,
    runs: int,
    seed: int,
    address: str | None,
    local_cluster: Path | None,
    **settings: Any,
) -> None:
    """Kill and stop processes of a run at random moments, and compare it with the same run undisturbed.

    Every run ends with the weights of the undisturbed one, bit by bit, and leaves nothing behind: exit code 0.
    Else it is 1, and what is wrong is said.

    \b
    Examples:
      rapa-dist chaos --kills 10
      rapa-dist chaos --tiles 16,4,1 --kills 100 --runs 5 --seed 7 --json > chaos.json
      rapa-dist chaos --local-cluster /tmp/three --kinds node-kill,node-cut,chip-kill --kills 6
    """  # noqa: D301 — click wants the backspace itself
    from rapa_dist.chaos.mischief import NODE_CUT, check_kinds

    wanted = tuple(kind.strip() for kind in kinds.split(",") if kind.strip())
    check_kinds(wanted, several_nodes=local_cluster is not None)
    if local_cluster is not None and address is not None:
        raise UsageError("--local-cluster and --address exclude each other: the nodes say where they are reached.")
    if settings["tiles"] is None:
        settings["tiles"] = _TILES
        if settings["channels"] and settings["channels"].count(",") != _TILES.count(","):
            raise UsageError(
                f"--channels {settings['channels']} has another number of layers than the default tiles, {_TILES}. "
                "Give --tiles with a number for every layer, too."
            )
    for option, value in (("--kills", kills), ("--runs", runs)):
        if value < 1:
            raise UsageError(f"{option} needs at least 1; it is {value}.")
    if runs > kills:
        raise UsageError(f"{kills} kills can't be spread over {runs} runs. Use a smaller --runs, or more --kills.")

    from rapa_dist.chaos.campaign import Plan, campaign
    from rapa_dist.chaos.nodes import LocalNodes
    from rapa_dist.console import stderr

    nodes = LocalNodes(local_cluster.absolute()) if local_cluster else None
    if nodes and NODE_CUT in wanted:
        nodes.check_can_cut()
    options = [
        text
        for name, value in settings.items()
        if value is not None
        for text in (f"--{name.replace('_', '-')}", str(value))
    ]
    plan = Plan(options=tuple(options), kinds=wanted, kills=kills, runs=runs, seed=seed, address=address, nodes=nodes)
    report = campaign(plan, lambda line: stderr.print(line, markup=False))
    with outcome(1 if report["wrong"] else 0):
        if as_json:
            emit(report)
        else:
            _show(report)


def _show(report: dict[str, Any]) -> None:
    from rich.table import Table

    from rapa_dist.console import stdout

    table = Table(box=None, pad_edge=False, header_style="bold")
    table.add_column("done")
    for column in ("times", "seconds lost, median", "longest"):
        table.add_column(column, justify="right")
    for kind, found in report["kinds"].items():
        times = ["–" if found[key] is None else f"{found[key]:.2f}" for key in ("median_s", "longest_s")]
        table.add_row(kind, str(found["number"]), *times)
    stdout.print(table)
    for line in report["wrong"]:
        stdout.print(line, markup=False)
    done, wanted = len(report["deeds"]), report["wanted"]
    stdout.print(
        f"{report['verdict']}: {report['runs']} × {report['steps_per_run']} steps, seed {report['seed']}; "
        f"{done} of {wanted} deeds{', the run had ended before the rest' * (done < wanted)}"
    )
