"""`rapa-dist runs`: a table of runs."""

from pathlib import Path
from typing import TYPE_CHECKING

import click

from rapa_dist.cli.columns import in_columns, printable
from rapa_dist.cli.output import emit, json_option, show, tell
from rapa_dist.cli.types import path

if TYPE_CHECKING:
    from rapa_dist.runs.listing import Listed


@click.command()
@click.argument("folder", type=path, required=False)
@json_option
def runs(folder: Path | None, as_json: bool) -> None:
    """List the runs in FOLDER, or in runs/: what each of them is, how far it came, and whether it can be resumed.

    A run is training, finished, interrupted or unreadable. Its test error is the last one, and beside it is the best
    one with its epoch.

    \b
    Examples:
      rapa-dist runs
      rapa-dist runs reproduce/cifar10/runs --json
    """  # noqa: D301 — click wants the backspace itself
    from rapa_dist.runs.listing import RUNS, list_runs

    where = RUNS if folder is None else folder
    found, others = ([], 0) if folder is None and not where.exists() else list_runs(where)
    if others:
        tell(f"{others:,} other folder{'s' * (others > 1)} in {where}: no runs")
    if as_json:
        emit({"folder": str(where), "runs": found})
    elif found:
        _show(found)
    else:
        tell(f"There are no runs in {where}. `rapa-dist train` makes one.")


def _show(found: "list[Listed]") -> None:
    head = ["run", "state", "epochs", "test error", "best (epoch)", "data", "tiles", "scheme", "fabric", "resumable"]
    rows = [[printable(run.name), run.state.value, *_row(run), _resumable(run)] for run in found]
    show(in_columns([head, *rows], right=(2, 3, 4)))
    for run in found:
        if run.not_resumable_because and run.state != "training":
            show(f"{printable(run.name)}: {printable(run.not_resumable_because)}")


def _row(run: "Listed") -> list[str]:
    if run.epochs is None:
        return 7 * ["–"]
    return [
        f"{run.epochs:,}/{run.epochs_planned:,}",
        "–" if run.test_error_percent is None else f"{run.test_error_percent:.2f} %",
        "–" if run.best_test_error_percent is None else f"{run.best_test_error_percent:.2f} % ({run.best_epoch})",
        printable(_short(run.dataset)),
        ",".join(map(str, run.tiles or ())),
        run.scheme or "–",
        printable(str(run.fabric or "–")),
    ]


def _short(dataset: str | None) -> str:
    """Return a data set's name without the folders that a folder of images lies in."""
    kind, colon, folder = (dataset or "–").partition(":")
    return f"{kind}{colon}{Path(folder).name}" if colon else kind


def _resumable(run: "Listed") -> str:
    if not run.resumable:
        return "no"
    return "with more --epochs" if run.state == "finished" else "yes"
