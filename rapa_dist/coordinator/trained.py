"""A trained network as its run left it: checkpoint, images, and a machine to run it on again."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from rapa_dist.config import TrainConfig
from rapa_dist.console import stderr
from rapa_dist.coordinator.checkpoint import Checkpoint
from rapa_dist.coordinator.learner import learner
from rapa_dist.coordinator.run_directory import RunDirectory
from rapa_dist.coordinator.run_images import WHERE_THEY_WERE, Where, as_the_run_has_them, check_same, open_images
from rapa_dist.coordinator.session import one_digital_thread
from rapa_dist.coordinator.weights import weights_sha256
from rapa_dist.data import DataSet
from rapa_dist.data.classes import translate
from rapa_dist.demand import arena_floats, test_images
from rapa_dist.errors import UsageError
from rapa_dist.fabric.serial import SerialFabric
from rapa_dist.layout import machine_of
from rapa_dist.nn.schedule import Learner
from rapa_dist.physics.choosing import PhysicsChoice
from rapa_dist.tile import Matrix


def check_reassigns(
    path: Path, so: str, instead: str = "Give a tiled run with --scheme random.", *, noisy: bool = False
) -> None:
    """Raise UsageError unless a run draws its assignments at random again and again; before its images are read.

    Args:
        path: the run's directory.
        so: what follows if it does not.
        instead: what to do then.
        noisy: whether its tiles are, so that no two passes are alike anyway.
    """
    config = RunDirectory(path).config
    if not config.reassigns and not noisy:
        raise UsageError(
            f"The run in {path} (scheme {config.scheme}) assigns every patch always to the same tile, so {so}. "
            f"{instead}"
        )


@dataclass(frozen=True, slots=True)
class OtherPhysics:
    """Tiles that a network was not trained on, but is programmed into."""

    physics: PhysicsChoice | None
    """What they are like; None: ideal."""
    seed: int
    """Of their devices."""

    def instead_of(self, config: TrainConfig) -> TrainConfig:
        """Return the configuration of the network on these tiles."""
        return replace(config, physics=self.physics, seed=self.seed, weight_decay=0.0)


@dataclass(frozen=True, slots=True, kw_only=True)
class Trained:
    """A checkpoint of a run with the images to look at it by. Nothing is written to the run's directory."""

    path: Path
    """The run's directory."""
    name: str
    """The checkpoint's name."""
    checkpoint: Checkpoint
    data: DataSet
    """The run's training images, and the ones to test on."""
    same_images: bool
    """Whether these are of the run's test images."""

    @classmethod
    def open(
        cls,
        path: Path,
        *,
        checkpoint: str = "newest",
        where: Where = WHERE_THEY_WERE,
        limit_test: int | None = None,
        others: bool = False,
    ) -> "Trained":
        """Read a checkpoint, and the images that its run was tested on or, if they may be, others.

        Args:
            path: the run's directory.
            checkpoint: "newest", "best" (lowest test error while training) or a name.
            where: where the images are.
            limit_test: test images to use; None: as many as the run did, of others all.
            others: whether what `where` names may be other images than the run's, with the same classes.

        Raises:
            RapaError: with the cause, and what to do.
        """
        directory = RunDirectory(path)
        config = directory.config
        found = directory.find_checkpoint(checkpoint)
        trained = directory.read_checkpoint(found)
        images = open_images(directory, config, where)
        others = others and where.dataset is not None
        data = as_the_run_has_them(images, config, tell=not others)
        table = None
        if same := data.fingerprint == trained.data_fingerprint or not others:
            check_same(directory, data, trained, "to test on other images, use `rapa-dist evaluate --dataset`.")
            limit = config.limit_test if limit_test is None else limit_test
        else:
            limit = limit_test
            table, said = translate(trained.classes, images.classes, images.name)
            if said:
                stderr.print(said, markup=False)
        if limit != config.limit_test or not same:
            test = images.limited(1, limit).test
            if table is not None:
                test = replace(test, labels=table[test.labels])
            data = replace(data, test=test)
        return cls(path=path, name=found.stem, checkpoint=trained, data=data, same_images=same)

    @property
    def config(self) -> TrainConfig:
        """The run's configuration."""
        return self.checkpoint.config

    @property
    def mean(self) -> Matrix:
        """(channels,) mean pixel per channel, 0…1, that the network subtracts from its input."""
        return np.asarray(self.checkpoint.data_mean, np.float32)

    @property
    def step(self) -> int:
        """Mini-batches trained."""
        return self.checkpoint.progress.step

    @contextmanager
    def network(
        self, seed: int | None = None, *, gradients: bool = False, on: OtherPhysics | None = None
    ) -> Iterator[Learner]:
        """Bring the network up, with kernels from the checkpoint.

        Args:
            seed: of the assignments, and of the noise of products; None: the run's.
            gradients: whether somebody goes back from scores to images, for which every passage is kept.
            on: other tiles than those that it was trained on; None: those.
        """
        checkpoint = self.checkpoint
        of_tiles = self.config if on is None else on.instead_of(self.config)
        config = of_tiles if seed is None else replace(of_tiles, seed=seed)
        machine = machine_of(of_tiles)
        floats = arena_floats(machine, max(config.batch_size, self.test_images) if gradients else config.batch_size)
        with one_digital_thread(), SerialFabric(machine, floats, checkpoint.kernels, step=self.step) as fabric:
            if on is None:
                fabric.restore(checkpoint.kernels, checkpoint.stored)
            network = learner(config, fabric, checkpoint.digital, step=self.step)
            network.model.requires_grad_(False)  # nothing is learnt any more
            yield network

    @property
    def test_images(self) -> int:
        """Images in a batch of a test."""
        return test_images(machine_of(self.config), self.config.batch_size)

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
            "same_images": self.same_images,
            "weights_sha256": weights_sha256(self.checkpoint.weights),
        }
