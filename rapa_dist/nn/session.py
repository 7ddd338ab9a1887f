"""A model's tiled layers on the tiles of a fabric: what is drawn for them, what is under way, and when a step ends."""

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any
from weakref import WeakSet

from torch import Tensor

from rapa_dist.assignment import Assignment
from rapa_dist.errors import UsageError
from rapa_dist.fabric.base import Fabric
from rapa_dist.fabric.passage import Passage
from rapa_dist.geometry import Geometry
from rapa_dist.machine import Machine, TileArray
from rapa_dist.nn.minibatch import MiniBatch, Part, current
from rapa_dist.router import Router
from rapa_dist.tile import Update

_NONE = Update(0.0, 0.0)


class Session:
    """What a layer asks when it is called, and an optimizer when it takes a step."""

    def __init__(self, fabric: Fabric, *, seed: int, step: int = 0) -> None:
        """Begin.

        Args:
            fabric: with the kernels in its tiles.
            seed: of the assignments.
            step: steps that the kernels have been trained for.
        """
        self.fabric, self.seed, self.router = fabric, seed, Router(seed)
        self.step = step
        """Steps trained so far: what the assignments of the next mini-batch are drawn for."""
        self.last_part = False
        """Whether the errors sent now are the mini-batch's last, so that prepared kernels can be put in force."""
        self.learnt = False
        """Whether tiles have been sent errors to learn from since the last step."""
        self.closed = False
        """Whether its fabric is gone: nothing goes through any more."""
        self._prepared: set[int] = set()  # tile arrays with an update that is not in force yet
        self._under_way: Counter[int] = Counter()  # by tile array: passages whose errors have not come yet
        self._ending: list[Passage] = []  # whose last cycle nobody has waited for
        self._begun: WeakSet[Passage] = WeakSet()  # all that somebody still has
        self._broken: list[Passage] = []  # on which tiles may be at work, although something failed
        self._calls: Counter[tuple[int, bool]] = Counter()  # outside of a schedule, since the last step
        self._updates: dict[int, Update] = {}

    def part_for(self, array: int, images: int, *, training: bool) -> Part:
        """Return the part that this thread is at work on; outside of a schedule, a mini-batch of its own."""
        part = current()
        if part is not None:
            return part
        call = self._calls[array, training]
        self._calls[array, training] += 1
        place: tuple[int, ...] = (self.step, call, 0)
        if training:
            place = (self.step, call) if call else (self.step,)
        return Part(MiniBatch(training, place, (images,), self.seed), 0)

    def begin(self, array: TileArray, geometry: Geometry, planes: Tensor, part: Part) -> Passage:
        """Send planes (images, h, w, c_in) on their way through a tile array; returns while the tiles work."""
        batch, call = part.batch, part.call_of(array.index)
        if call == 0 and batch.whole is not None and batch.whole.serves(array.index, planes, part.number):
            passage = batch.whole.part(part.number)
        else:
            assignment = self.assignment(array, geometry, batch, call, part.number)
            passage = self.fabric.passage(array, geometry, planes, assignment)
        self._begun.add(passage)
        passage.begin()
        return passage

    def assignment(
        self, array: TileArray, geometry: Geometry, batch: MiniBatch, call: int, part: int | None
    ) -> Assignment:
        """Return the assignment of a part of a mini-batch; None: of the mini-batch as a whole."""
        place = (*batch.place, call) if call else batch.place
        sizes = batch.sizes if part is not None else (batch.images,)

        def draw() -> Sequence[Assignment]:
            return self.router.assign(array, geometry, batch.purpose, place, sizes)

        found: Assignment = batch.draw((array.index, call, geometry.n_patches, part is None), draw, part or 0)
        return found

    def draw_ahead(self, machine: Machine, batch: MiniBatch) -> None:
        """Draw what a mini-batch will ask for, if its images meet the layers as those did that the machine is for."""
        for array in machine.arrays:
            for call, geometry in enumerate(array.passages):
                if call or batch.whole is None or not batch.whole.is_through(array.index):
                    self.assignment(array, geometry, batch, call, 0)

    def expect_errors(self, array: int) -> None:
        """Take note that errors of a passage may come back."""
        self._under_way[array] += 1

    def send_errors(
        self,
        array: int,
        passage: Passage,
        errors: Tensor,
        rates: Mapping[str, Any] | None,
        input_error: bool,
        learn: bool,
    ) -> None:
        """Have tiles pass errors back, and prepare their update; returns while they work.

        Args:
            array: which tiles.
            passage: the errors are those of its outputs.
            errors: (images, h, w, c_out).
            rates: the optimizer's "lr" and "weight_decay"; None where none has the layer.
            input_error: whether the errors of the planes are wanted.
            learn: whether the kernels want a gradient.
        """
        if self.closed:
            raise UsageError("backward() comes too late: the fabric was closed. Call it inside `with open_fabric(…)`.")
        self._under_way[array] -= 1
        update = self._update(array, rates) if rates is not None else None
        if learn and self.fabric.gives_gradients:
            update = update or _NONE  # what becomes of a gradient is the optimizer's business
        commit = update is not None and self.last_part and not self._under_way[array]
        passage.send_errors(errors, update, input_error=input_error, commit=commit)
        if update is not None:
            self.learnt = True
            (self._prepared.discard if commit else self._prepared.add)(array)
        if not input_error:
            self._ending.append(passage)

    def _update(self, array: int, rates: Mapping[str, Any]) -> Update:
        rate, decay = float(rates["lr"]), float(rates["weight_decay"])
        update = self._updates.get(array)
        physics = self.fabric.machine.arrays[array].physics
        if decay and physics is not None and physics.device is not None:
            raise UsageError(
                f"The optimizer's weight_decay is {decay:g}, and the devices of tiles know nothing of it. Use "
                "weight_decay=0, or devices with a lifetime."
            )
        if update is None or update.learning_rate != rate or update.weight_decay != decay:
            update = self._updates[array] = Update(rate, decay)
        return update

    def close(self) -> None:
        """Take note that the fabric is gone."""
        self.closed = True

    def settle(self) -> None:
        """Wait for the cycles that nobody has waited for."""
        ending, self._ending = self._ending, []
        for passage in ending:
            passage.input_errors()

    def put_in_force(self) -> None:
        """Put the updates that are prepared in force: the end of a step."""
        self.fabric.commit(sorted(self._prepared))
        self.settle()
        self._forget()
        self.step += 1

    def drop(self) -> None:
        """Forget the updates that are prepared and not in force."""
        self.fabric.discard(sorted(self._prepared))
        self.settle()
        self._forget()

    def keep(self, passage: Passage) -> None:
        """Keep a passage in the middle of which something failed, until the step is abandoned or ends."""
        self._broken.append(passage)

    def abandon(self) -> None:
        """Forget a step that something failed in, once no tile is at work on it any more."""
        for passage in list(self._begun):
            passage.release()
        self.drop()

    def _forget(self) -> None:
        self.learnt = False
        self._broken.clear()
        self._prepared.clear()
        self._calls.clear()
        self._under_way.clear()
