"""Classifying a test set, by one random assignment or by the majority of several votes."""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F

from rapa_dist.console import Advance
from rapa_dist.coordinator.assigner import Assigner
from rapa_dist.data import ImageSet, evaluation_batches
from rapa_dist.footprint import TEST_IMAGES
from rapa_dist.network.learner import Learner
from rapa_dist.tile import Matrix


@dataclass(frozen=True, slots=True)
class Score:
    """How a network did on a set of images."""

    error_percent: float
    """Share of the images that were classified wrongly."""
    loss: float
    """Mean cross entropy of the first vote."""


@torch.no_grad()
def evaluate(
    network: Learner,
    assigner: Assigner,
    images: ImageSet,
    mean: Matrix,
    *,
    step: int,
    votes: int = 1,
    micro_batches: int = 1,
    advance: Advance = lambda done, total: None,
    stop: Callable[[], bool] = lambda: False,
) -> Score | None:
    """Classify a set of images.

    Args:
        network: its fabric must hold batches of `TEST_IMAGES` images.
        assigner: draws the assignments; every vote has its own.
        images: the set.
        mean: (3,) mean pixel per channel to subtract.
        step: steps trained so far.
        votes: V; the class with most votes wins, among equals the one with the larger sum of probabilities.
        micro_batches: parts that every batch is cut into, if the network has it cut.
        advance: told how many images are done.
        stop: asked after every batch whether to give up.

    Returns:
        The score, or None if `stop` said so.
    """
    wrong, loss, first = 0, 0.0, 0
    parts = micro_batches if network.cuts else 1
    total = len(images.labels)
    for pixels, labels in evaluation_batches(images, mean, TEST_IMAGES):
        batch, target = torch.from_numpy(pixels), torch.from_numpy(labels)
        ballot: torch.Tensor | None = None
        for vote in range(votes):
            scores = network.classify(batch, assigner.route_test(step, first, len(labels), vote, parts))
            if vote == 0:
                loss += F.cross_entropy(scores, target, reduction="sum").item()
            cast = cast_vote(scores)
            ballot = cast if ballot is None else ballot + cast
        assert ballot is not None
        wrong += int((ballot.argmax(dim=1) != target).sum())
        first += len(labels)
        advance(first, total)
        if stop():
            return None
    return Score(100 * wrong / total, loss / total)


def cast_vote(scores: torch.Tensor) -> torch.Tensor:
    """Return (images, classes) 1 for the class voted for, plus a share that only ever breaks ties."""
    probabilities = scores.double().softmax(dim=1)
    vote = torch.zeros_like(probabilities)
    vote[torch.arange(len(scores)), scores.argmax(dim=1)] = 1
    return vote + probabilities * np.float64(1e-6)
