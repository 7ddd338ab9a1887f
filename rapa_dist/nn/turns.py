"""A baton that parts of a mini-batch pass on, each in a thread of its own: only who has it computes.

It is passed on wherever a part would have to wait for tiles, always in the same order, so that the other parts compute
meanwhile and yet everything happens in an order that no timing can change.

    part 0 (caller's thread)   computes ── gives way …………………………… computes ── ends
    part 1 (a thread)                      computes ── gives way …            computes ── ends
"""

import os
import select
import threading
import weakref
from collections.abc import Callable, Sequence

from rapa_dist.native import native

_LOOK_MS = 100


class _Abandoned(BaseException):
    """Ends a part because another one failed."""


class _Gate:
    """Where a thread sleeps until it is let through.

    A pipe and not a lock: the kernel takes a write to it for a sign that the writer is about to sleep, and wakes the
    reader on the writer's core, where it finds the caches as they were left. It takes a third of the time.
    """

    def __init__(self) -> None:
        self._exit, self._entrance = os.pipe2(os.O_CLOEXEC)
        self._opened = select.poll()
        self._opened.register(self._exit, select.POLLIN)

    def open(self) -> None:
        os.write(self._entrance, b"\0")

    def pass_through(self) -> None:
        while not self._opened.poll(_LOOK_MS):
            pass  # between two calls Python sees to a signal that came just before one of them
        os.read(self._exit, 1)

    def swap(self, other: "_Gate") -> None:
        """Open another gate, and pass through this one.

        In one call of the library: between two, both threads would ask for Python's lock.
        """
        library = native().library
        if library is None:
            other.open()
        elif library.rapa_swap(other._entrance, self._exit):
            return
        self.pass_through()  # also where a signal came, whose handler Python calls before it waits on

    def __del__(self) -> None:
        os.close(self._entrance)
        os.close(self._exit)


class _Baton:
    """What the threads share."""

    def __init__(self, count: int) -> None:
        self.gates = [_Gate() for _ in range(count)]
        self.running = [False] * count
        self.parts: Sequence[Callable[[], None]] = ()
        self.failure: BaseException | None = None
        self.closed = False

    def following(self, me: int) -> int | None:
        """Return which part is next, if another one is at work."""
        count = len(self.running)
        return next((at % count for at in range(me + 1, me + count) if self.running[at % count]), None)

    def attempt(self, me: int) -> None:
        """Run a part to its end; whatever it raises ends the others."""
        try:
            if self.failure is None:
                self.parts[me]()
        except _Abandoned:
            pass
        except BaseException as error:  # noqa: BLE001  it is raised again in the caller's thread
            self.failure = self.failure or error
        self.running[me] = False

    def work(self, me: int) -> None:
        """Do the parts of this thread, run by run."""
        gate = self.gates[me]
        gate.pass_through()
        while not self.closed:
            self.attempt(me)
            following = self.following(me)
            gate.swap(self.gates[0 if following is None else following])

    def close(self) -> None:
        """End the threads."""
        self.closed = True
        for gate in self.gates[1:]:
            gate.open()


class Turns:
    """Runs functions side by side, one at a time, the first of them in the caller's thread; again and again."""

    def __init__(self, count: int) -> None:
        self._baton = baton = _Baton(count)
        for number in range(1, count):
            threading.Thread(target=baton.work, args=(number,), name=f"part-{number}", daemon=True).start()
        weakref.finalize(self, baton.close)

    def give_way(self, me: int) -> None:
        """Let the other parts go on, each to where it has to wait; return when it is this one's turn again."""
        baton = self._baton
        following = baton.following(me)
        if following is None:
            return
        baton.gates[me].swap(baton.gates[following])
        if baton.failure is not None:
            raise _Abandoned

    def run(self, parts: Sequence[Callable[[], None]]) -> None:
        """Run parts to their ends, at most as many as there are turns.

        What one of them raises ends the others where they give way, and is raised here.
        """
        baton = self._baton
        baton.parts, baton.failure = parts, None
        baton.running[: len(parts)] = [True] * len(parts)
        baton.attempt(0)
        following = baton.following(0)
        if following is not None:
            baton.gates[0].swap(baton.gates[following])  # the last one to end opens it
        failure, baton.parts, baton.failure = baton.failure, (), None
        if failure is not None:
            raise failure
