"""A run that is trained to its end while mischief is done to it, deed by deed."""

import os
import signal
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass

from rapa_dist.chaos.mischief import (
    ALL_TILES,
    CHIP_KILL,
    COORDINATOR_KILL,
    COORDINATOR_TERM,
    CUT_S,
    NODE_CUT,
    NODE_KILL,
    ON_NODES,
    SAVING,
    STARTING,
    TILE_KILL,
    TILE_STOP,
    Mischief,
)
from rapa_dist.chaos.nodes import LocalNodes
from rapa_dist.chaos.subject import Subject
from rapa_dist.errors import ClusterError

_START_S = 8.0  # within which a start is killed, if no start has been seen yet
_TERM_EXIT = 130
_STEPS_UNDER_WAY = 2  # that the tiles of one node may do before the loss of another is noticed
_TO_TILES = {TILE_KILL: signal.SIGKILL, ALL_TILES: signal.SIGKILL, TILE_STOP: signal.SIGSTOP}


@dataclass(frozen=True, slots=True, kw_only=True)
class Deed:
    """What was done, and what it cost."""

    run: int
    kind: str
    moment: str
    step: int
    """Training steps that were done then; -1 before the tiles were up."""
    seconds: float | None
    """Wall time until all that were hit were back and the run was a step further than before; None: it ended first."""


class Disturbance:
    """What is done to one run of a campaign."""

    def __init__(self, subject: Subject, run: int, say: Callable[[str], None], nodes: LocalNodes | None = None) -> None:
        """Do nothing yet.

        Args:
            subject: the run.
            run: its number.
            say: told of every deed.
            nodes: where it is, if mischief is to be done to nodes.
        """
        self.deeds: list[Deed] = []
        """Done so far."""
        self._subject, self._run, self._say, self._nodes = subject, run, say, nodes
        self._in_starts: list[Mischief] = []
        self._start_s = _START_S

    def carry_out(self, todo: Sequence[Mischief]) -> None:
        """Train the run to its end, and do to it what is to be done, in this order.

        Raises:
            ClusterError: it does not get on, or ends in another way than it should.
        """
        subject = self._subject
        self._in_starts = [mischief for mischief in todo if mischief.moment == STARTING]
        self._launch()
        for mischief in todo:
            if mischief.moment != STARTING:
                if not self._reaches(mischief):
                    break
                self._do(mischief)
        subject.wait_until(lambda: subject.exit_code is not None, "no end")
        if subject.exit_code:
            raise ClusterError(f"The run ended with exit code {subject.exit_code}:\n{subject.last_lines}")

    def _launch(self) -> None:
        """Start the run, as often as its start is to be killed and once more."""
        subject = self._subject
        while self._in_starts:
            mischief = self._in_starts.pop()
            subject.launch()
            time.sleep(self._start_s * mischief.delay_s / 0.03)
            self._note(mischief, subject.step(), None)
            subject.kill()
        started = time.monotonic()
        subject.launch()
        subject.wait_until(lambda: subject.step() >= 0, "no tiles")
        self._start_s = time.monotonic() - started

    def _reaches(self, mischief: Mischief) -> bool:
        """Wait for the moment of a deed; return False if the run ended before."""
        subject = self._subject
        if not subject.wait_until(lambda: subject.step() >= mischief.step, "no step"):
            return False
        if mischief.moment == SAVING:
            subject.wait_until(subject.saves, "no checkpoint")
        time.sleep(mischief.delay_s)
        return subject.exit_code is None

    def _do(self, mischief: Mischief) -> None:
        """Do a deed, and wait until the run has got over it."""
        subject, nodes = self._subject, self._nodes
        chips: dict[int, int] = {}
        if nodes and mischief.kind in ON_NODES:
            if mischief.kind != CHIP_KILL:
                nodes.settle()
            chips = nodes.chips()
            if not chips:
                self._say(f"run {self._run}: no other node has tiles; {mischief.kind} left out")
                return
        step, pids, began = subject.step(), subject.pids(), time.monotonic()
        hit: Sequence[int] = ()
        further = step
        if mischief.kind in (COORDINATOR_KILL, COORDINATOR_TERM):
            self._end_coordinator(mischief)
        elif nodes and chips:
            further += _STEPS_UNDER_WAY
            _hit_node(nodes, mischief, chips)
        else:
            hit = range(len(pids)) if mischief.kind == ALL_TILES else [mischief.victim % len(pids)]
            for victim in hit:
                with suppress(ProcessLookupError):
                    os.kill(pids[victim], _TO_TILES[mischief.kind])

        def is_over() -> bool:
            now = subject.pids()
            return subject.step() > further and all(now[victim] != pids[victim] for victim in hit)

        over = subject.wait_until(is_over, f"no recovery from {mischief.kind}")
        self._note(mischief, step, time.monotonic() - began if over and subject.exit_code is None else None)

    def _end_coordinator(self, mischief: Mischief) -> None:
        """Kill the coordinator or ask it to end, and resume the run."""
        subject = self._subject
        if mischief.kind == COORDINATOR_KILL:
            subject.kill()
        else:
            subject.signal(signal.SIGTERM)
            if subject.exit_code not in (_TERM_EXIT, 0):  # it may just have been done
                raise ClusterError(f"exit code {subject.exit_code} after SIGTERM\n{subject.last_lines}")
        self._launch()

    def _note(self, mischief: Mischief, step: int, seconds: float | None) -> None:
        seconds = None if seconds is None else round(seconds, 3)
        self.deeds.append(Deed(run=self._run, kind=mischief.kind, moment=mischief.moment, step=step, seconds=seconds))
        lost = "" if seconds is None else f", {seconds:.2f} s"
        self._say(f"run {self._run}, step {step}: {mischief.kind} while {mischief.moment}{lost}")


def _hit_node(nodes: LocalNodes, mischief: Mischief, chips: dict[int, int]) -> None:
    """Do mischief to one of the nodes that have tiles, or to its chip."""
    node = sorted(chips)[mischief.victim % len(chips)]
    if mischief.kind == NODE_KILL:
        nodes.kill(node)
    elif mischief.kind == NODE_CUT:
        nodes.cut(node, CUT_S)
    else:
        assert mischief.kind == CHIP_KILL
        os.kill(chips[node], signal.SIGKILL)
