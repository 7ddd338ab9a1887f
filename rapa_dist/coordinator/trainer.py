"""The training loop: forward, loss, backward (in which the tiles update themselves), digital update."""

import math
import time
from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from typing import Any, Protocol

import numpy as np
import torch

from rapa_dist.config import TrainConfig
from rapa_dist.coordinator import checkpoint as checkpoints
from rapa_dist.coordinator.checkpoint import Checkpoint, Progress
from rapa_dist.coordinator.evaluation import Score, as_images, evaluate
from rapa_dist.coordinator.learner import digital_arrays, learner, network_of
from rapa_dist.coordinator.recoveries import Recoveries
from rapa_dist.coordinator.run_directory import RunDirectory
from rapa_dist.coordinator.saving import Saver
from rapa_dist.coordinator.weights import weights_sha256
from rapa_dist.data import Batches, DataSet
from rapa_dist.demand import test_images
from rapa_dist.errors import DivergedError
from rapa_dist.fabric.base import Fabric, Kernels
from rapa_dist.hardware import CycleTimes, testing_s, training_epoch_s
from rapa_dist.interrupts import uninterrupted
from rapa_dist.machine import Machine
from rapa_dist.nn.schedule import Result, Step
from rapa_dist.router import loads
from rapa_dist.similarity import similarity

SNAPSHOT_EVERY = 200
"""Steps after which the coordinator takes a copy of all weights, where some tiles live on other nodes, by default."""


class Display(Protocol):
    """Shows a run to whoever watches."""

    def trained(self, progress: Progress, steps_per_epoch: int, loss: float) -> None:
        """Take note of a step."""

    def tested(self, done: int, total: int) -> None:
        """Take note of a tested batch."""

    def finished_epoch(self, metrics: dict[str, Any]) -> None:
        """Take note of an epoch, given its line of metrics.jsonl."""


@dataclass(frozen=True, slots=True)
class Outcome:
    """How a call of `Trainer.run` ended."""

    finished: bool
    """False: it was asked to stop before the last epoch was done."""
    checkpoint: str
    """Name of the newest checkpoint."""


def initial_checkpoint(config: TrainConfig, data: DataSet) -> Checkpoint:
    """Return a run that has not trained a step yet."""
    network = network_of(config, data)
    return Checkpoint(
        config=network.config,
        arrays=tuple(array.name for array in network.recording.machine.arrays),
        data_fingerprint=data.fingerprint,
        data_mean=data.mean.tolist(),
        classes=data.classes,
        progress=Progress(),
        kernels=network.initial_kernels(),
        digital=digital_arrays(network.model),
    )


