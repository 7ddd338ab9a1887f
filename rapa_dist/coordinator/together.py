"""Several runs at once, as one more dimension of the fabric `batched`: for a GPU, which one network leaves idle.

Each has its own directory, metrics and checkpoints, and takes the steps that it would take by itself, equal to them
within rounding. They are trained epoch by epoch; runs that are not level, since they were stopped between two of their
checkpoints, are brought level first.
"""

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, closing, contextmanager, suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

from rapa_dist.config import TrainConfig, difference
from rapa_dist.coordinator import checkpoint as checkpoints
from rapa_dist.coordinator import opening
from rapa_dist.coordinator.checkpoint import Checkpoint, Progress
from rapa_dist.coordinator.own_tiles import OwnTiles
from rapa_dist.coordinator.run import RunResult
from rapa_dist.coordinator.run_directory import RunDirectory
from rapa_dist.coordinator.saving import Saver
from rapa_dist.coordinator.session import one_digital_thread
from rapa_dist.coordinator.sessions import options_of
from rapa_dist.coordinator.trainer import Trainer
from rapa_dist.data import DataSet
from rapa_dist.errors import RapaError, UsageError
from rapa_dist.fabric.batched import BatchedFabric
from rapa_dist.fabric.registry import registered
from rapa_dist.footprint import check_memory, images_per_batch
from rapa_dist.interrupts import asked_to_stop, uninterrupted
from rapa_dist.network.batched import BatchedNetwork
from rapa_dist.network.pipeline import Result, Step

_MAY_DIFFER = ("seed", "lr", "lr_decay", "lr_decay_every", "warmup_epochs", "weight_decay", "augment")


def train_together(
    runs: Sequence[tuple[Path, TrainConfig]], *, device: str, data_dir: Path | None
) -> list[RunResult | RapaError]:
    """Train runs to their end; those that are there already are resumed.

    Args:
        runs: directory and configuration of each; machine, pooling and images are the same for all.
        device: "cpu" or "cuda".
        data_dir: where data sets are; None for the usual places.

    Returns:
        For every run what it came to, or what ended it: the others go on.

    Raises:
        UsageError: they can't be trained together.
        RapaError: one of them can't be opened; nothing has been trained.
    """
    check_alike([config for _, config in runs])
    _, config = runs[0]
    with ExitStack() as clean_up, one_digital_thread():
        data = opening.load(config, data_dir)
        images = images_per_batch(config.batch_size, len(data.train))
        check_memory(config.machine, len(runs) * images, "batched")
        members = [_open(path, config, data, data_dir, device, clean_up) for path, config in runs]
        stop = clean_up.enter_context(asked_to_stop())
        _Cohort(members, data, images, device).train(stop)
        return [member.close(stop) for member in members]


def check_alike(configs: Sequence[TrainConfig]) -> None:
    """Raise UsageError unless these networks can be trained together."""
    first, *others = configs
    for other in others:
        differs = difference(first, other, but=_MAY_DIFFER)
        if differs:
            raise UsageError(f"These runs can't be trained together, as they differ in {'; '.join(differs)}.")


class _Member:
    """One of the runs."""

    def __init__(self, directory: RunDirectory, start: Checkpoint) -> None:
        self.checkpoint = start
        """As it stands between epochs."""
        self.error: RapaError | None = None
        """What ended it."""
        self._directory = directory
        self._saver = Saver(directory, checkpoints.name_of(start.progress.step, start.progress.epoch))
        self._fabric: BatchedFabric | None = None
        self._trainer: Trainer

    @property
    def at_end(self) -> bool:
        """Whether its last epoch is done."""
        return self.checkpoint.progress.epoch >= self.checkpoint.config.epochs

    @property
    def place(self) -> tuple[int, int]:
        """Epochs that are done, and steps of the next one."""
        return self.checkpoint.progress.epoch, self.checkpoint.progress.step_in_epoch

    def join(self, network: BatchedNetwork, data: DataSet) -> None:
        """Go on as a network in which it already is as its checkpoint has it."""
        self._fabric = network.fabric
        self._trainer = Trainer(
            self.checkpoint,
            data,
            network.fabric,
            self._directory,
            _Unseen(),
            saver=self._saver,
            network=network,
        )

    def steps(self) -> Iterator[Step]:
        """Yield what is left of the epoch."""
        return self._trainer.steps()

    def take(self, result: Result) -> None:
        """Take note of what became of a step."""
        with self._ended_by_an_error():
            self._trainer.take(result)

    def end_epoch(self, train_s: float, stop: Callable[[], bool], networks: int) -> None:
        """Test and save, or save alone."""
        with self._ended_by_an_error():
            self._trainer.end_epoch(train_s, stop, networks=networks)
            self.checkpoint = self._trainer.snapshot

    def close(self, stop: Callable[[], bool]) -> RunResult | RapaError:
        """Write what is still to be written, and return what the run came to."""
        with self._ended_by_an_error():
            self._saver.settle(stop)
        if self.error is not None:
            return self.error
        if self._fabric is not None:
            with suppress(OSError):  # the run itself is saved
                self._directory.write_tiles(OwnTiles(self._fabric, self._directory.name).read().as_dict())
        return RunResult(self._directory, self._saver.newest, self.at_end)

    @contextmanager
    def _ended_by_an_error(self) -> Iterator[None]:
        try:
            yield
        except RapaError as error:
            self._directory.log(f"stopped: {error!r}")
            self.error = error


