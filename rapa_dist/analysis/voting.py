"""Voting (§4): classification by the majority of several random assignments."""

from pathlib import Path
from typing import Any

import numpy as np
import torch

from rapa_dist.console import work
from rapa_dist.coordinator.evaluation import as_images, cast_vote
from rapa_dist.coordinator.run_images import WHERE_THEY_WERE, Where
from rapa_dist.coordinator.trained import Trained, check_reassigns
from rapa_dist.data import evaluation_batches
from rapa_dist.errors import UsageError


def voting(
    path: Path,
    *,
    votes: int,
    checkpoint: str = "newest",
    limit_test: int | None = None,
    where: Where = WHERE_THEY_WERE,
) -> dict[str, Any]:
    """Return the test error of the majority of the first 1, 2, … V votes, and of every vote by itself.

    The votes are those of `rapa-dist evaluate --votes`. `changed_percent` is how many images one vote has right and all
    of them have wrong, or the other way round, in the mean of the votes.

    Args:
        path: directory of a run with the scheme "random".
        votes: V.
        checkpoint: "newest", "best" or a name.
        limit_test: test images to use; None: as the run did.
        where: where the run's images are.

    Raises:
        RapaError: with the cause, and what to do.
    """
    if votes < 1:
        raise UsageError(f"--votes needs at least 1; it is {votes}.")
    check_reassigns(path, "all votes would agree")
    trained = Trained.open(path, checkpoint=checkpoint, where=where, limit_test=limit_test)
    wrong_majority, wrong_single = np.zeros(votes, int), np.zeros(votes, int)
    changed = 0
    first, total = 0, len(trained.data.test.labels)
    with trained.network() as network, work("Voting", "images") as advance:
        for pixels, labels in evaluation_batches(trained.data.test, trained.mean, trained.test_images):
            batch, target = as_images(pixels), torch.from_numpy(labels)
            right: list[torch.Tensor] = []
            ballot = torch.zeros(len(labels), len(trained.checkpoint.classes), dtype=torch.float64)
            for vote in range(votes):
                scores = network.classify(batch, (trained.step, first, vote))
                ballot += cast_vote(scores)
                wrong_majority[vote] += int((ballot.argmax(dim=1) != target).sum())
                right.append(scores.argmax(dim=1) == target)
                wrong_single[vote] += int((~right[-1]).sum())
            by_all = ballot.argmax(dim=1) == target
            changed += sum(int((of_vote != by_all).sum()) for of_vote in right)
            first += len(labels)
            advance(first, total)
    singles = 100 * wrong_single / total
    return trained.about() | {
        "votes": list(range(1, votes + 1)),
        "test_error_percent": (100 * wrong_majority / total).tolist(),
        "single_test_error_percent": singles.tolist(),
        "mean_single_test_error_percent": float(singles.mean()),
        "changed_percent": 100 * changed / (votes * total),
    }
