"""Testing a run's network again, from a checkpoint; nothing is written to the run's directory."""

from pathlib import Path
from typing import Any

import numpy as np

from rapa_dist.console import stderr, work
from rapa_dist.coordinator import checkpoint as checkpoints
from rapa_dist.coordinator.assigner import Assigner
from rapa_dist.coordinator.checkpoint import Checkpoint
from rapa_dist.coordinator.evaluation import evaluate
from rapa_dist.coordinator.run_directory import RunDirectory
from rapa_dist.coordinator.session import one_digital_thread
from rapa_dist.data import load_dataset
from rapa_dist.errors import CheckpointError, DataError, UsageError
from rapa_dist.fabric.serial import SerialFabric
from rapa_dist.footprint import TEST_IMAGES
from rapa_dist.network.model import Network


def retest(
    path: Path,
    *,
    checkpoint: str = "newest",
    votes: int = 1,
    dataset: str | None = None,
    data_dir: Path | None = None,
    limit_test: int | None = None,
    seed: int | None = None,
) -> dict[str, Any]:
    """Test the network of a run and return its error with what it was obtained with.

    Args:
        path: the run's directory.
        checkpoint: "newest", "best" (lowest test error while training) or a name.
        votes: V, random assignments that vote on every image.
        dataset: another data set than the run's, with as many classes.
        data_dir: where it is.
        limit_test: test images to use; None: as the run did.
        seed: of the assignments; None: the run's.

    Raises:
        RapaError: with the cause, and what to do.
    """
    if votes < 1:
        raise UsageError(f"--votes needs at least 1; it is {votes}.")
    if seed is not None and seed < 0:
        raise UsageError(f"--seed needs at least 0; it is {seed}.")
    directory = RunDirectory(path)
    config = directory.config
    if votes > 1 and config.scheme != "random":
        raise UsageError(
            f"Scheme {config.scheme} assigns every patch always to the same tile, so all votes would agree. "
            "Leave --votes out."
        )
    name, trained = _find(directory, checkpoint)
    data = load_dataset(
        dataset or config.dataset,
        data_dir=data_dir or directory.data_dir,
        limit_train=config.limit_train if dataset is None else 1,  # none is used
        limit_test=limit_test if limit_test is not None or dataset is not None else config.limit_test,
    )
    if len(data.classes) != trained.classes:
        raise DataError(
            f"The network knows {trained.classes} classes, {data.name} has {len(data.classes)}. "
            "Give a --dataset with the same classes."
        )
    if dataset is None and limit_test is None and data.fingerprint != trained.data_fingerprint:
        stderr.print(
            f"warning: the images of {data.name} are not those that the run was trained and tested on", markup=False
        )
    machine = config.machine
    with (
        one_digital_thread(),
        SerialFabric(machine, TEST_IMAGES, trained.kernels) as fabric,
        work("Testing", "images") as advance,
    ):
        network = Network(fabric, pooling=config.pooling, digital=trained.digital)
        assigner = Assigner(machine, config.scheme, config.seed if seed is None else seed)
        mean = np.asarray(trained.data_mean, np.float32)
        step = trained.progress.step
        parts = config.micro_batches  # as in the run's own tests, so that the scores have the same bits
        score = evaluate(
            network, assigner, data.test, mean, step=step, votes=votes, micro_batches=parts, advance=advance
        )
    assert score is not None
    return {
        "run_dir": str(path),
        "checkpoint": name,
        "epoch": trained.progress.epoch,
        "dataset": data.name,
        "images": len(data.test.labels),
        "votes": votes,
        "test_error_percent": score.error_percent,
        "test_loss": score.loss,
    }


def _find(directory: RunDirectory, which: str) -> tuple[str, Checkpoint]:
    folder = directory.checkpoint_folder
    newest = checkpoints.latest(folder)
    if which == "newest":
        return newest.stem, directory.read_checkpoint(newest)
    if which == "best":
        epoch = directory.read_checkpoint(newest).progress.best_epoch
        found = [path for path in checkpoints.checkpoints(folder) if path.stem.endswith(f"-epoch-{epoch:05d}")]
        which = found[0].stem if epoch and found else which
    path = folder / f"{which}.safetensors"
    if path not in checkpoints.checkpoints(folder):
        names = ", ".join(p.stem for p in checkpoints.checkpoints(folder))
        raise CheckpointError(f"There is no checkpoint “{which}” in {folder}. There are: {names}.")
    return which, directory.read_checkpoint(path)
