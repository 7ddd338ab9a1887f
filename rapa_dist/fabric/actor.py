"""A tile in a process of its own: the Ray actor. It never imports torch, and Ray never carries its rows."""

from __future__ import annotations

import os
import threading
import time
from typing import TYPE_CHECKING, Any

import ray

from rapa_dist.cells import State, Word
from rapa_dist.fabric.arena import Arena
from rapa_dist.fabric.board import Board
from rapa_dist.fabric.doorbell import Status, TileDoorbell, answers_path
from rapa_dist.fabric.quiet import (
    die_at_once,
    give_memory_back,
    relax_others,
    sharp_sleep,
    stop_polling,
    wait_for_a_core,
)
from rapa_dist.fabric.running_code import RunningCode, check_against
from rapa_dist.fabric.site import Site
from rapa_dist.native import native, tile_of
from rapa_dist.native.tile import NativeTile

if TYPE_CHECKING:
    from rapa_dist.fabric.inspector import Inspector
    from rapa_dist.tile import Matrix


def _load_python_loop() -> None:
    """Have the loop in Python there when the code is checked, and NumPy multiply on one thread."""
    from rapa_dist.fabric import serving  # noqa: F401
    from rapa_dist.fabric.blas import one_blas_thread

    one_blas_thread()


class Tile:
    """One analog tile as a Ray actor. Cycles come by doorbell; Ray's calls are for looking in.

    The process may be killed anywhere: Ray starts another one, which finds kernel and counters in the
    cells, says so on its doorbell, and is rung again.
    """

    def __init__(self, site: Site, coordinator: RunningCode) -> None:
        if native().library is None:
            _load_python_loop()
        self._code = check_against(coordinator)
        if site.array.physics is not None:
            from rapa_dist.native import physics  # noqa: F401  what computes has to be there when the code is checked

            _load_python_loop()
            self._code = check_against(coordinator)
        die_at_once()
        self._site = site
        self._cells, self._arena, self._board = site.open_cells(), site.map_arena(), site.map_board()
        self._tile = tile_of(self._cells, site.array, site.machine.tiles[site.tile][1])
        self._inspector: Inspector | None = None
        words = self._cells.words
        words[Word.THREAD], words[Word.PID], words[Word.STATE] = 0, os.getpid(), State.IDLE
        words[Word.SINCE_NS] = words[Word.SINCE_NS] or time.monotonic_ns()  # a restart goes on counting
        words[Word.STARTS] += 1
        threading.Thread(target=self._serve, name="doorbell", daemon=True).start()

    def _serve(self) -> None:
        site, tile = self._site, self._tile
        self._cells.words[Word.THREAD] = threading.get_native_id()
        bell = TileDoorbell(site.directory, site.tile, site.token)
        stop_polling()
        relax_others()
        wait_for_a_core()
        sharp_sleep()
        give_memory_back()
        bell.answer(0, Status.HELLO)
        if isinstance(tile, NativeTile):
            answers = answers_path(site.directory)
            tile.loop(self._arena, self._board, site.token, site.tile, bell.fileno(), answers).serve()
        from rapa_dist.fabric.serving import serve

        serve(tile, site.array, site.tile, Arena(self._arena), Board(self._board), bell)

    @ray.method(concurrency_group="inspect")
    def ready(self) -> RunningCode:
        """Return what code this process runs, once the actor exists."""
        return self._code

    @ray.method(concurrency_group="inspect")
    def stats(self) -> dict[str, Any]:
        """Return what the tile is and has done so far (`TileStats`); answers while the tile works."""
        return self._looking_in().own().as_dict()

    @ray.method(concurrency_group="inspect")
    def chip_stats(self) -> list[dict[str, Any]]:
        """Return the stats of all tiles that share this one's node: one call to a node shows them all."""
        return [stats.as_dict() for stats in self._looking_in().chip()]

    def _looking_in(self) -> Inspector:
        from rapa_dist.fabric.inspector import Inspector  # only once somebody asks: it takes memory

        if self._inspector is None:
            self._inspector = Inspector(self._site, ray.get_runtime_context().get_node_id())
        return self._inspector

    @ray.method(concurrency_group="inspect")
    def weights(self) -> Matrix:
        """Return a copy of the kernel matrix, (k + 1, c_out), as after some whole number of updates."""
        from rapa_dist.inspection import read_kernel

        return read_kernel(self._cells)
