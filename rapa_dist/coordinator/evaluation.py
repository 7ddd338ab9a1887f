"""Classifying a test set, by one random assignment or by the majority of several votes."""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F

from rapa_dist.console import Advance
from rapa_dist.data import ImageSet, evaluation_batches
from rapa_dist.nn.schedule import Learner
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
    images: ImageSet,
    mean: Matrix,
    *,
    batch_size: int,
    step: int,
    votes: int = 1,
    advance: Advance = lambda done, total: None,
    stop: Callable[[], bool] = lambda: False,
) -> Score | None:
    """Classify a set of images.

    Args:
        network: every vote has assignments of its own.
        images: the set.
        mean: (3,) mean pixel per channel to subtract.
        batch_size: images at a time, as `demand.test_images` gives it.
        step: steps trained so far.
        votes: V; the class with most votes wins, among equals the one with the larger sum of probabilities.
        advance: told how many images are done.
        stop: asked after every batch whether to give up.

    Returns:
        The score, or None if `stop` said so.
    """
    wrong, loss, first = 0, 0.0, 0
    total = len(images.labels)
    for pixels, labels in evaluation_batches(images, mean, batch_size):
        device = next(network.model.parameters()).device
        batch, target = as_images(pixels, device), torch.from_numpy(labels)
        ballot: torch.Tensor | None = None
        for vote in range(votes):
            scores = network.classify(batch, (step, first, vote)).cpu()
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


def as_images(pixels: Matrix, device: torch.device | str = "cpu") -> torch.Tensor:
    """Return pixels (images, h, w, channels) as models take them, (images, channels, h, w), with the same memory."""
    return torch.from_numpy(pixels).to(device).permute(0, 3, 1, 2)


def cast_vote(scores: torch.Tensor) -> torch.Tensor:
    """Return (images, classes) 1 for the class voted for, plus a share that only ever breaks ties."""
    probabilities = scores.double().softmax(dim=1)
    vote = torch.zeros_like(probabilities)
    vote[torch.arange(len(scores)), scores.argmax(dim=1)] = 1
    return vote + probabilities * np.float64(1e-6)
