"""Schedules: in which order a model and its tiles work on a mini-batch. For any model.

`Whole` sends a mini-batch through the network in one piece. `MicroBatches(n)` cuts it into parts: while the tiles work
on one part, the coordinator works on another; parts are computed with the same kernels, and make one update. Where the
first tile array takes the images themselves, it computes a mini-batch as a whole, and the next mini-batch's first cycle
reaches its tiles together with this one's last: they wake up once, update and go forward.
"""

from collections.abc import Callable, Generator, Iterable, Iterator
from dataclasses import dataclass
from functools import lru_cache
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from rapa_dist.errors import ClusterError
from rapa_dist.fabric.passage import Passage
from rapa_dist.nn.layers import geometry_of
from rapa_dist.nn.minibatch import MiniBatch, Part, at_work
from rapa_dist.nn.optim import RapaSGD
from rapa_dist.nn.record import Recording
from rapa_dist.nn.session import Session
from rapa_dist.nn.turns import Turns
from rapa_dist.streams import Purpose, torch_seed
from rapa_dist.tile import Update

Loss = Callable[[Tensor, Tensor], Tensor]
"""(scores (images, classes), labels (images,)) → the mean loss."""


@dataclass(frozen=True, slots=True)
class Step:
    """A mini-batch to train."""

    number: int
    """Steps trained before it."""
    images: Tensor
    """(images, …) as the model takes them."""
    labels: Tensor
    """(images,) classes."""
    learning_rate: float
    """λ."""


