"""Adversarial attack (Fig. 4): the fast gradient sign method under random assignments.

The strength is a signal-to-noise ratio in dB, 20 · log10(‖x‖₂ / ‖δ‖₂), x in pixel values 0…1 (Cissé et al., Parseval
networks). The gradient goes back through assignments of its own, and the attack is judged under others, so
that an attacker who knows all kernels does not know who will compute what.
"""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from rapa_dist.console import work
from rapa_dist.coordinator.evaluation import as_images
from rapa_dist.coordinator.run_directory import RunDirectory
from rapa_dist.coordinator.run_images import WHERE_THEY_WERE, Where
from rapa_dist.coordinator.trained import Trained, check_reassigns
from rapa_dist.data import evaluation_batches
from rapa_dist.errors import UsageError
from rapa_dist.nn.schedule import Learner

DEFAULT_SNR_DB = (15.0, 20.0, 25.0, 30.0, 33.0, 36.0, 40.0, 45.0, 50.0)
_JUDGES = 4
_GRADIENT_VOTES = 1_000_000  # numbers of votes from here on are the attacker's; below, the judges'


def attack(
    path: Path,
    *,
    snr_db: Sequence[float] = DEFAULT_SNR_DB,
    gradient_assignments: int = 1,
    judge_assignments: int | None = None,
    same_assignment: bool = False,
    checkpoint: str = "newest",
    limit_test: int | None = None,
    where: Where = WHERE_THEY_WERE,
    clip: bool = False,
) -> dict[str, Any]:
    """Return the accuracy under attack on the images that were classified correctly without.

    Args:
        path: the run's directory.
        snr_db: strengths, as signal-to-noise ratios in dB; a smaller one is a stronger attack.
        gradient_assignments: random assignments whose gradients the attacker averages.
        judge_assignments: random assignments under which the attack is judged, one after the other; None: 4, or 1
            where all of them are the same one.
        same_assignment: judge under the attacker's own assignment instead.
        checkpoint: "newest", "best" or a name.
        limit_test: test images to use; None: as the run did.
        where: where the run's images are.
        clip: cut attacked pixels off at 0 and 1, which raises the ratio a little.

    Returns:
        With `accuracy_percent`, per strength, the mean over judging assignments (each on the images that it had
        right before) and `accuracy_std` the standard deviation; and `clean_accuracy_percent` of all images, beside
        `chance_percent`, what guessing would come to.

    Raises:
        RapaError: with the cause, and what to do.
    """
    check_strengths(snr_db)
    if judge_assignments is None:
        redrawn = RunDirectory(path).config.reassigns and not same_assignment
        judge_assignments = _JUDGES if redrawn else 1
    numbers = (("--gradient-assignments", gradient_assignments), ("--judge-assignments", judge_assignments))
    for option, value in numbers:
        if value < 1:
            raise UsageError(f"{option} needs at least 1; it is {value}.")
    several = [option for option, value in numbers if value > 1]
    if same_assignment and several:
        raise UsageError(
            "--same-assignment has one assignment for gradient and judgement. "
            f"Leave {' and '.join(several)} out, or --same-assignment."
        )
    if several:
        check_reassigns(path, f"all assignments of {' and '.join(several)} would be the same one")
    trained = Trained.open(path, checkpoint=checkpoint, where=where, limit_test=limit_test)
    mean = torch.from_numpy(trained.mean)[:, None, None]
    right = np.zeros(judge_assignments, int)
    still_right = np.zeros((len(snr_db), judge_assignments), int)
    first, total = 0, len(trained.data.test.labels)
    with trained.network(gradients=True) as network, work("Attacking", "images") as advance:
        side = _Side(network, trained.step)
        for pixels, labels in evaluation_batches(trained.data.test, trained.mean, trained.test_images):
            images, target = as_images(pixels), torch.from_numpy(labels)
            attackers = [_GRADIENT_VOTES + i for i in range(gradient_assignments)]
            judges = attackers if same_assignment else list(range(judge_assignments))
            direction = side.gradient(images, target, first, attackers).sign()
            clean = [side.correct(images, target, first, judge) for judge in judges]
            right += [int(hits.sum()) for hits in clean]
            for row, ratio in enumerate(snr_db):
                attacked = perturb(images, mean, direction, ratio, clip=clip)
                for column, judge in enumerate(judges):
                    hits = side.correct(attacked, target, first, judge) & clean[column]
                    still_right[row, column] += int(hits.sum())
            first += len(labels)
            advance(first, total)
    accuracy = 100 * still_right / np.maximum(right, 1)
    return trained.about() | {
        "snr_db": [float(ratio) for ratio in snr_db],
        "accuracy_percent": accuracy.mean(axis=1).tolist(),
        "accuracy_std": accuracy.std(axis=1, ddof=1).tolist() if judge_assignments > 1 else [None] * len(snr_db),
        "clean_accuracy_percent": float(100 * right.mean() / total),
        "chance_percent": 100 / len(trained.checkpoint.classes),
        "gradient_assignments": gradient_assignments,
        "judge_assignments": judge_assignments,
        "same_assignment": same_assignment,
        "clip": clip,
    }


