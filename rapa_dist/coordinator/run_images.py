"""The images of a run: where they lie may change with every command, what they are may not.

What they are is told by their fingerprint, of pixels and labels as the run uses them; the checkpoint has it. So images
that have moved can be resumed from, tested on and analysed, and others that took their place are refused.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from rapa_dist.config import TrainConfig
from rapa_dist.console import stderr
from rapa_dist.coordinator.checkpoint import Checkpoint
from rapa_dist.coordinator.run_directory import RunDirectory
from rapa_dist.data import DataSet
from rapa_dist.data.classes import listed
from rapa_dist.data.load import AllImages, check_name, open_dataset
from rapa_dist.data.look import Look, look
from rapa_dist.errors import DataError, UsageError

NEW_RUN = "or start a new run without --resume."
"""What else to do than to resume."""
_SAY_WHERE = "with --dataset (images:FOLDER) or --data-dir"


@dataclass(frozen=True, slots=True, kw_only=True)
class Where:
    """Where images are to be looked for."""

    dataset: str | None = None
    """A data set's name; None: as the run's configuration has it."""
    data_dir: Path | None = None
    """The folder of published data sets; None: where the run found them."""

    @property
    def given(self) -> bool:
        """Whether it is said at all."""
        return self.dataset is not None or self.data_dir is not None


WHERE_THEY_WERE = Where()
"""Where the run found its images."""


def open_images(directory: RunDirectory, config: TrainConfig, where: Where) -> AllImages:
    """Return the images at a place, which need not be the run's.

    Raises:
        UsageError: there is no such data set.
        DataError: there are none, or they can't be read.
    """
    with _maybe_moved(directory, where):
        return open_dataset(_name(config, where), where.data_dir or directory.data_dir, config.image_size)


def look_at_images(directory: RunDirectory, config: TrainConfig, where: Where) -> Look:
    """Return what is known of the images at a place without decoding them; errors are those of `open_images`."""
    with _maybe_moved(directory, where):
        return look(
            _name(config, where),
            data_dir=where.data_dir or directory.data_dir,
            limit_train=config.limit_train,
            limit_test=config.limit_test,
            image_size=config.image_size,
        )


def _name(config: TrainConfig, where: Where) -> str | None:
    return config.dataset if where.dataset is None else check_name(where.dataset)


@contextmanager
def _maybe_moved(directory: RunDirectory, where: Where) -> Iterator[None]:
    """Say what to do where images can't be found or read, and nobody has said where they are."""
    try:
        yield
    except DataError as error:
        if where.given:
            raise
        moved = f"If the images of the run in {directory.path} have moved, say where they are, {_SAY_WHERE}."
        raise DataError(f"{str(error).removesuffix('.')}. {moved}") from error


def as_the_run_has_them(images: AllImages, config: TrainConfig, *, tell: bool = True) -> DataSet:
    """Return as many of the images as the run uses; `tell` where there are not so many."""
    return images.limited(config.limit_train, config.limit_test, tell=tell)


def check_looks_same(directory: RunDirectory, seen: Look, newest: Checkpoint | None) -> None:
    """Raise DataError if images that were only looked at are, by what is known of them, not those of a run."""
    if seen.fingerprint is not None:
        check_same(directory, seen, newest, NEW_RUN)
    elif newest is not None and seen.classes is not None and len(seen.classes) != len(newest.classes):
        raise DataError(
            f"The data set {seen.name} is not the one that the run in {directory.path} was trained on: it has "
            f"{len(seen.classes)} classes, that of the run {len(newest.classes)}. Say where the run's images are now, "
            f"{_SAY_WHERE}; {NEW_RUN}"
        )


def check_same(directory: RunDirectory, data: DataSet | Look, newest: Checkpoint | None, otherwise: str) -> None:
    """See that these are the images that a run was trained and tested on; warn if their classes are called otherwise.

    Args:
        directory: the run's.
        data: the images, `as_the_run_has_them`.
        newest: a checkpoint of the run; None if it has none yet, and was not told to look elsewhere.
        otherwise: what to do with other images.

    Raises:
        DataError: they are others; both fingerprints are given.
    """
    if newest is None:
        return
    if data.fingerprint != newest.data_fingerprint:
        raise DataError(
            f"The data set {data.name} is not the one that the run in {directory.path} was trained on: its images and "
            f"labels have the fingerprint {data.fingerprint}, those of the run {newest.data_fingerprint}. "
            f"Restore it, or say where the run's images are now, {_SAY_WHERE}; {otherwise}"
        )
    if data.classes is not None and data.classes != newest.classes:
        stderr.print(
            f"warning: the images of {data.name} are those of the run in {directory.path}, but its classes had other "
            f"names: {listed(newest.classes)}. They are now: {listed(data.classes)}.",
            markup=False,
        )


def check_elsewhere(directory: RunDirectory, config: TrainConfig, newest: Checkpoint | None, where: Where) -> None:
    """Raise UsageError if images elsewhere are named for a run that can't tell whether they are its own."""
    if newest is None and where.dataset is not None and where.dataset != config.dataset:
        raise UsageError(
            f"The run in {directory.path} was stopped before its first checkpoint, so nothing says whether "
            f"{where.dataset} has the images of {config.dataset}. Start a new run without --resume."
        )
