"""`rapa-dist evaluate`: test error of a trained network, also by the majority of several votes."""

from pathlib import Path
from typing import Any

import click

from rapa_dist.cli.images import where_options
from rapa_dist.cli.output import emit, json_option, show
from rapa_dist.cli.types import path


@click.command()
@click.argument("run_dir", type=path)
@click.option(
    "--checkpoint",
    metavar="NAME",
    default="newest",
    show_default=True,
    help="newest, best, or a checkpoint's name.",
)
@click.option(
    "--votes",
    type=int,
    default=1,
    show_default=True,
    help="Classify by the majority of so many random assignments.",
)
@where_options("Where the run's images are now, or other images to test on.")
@click.option("--limit-test", type=int, metavar="N", help="Use N test images only.  [default: the run's]")
@click.option("--seed", type=int, help="Seed of the assignments.  [default: the run's]")
@json_option
def evaluate(
    run_dir: Path,
    checkpoint: str,
    votes: int,
    where: Any,
    limit_test: int | None,
    seed: int | None,
    as_json: bool,
) -> None:
    """Print the test error of the run in RUN_DIR.

    \b
    Examples:
      rapa-dist evaluate runs/20261123T120000Z-builtin-16x4x1 --votes 5
    """  # noqa: D301 — click wants the backspace itself
    from rapa_dist.console import counted
    from rapa_dist.coordinator.retest import retest

    result = retest(
        run_dir,
        checkpoint=checkpoint,
        votes=votes,
        where=where,
        limit_test=limit_test,
        seed=seed,
    )
    if as_json:
        emit(result)
    else:
        show(
            f"test error {result['test_error_percent']:.2f} % on {result['images']:,} images of "
            f"{result['dataset']}, {counted(votes, 'vote')}, checkpoint {result['checkpoint']}"
        )
