"""What a report tells: read from a run directory, with a note on everything that is not there."""

import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rapa_dist.config import TrainConfig
from rapa_dist.console import counted
from rapa_dist.coordinator import sessions
from rapa_dist.coordinator.checkpoint import Checkpoint
from rapa_dist.coordinator.run_directory import RunDirectory
from rapa_dist.errors import CheckpointError, RunDirectoryError, UsageError
from rapa_dist.fields import OBJECT, TEXT, check, listing
from rapa_dist.files import cause, parse_json, read_file
from rapa_dist.inspection import RunStats, TileStats
from rapa_dist.locks import is_locked

_MOST = 1 << 26  # bytes of a file about tiles
_RUN_STATS = {"run": TEXT, "tiles": listing(OBJECT), "silent": listing(TEXT)}


@dataclass(frozen=True, slots=True, kw_only=True)
class Content:
    """A run as its directory shows it at one moment."""

    path: Path
    """The run directory."""
    name: str
    """The run's name."""
    config: TrainConfig
    sessions: list[dict[str, Any]]
    """With what it was started and resumed, oldest first; empty where that is not known."""
    metrics: list[dict[str, Any]]
    """A dictionary for every finished epoch, oldest first. Runs from before there was any lack `similarity`."""
    under_way: bool
    """Whether a process trains in the directory right now."""
    tiles: RunStats | None
    """What the tiles did since the run was last started or resumed; None until it has stopped, or if it was cut off."""
    checkpoint_name: str | None
    checkpoint: Checkpoint | None
    """Where the filters are from."""
    scaling: dict[str, Any] | None
    """A scaling.json."""
    missing: list[str] = field(default_factory=list)
    """What could not be shown, and why: a sentence each."""

    @property
    def best(self) -> dict[str, Any] | None:
        """The epoch with the lowest test error, the first of equals; None before any."""
        return min(self.metrics, key=lambda line: line["test_error_percent"], default=None)

    @property
    def status(self) -> str:
        """How far the run has come, in a few words."""
        done, wanted = len(self.metrics), self.config.epochs
        if self.under_way:
            return f"in progress: {done:,} of {counted(wanted, 'epoch')}"
        return (
            f"finished: {counted(done, 'epoch')}"
            if done >= wanted
            else f"stopped after {done:,} of {counted(wanted, 'epoch')}"
        )

    def similarity(self, layer: int) -> tuple[list[int], list[float]]:
        """Return the epochs for which S of a layer was recorded, and S in them."""
        pairs = [(line["epoch"], line["similarity"][layer]) for line in self.metrics if line.get("similarity")]
        known = [(epoch, value) for epoch, value in pairs if value is not None]
        return [epoch for epoch, _ in known], [value for _, value in known]


def gather(path: Path, *, checkpoint: str = "newest", scaling: Path | None = None) -> Content:
    """Read a run directory; the run may be under way.

    Args:
        path: the run directory.
        checkpoint: "newest", "best" or a name: where the filters are taken from.
        scaling: a scaling.json; None for the one in the run directory, if there is one.

    Raises:
        RunDirectoryError: this is no run directory, or its metrics are damaged.
        CheckpointError: a checkpoint was asked for that is not there or not whole. (Without asking for one, a run that
            has none is described without filters.)
        UsageError: `scaling` is no scaling.json.
    """
    directory = RunDirectory(path)
    config = directory.config
    missing: list[str] = []
    metrics = _read_metrics(directory, len(config.tiles))
    under_way = is_locked(path / ".lock")
    if not metrics:
        missing.append("No epoch is finished yet: there are no curves and no errors.")
    elif config.tiled and not any(line.get("similarity") for line in metrics):
        missing.append(
            "Similarity over time was not recorded: the run was trained by an older version. "
            "That of the checkpoint is under Filters."
        )
    name, found = _read_checkpoint(directory, checkpoint, missing)
    return Content(
        path=path,
        name=directory.name,
        config=config,
        sessions=_read_sessions(path, missing),
        metrics=metrics,
        under_way=under_way,
        tiles=_read_tiles(path / "tiles.json", under_way, _last_step(metrics, found), missing),
        checkpoint_name=name,
        checkpoint=found,
        scaling=_read_scaling(path, scaling, missing),
        missing=missing,
    )


