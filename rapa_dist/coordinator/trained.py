"""A trained network as its run left it: checkpoint, images, and a machine to run it on again."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from rapa_dist.config import TrainConfig
from rapa_dist.console import stderr
from rapa_dist.coordinator.assigner import Assigner
from rapa_dist.coordinator.checkpoint import Checkpoint
from rapa_dist.coordinator.run_directory import RunDirectory
from rapa_dist.coordinator.session import one_digital_thread
from rapa_dist.data import DataSet, load_dataset
from rapa_dist.errors import DataError, UsageError
from rapa_dist.fabric.serial import SerialFabric
from rapa_dist.footprint import TEST_IMAGES
from rapa_dist.network.model import Network
from rapa_dist.tile import Matrix


def check_reassigns(path: Path, so: str, instead: str = "Give a tiled run with --scheme random.") -> None:
    """Raise UsageError unless a run draws its assignments at random again and again; before its images are read.

    Args:
        path: the run's directory.
        so: what follows if it does not.
        instead: what to do then.
    """
    config = RunDirectory(path).config
    if not config.reassigns:
        raise UsageError(
            f"The run in {path} (scheme {config.scheme}) assigns every patch always to the same tile, so {so}. "
            f"{instead}"
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Trained:
    """A checkpoint of a run with the images to look at it by. Nothing is written to the run's directory."""

    path: Path
    """The run's directory."""
    name: str
    """The checkpoint's name."""
    checkpoint: Checkpoint
    data: DataSet

    @classmethod
    def open(
        cls,
        path: Path,
        *,
        checkpoint: str = "newest",
        dataset: str | None = None,
        data_dir: Path | None = None,
        limit_test: int | None = None,
    ) -> "Trained":
        """Read a checkpoint, and the images that its run was tested on or others.

        Args:
            path: the run's directory.
            checkpoint: "newest", "best" (lowest test error while training) or a name.
            dataset: another data set than the run's, with as many classes.
            data_dir: where it is.
            limit_test: test images to use; None: as the run did.

        Raises:
            RapaError: with the cause, and what to do.
        """
        directory = RunDirectory(path)
        config = directory.config
        found = directory.find_checkpoint(checkpoint)
        trained = directory.read_checkpoint(found)
        data = load_dataset(
            dataset or config.dataset,
            data_dir=data_dir or directory.data_dir,
            limit_train=config.limit_train if dataset is None else 1,  # none is used
            limit_test=limit_test if limit_test is not None or dataset is not None else config.limit_test,
        )
        if len(data.classes) != len(trained.classes):
            raise DataError(
                f"The network knows {len(trained.classes)} classes, {data.name} has {len(data.classes)}. "
                "Give a --dataset with the same classes."
            )
        if dataset is None and limit_test is None and data.fingerprint != trained.data_fingerprint:
            stderr.print(
                f"warning: the images of {data.name} are not those that the run was trained and tested on",
                markup=False,
            )
        return cls(path=path, name=found.stem, checkpoint=trained, data=data)

    @property
    def config(self) -> TrainConfig:
        """The run's configuration."""
        return self.checkpoint.config

    @property
    def mean(self) -> Matrix:
        """(3,) mean pixel per channel, 0…1, that the network subtracts from its input."""
        return np.asarray(self.checkpoint.data_mean, np.float32)

    @property
    def step(self) -> int:
        """Mini-batches trained."""
        return self.checkpoint.progress.step

    def assigner(self, seed: int | None = None) -> Assigner:
        """Return what draws the assignments, with the run's seed or another."""
        return Assigner(self.config.machine, self.config.scheme, self.config.seed if seed is None else seed)

    @contextmanager
    def network(self, images: int = TEST_IMAGES) -> Iterator[Network]:
        """Bring the network up, with kernels from the checkpoint, for mini-batches of at most `images` images."""
        with one_digital_thread(), SerialFabric(self.config.machine, images, self.checkpoint.kernels) as fabric:
            yield Network(fabric, pooling=self.config.pooling, digital=self.checkpoint.digital)

    def about(self) -> dict[str, Any]:
        """Return which network this is, as plain values."""
        config = self.config
        return {
            "run_dir": str(self.path),
            "checkpoint": self.name,
            "epoch": self.checkpoint.progress.epoch,
            "scheme": config.scheme,
            "tiles": list(config.tiles),
            "pooling": config.pooling,
            "dataset": self.data.name,
            "images": len(self.data.test.labels),
        }
