"""Opening a run: a new one, or one that is resumed; its directory is held, and what it starts from is on disk."""

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import replace
from pathlib import Path

from rapa_dist.config import TrainConfig
from rapa_dist.console import counted
from rapa_dist.coordinator import checkpoint as checkpoints
from rapa_dist.coordinator import run_images, sessions
from rapa_dist.coordinator.checkpoint import Checkpoint, Progress
from rapa_dist.coordinator.run_directory import RunDirectory
from rapa_dist.coordinator.telling import tell
from rapa_dist.coordinator.trainer import initial_checkpoint
from rapa_dist.data import DataSet, load_dataset
from rapa_dist.errors import CheckpointError, ClusterError, RunDirectoryError, UsageError
from rapa_dist.fabric.cut_short import last_words
from rapa_dist.interrupts import uninterrupted


def load(config: TrainConfig, data_dir: Path | None) -> DataSet:
    """Return what a run is trained on."""
    return load_dataset(
        config.dataset,
        data_dir=data_dir,
        limit_train=config.limit_train,
        limit_test=config.limit_test,
        image_size=config.image_size,
    )


@contextmanager
def held(directory: RunDirectory) -> Iterator[None]:
    """Take a run directory that is there; see `resumable`."""
    directory.take()
    with resumable(directory):
        yield


def begin(
    path: Path | None,
    config: TrainConfig,
    data: DataSet,
    data_dir: Path | None,
    clean_up: ExitStack,
    options: Sequence[str] = (),
) -> tuple[RunDirectory, Checkpoint]:
    """Make the directory of a new run, and write its first checkpoint.

    Args:
        path: where; None for one below `runs/`.
        config: what to train.
        data: on what.
        data_dir: where that was looked for.
        clean_up: releases the directory when it is closed.
        options: of `rapa-dist train`, to resume it as it is started.

    Raises:
        RunDirectoryError: it can't be made or written to.
    """
    with uninterrupted():
        directory = RunDirectory.create(path, config, data_dir, options)
        clean_up.enter_context(resumable(directory))
        start = initial_checkpoint(config, data)
        _write_first(directory, start)
    directory.log(f"new run: {config}")
    return directory, start


def newest(directory: RunDirectory) -> Checkpoint | None:
    """Return the newest checkpoint of a run; None if it was killed before it wrote one.

    Raises:
        CheckpointError: it can't be read, or is of another configuration.
    """
    found = checkpoints.checkpoints(directory.checkpoint_folder)
    return directory.read_checkpoint(found[-1]) if found else None


def check_images(directory: RunDirectory, data: DataSet, newest: Checkpoint | None) -> None:
    """See that these are the images that the run was trained on.

    Raises:
        DataError: they are others.
        CheckpointError: with them the run can't be as far as its checkpoint says.
    """
    run_images.check_same(directory, data, newest, run_images.NEW_RUN)
    if newest:
        _check_steps(directory, newest, len(data.train))


