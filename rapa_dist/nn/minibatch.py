"""Where in a run a forward pass stands: what its draws are a function of, and which part of a mini-batch it is.

A mini-batch may be cut into parts that go through the network one beside the other. What is drawn for an image does not
depend on the cut: it is drawn for the whole mini-batch, and every part takes its share.
"""

import threading
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import accumulate, pairwise
from typing import Any, Protocol

from torch import Tensor

from rapa_dist.fabric.passage import Passage
from rapa_dist.streams import Purpose


class WholePassage(Protocol):
    """A passage of all images of a mini-batch that its parts share."""

    def begin(self) -> None:
        """Ring the tiles for the forward cycle."""

    def is_through(self, array: int) -> bool:
        """Return whether it is through this tile array."""

    def serves(self, array: int, planes: Tensor, part: int) -> bool:
        """Return whether it is through this tile array, and of these planes of a part."""

    def part(self, number: int) -> Passage:
        """Return the passage of one part."""

    def send_errors(self) -> None:
        """Have the tiles learn from the errors of all parts."""

    def release(self) -> None:
        """Give back what the passage holds."""


@dataclass(slots=True)
class MiniBatch:
    """A mini-batch on its way through a network."""

    training: bool
    """Whether it is trained on; else it is tested."""
    place: tuple[int, ...]
    """(step,) in training; (step, first image, vote) in a test. With the seed, all that draws depend on."""
    sizes: tuple[int, ...]
    """Images of its parts."""
    seed: int
    """The run's."""
    whole: WholePassage | None = None
    """The passage of all its images through the first tile array, where that was begun beforehand."""
    drawn: dict[Any, Sequence[Any]] = field(default_factory=dict)
    """What has been drawn for it, by what it is for: one entry for each part."""
    images: int = field(init=False)
    """Images in all."""
    edges: list[tuple[int, int]] = field(init=False)
    """First image of every part, and one past its last."""

    def __post_init__(self) -> None:
        self.edges = list(pairwise(accumulate(self.sizes, initial=0)))
        self.images = self.edges[-1][1]

    def draw(self, key: Any, draw: Callable[[], Sequence[Any]], part: int) -> Any:
        """Return a part's share of what is drawn for the whole mini-batch, once."""
        found = self.drawn.get(key)
        if found is None:
            found = self.drawn[key] = draw()
        return found[part]

    @property
    def purpose(self) -> Purpose:
        """What its assignments are drawn for."""
        return Purpose.ASSIGN_TRAIN if self.training else Purpose.ASSIGN_TEST


class Part:
    """One part of a mini-batch in one thread. Layers ask for the one that is under way by `current`."""

    def __init__(self, batch: MiniBatch, number: int, give_way: Callable[[], None] = lambda: None) -> None:
        """Stand at the beginning of the network.

        Args:
            batch: the mini-batch.
            number: which of its parts.
            give_way: called before tiles are waited for: lets other parts go on meanwhile.
        """
        self.batch, self.number, self.give_way = batch, number, give_way
        self._calls: Counter[int] = Counter()

    def call_of(self, array: int) -> int:
        """Return how often this part has passed through a tile array before, and count one more."""
        before = self._calls[array]
        self._calls[array] += 1
        return before


class _Current(threading.local):
    part: Part | None = None


_current = _Current()


def current() -> Part | None:
    """Return the part that this thread is at work on; None outside of a schedule."""
    return _current.part


class at_work:  # noqa: N801  used like a function
    """Have layers that are called in this thread belong to a part, for the time of a `with`."""

    def __init__(self, part: Part) -> None:
        self._part = part

    def __enter__(self) -> Part:
        self._before, _current.part = _current.part, self._part
        return self._part

    def __exit__(self, *error: object) -> None:
        _current.part = self._before
