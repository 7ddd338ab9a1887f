"""Testing a run's network again, from a checkpoint; nothing is written to the run's directory."""

import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rapa_dist.config import chosen_physics
from rapa_dist.console import work
from rapa_dist.coordinator.evaluation import evaluate
from rapa_dist.coordinator.run_directory import RunDirectory
from rapa_dist.coordinator.run_images import WHERE_THEY_WERE, Where
from rapa_dist.coordinator.trained import OtherPhysics, Trained, check_reassigns
from rapa_dist.errors import UsageError
from rapa_dist.physics.choosing import choose

_ABOUT = ("run_dir", "checkpoint", "epoch", "weights_sha256", "dataset", "images", "same_images")


def retest(
    path: Path,
    *,
    checkpoint: str = "newest",
    votes: int = 1,
    where: Where = WHERE_THEY_WERE,
    limit_test: int | None = None,
    seed: int | None = None,
    physics: str | None = None,
    physics_set: Sequence[str] = (),
    times: int = 1,
) -> dict[str, Any]:
    """Test the network of a run and return its error with what it was obtained with.

    Args:
        path: the run's directory.
        checkpoint: "newest", "best" (lowest test error while training) or a name.
        votes: V, random assignments that vote on every image.
        where: where the images are: the run's own, or those of another data set with the same classes.
        limit_test: test images to use; None: as many as the run did, of others all.
        seed: of the assignments and of noise; None: the run's.
        physics: a preset or a file: other tiles than those that the network was trained on, with devices of their own.
        physics_set: fields of that which are changed; of the run's own, on its devices, if there is no other.
        times: tests, each with the next seed.

    Raises:
        RapaError: with the cause, and what to do.
    """
    if votes < 1:
        raise UsageError(f"--votes needs at least 1; it is {votes}.")
    if seed is not None and seed < 0:
        raise UsageError(f"--seed needs at least 0; it is {seed}.")
    if times < 1:
        raise UsageError(f"--times needs at least 1; it is {times}.")
    own = RunDirectory(path).config
    is_other = physics is not None or bool(physics_set)
    other = chosen_physics(choose(physics, physics_set, own.physics)) if is_other else None
    noisy = (other if is_other else own.physics) is not None
    if votes > 1:
        check_reassigns(path, "all votes would agree", "Leave --votes out.", noisy=noisy)
    if times > 1:
        check_reassigns(path, "all tests would agree", "Leave --times out.", noisy=noisy)
    trained = Trained.open(path, checkpoint=checkpoint, where=where, limit_test=limit_test, others=True)
    scores, first = [], own.seed if seed is None else seed
    for number in range(first, first + times):
        on = OtherPhysics(other, own.seed if physics is None else number) if is_other else None
        with trained.network(number, on=on) as network, work("Testing", "images") as advance:
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
        scores.append(score)
    about, errors = trained.about(), [score.error_percent for score in scores]
    result = {name: about[name] for name in _ABOUT} | {
        "votes": votes,
        "test_error_percent": statistics.fmean(errors),
        "test_loss": statistics.fmean(score.loss for score in scores),
    }
    if is_other:
        result["physics"] = "ideal" if other is None else other.as_dict()
    if times > 1:
        result |= {"test_errors_percent": errors, "test_error_spread": statistics.stdev(errors)}
    return result
