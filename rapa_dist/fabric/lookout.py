"""The lookout of a chip: what becomes of tiles that owe an answer. It ends those that hang, and gives up hopeless ones.

A tile's process that is dead comes back by itself: Ray sees to it. One that is there and does not get on would keep the
run waiting for ever; it is killed, so that it comes back, too. That is never wrong, only a waste: no bit depends on it.
"""

import time
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from rapa_dist.cells import Word
from rapa_dist.errors import ClusterError
from rapa_dist.fabric.chip import Chip
from rapa_dist.fabric.doorbell import Cycle, Ring
from rapa_dist.fabric.processes import Look, end, look
from rapa_dist.fabric.site import cells_name
from rapa_dist.fabric.tile_actors import death_of, how_it_ended
from rapa_dist.machine import TileArray

RESTARTS = 10
"""How often a tile may die without getting on in between, by default."""
_HANG_S = 1.9  # in which a tile that owes an answer has to take some processor time, at least
_HANG_S_PER_TILE = 0.02  # more where many processes share the cores
_FLOPS = 1e9  # of the slowest core that one would use
_LOOPS = 5.0  # times the allowance, in processor time, in which its words have to change
_ASK_AFTER_S, _ASK_EVERY_S, _ASK_TIMEOUT_S = 5.0, 2.0, 1.0
_MOST_ASKED = 8
_RESTART_TIMEOUT_S = 60.0  # without any sign of life from a tile
_LOG_LINES, _LOG_BYTES = 8, 20_000


class Restart(NamedTuple):
    """A tile's process that was replaced while a run went on."""

    tile: str
    """The tile's name within the run."""
    hung: bool
    """Whether it hung and was killed for that; else it died by itself."""
    seconds: float
    """Wall time from when the coordinator began to wait for the cycle to when all tiles had done it."""


@dataclass(slots=True)
class _Watched:
    """A tile that owes an answer, as it was when it last got on."""

    words: tuple[int, ...]
    cpu_ns: int
    """When its words changed."""
    last_cpu_ns: int
    still_s: float
    """For how long it has taken no processor time."""


