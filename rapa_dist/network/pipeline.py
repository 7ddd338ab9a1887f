"""Micro-batches: while the tiles work on one part of a mini-batch, the coordinator works on another.

The first layer, with many tiles and short cycles, computes a mini-batch as a whole. Behind it every part goes
its own way through the network, and stops wherever it would have to wait for tiles. The parts take turns
in a fixed order, so that each tile sees them in the same order in every layer, and a run has the same bits
whether tiles work at the same time or not.
"""

from collections.abc import Generator, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import chain, repeat
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from rapa_dist.assignment import Assignment
from rapa_dist.network.convolution import Passage
from rapa_dist.tile import Update

if TYPE_CHECKING:
    from rapa_dist.network.model import Network


@dataclass(frozen=True, slots=True)
class Part:
    """Some of the images of a mini-batch, and who computes their patches behind the first layer."""

    first: int
    """First image."""
    last: int
    """One past the last image."""
    assignments: Sequence[Assignment]
    """One for every layer from the second on, for these images alone."""


@dataclass(frozen=True, slots=True)
class Routing:
    """Who computes what in a mini-batch."""

    whole: Assignment
    """The first layer's assignment, for all images."""
    parts: Sequence[Part]
    """What the mini-batch is cut into behind it; parts are computed with the same kernels, and make one update."""


@dataclass(frozen=True, slots=True)
class Step:
    """A mini-batch to train."""

    images: Tensor
    """(images, 32, 32, 3) pixels as the network takes them."""
    labels: Tensor
    """(images,) classes."""
    routing: Routing
    """Who computes what."""
    update: Update
    """λ and decay."""
    draws: Sequence[Tensor] = ()
    """Per layer but the last (images, pooled side, pooled side, c_out) uniform draws, where pooling is stochastic."""


class Result(NamedTuple):
    """What became of a mini-batch."""

    loss: float
    """Mean cross entropy."""
    wrong: int
    """Images that were classified wrongly."""
    images: int
    """Images in all."""


def train(network: "Network", steps: Iterable[Step]) -> Generator[Result]:
    """Train mini-batches: forward, backward, and the update of tiles and digital side.

    The next step is prepared in the middle of a step, when the coordinator has little to do, and its first cycle
    reaches every tile together with this step's last one: it wakes up once, updates and goes forward.

    Args:
        network: what to train.
        steps: asked for one ahead. When it is at its end, so is everything that was begun.

    Yields:
        A result for every step. If its loss is no finite number, neither are the weights, now.
    """
    coming = iter(steps)
    now = _Training.next(network, coming, None)
    try:
        while now is not None:
            now.begin()
            now.go_forth()
            upcoming = _Training.next(network, coming, now)
            now.go_back()
            with network.fabric.together():
                now.update_first()
                if upcoming is not None and upcoming.prepared:
                    upcoming.begin()
            network.update_digital(now.step.update)
            now.end()
            done, now = now, upcoming
            yield Result(done.loss, done.wrong, len(done.step.labels))
    except GeneratorExit:
        if now is not None:
            now.abandon()
        raise


@torch.no_grad()
def classify(network: "Network", images: Tensor, routing: Routing) -> Tensor:
    """Return the scores (images, classes) of a batch (images, 32, 32, 3)."""
    scores = torch.empty(len(images), len(network.head.bias))
    whole = network.convolutions[0].begin(images, routing.whole)
    ways = [_classification(network, whole, part, scores) for part in routing.parts]
    for _ in network.convolutions:
        _advance(ways)
    return scores


def _advance(ways: Iterable[Iterator[None]]) -> None:
    """Have every part go on to where it has to wait for tiles, or to its end."""
    for way in ways:
        next(way, None)


def _classification(network: "Network", whole: Passage, part: Part, scores: Tensor) -> Iterator[None]:
    planes, _ = network.stages[0].forward(whole.receive_outputs(part.first, part.last))
    layers = zip(network.convolutions[1:], network.stages[1:], part.assignments, strict=True)
    for convolution, stage, assignment in layers:
        passage = convolution.begin(planes, assignment, part.first)
        yield
        planes, _ = stage.forward(passage.receive_outputs())
    scores[part.first : part.last] = network.head(planes)