class Trainer:
    """Trains one network from a checkpoint on, writing to a run directory.

    Which images, which assignments and which λ a step has is a function of the configuration and the
    step's number: a run that was stopped and resumed takes the same steps as one that was not.
    """

    def __init__(
        self,
        start: Checkpoint,
        data: DataSet,
        fabric: Fabric,
        directory: RunDirectory,
        display: Display,
        recoveries: Recoveries | None = None,
        saver: Saver | None = None,
        snapshot_every: int = SNAPSHOT_EVERY,
        device: str = "cpu",
    ) -> None:
        """Continue from `start`, whose kernels are in the fabric's tiles already.

        Args:
            start: where to begin.
            data: what to train on.
            fabric: the tiles.
            directory: where results go.
            display: who is told how it goes.
            recoveries: what the run got over, for its metrics.
            saver: the run's, which outlives this trainer; None for a new one, where `start` is on disk.
            snapshot_every: steps between copies of all weights, where a node can be lost; 0: none but checkpoints.
            device: where the digital side computes.
        """
        self.config = config = start.config
        self.progress = replace(start.progress)
        self._start = start
        self._data = data
        self._fabric = fabric
        self._directory = directory
        self._display = display
        self._recoveries = recoveries or Recoveries(directory)
        self._recoveries.step = self.progress.step
        self._learner = learner(config, fabric, start.digital, step=self.progress.step, device=device)
        self._device = device
        self._batches = Batches(
            data.train, data.mean, batch_size=config.batch_size, seed=config.seed, augment=config.augment
        )
        self._last = 0, 0  # step and epoch under way, from 1
        self._saver = saver or Saver(directory, checkpoints.name_of(self.progress.step, self.progress.epoch))
        self.snapshot_every = snapshot_every
        """May be set anew between steps."""
        self.snapshot = start
        """What to go back to if a node is lost: the newest snapshot or checkpoint."""
        images = len(data.train.labels)
        machine, router = fabric.machine, self._learner.session.router
        self._device_time_s = training_epoch_s(
            lambda size: loads(machine, router, size, training=True), images, config.batch_size, CycleTimes()
        )
        self._test_device_time_s = testing_s(
            lambda size: loads(machine, router, size, training=False),
            len(data.test.labels),
            test_images(machine, config.batch_size),
            CycleTimes(),
        )
        self._counted_until = time.perf_counter()

    @property
    def newest(self) -> str:
        """Name of the newest checkpoint on disk."""
        return self._saver.newest

    @property
    def at_end(self) -> bool:
        """Whether the last epoch is done."""
        return self.progress.epoch >= self.config.epochs

    def run(self, stop: Callable[[], bool] = lambda: False) -> Outcome:
        """Train and test until the last epoch is done, or until `stop` says so; then save.

        Raises:
            DivergedError: the loss or a weight is no longer finite; the last checkpoint is from before.
            CheckpointError: nothing could be saved for too long.
        """
        while not self.at_end:
            self._counted_until = time.perf_counter()
            with closing(self._learner.train(self.steps(stop))) as results:
                for result in results:
                    self.take(result)
            if not self.end_epoch(self._uncounted(), stop):
                return self.end(stop, finished=False)
        return self.end(stop, finished=True)

    def save_snapshot(self) -> None:
        """Save the newest snapshot, or try to, unless it is on disk; asks nothing of the tiles.

        Raises:
            DivergedError: there is a weight in it that is not finite.
            CheckpointError: nothing could be saved for too long.
        """
        progress, snapshot = self.snapshot.progress, self.snapshot
        name = checkpoints.name_of(progress.step, progress.epoch)
        if name == self.newest:
            return
        self._check_finite(snapshot)
        best = progress.best_epoch
        self._saver.save(name, snapshot, checkpoints.name_of(best * len(self._batches), best) if best else None)

    def steps(self, stop: Callable[[], bool] = lambda: False) -> Iterator[Step]:
        """Yield the steps that are left of the epoch under way, until `stop` says so."""
        rate = self.config.learning_rate(self.progress.epoch)
        batches = self._batches.epoch(self.progress.epoch, self.progress.step_in_epoch)
        for number, (pixels, labels) in enumerate(batches, self.progress.step):
            if stop():
                return
            yield Step(number, as_images(pixels, self._device), torch.from_numpy(labels).to(self._device), rate)

    def take(self, result: Result) -> None:
        """Take note of what became of the next of these steps.

        Raises:
            DivergedError: the loss is no finite number.
            CheckpointError: nothing could be saved for too long.
        """
        progress = self.progress
        self._last = progress.step + 1, progress.epoch + 1
        if not math.isfinite(result.loss):
            raise self._diverged(f"the loss is {result.loss}")
        self._saver.retry()
        self._recoveries.step = progress.step = progress.step + 1
        progress.step_in_epoch += 1
        progress.loss_sum += result.loss * result.images
        progress.wrong += result.wrong
        progress.seen += result.images
        self._display.trained(progress, len(self._batches), result.loss)
        if self._fabric.spread and self.snapshot_every and progress.step % self.snapshot_every == 0:
            progress.train_s += self._uncounted()
            self.snapshot = self._look()

    def start_again(self) -> Checkpoint:
        """Return the newest snapshot, to train on from, with all the wall time that its epoch has taken so far."""
        progress, snapshot = self.progress, self.snapshot
        if progress.epoch != snapshot.progress.epoch:
            return snapshot
        train_s = progress.train_s + self._uncounted()
        return replace(snapshot, progress=replace(snapshot.progress, train_s=train_s))

    def end_epoch(self, train_s: float, stop: Callable[[], bool]) -> bool:
        """Test, record the epoch and save; or, if `stop` says so, save what there is of it.

        Args:
            train_s: wall time of its training that is not in `progress` yet, in seconds.
            stop: asked for now and then.

        Returns:
            Whether to go on.

        Raises:
            DivergedError, CheckpointError: as `run` does.
        """
        progress, started = self.progress, time.perf_counter()
        progress.train_s += train_s
        score = None if stop() else self._test(stop)
        if score is not None and not math.isfinite(score.loss):
            raise self._diverged(f"the test loss is {score.loss}")
        progress.test_s += time.perf_counter() - started
        unsaved = checkpoints.name_of(progress.step, progress.epoch) != self.newest
        look = self._look() if unsaved or score is not None else None  # the tiles may fail here: nothing is written yet
        progress.recoveries = [*progress.recoveries, *self._recoveries.take()]
        if look is not None and score is not None:
            self._finish_epoch(look, score, self._wall())
        elif look is not None:
            self._save(look)
        return score is not None and (self.at_end or not stop())

    def end(self, stop: Callable[[], bool], *, finished: bool) -> Outcome:
        """Wait until everything is written, and return how it ended.

        Raises:
            CheckpointError: nothing could be saved for too long.
        """
        self._saver.settle(stop)
        return Outcome(finished, self.newest)

    def _test(self, stop: Callable[[], bool]) -> Score | None:
        return evaluate(
            self._learner,
            self._data.test,
            self._data.mean,
            batch_size=test_images(self._fabric.machine, self.config.batch_size),
            step=self.progress.step,
            advance=self._display.tested,
            stop=stop,
        )

    def _finish_epoch(self, look: Checkpoint, score: Score, wall: dict[str, Any]) -> None:
        """Record an epoch and save it, and only then tell of it."""
        self._check_finite(look)
        progress = self.progress
        metrics = {
            "epoch": progress.epoch + 1,
            "step": progress.step,
            "learning_rate": self.config.learning_rate(progress.epoch),
            "train_images": progress.seen,
            "test_images": len(self._data.test.labels),
            "train_loss": progress.loss_sum / progress.seen,
            "train_error_percent": 100 * progress.wrong / progress.seen,
            "test_loss": score.loss,
            "test_error_percent": score.error_percent,
            "device_time_s": self._device_time_s,
            "test_device_time_s": self._test_device_time_s,
            "similarity": _similarities(self._fabric.machine, look.kernels),
            "weights_sha256": weights_sha256(look.weights),
            "wall": wall,
        }
        with uninterrupted():  # an epoch that is in metrics.jsonl is in a checkpoint, too
            progress.metrics_bytes = self._saver.append(metrics)
            progress.epoch += 1
            if progress.best_epoch == 0 or score.error_percent < progress.best_test_error_percent:
                progress.best_epoch, progress.best_test_error_percent = progress.epoch, score.error_percent
            progress.step_in_epoch, progress.loss_sum, progress.wrong, progress.seen = 0, 0.0, 0, 0
            progress.train_s, progress.test_s, progress.recoveries = 0.0, 0.0, []
            self._save(look)
        self._directory.log(f"epoch {progress.epoch} done: {metrics}")
        self._display.finished_epoch(metrics)

    def _wall(self) -> dict[str, Any]:
        """Return the part of a line of metrics that no two runs have in common: of all sessions of the epoch."""
        progress = self.progress
        return {
            "finished": datetime.now(UTC).isoformat(timespec="seconds"),
            "fabric": self._fabric.name,
            "train_s": round(progress.train_s, 3),
            "test_s": round(progress.test_s, 3),
            "steps": progress.step_in_epoch,
            "step_ms": round(1e3 * progress.train_s / progress.step_in_epoch, 3),
            "recoveries": progress.recoveries,
        }

    def _uncounted(self) -> float:
        """Return the wall time since it was asked for last, or since the epoch was begun or resumed, in seconds."""
        since, self._counted_until = self._counted_until, time.perf_counter()
        return self._counted_until - since

    def _diverged(self, what: str) -> DivergedError:
        step, epoch = self._last
        learning_rate = self.config.learning_rate(max(epoch - 1, 0))
        return DivergedError(
            f"Training diverged: {what} in step {step} (epoch {epoch}), λ = {learning_rate:g}. "
            f"The last good checkpoint is {self.newest} in {self._directory.checkpoint_folder}. "
            "Start again with a smaller --lr or a longer --warmup-epochs."
        )

    def _look(self) -> Checkpoint:
        """Return the run as it stands."""
        kernels, digital = self._fabric.all_kernels(), digital_arrays(self._learner.model)
        stored = self._fabric.stored()
        return replace(self._start, progress=replace(self.progress), kernels=kernels, digital=digital, stored=stored)

    def _check_finite(self, look: Checkpoint) -> None:
        if not all(np.isfinite(array).all() for array in (*look.kernels, *look.digital.values())):
            raise self._diverged("there are weights that are no finite numbers")

    def _save(self, look: Checkpoint) -> None:
        """Save the run as it stands, or try to, given what the tiles hold."""
        self.snapshot = replace(look, progress=replace(self.progress))
        self.save_snapshot()


def _similarities(machine: Machine, kernels: Kernels) -> list[float | None]:
    """Return S of every layer (Fig. 3); None with fewer than two tiles, or where it is no finite number."""
    found = [similarity(array.filters(of_layer)) for array, of_layer in zip(machine.arrays, kernels, strict=True)]
    return [value if value is not None and math.isfinite(value) else None for value in found]