class Result(NamedTuple):
    """What became of a mini-batch."""

    loss: float
    """Mean loss."""
    wrong: int
    """Images that were classified wrongly."""
    images: int
    """Images in all."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Learner:
    """Everything that a schedule sets to work."""

    model: nn.Module
    optimizer: RapaSGD
    session: Session
    recording: Recording
    schedule: "MicroBatches"
    loss: Loss = F.cross_entropy

    def train(self, steps: Iterable["Step"]) -> Generator[Result]:
        """Train mini-batches by the schedule."""
        return self.schedule.train(self, steps)

    def classify(self, images: Tensor, place: tuple[int, ...]) -> Tensor:
        """Return the scores (images, classes) of images in a test; for `place` see `MicroBatches.classify`."""
        return self.schedule.classify(self, images, place)

    def scores(self, images: Tensor, place: tuple[int, ...]) -> Tensor:
        """Return the same, in one piece and so that autograd can go back to the images."""
        if self.model.training:
            self.model.eval()
        batch = MiniBatch(False, place, (len(images),), self.session.seed)
        with at_work(Part(batch, 0)):
            found: Tensor = self.model(images)
        return found


class MicroBatches:
    """Cuts mini-batches into parts that go through the model side by side, each in a thread of its own."""

    def __init__(self, parts: int) -> None:
        self.parts, self.turns = parts, Turns(parts)

    def train(self, learner: Learner, steps: Iterable[Step]) -> Generator[Result]:
        """Train mini-batches: forward, backward, and the update of tiles and digital parameters.

        What the model raises is raised here, once nothing is under way any more, and what tiles have prepared is
        forgotten; in a backward pass some layers may have put their new kernels in force before.

        Args:
            learner: what to train.
            steps: asked for one ahead. When it is at its end, so is everything that was begun. What it raises comes
                when the steps before have been yielded.

        Yields:
            A result for every step. If its loss is no finite number, neither are the weights, now.
        """
        coming = iter(steps)
        now = self._next(learner, coming)
        following: _Training | None = None
        failure: Exception | None = None

        def look_ahead() -> None:
            nonlocal following, failure
            try:
                following = self._next(learner, coming)
            except Exception as error:  # noqa: BLE001  the step under way has nothing to do with it
                failure = error

        try:
            while now is not None:
                now.begin()
                now.run(look_ahead)
                with learner.session.fabric.together():
                    now.update_first()
                    if following is not None:
                        following.begin()
                learner.optimizer.take_step()
                done, now, following = now, following, None
                yield done.result()
            if failure is not None:
                raise failure
        except ClusterError:
            raise  # there are tiles that nobody can wait for
        except GeneratorExit:
            if now is not None:
                now.abandon()
            raise
        except Exception:
            for training in (now, following):
                if training is not None:
                    training.abandon()
            learner.session.abandon()
            learner.optimizer.zero_grad()
            raise

    def _next(self, learner: Learner, steps: Iterator[Step]) -> "_Training | None":
        step = next(steps, None)
        return None if step is None else _Training(learner, step, cut(len(step.labels), self.parts), self.turns)

    @torch.no_grad()
    def classify(self, learner: Learner, images: Tensor, place: tuple[int, ...]) -> Tensor:
        """Return the scores (images, classes) of images.

        Args:
            learner: whose model.
            images: (images, …).
            place: (step, first image, vote): what the assignments are drawn for.
        """
        if learner.model.training:
            learner.model.eval()
        batch = MiniBatch(False, place, cut(len(images), self.parts), learner.session.seed)
        _begin_whole(learner, batch, images)
        scores: list[Tensor | None] = [None] * len(batch.sizes)
        turns = self.turns

        def classify(number: int) -> None:
            first, last = batch.edges[number]
            with at_work(Part(batch, number, lambda: turns.give_way(number))), torch.no_grad():
                scores[number] = learner.model(images[first:last])

        try:
            turns.run([lambda number=number: classify(number) for number in range(len(scores))])  # type: ignore[misc]
        finally:
            if batch.whole is not None:
                batch.whole.release()
        return torch.cat([part for part in scores if part is not None])


class Whole(MicroBatches):
    """Sends mini-batches through the model in one piece."""

    def __init__(self) -> None:
        super().__init__(1)


class _Training:
    """A mini-batch in training."""

    def __init__(self, learner: Learner, step: Step, sizes: tuple[int, ...], turns: Turns) -> None:
        self._learner, self._step, self._turns = learner, step, turns
        self._batch = MiniBatch(True, (step.number,), sizes, learner.session.seed)
        self._losses: list[Tensor] = [_ZERO] * len(sizes)
        self._wrong: list[Tensor] = [_ZERO] * len(sizes)
        _begin_whole(learner, self._batch, step.images, begin=False)
        learner.session.draw_ahead(learner.recording.machine, self._batch)

    def begin(self) -> None:
        """Ring the tiles of the first array."""
        if self._batch.whole is not None:
            self._batch.whole.begin()

    def run(self, in_the_middle: Callable[[], None]) -> None:
        """Go forth and back, part by part; do something else where the coordinator has little to do."""
        if not self._learner.model.training:
            self._learner.model.train()
        self._learner.optimizer.set_rate(self._step.learning_rate)
        _seed(torch_seed(self._learner.session.seed, Purpose.DIGITAL, self._step.number))
        count, turns = len(self._batch.sizes), self._turns
        pending = [in_the_middle]

        def go(number: int) -> None:
            part = Part(self._batch, number, lambda: turns.give_way(number))
            with at_work(part):
                loss = self._forward(number)
                if number == count - 1:
                    part.give_way = lambda: self._spare_time(turns, number, pending)
                    self._learner.session.last_part = True
                loss.backward()  # type: ignore[no-untyped-call]
                self._learner.session.last_part = False

        try:
            turns.run([lambda number=number: go(number) for number in range(count)])  # type: ignore[misc]
        finally:
            self._learner.session.last_part = False
        while pending:
            pending.pop()()

    @staticmethod
    def _spare_time(turns: Turns, number: int, pending: list[Callable[[], None]]) -> None:
        while pending:
            pending.pop()()
        turns.give_way(number)

    def _forward(self, number: int) -> Tensor:
        first, last = self._batch.edges[number]
        labels = self._step.labels[first:last]
        scores = self._learner.model(self._step.images[first:last])
        loss = self._learner.loss(scores, labels)
        if len(labels) < self._batch.images:
            loss = loss * (len(labels) / self._batch.images)
        self._losses[number] = loss.detach()
        self._wrong[number] = torch.count_nonzero(scores.detach().argmax(dim=1) != labels)
        return loss

    def update_first(self) -> None:
        """Have the tiles of the first array do their last cycle."""
        if self._batch.whole is not None:
            self._batch.whole.send_errors()

    def result(self) -> Result:
        """Return what became of it."""
        return Result(sum(map(float, self._losses)), sum(map(int, self._wrong)), self._batch.images)

    def abandon(self) -> None:
        """Wait for what was begun, so that nothing is under way any more."""
        if self._batch.whole is not None:
            self._batch.whole.release()


class WholeFirst:
    """A passage of a whole mini-batch through the first tile array, which its parts share."""

    def __init__(self, learner: Learner, index: int, batch: MiniBatch, images: Tensor) -> None:
        layer = learner.recording.layers[index]
        self._layer, self._learner, self._batch, self._images = layer, learner, batch, images
        array = layer.array
        geometry = geometry_of(layer, images, array.name)
        assignment = learner.session.assignment(array, geometry, batch, 0, None)
        planes = images.permute(0, 2, 3, 1) if images.dim() == 4 else images
        self.passage = learner.session.fabric.passage(array, geometry, planes, assignment)
        self.passage.prepare()
        self._errors: Tensor | None = None

    def is_through(self, array: int) -> bool:
        """Return whether it is through this tile array."""
        return array == self._layer.array.index

    def serves(self, array: int, planes: Tensor, part: int) -> bool:
        """Return whether this is the tile array, and the planes are the images of the part."""
        first, last = self._batch.edges[part]
        images = self._images
        at = images.data_ptr() + first * images.stride(0) * images.element_size()
        return self.is_through(array) and planes.data_ptr() == at and planes.shape[0] == last - first

    def begin(self) -> None:
        """Ring the tiles for the forward cycle."""
        self.passage.begin()

    def part(self, number: int) -> Passage:
        """Return the passage of one part."""
        return _PartOfWhole(self, *self._batch.edges[number])

    def take(self, errors: Tensor, first: int, last: int) -> None:
        """Keep the errors of some images until all are there."""
        if last - first == self._batch.images:
            self._errors = errors
            return
        if self._errors is None:
            self._errors = errors.new_empty(self._batch.images, *errors.shape[1:])
        self._errors[first:last] = errors

    def send_errors(self) -> None:
        """Have the tiles learn from all errors."""
        if self._errors is None:
            self.release()
            return
        session, layer = self._learner.session, self._layer
        session.expect_errors(layer.array.index)
        session.last_part = True
        session.send_errors(layer.array.index, self.passage, self._errors, layer.rates, False, True)
        session.last_part = False

    def release(self) -> None:
        """Give back what the passage holds."""
        self.passage.release()


class _PartOfWhole(Passage):
    shared = True

    def __init__(self, whole: WholeFirst, first: int, last: int) -> None:
        self._whole, self._first, self._last = whole, first, last

    def begin(self) -> None:
        self._whole.begin()

    def outputs(self, first: int = 0, last: int | None = None) -> Tensor:
        assert (first, last) == (0, None)
        return self._whole.passage.outputs(self._first, self._last)

    def send_errors(self, errors: Tensor, update: Update | None, *, input_error: bool, commit: bool) -> None:
        self._whole.take(errors, self._first, self._last)

    def input_errors(self) -> None:
        return None

    def release(self) -> None:
        pass


def _seed(seed: int) -> None:
    """Seed PyTorch's generators that are in use, as `torch.manual_seed` seeds all.

    That one takes down for every step from where it was called, for devices that may be used one day: 1.5 ms.
    """
    torch.default_generator.manual_seed(seed)
    if torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
        torch.cuda.manual_seed_all(seed)


def _begin_whole(learner: Learner, batch: MiniBatch, images: Tensor, *, begin: bool = True) -> None:
    """Begin the passage of a mini-batch through the first tile array, where that takes the images themselves."""
    index = learner.recording.first
    if index is not None and not images.requires_grad and not learner.session.fabric.gives_gradients:
        batch.whole = WholeFirst(learner, index, batch, images)
        if begin:
            batch.whole.begin()


_ZERO = torch.zeros(())


@lru_cache(maxsize=256)
def cut(images: int, parts: int) -> tuple[int, ...]:
    """Return the sizes of at most `parts` parts of a mini-batch; they differ by at most one, the larger come first."""
    parts = min(parts, images)
    size, larger = divmod(images, parts)
    return (size + 1,) * larger + (size,) * (parts - larger)