class Lookout:
    """Looks after the tiles of one chip, as long as their actors are known to it."""

    def __init__(
        self,
        chip: Chip,
        actors: Mapping[int, Any],
        on_restart: Callable[[Restart], None],
        *,
        restarts: int = RESTARTS,
        hang_s: float | None = _HANG_S,
    ) -> None:
        """Have a chip call when it is kept waiting.

        Args:
            chip: whose tiles.
            actors: the tiles' actors by number; may grow and shrink.
            on_restart: told of a tile whose process was replaced, when the cycle that it held up is done.
            restarts: how often a tile may be restarted without getting on in between.
            hang_s: without processor time, after which a tile hangs; longer where there is much to do. None: never.
        """
        self._chip, self._actors, self._on_restart = chip, actors, on_restart
        self._restarts, self._hang_s = restarts, hang_s
        self._watched: dict[int, _Watched] = {}
        self._hung: set[int] = set()
        self._back: dict[int, bool] = {}  # tiles that came back in this wait, and whether they had hung
        self._starts: dict[int, int] = {}  # by tile, as far as they have been told of
        self._got_on: dict[int, tuple[int, int]] = {}  # by tile: its last answer, and starts until then
        self._pids: dict[int, int] = {}
        self._signs: dict[int, float] = {}  # by tile, when its process said last that it was up
        self._last_asked = self._silence_s = 0.0
        chip.on_silence, chip.on_hello, chip.on_calm = self.silence, self.hello, self.calm

    def hello(self, tile: int) -> None:
        """Take note that a tile's process has come up.

        Raises:
            ClusterError: it does so again and again, and does not get on.
        """
        self._signs[tile] = time.monotonic()
        words = self._chip.cells[tile].words
        known, starts = self._starts.get(tile, 1), words[Word.STARTS]
        before, self._pids[tile] = self._pids.get(tile, 0), words[Word.PID]
        self._watched.pop(tile, None)
        if tile not in self._actors or starts <= known:  # its first HELLO, heard late
            return
        self._back[tile] = tile in self._hung or self._back.get(tile, False)
        self._hung.discard(tile)
        self._raise_if_hopeless(tile, before)
        self._starts[tile] = starts

    def silence(self, tiles: Iterable[int], silence_s: float) -> None:
        """Look at tiles that owe an answer.

        Args:
            tiles: by number.
            silence_s: for how long the coordinator has slept for one of them.

        Raises:
            ClusterError: one of them won't come back.
        """
        tiles = list(dict.fromkeys(tiles))
        # counted, not read from a clock: a coordinator that was stopped for a while has not been waiting
        look_s = silence_s - self._silence_s if silence_s > self._silence_s else silence_s
        self._silence_s = silence_s
        dead = []
        for tile in tiles:
            words = self._chip.cells[tile].words
            seen = look(words[Word.PID], words[Word.THREAD])
            if seen is None:
                dead.append(tile)
                self._watched.pop(tile, None)
                self._raise_if_hopeless(tile, words[Word.PID])
            elif self._hang_s is not None and self._hangs(tile, seen, look_s):
                self._watched.pop(tile, None)
                if end(words[Word.PID], self._chip.scratch.path / cells_name(tile)):
                    self._hung.add(tile)
                    words[Word.HANGS] += 1
        if silence_s < _ASK_AFTER_S:
            return
        now = time.monotonic()
        if dead and now - self._last_asked > _ASK_EVERY_S:
            self._raise_if_gone(dead[:_MOST_ASKED])
            self._last_asked = time.monotonic()
        longest_s = max(_RESTART_TIMEOUT_S, _LOOPS * max(map(self.allowance_s, tiles), default=0.0))
        lost = [tile for tile in tiles if min(silence_s, now - self._signs.get(tile, 0.0)) > longest_s]
        if lost:
            names = ", ".join(map(self._chip.name_of, lost[:5]))
            raise ClusterError(
                f"No answer from {len(lost)} tiles ({names}{' …' * (len(lost) > 5)}) for {silence_s:.0f} s."
                f"{self._log_of(self._chip.cells[lost[0]].words[Word.PID])}"
            )

    def calm(self) -> None:
        """Take note that a wait which was disturbed is over, and tell who had been replaced."""
        seconds = time.monotonic() - self._chip.waiting_since
        back, self._back = self._back, {}
        self._watched.clear()
        self._silence_s = 0.0
        for tile, hung in back.items():
            self._on_restart(Restart(self._chip.name_of(tile), hung, round(seconds, 3)))

    def allowance_s(self, tile: int) -> float:
        """Return for how long a tile may take no processor time: in proportion to what it owes, holds included."""
        array = self._chip.machine.arrays[self._chip.machine.tiles[tile][0]]
        work_s = sum(work_s_of(ring, array) for ring in self._chip.owed(tile))
        return max(self._hang_s or _HANG_S, _HANG_S_PER_TILE * len(self._chip.cells)) + work_s

    def end_tiles(self, *, only_stopped: bool = False) -> bool:
        """Kill tiles' processes that are still there, or those of them that are stopped and hear no request to leave.

        Returns:
            Whether none is left.
        """
        left = False
        for tile, cells in self._chip.cells.items():
            pid = cells.words[Word.PID]
            if (seen := look(pid)) is not None:
                left = True
                if seen.stopped or not only_stopped:
                    end(pid, self._chip.scratch.path / cells_name(tile))
        return not left

    def _hangs(self, tile: int, seen: Look, look_s: float) -> bool:
        words = self._chip.cells[tile].words
        mark = tuple(words[: Word.ANSWERED + 1].tolist())
        watched = self._watched.get(tile)
        if watched is None or watched.words != mark:
            still_s = look_s if watched is None else 0.0
            self._watched[tile] = _Watched(mark, seen.cpu_ns, seen.cpu_ns, still_s)
            return False
        watched.still_s = watched.still_s + look_s if seen.cpu_ns == watched.last_cpu_ns else 0.0
        watched.last_cpu_ns = seen.cpu_ns
        allowance_s = self.allowance_s(tile)
        return watched.still_s >= allowance_s or seen.cpu_ns - watched.cpu_ns > 1e9 * _LOOPS * allowance_s

    def _raise_if_hopeless(self, tile: int, pid: int) -> None:
        words = self._chip.cells[tile].words
        answered, starts = words[Word.ANSWERED], words[Word.STARTS]
        now = answered, self._starts.get(tile, 1)
        at, before = self._got_on.setdefault(tile, now)
        if at != answered:
            self._got_on[tile] = now
        elif starts - before > self._restarts:
            raise ClusterError(
                f"{self._chip.name_of(tile)} does not get on: its process was replaced {starts - before} times in one "
                f"and the same cycle (--max-restarts {self._restarts}).{self._log_of(pid)}"
            )

    def _raise_if_gone(self, tiles: Iterable[int]) -> None:
        """Raise ClusterError if Ray does not bring a tile back."""
        import ray

        asked = {self._actors[tile].ready.remote(): tile for tile in tiles if tile in self._actors}
        answers = ray.wait(list(asked), num_returns=len(asked), timeout=_ASK_TIMEOUT_S)[0] if asked else []
        for reference in answers:
            if (death := death_of(reference, _ASK_TIMEOUT_S)) is not None:
                tile = asked[reference]
                log = partial(self._log_of, self._chip.cells[tile].words[Word.PID])
                raise ClusterError(f"{self._chip.name_of(tile)} {how_it_ended(death, log)}") from death

    @staticmethod
    def _log_of(pid: int) -> str:
        """Return the last lines that a worker of this node's Ray printed, as a part of a message."""
        with suppress(Exception):  # a help to the reader; Ray's folders are its own business
            import ray

            logs = Path(ray._private.worker._global_node.get_logs_dir_path())  # type: ignore[attr-defined]
            for path in sorted(logs.glob(f"worker-*-{pid}.err")):
                with path.open("rb") as file:
                    file.seek(max(0, path.stat().st_size - _LOG_BYTES))
                    lines = file.read().decode(errors="replace").splitlines()
                if lines := [line for line in lines if line.strip() and not line.startswith(":")]:
                    return "\n".join([f" The last lines of its log ({path.name}):", *lines[-_LOG_LINES:]])
        return f" The log of its last process ({pid}) says nothing about it: it was probably killed from outside."


def work_s_of(ring: Ring, array: TileArray) -> float:
    """Return what a cycle may take on a slow core, and until its answer may come."""
    products = (ring.cycle & Cycle.FORWARD > 0) + (ring.cycle & Cycle.INPUT_ERROR > 0) + (ring.cycle & Cycle.UPDATE > 0)
    return 2 * products * ring.rows * (array.k + 1) * array.c_out / _FLOPS + ring.hold_ns * 1e-9
