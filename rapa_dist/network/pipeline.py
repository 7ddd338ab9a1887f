"""Micro-batches: while the tiles work on one part of a mini-batch, the coordinator works on another.

Every part goes its own way through the network, and stops wherever it would have to wait for tiles. The
parts take turns in a fixed order, so that each tile sees them in the same order in every layer, and a run
has the same bits whether tiles work at the same time or not.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from rapa_dist.assignment import Assignment
from rapa_dist.network.model import Network
from rapa_dist.tile import Update


@dataclass(frozen=True, slots=True)
class Part:
    """Some of the images of a mini-batch, and who computes their patches."""

    first: int
    """First image."""
    last: int
    """One past the last image."""
    assignments: Sequence[Assignment]
    """One per layer, for these images alone."""


def train_step(
    network: Network, images: Tensor, labels: Tensor, parts: Sequence[Part], update: Update
) -> tuple[float, int]:
    """Train a mini-batch: forward, backward, and the update of tiles and digital side.

    Args:
        network: what to train.
        images: (images, 32, 32, 3) pixels as the network takes them.
        labels: (images,) classes.
        parts: the mini-batch cut up; they are computed with the same kernels, and make one update.
        update: λ and decay.

    Returns:
        The mean loss, and how many images were classified wrongly. If the loss is no finite number, neither
        are the weights, now.
    """
    training = [_Training(network, images, labels, part, update, commit=part is parts[-1]) for part in parts]
    _take_turns([one.way() for one in training])
    network.update_digital(update)
    return sum(one.loss for one in training), sum(one.wrong for one in training)


@torch.no_grad()
def classify(network: Network, images: Tensor, parts: Sequence[Part]) -> Tensor:
    """Return the scores (images, classes) of a batch; arguments as in `train_step`."""
    scores = torch.empty(len(images), network.classes)
    _take_turns([_classification(network, images, part, scores) for part in parts])
    return scores


def _take_turns(ways: list[Iterator[None]]) -> None:
    """Advance all ways by turns until each has come to its end."""
    while ways:
        ways = [way for way in ways if next(way, _END) is not _END]


_END = object()


def _classification(network: Network, images: Tensor, part: Part, scores: Tensor) -> Iterator[None]:
    planes = images[part.first : part.last]
    for convolution, stage, assignment in zip(network.convolutions, network.stages, part.assignments, strict=True):
        passage = convolution.begin(planes, assignment, part.first)
        yield
        planes = stage(passage.receive_outputs())
    scores[part.first : part.last] = network.score(planes)


class _Training:
    """A part of a mini-batch in training."""

    def __init__(
        self, network: Network, images: Tensor, labels: Tensor, part: Part, update: Update, *, commit: bool
    ) -> None:
        self._network, self._images, self._labels, self._part = network, images, labels, part
        self._update, self._commit = update, commit
        self.loss, self.wrong = 0.0, 0

    def way(self) -> Iterator[None]:
        """Go forward and back; stop wherever tiles have work to do."""
        network, part = self._network, self._part
        planes, passages = self._images[part.first : part.last], []
        layers = zip(network.convolutions, network.stages, part.assignments, strict=True)
        between = []  # (outputs of the tiles, what the digital side made of them)
        for convolution, stage, assignment in layers:
            passage = convolution.begin(planes, assignment, part.first)
            yield
            outputs = passage.receive_outputs().requires_grad_()
            after = stage(outputs)
            passages.append(passage)
            between.append((outputs, after))
            planes = after.detach()
        errors: Tensor | None = self._head(planes.requires_grad_())
        for index in range(len(passages) - 1, -1, -1):
            outputs, after = between[index]
            (output_errors,) = torch.autograd.grad(after, outputs, errors)
            passages[index].send_errors(output_errors, self._update, input_error=index > 0, commit=self._commit)
            yield
            errors = passages[index].receive_input_errors()  # none of the images

    def _head(self, planes: Tensor) -> Tensor:
        """Take note of loss and errors; return the gradient of the mini-batch's mean loss, (images, …)."""
        labels = self._labels[self._part.first : self._part.last]
        scores = self._network.score(planes)
        loss = F.cross_entropy(scores, labels, reduction="sum") / len(self._labels)
        self.loss = loss.item()
        self.wrong = int((scores.argmax(dim=1) != labels).sum())
        loss.backward()  # type: ignore[no-untyped-call]
        assert planes.grad is not None
        return planes.grad