class _Cohort:
    """Runs of one shape, on their way to the end."""

    def __init__(self, members: Sequence[_Member], data: DataSet, images: int, device: str) -> None:
        self._members, self._data, self._images, self._device = members, data, images, device

    def train(self, stop: Callable[[], bool]) -> None:
        """Train all to their end, or until `stop` says so."""
        level: list[_Member] = []
        while not stop() and (left := [one for one in self._members if one.error is None and not one.at_end]):
            last = min(one.place for one in left)
            before, level = level, [one for one in left if one.place == last]
            if level != before:
                network = self._program(level)
            self._train_epoch(network, level, stop)

    def _program(self, members: Sequence[_Member]) -> BatchedNetwork:
        """Bring members into the tiles of one fabric, as they stand."""
        first = members[0].checkpoint
        fabric = BatchedFabric(
            first.config.machine,
            self._images,
            [one.checkpoint.kernels for one in members],
            device=self._device,
            step=first.progress.step,
        )
        digital = [one.checkpoint.digital for one in members]
        network = BatchedNetwork(fabric, pooling=first.config.pooling, digital=digital)
        for number, member in enumerate(members):
            member.join(network.alone(number), self._data)
        return network

    def _train_epoch(self, network: BatchedNetwork, members: Sequence[_Member], stop: Callable[[], bool]) -> None:
        """Train what is left of an epoch, and test."""
        started = time.perf_counter()
        with closing(network.train_together(_side_by_side(members, stop))) as results:
            for of_members in results:
                for member, result in zip(members, of_members, strict=True):
                    if member.error is None:
                        member.take(result)
        train_s = time.perf_counter() - started
        for member in members:
            if member.error is None:
                member.end_epoch(train_s, stop, len(members))


def _side_by_side(members: Sequence[_Member], stop: Callable[[], bool]) -> Iterator[tuple[Step, ...]]:
    """Yield the steps of an epoch, of all members at once, until `stop` says so."""
    for of_members in zip(*(one.steps() for one in members), strict=True):
        if stop():
            return
        yield of_members


def _open(
    path: Path, config: TrainConfig, data: DataSet, data_dir: Path | None, device: str, clean_up: ExitStack
) -> _Member:
    directory = RunDirectory(path)
    options = options_of({"fabric": BatchedFabric.name, "device": device}, {"device": "cpu"})
    config = replace(config, dataset=data.name)
    if directory.begun:
        clean_up.enter_context(opening.held(directory))
        newest = opening.newest(directory)
        opening.check_progress(directory, config, newest)
        opening.check_images(directory, data, newest)
        start = opening.go_on(directory, config, data, newest, data_dir, options)
    else:
        directory, start = opening.begin(path, config, data, data_dir, clean_up, options)
    registration = registered(run=directory.name, run_dir=path, fabric=BatchedFabric.name, options=options)
    with uninterrupted():
        clean_up.enter_context(registration)
    return _Member(directory, start)


class _Unseen:
    """Shows nothing: who is watched is whoever asked for these runs."""

    def trained(self, progress: Progress, steps_per_epoch: int, loss: float) -> None:
        """Show nothing."""

    def tested(self, done: int, total: int) -> None:
        """Show nothing."""

    def finished_epoch(self, metrics: dict[str, Any]) -> None:
        """Show nothing."""
