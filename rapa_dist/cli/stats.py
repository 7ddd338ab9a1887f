"""`rapa-dist stats`: what every tile of a training does, from any terminal."""

import os
import sys
from contextlib import redirect_stdout, suppress
from functools import partial
from typing import TYPE_CHECKING, NoReturn

import click

from rapa_dist.cli.output import Output, emit, emit_error, json_option, tell
from rapa_dist.cli.types import text
from rapa_dist.errors import ClusterError, OutputError, UsageError

if TYPE_CHECKING:
    from rapa_dist.fabric.watcher import RunEndedError, Watcher
    from rapa_dist.inspection import RunStats

_INTERVAL_S, _LONGEST_INTERVAL_S = 2.0, 86_400
_LAST = "Its last numbers are in tiles.json in its run directory."


@click.command()
@click.option("--run", type=text, metavar="NAME", help="Name of the run, or its directory.  [default: the only one]")
@click.option(
    "--address",
    type=text,
    metavar="HOST:PORT",
    help="Ray cluster that it is on.  [default: that of a run which trains on this machine, else RAY_ADDRESS, else one "
    "that runs here]",
)
@click.option(
    "--layer", metavar="N", help="Only the tiles of one layer, by its number, as in L0/T003, or its name, like conv0."
)
@click.option(
    "--sort",
    default="tile",
    show_default=True,
    metavar="COLUMN",
    help="Sort tiles by a column: state, restarts, forward, backward, updates, busy, waiting, device, utilisation, in, "
    "out, norm, step, memory, pid or node.",
)
@click.option("--watch", is_flag=True, help="Go on showing it until Ctrl-C, or until the run ends.")
@click.option(
    "--interval", type=float, metavar="SECONDS", help=f"Between looks with --watch.  [default: {_INTERVAL_S:g}]"
)
@json_option
def stats(
    run: str | None,
    address: str | None,
    layer: str | None,
    sort: str,
    watch: bool,
    interval: float | None,
    as_json: bool,
) -> None:
    """Show what every tile of a training does: rows, updates, busy and device time, bytes, ‖K‖, memory.

    Attaches to a running job without disturbing it: a look costs one call per node. Totals per layer
    come first; imbalance is the rows of a layer's busiest tile over the mean.

    \b
    Examples:
      rapa-dist stats
      rapa-dist stats --run 20261123T120000Z-builtin-16x4x1 --layer 0 --sort busy
      rapa-dist stats --watch --interval 5
      rapa-dist stats --json
    """  # noqa: D301 — click wants the backspace itself
    from rapa_dist.inspection import check_sort

    check_sort(sort)
    if watch and as_json:
        raise UsageError("--watch and --json exclude each other: --json prints one object. Leave one of them out.")
    if interval is not None and not watch:
        raise UsageError("--interval is for --watch: without it there is one look only. Add --watch, or leave it out.")
    if interval is not None and not 0 < interval <= _LONGEST_INTERVAL_S:
        raise UsageError(
            f"--interval needs seconds above 0, like 2, and up to {_LONGEST_INTERVAL_S:,}, a day; it is {interval:g}."
        )

    from rapa_dist.fabric.watcher import RunEndedError, find_run

    with redirect_stdout(sys.stderr):  # Ray prints its warnings to stdout
        watcher = find_run(run, address, partial(_leave, as_json=as_json))
    try:
        try:
            first = watcher.read().only(layer)
        except RunEndedError as error:
            raise ClusterError(f"{error} {_LAST}") from None
        if as_json:
            emit(first.as_dict())
        elif watch:
            watcher.leave = partial(_leave, code=0)
            _watch(watcher, first, layer, sort, interval or _INTERVAL_S)
        else:
            _show(first, sort)
    finally:
        watcher.close()


def _leave(error: "ClusterError | RunEndedError", *, as_json: bool = False, code: int = 1) -> NoReturn:
    """Say what is gone, and end the process: another thread of it waits in Ray, which does not let go.

    Args:
        error: what is gone.
        as_json: whether to say so on stdout, too.
        code: exit code if it is the run that has ended.
    """
    from rapa_dist.console import stdout

    message = str(error)
    if isinstance(error, ClusterError):
        code = error.exit_code
    else:
        message = f"{message} {_LAST}"
    tell(f"Error: {message}" if code else message)
    with suppress(OutputError):
        stdout.show_cursor()
        if as_json:
            emit_error(ClusterError.__name__, message, Output())
    os._exit(code)


def _show(stats: "RunStats", sort: str) -> None:
    from rapa_dist.console import stdout
    from rapa_dist.coordinator.tiles_table import tiles_table

    stdout.print(tiles_table(stats, sort=sort, width=stdout.width if stdout.is_terminal else None))


def _watch(watcher: "Watcher", first: "RunStats", layer: str | None, sort: str, interval_s: float) -> None:
    """Show stats again and again, in place on a terminal, one table after the other elsewhere."""
    import time
    from contextlib import ExitStack

    from rich.live import Live

    from rapa_dist.console import stderr, stdout
    from rapa_dist.coordinator.tiles_table import tiles_table
    from rapa_dist.fabric.watcher import RunEndedError

    latest = first
    with ExitStack() as clean_up:
        live = None
        if stdout.is_terminal:
            live = clean_up.enter_context(Live(console=stdout, auto_refresh=False, redirect_stdout=False))
        due = time.monotonic()
        while True:
            if live is not None and stdout.is_terminal:  # one that hung up is none any more, and shows nothing
                live.update(tiles_table(latest, sort=sort, width=stdout.width, height=stdout.height), refresh=True)
            else:
                _show(latest, sort)
                sys.stdout.write("\n")
            due = max(due + interval_s, time.monotonic())
            time.sleep(max(0.0, due - time.monotonic()))
            try:
                latest = watcher.read().only(layer)
            except RunEndedError as error:
                ended = str(error)
                break
    stderr.print(f"{ended} These were its last numbers.", markup=False)
