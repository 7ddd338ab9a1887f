"""A tile in a process of its own: the Ray actor. It never imports torch, and Ray never carries its rows."""

import os
import threading
import time
import traceback
from typing import Any

import numpy as np
import ray

from rapa_dist.fabric.blas import one_blas_thread
from rapa_dist.fabric.chip import Site, tile_name
from rapa_dist.fabric.clock import sharp_sleep
from rapa_dist.fabric.doorbell import Cycle, Status, TileDoorbell
from rapa_dist.tile import AnalogTile, Matrix, State, Update, Word


class Tile:
    """One analog tile as a Ray actor. Cycles come by doorbell; Ray's calls are for looking in.

    The process may be killed anywhere: Ray starts another one, which finds kernel and counters in the
    cells, says so on its doorbell, and is rung again.
    """

    def __init__(self, site: Site) -> None:
        one_blas_thread()
        self._site = site
        self._cells = site.open_cells()
        words = self._cells.words
        words[Word.PID], words[Word.SINCE_NS], words[Word.STATE] = os.getpid(), time.monotonic_ns(), State.IDLE
        words[Word.STARTS] += 1
        threading.Thread(target=self._serve, name="doorbell", daemon=True).start()

    def _serve(self) -> None:
        site = self._site
        arena = site.open_arena()
        patches, outputs = arena.patches(site.layer_index), arena.outputs(site.layer_index)
        words = self._cells.words
        tile, bell = AnalogTile(self._cells), TileDoorbell(site.directory, site.tile, site.token)
        sharp_sleep()
        free_ns = 0  # when the array that this tile stands for is done with its last cycle
        bell.answer(0, Status.HELLO)
        while True:
            number, cycle, first, last, learning_rate, weight_decay, hold_ns, rung_ns = bell.wait()
            if number <= words[Word.ANSWERED]:
                bell.answer(number)  # by a process that was killed right after; its rows may be in use again
                continue
            try:
                if cycle == Cycle.FORWARD:
                    words[Word.STATE] = State.FORWARD
                    tile.forward(patches[first:last], outputs[first:last])
                elif cycle != Cycle.EMPTY:
                    words[Word.STATE] = State.BACKWARD
                    tile.backward(
                        patches[first:last],
                        outputs[first:last],
                        cycle=number,
                        update=Update(learning_rate, weight_decay) if cycle & Cycle.UPDATE else None,
                        input_error=bool(cycle & Cycle.INPUT_ERROR),
                        commit=bool(cycle & Cycle.COMMIT),
                    )
            except Exception:  # noqa: BLE001  whatever it is, the coordinator has to hear of it
                traceback.print_exc()
                bell.answer(number, Status.FAILED)
                continue
            words[Word.ANSWERED] = number
            if hold_ns:
                words[Word.STATE] = State.HOLDING
                free_ns = max(free_ns, rung_ns) + hold_ns
                time.sleep(max(0, free_ns - time.monotonic_ns()) * 1e-9)
            words[Word.STATE] = State.IDLE
            bell.answer(number)

    @ray.method(concurrency_group="inspect")
    def ready(self) -> int:
        """Return the process id, once the actor exists."""
        return os.getpid()

    @ray.method(concurrency_group="inspect")
    def stats(self) -> dict[str, Any]:
        """Return what the tile is and has done so far; answers while the tile works."""
        layer, tile = self._site.machine.tiles[self._site.tile]
        words = self._cells.words
        context = ray.get_runtime_context()
        return {
            "tile": tile_name(layer, tile),
            "node": context.get_node_id(),
            "pid": os.getpid(),
            "restarts": int(words[Word.STARTS]) - 1,
            "rows_forward": int(words[Word.ROWS_FORWARD]),
            "rows_backward": int(words[Word.ROWS_BACKWARD]),
            "rows_update": int(words[Word.ROWS_UPDATE]),
            "updates": int(words[Word.UPDATES]),
            "busy_s": int(words[Word.BUSY_NS]) / 1e9,
            "bytes_in": int(words[Word.BYTES_IN]),
            "bytes_out": int(words[Word.BYTES_OUT]),
            "kernel_norm": float(np.linalg.norm(self._kernel())),
            "resident_bytes": _resident_bytes(),
        }

    @ray.method(concurrency_group="inspect")
    def weights(self) -> Matrix:
        """Return a copy of the kernel matrix, (k + 1, c_out), as after some whole number of updates."""
        return self._kernel()

    def _kernel(self) -> Matrix:
        words = self._cells.words
        while True:
            before = words[Word.COMMIT]
            kernel = self._cells.kernel.copy()
            if words[Word.COMMIT] == before:  # else an update may have overtaken the copy
                return kernel


def _resident_bytes() -> int:
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")
