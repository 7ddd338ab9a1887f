"""A run from end to end: data, machine, run directory, training; how it starts, resumes and stops."""

import math
from contextlib import ExitStack, redirect_stdout, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from rapa_dist.config import TrainConfig, check_physics
from rapa_dist.console import counted
from rapa_dist.coordinator import checkpoint as checkpoints
from rapa_dist.coordinator import opening
from rapa_dist.coordinator.checkpoint import Checkpoint
from rapa_dist.coordinator.display import RunDisplay, introduction
from rapa_dist.coordinator.learner import network_of
from rapa_dist.coordinator.own_tiles import OwnTiles
from rapa_dist.coordinator.physics_notes import notes
from rapa_dist.coordinator.recoveries import Recoveries
from rapa_dist.coordinator.rollback import NODE_PATIENCE_S, Rollback
from rapa_dist.coordinator.run_directory import RAY_LOGS, RunDirectory
from rapa_dist.coordinator.run_images import Where, as_the_run_has_them, check_elsewhere, open_images
from rapa_dist.coordinator.saving import PATIENCE_S, Saver
from rapa_dist.coordinator.session import Place, look_ahead, one_digital_thread
from rapa_dist.coordinator.sessions import options_of
from rapa_dist.coordinator.telemetry import RayMetrics
from rapa_dist.coordinator.telling import tell
from rapa_dist.coordinator.trainer import SNAPSHOT_EVERY, Trainer
from rapa_dist.coordinator.weights import weights_sha256
from rapa_dist.data import DataSet
from rapa_dist.errors import CheckpointError, ClusterError, NodeLostError
from rapa_dist.fabric.cluster import clear_away_abandoned
from rapa_dist.fabric.lookout import RESTARTS
from rapa_dist.interrupts import asked_to_stop
from rapa_dist.layout import machine_of


@dataclass(frozen=True, slots=True, kw_only=True)
class Tolerance:
    """How much trouble a run takes before it stops."""

    restarts: int = RESTARTS
    """How often a tile's process may be replaced in one and the same cycle."""
    save_patience_s: float = PATIENCE_S
    """For how long it may be impossible to save, in seconds."""
    node_patience_s: float = NODE_PATIENCE_S
    """How long to wait for a node in place of a lost one, where those that are left are too few, in seconds."""
    snapshot_every: int = SNAPSHOT_EVERY
    """Steps between copies of all weights, where a node can be lost: at most so many are trained again. 0: no copies
    but the checkpoints."""


TOLERANCE = Tolerance()


@dataclass(frozen=True, slots=True)
class RunResult:
    """What a run came to."""

    directory: RunDirectory
    checkpoint: str
    """Name of the newest checkpoint."""
    finished: bool
    """False: it was interrupted and can be resumed."""

    def as_dict(self) -> dict[str, Any]:
        """Return the result as plain values; `train_s` is wall time."""
        metrics = self.directory.metrics()
        last = metrics[-1] if metrics else {}
        best = min(metrics, key=lambda line: line["test_error_percent"], default={})
        return {
            "run_dir": str(self.directory.path),
            "checkpoint": self.checkpoint,
            "weights_sha256": self._weights_sha256(),
            "finished": self.finished,
            "epochs": len(metrics),
            "test_error_percent": last.get("test_error_percent"),
            "train_error_percent": last.get("train_error_percent"),
            "best_test_error_percent": best.get("test_error_percent"),
            "best_epoch": best.get("epoch"),
            "device_time_s": sum(line.get("device_time_s", math.nan) for line in metrics),  # none in older runs
            "train_s": round(sum(line["wall"]["train_s"] for line in metrics), 3),
        }

    def _weights_sha256(self) -> str | None:
        """Return the hash of the newest checkpoint's weights; None where somebody has taken it away meanwhile."""
        with suppress(CheckpointError):
            folder = self.directory.checkpoint_folder
            return weights_sha256(checkpoints.read(folder / f"{self.checkpoint}.safetensors").weights)
        return None

    def summary(self) -> str:
        """Return the result in a few lines."""
        values = self.as_dict()
        lines = [f"run          {values['run_dir']}", f"checkpoint   {values['checkpoint']}"]
        if values["weights_sha256"]:
            lines.append(f"weights      sha256 {values['weights_sha256']}")
        if values["epochs"]:
            lines.append(
                f"test error   {values['test_error_percent']:.2f} % after "
                f"{counted(values['epochs'], 'epoch')}; "
                f"best {values['best_test_error_percent']:.2f} % in epoch {values['best_epoch']}"
            )
            lines.append(
                f"training     {values['device_time_s']:.3g} s on the emulated arrays (device time), "
                f"{values['train_s']:,.1f} s here (wall time)"
            )
        return "\n".join(lines)


def start_run(
    config: TrainConfig,
    *,
    fabric: str,
    address: str | None,
    data_dir: Path | None,
    run_dir: Path | None,
    device: str = "cpu",
    nodes: int | None = None,
    live: bool = False,
    tolerance: Tolerance = TOLERANCE,
    data: DataSet | None = None,
) -> RunResult:
    """Train a new run. Everything that can be wrong is looked at before anything is written or started.

    Args:
        config: what to train.
        fabric: one of `FABRICS`.
        address: the Ray cluster; None to look for one, or start one.
        data_dir: where data sets are; None for the usual places.
        run_dir: the run's directory; None for one below `runs/`.
        device: where the fabric "batched" computes, "cpu" or "cuda".
        nodes: nodes of the cluster to use at most; None: all that offer tiles.
        live: whether to show what every tile does.
        tolerance: how much trouble it takes before it stops.
        data: what to train on, where that is in memory; None: what the configuration names.

    Raises:
        RapaError: with the cause, and what to do.
    """
    RunDirectory.check_new(run_dir)
    check_physics(fabric, config.physics)
    look_ahead(fabric, address)
    data = opening.load(config, data_dir) if data is None else data
    config = network_of(config, data).config
    with ExitStack() as clean_up:
        place = Place(fabric, machine_of(config), min(config.batch_size, len(data.train)), device, nodes)
        clean_up.callback(place.close)
        place.connect(address)
        options = _options(fabric, device, address, nodes, live, tolerance)
        directory, start = opening.begin(run_dir, config, data, data_dir, clean_up, options)
        return _train(start, data, place, directory, live, tolerance, device)


