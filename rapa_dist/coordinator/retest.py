"""Testing a run's network again, from a checkpoint; nothing is written to the run's directory."""

from pathlib import Path
from typing import Any

from rapa_dist.console import work
from rapa_dist.coordinator.evaluation import evaluate
from rapa_dist.coordinator.run_images import WHERE_THEY_WERE, Where
from rapa_dist.coordinator.trained import Trained, check_reassigns
from rapa_dist.errors import UsageError

_ABOUT = ("run_dir", "checkpoint", "epoch", "weights_sha256", "dataset", "images", "same_images")


def retest(
    path: Path,
    *,
    checkpoint: str = "newest",
    votes: int = 1,
    where: Where = WHERE_THEY_WERE,
    limit_test: int | None = None,
    seed: int | None = None,
) -> dict[str, Any]:
    """Test the network of a run and return its error with what it was obtained with.

    Args:
        path: the run's directory.
        checkpoint: "newest", "best" (lowest test error while training) or a name.
        votes: V, random assignments that vote on every image.
        where: where the images are: the run's own, or those of another data set with the same classes.
        limit_test: test images to use; None: as many as the run did, of others all.
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
    trained = Trained.open(path, checkpoint=checkpoint, where=where, limit_test=limit_test, others=True)
    with trained.network(seed) as network, work("Testing", "images") as advance:
        score = evaluate(
            network,
            trained.data.test,
            trained.mean,
            batch_size=trained.test_images,
            step=trained.step,
            votes=votes,
            advance=advance,
        )
    assert score is not None
    about = trained.about()
    return {name: about[name] for name in _ABOUT} | {
        "votes": votes,
        "test_error_percent": score.error_percent,
        "test_loss": score.loss,
    }
