"""Micro-batches: while the tiles work on one part of a mini-batch, the coordinator works on another.

Every part goes its own way through the network, and stops wherever it would have to wait for tiles. The
parts take turns in a fixed order, so that each tile sees them in the same order in every layer, and a run
has the same bits whether tiles work at the same time or not.
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import NamedTuple

import torch
from torch import Tensor

from rapa_dist.assignment import Assignment
from rapa_dist.network.convolution import Passage
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


@dataclass(frozen=True, slots=True)
class Step:
    """A mini-batch to train."""

    images: Tensor
    """(images, 32, 32, 3) pixels as the network takes them."""
    labels: Tensor
    """(images,) classes."""
    parts: Sequence[Part]
    """The mini-batch cut up: parts are computed with the same kernels, and make one update."""
    update: Update
    """λ and decay."""


class Result(NamedTuple):
    """What became of a mini-batch."""

    loss: float
    """Mean cross entropy."""
    wrong: int
    """Images that were classified wrongly."""
    images: int
    """Images in all."""


def train(network: Network, steps: Iterable[Step]) -> Iterator[Result]:
    """Train mini-batches: forward, backward, and the update of tiles and digital side.

    While the tiles do the last cycles of a step, the next one is asked for and begun: its first cycles queue
    up behind the others, so every tile still does everything in order.

    Args:
        network: what to train.
        steps: asked for one ahead. When it is at its end, so is everything that was begun.

    Yields:
        A result for every step. If its loss is no finite number, neither are the weights, now.
    """
    now: _Training | None = None
    try:
        for step in chain(steps, (None,)):
            before, now = now, None if step is None else _Training(network, step)
            if before is not None:
                overlap = now is not None and now.fits_behind(before)
                for part in range(len(before.ways)):
                    before.end(part)
                    if now is not None and overlap:
                        now.begin(part)
                network.update_digital(before.step.update)
                yield Result(before.loss, before.wrong, len(before.step.labels))
            if now is not None:
                now.go_on()
    except GeneratorExit:
        if now is not None:
            now.abandon()
        raise


@torch.no_grad()
def classify(network: Network, images: Tensor, parts: Sequence[Part]) -> Tensor:
    """Return the scores (images, classes) of a batch (images, 32, 32, 3), cut into parts."""
    scores = torch.empty(len(images), len(network.head.bias))
    ways = [_classification(network, images, part, scores) for part in parts]
    for _ in range(len(network.convolutions) + 1):
        _advance(ways)
    return scores


def _advance(ways: Iterable[Iterator[None]]) -> None:
    """Have every part go on to where it has to wait for tiles, or to its end."""
    for way in ways:
        next(way, None)


def _classification(network: Network, images: Tensor, part: Part, scores: Tensor) -> Iterator[None]:
    planes = images[part.first : part.last]
    for convolution, stage, assignment in zip(network.convolutions, network.stages, part.assignments, strict=True):
        passage = convolution.begin(planes, assignment, part.first)
        yield
        planes, _ = stage.forward(passage.receive_outputs())
    scores[part.first : part.last] = network.head(planes)


class _Training:
    """A mini-batch in training: each part on its way, one turn after the other."""

    def __init__(self, network: Network, step: Step) -> None:
        self.step = step
        self._network = network
        self._passages: list[Passage] = []
        self._begun = 0
        self.ways = [self._way(part, commit=part is step.parts[-1]) for part in step.parts]
        self.loss, self.wrong = 0.0, 0

    def fits_behind(self, before: "_Training") -> bool:
        """Return whether a part needs no memory that the one before does not free when the same part ends."""
        parts, theirs = self.step.parts, before.step.parts
        return len(parts) <= len(theirs) and all(p.last <= t.last for p, t in zip(parts, theirs, strict=False))

    def begin(self, part: int) -> None:
        """Have a part take its first turn; parts begin in their order, some perhaps before the step does."""
        if part < len(self.ways):
            _advance(self.ways[part : part + 1])
            self._begun = part + 1

    def go_on(self) -> None:
        """Advance all parts to where the tiles do their last cycles."""
        _advance(self.ways[self._begun :])
        for _ in range(2 * len(self._network.convolutions) - 1):
            _advance(self.ways)

    def end(self, part: int) -> None:
        """Wait for the last cycle of a part."""
        _advance(self.ways[part : part + 1])

    def abandon(self) -> None:
        """Wait for what has been begun, so that nothing is under way any more."""
        for passage in self._passages:
            passage.finish()

    def _way(self, part: Part, *, commit: bool) -> Iterator[None]:
        """Go forward and back; stop wherever tiles have work to do."""
        network, update = self._network, self.step.update
        planes, passages, saved = self.step.images[part.first : part.last], [], []
        for convolution, stage, assignment in zip(network.convolutions, network.stages, part.assignments, strict=True):
            passages.append(convolution.begin(planes, assignment, part.first))
            self._passages.append(passages[-1])
            yield
            planes, for_backward = stage.forward(passages[-1].receive_outputs())
            saved.append(for_backward)
        errors: Tensor | None = self._head(planes, part)
        for index in reversed(range(len(passages))):
            assert errors is not None  # only the first layer's are not wanted
            output_errors = network.stages[index].backward(saved[index], errors)
            passages[index].send_errors(output_errors, update, input_error=index > 0, commit=commit)
            yield
            errors = passages[index].receive_input_errors()

    def _head(self, planes: Tensor, part: Part) -> Tensor:
        labels = self.step.labels
        loss, wrong, errors = self._network.head.train(planes, labels[part.first : part.last], len(labels))
        self.loss += loss
        self.wrong += wrong
        return errors