def resume_run(
    path: Path,
    *,
    epochs: int | None,
    dataset: str | None = None,
    fabric: str,
    address: str | None,
    data_dir: Path | None,
    device: str = "cpu",
    nodes: int | None = None,
    live: bool = False,
    tolerance: Tolerance = TOLERANCE,
    data: DataSet | None = None,
) -> RunResult:
    """Go on with a run from its newest checkpoint, as if it had never stopped.

    Args:
        path: the run's directory.
        epochs: a new number of epochs, or None for the old one.
        dataset: where its images are now, by a data set's name; None: where they were.
        fabric: one of `FABRICS`; need not be the one it was started with.
        device: as for `start_run`.
        nodes: as for `start_run`.
        address: as for `start_run`.
        data_dir: as for `start_run`; None for where the run found its data.
        live: as for `start_run`.
        tolerance: as for `start_run`.
        data: as for `start_run`.

    Raises:
        RapaError: with the cause, and what to do.
    """
    directory = RunDirectory(path)
    config = directory.config
    with ExitStack() as clean_up:
        clean_up.enter_context(opening.held(directory))
        newest = opening.newest(directory)
        if epochs is not None:
            config = replace(config, epochs=epochs)
        opening.check_progress(directory, config, newest)
        if opening.is_finished(directory, config, newest):
            with suppress(ClusterError, OSError):  # of a coordinator that was killed at its end
                clear_away_abandoned()
            return RunResult(directory, directory.find_checkpoint("newest").stem, finished=True)
        check_physics(fabric, config.physics)
        look_ahead(fabric, address)
        if data is None:
            where = Where(dataset=dataset, data_dir=data_dir)
            check_elsewhere(directory, config, newest, where)
            data = as_the_run_has_them(open_images(directory, config, where), config)
        opening.check_images(directory, data, newest)
        config = replace(config, dataset=data.name)
        place = Place(fabric, machine_of(config), min(config.batch_size, len(data.train)), device, nodes)
        clean_up.callback(place.close)
        place.connect(address)
        options = _options(fabric, device, address, nodes, live, tolerance)
        start = opening.go_on(directory, config, data, newest, data_dir, options)
        return _train(start, data, place, directory, live, tolerance, device)


def _options(
    fabric: str, device: str, address: str | None, nodes: int | None, live: bool, tolerance: Tolerance
) -> list[str]:
    """Return the options of `rapa-dist train` that resume a run in the way that it is trained in now."""

    def named(tolerance: Tolerance) -> dict[str, Any]:
        return {
            "max_restarts": tolerance.restarts,
            "save_patience": tolerance.save_patience_s,
            "node_patience": tolerance.node_patience_s,
            "snapshot_every": tolerance.snapshot_every,
        }

    where = {"fabric": fabric, "device": device, "address": address, "nodes": nodes, "live": live or None}
    return options_of(where | named(tolerance), {"fabric": "ray", "device": "cpu"} | named(TOLERANCE))


def _train(
    start: Checkpoint,
    data: DataSet,
    place: Place,
    directory: RunDirectory,
    live: bool,
    tolerance: Tolerance,
    device: str,
) -> RunResult:
    config, recoveries = start.config, Recoveries(directory)
    with one_digital_thread(), redirect_stdout(directory.log_stream()):  # Ray prints its warnings to stdout
        try:
            if place.where:
                directory.log(place.where)
            told, step = recoveries.restarted, start.progress.step
            fabric = place.open(
                start.kernels, directory.name, directory.path, told, step=step, restarts=tolerance.restarts
            )
            fabric.restore(start.kernels, start.stored)
            tiles = OwnTiles(fabric, directory.name)
            metrics = RayMetrics() if fabric.name == "ray" else None
            display = RunDisplay(config, tiles, live=live, metrics=metrics)
            tell(directory, introduction(config, data, fabric.name))
            if step == 0:
                for note in notes(config, start.kernels, fabric):
                    tell(directory, note)
            newest = checkpoints.name_of(step, start.progress.epoch)
            saver = Saver(directory, newest, patience_s=tolerance.save_patience_s)
            with display, asked_to_stop() as stop:

                def trainer(start: Checkpoint) -> Trainer:
                    every = tolerance.snapshot_every
                    return Trainer(start, data, fabric, directory, display, recoveries, saver, every, device)

                rollback = Rollback(fabric, directory, saver, recoveries, place.rooms_left, tolerance.node_patience_s)
                outcome = rollback.run(start, trainer, stop)
            with suppress(OSError, NodeLostError):  # a full disk, a node lost at the end; the run itself is saved
                directory.write_tiles(display.last_look().as_dict())
        except ClusterError:
            with suppress(OSError):
                place.keep_logs(directory.path / RAY_LOGS)
            raise
        finally:
            place.close()
    if not outcome.finished:
        directory.log(f"interrupted; checkpoint {outcome.checkpoint}")
        opening.tell_how_to_resume(directory)
    return RunResult(directory, outcome.checkpoint, outcome.finished)
