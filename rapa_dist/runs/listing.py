"""A folder of runs: what each of them is, and how it stands."""

import os
from contextlib import suppress
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path

from rapa_dist.coordinator.run_directory import RunDirectory
from rapa_dist.errors import RapaError, RunDirectoryError
from rapa_dist.locks import is_locked

RUNS = Path("runs")
"""Where `rapa-dist train` makes runs that are not given a place."""
_MARKS = ("config.toml", "metrics.jsonl", "checkpoints")
"""One of these is in every folder that was ever a run's."""


class State(StrEnum):
    """How a run stands."""

    TRAINING = "training"
    """A process trains in its directory right now."""
    FINISHED = "finished"
    INTERRUPTED = "interrupted"
    UNREADABLE = "unreadable"


@dataclass(frozen=True, slots=True, kw_only=True)
class Listed:
    """A run as a line of a table. What can't be read is None."""

    name: str
    run_dir: Path
    state: State
    why: str | None = None
    """Why it is unreadable."""
    dataset: str | None = None
    tiles: tuple[int, ...] | None = None
    scheme: str | None = None
    pooling: str | None = None
    fabric: str | None = None
    """That its newest epoch was trained on."""
    epochs: int | None = None
    """Epochs that are done."""
    epochs_planned: int | None = None
    test_error_percent: float | None = None
    """After the newest epoch."""
    best_test_error_percent: float | None = None
    best_epoch: int | None = None
    resumable: bool = False
    """Whether `train --resume` would go on with it, a finished one with more epochs."""
    not_resumable_because: str | None = None


def list_runs(folder: Path) -> tuple[list[Listed], int]:
    """Return the runs in a folder, or the one that it is, by name; and how many other folders were passed over.

    Raises:
        RunDirectoryError: it can't be read.
    """
    if _is_run(folder):
        return [describe(folder)], 0
    try:
        with os.scandir(folder) as entries:
            folders = sorted(Path(entry.path) for entry in entries if _is_folder(entry))
    except OSError as error:
        raise RunDirectoryError(
            f"{folder} can't be read: {error.strerror}. Give a folder of runs, like {RUNS}."
        ) from None
    runs = [each for each in folders if _is_run(each)]
    return [describe(run) for run in runs], len(folders) - len(runs)


def describe(path: Path) -> Listed:
    """Return how the run in a directory stands; whatever is in it, this fails on nothing."""
    name = path.resolve().name
    try:
        directory = RunDirectory(path)
        config = directory.config
        metrics = directory.metrics()
    except (RapaError, OSError, ValueError) as error:
        return Listed(name=name, run_dir=path, state=State.UNREADABLE, why=str(error), not_resumable_because=str(error))
    training = is_locked(path / ".lock")
    because = "it trains right now" if training else _not_resumable(directory)
    state = State.TRAINING if training else State.FINISHED if len(metrics) >= config.epochs else State.INTERRUPTED
    best = min(metrics, key=lambda line: float(line["test_error_percent"]), default=None)
    return Listed(
        name=name,
        run_dir=path,
        state=state,
        dataset=config.dataset,
        tiles=config.tiles,
        scheme=config.scheme,
        pooling=config.pooling,
        fabric=metrics[-1]["wall"].get("fabric") if metrics else None,
        epochs=len(metrics),
        epochs_planned=config.epochs,
        test_error_percent=metrics[-1]["test_error_percent"] if metrics else None,
        best_test_error_percent=best["test_error_percent"] if best else None,
        best_epoch=best["epoch"] if best else None,
        resumable=because is None,
        not_resumable_because=because,
    )


def _not_resumable(directory: RunDirectory) -> str | None:
    """Return why a run could not be resumed from what is in its directory; None where nothing is in the way."""
    try:
        newest = directory.read_checkpoint(directory.find_checkpoint("newest"))
        directory.check_metrics(newest.progress.metrics_bytes)
    except (RapaError, OSError, ValueError) as error:
        return str(error)
    return None


def _is_folder(entry: os.DirEntry[str]) -> bool:
    with suppress(OSError):  # a link in a circle
        return entry.is_dir()
    return False


def _is_run(path: Path) -> bool:
    return any(os.path.lexists(path / mark) for mark in _MARKS)