def _read_metrics(directory: RunDirectory, layers: int) -> list[dict[str, Any]]:
    metrics = directory.metrics()
    for line in metrics:
        if line.get("similarity") and (found := len(line["similarity"])) != layers:
            raise RunDirectoryError(
                f"The metrics in {directory.path} have similarities of {counted(found, 'layer')} in epoch "
                f"{line['epoch']}, the run has {layers}. They were damaged: restore them."
            )
    return metrics


def _read_checkpoint(
    directory: RunDirectory, which: str, missing: list[str]
) -> tuple[str, Checkpoint] | tuple[None, None]:
    try:
        path = directory.find_checkpoint(which)
        return path.stem, directory.read_checkpoint(path)
    except CheckpointError as error:
        if which != "newest":
            raise
        missing.append(f"Filters can't be shown. {error}")
        return None, None


def _read_sessions(path: Path, missing: list[str]) -> list[dict[str, Any]]:
    found = sessions.sessions_of(path)
    if not found:
        missing.append(f"What the run was trained with is not known: its {sessions.FILE} is missing or damaged.")
    return found


def _last_step(metrics: list[dict[str, Any]], checkpoint: Checkpoint | None) -> int:
    """Return the last training step that is known to have been taken."""
    of_epochs = metrics[-1].get("step", 0) if metrics else 0
    return max(of_epochs, checkpoint.progress.step if checkpoint is not None else 0)


def _read_tiles(path: Path, under_way: bool, last_step: int, missing: list[str]) -> RunStats | None:
    """Read what the tiles did in the training that ended last, unless another one is known to have begun since."""
    written = "Statistics of the tiles are written when a training ends"
    if under_way:
        options = sessions.last_options(path.parent)
        on_ray = "--fabric" not in options or "ray" in options
        missing.append(
            f"{written}: ask this one, which is under way, with rapa-dist stats."
            if on_ray
            else f"{written}, and this one is under way."
        )
        return None
    try:
        found = check(parse_json(read_file(path, _MOST)), _RUN_STATS)
        stats = RunStats.of(found["run"], [TileStats.from_dict(tile) for tile in found["tiles"]], found["silent"])
        if stats.total.last_step >= last_step:
            return stats
        missing.append(
            f"{written}, and the last one was cut off: {path.name} is of one before it, which came to step "
            f"{stats.total.last_step:,} of {last_step:,}."
        )
    except FileNotFoundError:
        missing.append(f"{written} (this one was killed, or never took a step): there is no {path.name}.")
    except (OSError, ValueError) as error:
        missing.append(f"Statistics of the tiles can't be shown: {path.name} can't be read ({cause(error)}).")
    return None


def _read_scaling(directory: Path, given: Path | None, missing: list[str]) -> dict[str, Any] | None:
    path = given or directory / "scaling.json"
    if given is None and not os.path.lexists(path):
        return None
    try:
        found: dict[str, Any] = parse_json(read_file(path, _MOST))
        if found["format"] != 1:
            raise ValueError(f"its format is {found['format']}, expected 1")
        for block in found["blocks"]:
            for configuration in block["configurations"]:
                _ = configuration["tiles"], configuration["layers"][0]["cycles"]["all"]["speed_up"]
    except (OSError, ValueError, TypeError, KeyError, IndexError) as error:
        message = f"{path} is no scaling.json as `rapa-dist scale` writes it: {described(error)}."
        if given is not None:
            raise UsageError(f"--scaling: {message} Give one, or leave the option out.") from error
        missing.append(f"Scaling can't be shown: {message}")
        return None
    return found


def described(error: Exception) -> str:
    """Return what is wrong with a file, as a part of a sentence: a missing key alone would say little."""
    return cause(error) if isinstance(error, OSError | ValueError) else f"{type(error).__name__}: {error}"
