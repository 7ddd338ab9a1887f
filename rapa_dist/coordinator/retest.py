"""Testing a run's network again, from a checkpoint; nothing is written to the run's directory."""

from pathlib import Path
from typing import Any

from rapa_dist.console import work
from rapa_dist.coordinator.evaluation import evaluate
from rapa_dist.coordinator.trained import Trained, check_reassigns
from rapa_dist.errors import UsageError


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
    if votes > 1:
        check_reassigns(path, "all votes would agree", "Leave --votes out.")
    trained = Trained.open(path, checkpoint=checkpoint, dataset=dataset, data_dir=data_dir, limit_test=limit_test)
    with trained.network() as network, work("Testing", "images") as advance:
        score = evaluate(
            network,
            trained.assigner(seed),
            trained.data.test,
            trained.mean,
            step=trained.step,
            votes=votes,
            micro_batches=trained.config.micro_batches,  # as in the run's tests: the same bits
            advance=advance,
        )
    assert score is not None
    about = trained.about()
    return {name: about[name] for name in ("run_dir", "checkpoint", "epoch", "dataset", "images")} | {
        "votes": votes,
        "test_error_percent": score.error_percent,
        "test_loss": score.loss,
    }