def gap_closed(accuracy: Sequence[float], baseline: Sequence[float]) -> list[float | None]:
    """Return which share of the baseline's gap to perfect robustness is closed, in percent, per strength.

    Args:
        accuracy: in percent.
        baseline: of the untiled network, in percent; None in the result where it has no gap.
    """
    return [
        None if reference >= 100 else 100 * (value - reference) / (100 - reference)
        for value, reference in zip(accuracy, baseline, strict=True)
    ]


def perturb(images: Tensor, mean: Tensor, direction: Tensor, snr_db: float, *, clip: bool = False) -> Tensor:
    """Return attacked images: x + δ with δ along `direction`, as long as the ratio says, for every image.

    Args:
        images: (images, channels, h, w) pixel values 0…1 less the mean, as the network takes them.
        mean: (channels, 1, 1).
        direction: like the images; where all of an image's is zero it stays as it is.
        snr_db: 20 · log10(‖x‖₂ / ‖δ‖₂), with x in pixel values 0…1.
        clip: cut pixel values off at 0 and 1.
    """
    original = images + mean
    signal = original.flatten(1).norm(dim=1)
    noise = direction.flatten(1).norm(dim=1)
    length = torch.where(noise > 0, signal / noise, 0) * 10 ** (-snr_db / 20)
    attacked: Tensor = original + length[:, None, None, None] * direction
    attacked = attacked.clamp(0, 1) if clip else attacked
    return attacked - mean


def check_strengths(snr_db: Sequence[float]) -> None:
    """Raise UsageError unless the ratios can be used."""
    if not snr_db:
        raise UsageError("--snr needs at least one signal-to-noise ratio in dB, like 20,30,40.")
    for ratio in snr_db:
        if not (math.isfinite(ratio) and abs(ratio) <= 200):
            raise UsageError(f"--snr needs ratios from -200 to 200 dB; it has {ratio}.")


class _Side:
    """The network as attacker and judge see it."""

    def __init__(self, network: Learner, step: int) -> None:
        self._network, self._step = network, step

    def gradient(self, images: Tensor, labels: Tensor, first: int, votes: Sequence[int]) -> Tensor:
        """Return the mean gradient of the loss, with respect to the images, over some assignments."""
        total = torch.zeros_like(images)
        for vote in votes:
            pixels = images.clone().requires_grad_()
            loss = F.cross_entropy(self._network.scores(pixels, (self._step, first, vote)), labels, reduction="sum")
            (gradient,) = torch.autograd.grad(loss, pixels)
            total += gradient
        return total / len(votes)

    def correct(self, images: Tensor, labels: Tensor, first: int, vote: int) -> Tensor:
        """Return which images (images,) are classified correctly under an assignment."""
        with torch.no_grad():
            return self._network.scores(images, (self._step, first, vote)).argmax(dim=1) == labels
