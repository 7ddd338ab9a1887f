"""A tile in a process of its own: the Ray actor. It never imports torch, and Ray never carries its rows."""

import os
import threading
import time
import traceback
from typing import Any

import ray

from rapa_dist.fabric.blas import one_blas_thread
from rapa_dist.fabric.chip import Site
from rapa_dist.fabric.doorbell import Cycle, Status, TileDoorbell
from rapa_dist.fabric.inspector import Inspector
from rapa_dist.fabric.quiet import die_at_once, relax_others, sharp_sleep, stop_polling, wait_for_a_core
from rapa_dist.fabric.running_code import RunningCode, check_against
from rapa_dist.inspection import read_kernel
from rapa_dist.native import tile_on
from rapa_dist.tile import Matrix, State, Update, Word

# looked up once: in the loop over cycles every look-up counts
_FORWARD, _INPUT_ERROR, _UPDATE, _COMMIT = Cycle.FORWARD, Cycle.INPUT_ERROR, Cycle.UPDATE, Cycle.COMMIT
_DISCARD = Cycle.DISCARD
_STATE_IDLE, _STATE_FORWARD, _STATE_BACKWARD = State.IDLE, State.FORWARD, State.BACKWARD
_KEPT_VIEWS = 256


class Tile:
    """One analog tile as a Ray actor. Cycles come by doorbell; Ray's calls are for looking in.

    The process may be killed anywhere: Ray starts another one, which finds kernel and counters in the
    cells, says so on its doorbell, and is rung again.
    """

    def __init__(self, site: Site, coordinator: RunningCode) -> None:
        self._code = check_against(coordinator)
        one_blas_thread()
        die_at_once()
        self._site = site
        self._cells, self._arena, self._board = site.open_cells(), site.open_arena(), site.open_board()
        self._inspector = Inspector(site, ray.get_runtime_context().get_node_id())
        words = self._cells.words
        words[Word.THREAD], words[Word.PID], words[Word.STATE] = 0, os.getpid(), State.IDLE
        words[Word.SINCE_NS] = words[Word.SINCE_NS] or time.monotonic_ns()  # a restart goes on counting
        words[Word.STARTS] += 1
        threading.Thread(target=self._serve, name="doorbell", daemon=True).start()

    def _serve(self) -> None:
        site, words = self._site, self._cells.words
        words[Word.THREAD] = threading.get_native_id()
        arena, board = self._arena, self._board
        array = site.array
        k, c_out = array.k, array.c_out
        tile = tile_on(self._cells, bias=array.bias)
        bell = TileDoorbell(site.directory, site.tile, site.token)
        stop_polling()
        relax_others()
        wait_for_a_core()
        sharp_sleep()
        update = Update(0.0, 0.0)
        views: dict[
            tuple[int, int, int], tuple[Matrix, Matrix]
        ] = {}  # most steps have the same rows at the same places
        state, answered = Word.STATE, Word.ANSWERED
        free_ns = 0  # when the array that this tile stands for is done with its last cycle
        bell.answer(0, Status.HELLO)
        while True:
            number, cycle, rows, patches, outputs, learning_rate, weight_decay, hold_ns, rung_ns, after = bell.wait()
            if number <= words[answered]:
                continue  # done, by this process or one before it; the rows may be in use again
            if after > words[answered]:
                continue  # a ring was missed, or its cycle failed: that one has to come first
            try:
                if cycle:
                    view = views.get((patches, outputs, rows))
                    if view is None:
                        if len(views) >= _KEPT_VIEWS:
                            views.clear()
                        view = arena.rows(patches, rows, k), arena.rows(outputs, rows, c_out)
                        views[patches, outputs, rows] = view
                    if cycle == _FORWARD:
                        words[state] = _STATE_FORWARD
                        tile.forward(*view)
                    elif cycle == _DISCARD:
                        tile.discard(number)
                    else:
                        words[state] = _STATE_BACKWARD
                        if learning_rate != update.learning_rate or weight_decay != update.weight_decay:
                            update = Update(learning_rate, weight_decay)
                        tile.backward(
                            *view,
                            cycle=number,
                            update=update if cycle & _UPDATE else None,
                            input_error=cycle & _INPUT_ERROR != 0,
                            commit=cycle & _COMMIT != 0,
                        )
            except Exception:  # noqa: BLE001  whatever it is, the coordinator has to hear of it
                traceback.print_exc()
                words[state] = _STATE_IDLE
                bell.answer(number, Status.FAILED)
                continue
            if hold_ns:
                words[state] = State.HOLDING
                free_ns = max(free_ns, rung_ns) + hold_ns
                time.sleep(max(0, free_ns - time.monotonic_ns()) * 1e-9)
            words[state] = _STATE_IDLE
            words[answered] = number
            if board.asks(site.tile):
                bell.answer(number)

    @ray.method(concurrency_group="inspect")
    def ready(self) -> RunningCode:
        """Return what code this process runs, once the actor exists."""
        return self._code

    @ray.method(concurrency_group="inspect")
    def stats(self) -> dict[str, Any]:
        """Return what the tile is and has done so far (`TileStats`); answers while the tile works."""
        return self._inspector.own().as_dict()

    @ray.method(concurrency_group="inspect")
    def chip_stats(self) -> list[dict[str, Any]]:
        """Return the stats of all tiles that share this one's node: one call to a node shows them all."""
        return [stats.as_dict() for stats in self._inspector.chip()]

    @ray.method(concurrency_group="inspect")
    def weights(self) -> Matrix:
        """Return a copy of the kernel matrix, (k + 1, c_out), as after some whole number of updates."""
        return read_kernel(self._cells)
