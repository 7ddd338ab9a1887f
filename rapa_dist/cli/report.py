"""`rapa-dist report`: a run on one page."""

from pathlib import Path

import click

from rapa_dist.cli.output import emit, json_option, outcome, show
from rapa_dist.cli.types import path


@click.command()
@click.argument("run_dir", type=path)
@click.option(
    "--output",
    type=path,
    metavar="FILE",
    help="The HTML file to write.  [default: RUN_DIR/report.html]",
)
@click.option(
    "--checkpoint",
    metavar="NAME",
    default="newest",
    show_default=True,
    help="Where the filters are from: newest, best, or a checkpoint's name.",
)
@click.option(
    "--scaling",
    type=path,
    metavar="FILE",
    help="A scaling.json of `rapa-dist scale`.  [default: the one in RUN_DIR, if any]",
)
@json_option
def report(run_dir: Path, output: Path | None, checkpoint: str, scaling: Path | None, as_json: bool) -> None:
    """Write a report on the run in RUN_DIR: one HTML file that opens without a network.

    It has configuration, curves, errors, the tiles' load, their filters, and similarity over time. The run may
    be under way; what it does not have yet is named.

    \b
    Examples:
      rapa-dist report runs/20261123T120000Z-builtin-16x4x1
      rapa-dist report runs/20261123T120000Z-builtin-16x4x1 --output talk.html --checkpoint best
    """  # noqa: D301 — click wants the backspace itself
    from rapa_dist.console import counted, stderr
    from rapa_dist.report.page import report as write

    result = write(run_dir, output=output, checkpoint=checkpoint, scaling=scaling)
    for note in result["missing"]:
        stderr.print(f"warning: {note}", markup=False)
    with outcome(0, f"The report is in {result['report']}."):
        if as_json:
            emit(result)
        else:
            show(f"{result['report']}  ({result['bytes'] / 1e6:.1f} MB, {counted(result['epochs'], 'epoch')})")