class _Training:
    """A mini-batch in training."""

    def __init__(self, network: "Network", step: Step, before: "_Training | None") -> None:
        self.step = step
        self.loss, self.wrong = 0.0, 0
        self._network = network
        self._images = len(step.labels)
        self._first_image: int = 0  # mini-batches lie side by side in the first layer's memory, if it is large enough
        if before is not None and before._first_image == 0:
            self._first_image = before._images
            if self._first_image + self._images > network.convolutions[0].fabric.images:
                self._first_image = 0
        self._whole: Passage | None = None
        self._errors: Tensor
        self._ways: list[Iterator[None]]
        if before is None or not self._overlaps(before):
            self._prepare()

    @classmethod
    def next(cls, network: "Network", steps: Iterator[Step], before: "_Training | None") -> "_Training | None":
        """Ask for a step, and gather its patches where the mini-batch before it leaves room for them."""
        step = next(steps, None)
        return None if step is None else cls(network, step, before)

    @property
    def prepared(self) -> bool:
        """Whether the first layer's patches are gathered."""
        return self._whole is not None

    def _overlaps(self, before: "_Training") -> bool:
        """Return whether this mini-batch needs memory of the first layer that the one before has in use."""
        return self._first_image < before._first_image + before._images and (
            before._first_image < self._first_image + self._images
        )

    def _prepare(self) -> Passage:
        step = self.step
        self._whole = self._network.convolutions[0].prepare(step.images, step.routing.whole, self._first_image)
        return self._whole

    def begin(self) -> None:
        """Begin the first layer's forward cycle, if that has not been done."""
        (self._whole or self._prepare()).begin()

    def go_forth(self) -> None:
        """Go on, part by part, to where the tiles of the last layer have the errors."""
        assert self._whole is not None
        first, *others = self._network.convolutions
        self._errors = torch.empty(self._images, first.layer.side, first.layer.side, first.layer.c_out)
        parts = self.step.routing.parts
        self._ways = [self._way(self._whole, part, self._errors, commit=part is parts[-1]) for part in parts]
        for _ in range(len(others) + 1):
            _advance(self._ways)

    def go_back(self) -> None:
        """Go on, part by part, to where the errors of the first layer are known."""
        for _ in self._network.convolutions[1:]:
            _advance(self._ways)

    def update_first(self) -> None:
        """Have the tiles of the first layer do their last cycle."""
        assert self._whole is not None
        self._whole.send_errors(self._errors, self.step.update, input_error=False)

    def end(self) -> None:
        """Wait for the last cycle."""
        assert self._whole is not None
        self._whole.finish()

    def abandon(self) -> None:
        """Wait for the first cycle, if it has been begun, so that nothing is under way any more."""
        if self._whole is not None:
            self._whole.finish()

    def _way(self, whole: Passage, part: Part, errors_of_first: Tensor, *, commit: bool) -> Iterator[None]:
        """Go forward and back; stop wherever tiles have work to do."""
        first_stage, *stages = self._network.stages
        images = slice(part.first, part.last)
        draws = chain((of_layer[images] for of_layer in self.step.draws), repeat(None))
        planes, of_first = first_stage.forward(whole.receive_outputs(part.first, part.last), next(draws))
        layers = zip(self._network.convolutions[1:], stages, part.assignments, strict=True)
        passages, saved = [], []
        for convolution, stage, assignment in layers:
            passages.append(convolution.begin(planes, assignment, part.first))
            yield
            planes, for_backward = stage.forward(passages[-1].receive_outputs(), next(draws))
            saved.append(for_backward)
        loss, wrong, errors = self._network.head.train(planes, self.step.labels[images], self._images)
        self.loss += loss
        self.wrong += wrong
        for passage, stage, for_backward in zip(reversed(passages), reversed(stages), reversed(saved), strict=True):
            passage.send_errors(stage.backward(for_backward, errors), self.step.update, commit=commit)
            yield
            errors = passage.receive_input_errors()
        errors_of_first[images] = first_stage.backward(of_first, errors)
