"""`rapa-dist reproduce`: the paper's tables and figures, one command each."""

import sys
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any

import click

from rapa_dist.cli.output import emit, json_option, outcome
from rapa_dist.cli.types import path, text
from rapa_dist.errors import UsageError

_EPOCHS, _LIMIT_TRAIN = 100, 10_000
_PAPER_EPOCHS = 400
_INTERRUPTED = 130


@click.command()
@click.argument("experiment", metavar="EXPERIMENT")
@click.option("--epochs", type=int, help=f"Passes over the training images.  [default: {_EPOCHS}]")
@click.option("--limit-train", type=int, metavar="N", help=f"Training images to use.  [default: {_LIMIT_TRAIN}]")
@click.option("--limit-test", type=int, metavar="N", help="Test images to use.  [default: all]")
@click.option("--lr-decay-every", type=int, help="Epochs between decays of λ.  [default: epochs / 16, as the paper's]")
@click.option("--seeds", type=int, default=1, show_default=True, help="Runs of every cell.")
@click.option("--paper", is_flag=True, help=f"The paper's protocol: all images, {_PAPER_EPOCHS} epochs.")
@click.option("--cells", metavar="NAME,…", help="Some of the experiment's cells only.")
@click.option("--dataset", metavar="NAME", help="As for `train`.  [default: cifar10, else builtin]")
@click.option("--data-dir", type=path, help="Where data sets are.")
@click.option("--output", type=path, metavar="DIR", help="Where all goes.  [default: reproduce/<dataset>]")
@click.option(
    "--adopt",
    multiple=True,
    type=path,
    metavar="RUN_DIR",
    help="A run of `train` that has a cell's configuration; it is not trained again.",
)
@click.option("--fabric", default="batched", show_default=True, metavar="NAME", help="Fabric to train on.")
@click.option("--device", default="cpu", show_default=True, metavar="NAME", help="cpu, or cuda: a GPU for every job.")
@click.option("--jobs", type=int, metavar="N", help="Jobs at a time, at most.  [default: one per core, or GPU]")
@click.option("--address", type=text, metavar="HOST:PORT", help="Ray cluster to use, as for `train`.")
@click.option("--dry-run", is_flag=True, help="Print what is there and what is missing, and start nothing.")
@json_option
def reproduce(
    experiment: str,
    epochs: int | None,
    limit_train: int | None,
    limit_test: int | None,
    lr_decay_every: int | None,
    seeds: int,
    paper: bool,
    cells: str | None,
    dataset: str | None,
    data_dir: Path | None,
    output: Path | None,
    adopt: tuple[Path, ...],
    fabric: str,
    device: str,
    jobs: int | None,
    address: str | None,
    dry_run: bool,
    as_json: bool,
) -> None:
    """Reproduce EXPERIMENT: table1, table2, figure3, figure4 or regularizer.

    Runs and results are kept in the output folder; the same command goes on where it was stopped, and experiments
    with the same protocol share their runs. The networks of an experiment, its cells, are listed by --dry-run; that of
    cell random with seed 0 is trained in OUTPUT/runs/random-0, a run directory for `analyze` and `report`. The
    regularizer is a small problem of its own, on which the protocol has no influence.

    \b
    Examples:
      rapa-dist reproduce table1 --dataset images:photos --seeds 3
      rapa-dist reproduce figure4 --dataset cifar10 --paper --device cuda --seeds 5
    """  # noqa: D301 — click wants the backspace itself
    from rapa_dist.experiments.command import Request, prepare

    if paper and (given := [f"--{n}" for n, v in (("epochs", epochs), ("limit-train", limit_train)) if v is not None]):
        raise UsageError(f"--paper sets epochs and images itself. Leave {' and '.join(given)} out, or --paper.")
    request = Request(
        experiment=experiment,
        epochs=_PAPER_EPOCHS if paper else _EPOCHS if epochs is None else epochs,
        limit_train=None if paper else _LIMIT_TRAIN if limit_train is None else limit_train,
        limit_test=limit_test,
        lr_decay_every=lr_decay_every,
        seeds=seeds,
        cells=None if cells is None else tuple(name.strip() for name in cells.split(",")),
        dataset=dataset,
        data_dir=data_dir,
        output=output,
        adopt=adopt,
        fabric=fabric,
        device=device,
        jobs=jobs,
        address=address,
    )
    with redirect_stdout(sys.stderr):  # Ray prints its warnings to stdout
        work = prepare(request)
        result: dict[str, Any] = work.plan() if dry_run else work.run()
    code = _INTERRUPTED if result.get("stopped") else 1 if result.get("failed") else 0
    with outcome(code, "" if dry_run else f"Nothing is lost: what is done is in {work.output}."):
        if as_json:
            emit(result)
        else:
            sys.stdout.write(result["text"])
