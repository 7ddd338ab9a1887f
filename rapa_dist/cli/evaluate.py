"""`rapa-dist evaluate`: test error of a trained network, also by the majority of several votes."""

from pathlib import Path
from typing import Any

import click

from rapa_dist.cli.images import where_options
from rapa_dist.cli.output import emit, json_option, show
from rapa_dist.cli.types import path, text


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
@click.option("--seed", type=int, help="Seed of the assignments and of noise.  [default: the run's]")
@click.option(
    "--physics",
    type=text,
    metavar="NAME",
    help="Other tiles, as for train: train clean, test noisy.  [default: the run's]",
)
@click.option("--physics-set", multiple=True, metavar="FIELD=VALUE", help="Change a field of that, as for train.")
@click.option("--times", type=int, default=1, show_default=True, help="Test so often, each time with the next seed.")
@json_option
def evaluate(
    run_dir: Path,
    checkpoint: str,
    votes: int,
    where: Any,
    limit_test: int | None,
    seed: int | None,
    physics: str | None,
    physics_set: tuple[str, ...],
    times: int,
    as_json: bool,
) -> None:
    """Print the test error of the run in RUN_DIR.

    \b
    Examples:
      rapa-dist evaluate runs/20261123T120000Z-builtin-16x4x1 --votes 5
      rapa-dist evaluate runs/20261123T120000Z-builtin-16x4x1 --physics ecram --times 5
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
        physics=physics,
        physics_set=physics_set,
        times=times,
    )
    if as_json:
        emit(result)
    else:
        spread = f" ± {result['test_error_spread']:.2f} (n = {times})" if times > 1 else ""
        show(
            f"test error {result['test_error_percent']:.2f} %{spread} on {result['images']:,} images of "
            f"{result['dataset']}, {counted(votes, 'vote')}, checkpoint {result['checkpoint']}"
        )