def _check_steps(directory: RunDirectory, newest: Checkpoint, images: int) -> None:
    """Raise CheckpointError unless a run of so many images can be as far as its checkpoint says."""
    progress, batch = newest.progress, min(newest.config.batch_size, images)
    per_epoch = -(-images // batch)
    if (
        progress.step_in_epoch > per_epoch
        or progress.step != progress.epoch * per_epoch + progress.step_in_epoch
        or progress.seen != min(progress.step_in_epoch * batch, images)
    ):
        raise CheckpointError(
            f"The newest checkpoint in {directory.checkpoint_folder} says that the run has come to step "
            f"{progress.step:,}, by {counted(progress.epoch, 'epoch')} and {counted(progress.step_in_epoch, 'step')}; "
            f"an epoch has {counted(per_epoch, 'step')}. It was changed: delete its two files to resume from the one "
            "before."
        )


def is_finished(directory: RunDirectory, config: TrainConfig, newest: Checkpoint | None) -> bool:
    """Return whether a run has no epoch left to train; if so, say how to train it longer."""
    if newest is None or newest.progress.epoch < config.epochs:
        return False
    longer = f"{sessions.resume_command(directory.path)} --epochs {2 * config.epochs}"
    tell(
        directory,
        f"The run in {directory.path} is finished: {counted(config.epochs, 'epoch')} of {config.epochs:,} trained. "
        f"Nothing was started. To train it longer: {longer}",
    )
    return True


def go_on(
    directory: RunDirectory,
    config: TrainConfig,
    data: DataSet,
    newest: Checkpoint | None,
    data_dir: Path | None,
    options: Sequence[str] = (),
) -> Checkpoint:
    """Bring the directory back to the newest checkpoint, and return what to go on from.

    Args:
        directory: held.
        config: with the epochs that are wanted now, and the place where the images are now.
        data: what it is trained on.
        newest: None to begin at the beginning.
        data_dir: where data sets are now; None: where they were.
        options: of `rapa-dist train`, to resume it in the same way again.

    Raises:
        RunDirectoryError: it can't be written to.
    """
    start = newest or initial_checkpoint(config, data)
    if newest is None:
        _write_first(directory, start)
    try:
        directory.add_session(options, data_dir)
        directory.write_config(config)
        directory.cut_metrics(start.progress.metrics_bytes)
    except OSError as error:
        raise RunDirectoryError(
            f"Can't write to the run directory {directory.path}: {error.strerror}. Make room there, or correct "
            "permissions."
        ) from error
    name = checkpoints.name_of(start.progress.step, start.progress.epoch)
    origin = name if newest else "its beginning"
    tell(directory, f"Resuming {directory.path} from {origin}")
    return replace(start, config=config)


def _write_first(directory: RunDirectory, start: Checkpoint) -> None:
    """Write a run's first checkpoint; without one there is nothing to go back to, so there it is not tried again."""
    try:
        checkpoints.write(directory.checkpoint_folder, checkpoints.name_of(0, 0), start)
    except OSError as error:
        raise RunDirectoryError(
            f"Can't write the first checkpoint of the run in {directory.path}: {error.strerror}. "
            "Make room there, or correct its permissions."
        ) from error


def check_progress(directory: RunDirectory, config: TrainConfig, newest: Checkpoint | None) -> None:
    """Raise an error unless a run can go on from its newest checkpoint to the epochs that are wanted."""
    progress = newest.progress if newest else Progress()
    directory.check_metrics(progress.metrics_bytes)
    if (found := len(directory.metrics(progress.metrics_bytes))) != progress.epoch:
        raise RunDirectoryError(
            f"The metrics of the run in {directory.path} hold {counted(found, 'epoch')} up to its newest checkpoint, "
            f"which has finished {progress.epoch:,}. They were damaged: restore them, or start a new run."
        )
    if newest is None and directory.has_metrics:
        raise CheckpointError(
            f"The run in {directory.path} has trained at least one epoch, but its checkpoints are gone. "
            "Restore one, or start a new run without --resume."
        )
    begun = progress.epoch + (progress.step_in_epoch > 0)
    if config.epochs < begun:
        raise UsageError(
            f"The run in {directory.path} has begun {counted(begun, 'epoch')}, it can't end after {config.epochs}. "
            f"Use --epochs {begun} or more; for a shorter run, start a new one without --resume."
        )


@contextmanager
def resumable(directory: RunDirectory) -> Iterator[None]:
    """Hold a run directory; whatever ends the run early is logged, and with it how to resume is told."""

    def tell(why: str) -> None:
        directory.log(f"stopped: {why}")
        tell_how_to_resume(directory)

    try:
        with last_words(tell):
            yield
    except BaseException as error:
        directory.log(f"stopped: {error!r}")
        if isinstance(error, KeyboardInterrupt | ClusterError):
            tell_how_to_resume(directory)
        raise
    finally:
        directory.release()


def tell_how_to_resume(directory: RunDirectory) -> None:
    """Say how a run can be resumed."""
    found: list[Path] = []
    with suppress(CheckpointError):  # whatever is told here is not why the run ended
        found = checkpoints.checkpoints(directory.checkpoint_folder)
    saved = f"The newest checkpoint is {found[-1].stem}. " if found else ""
    tell(directory, f"\n{saved}Resume with: {sessions.resume_command(directory.path)}")
