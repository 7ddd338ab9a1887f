"""The loop of a tile's process in Python: what the library's loop.c does, where there is no library."""

import time
import traceback
from typing import NoReturn

from rapa_dist.cells import State, Word
from rapa_dist.fabric.arena import Arena
from rapa_dist.fabric.board import Board
from rapa_dist.fabric.doorbell import Cycle, Ring, Status, TileDoorbell
from rapa_dist.machine import TileArray
from rapa_dist.tile import AnalogTile, Update

_BACKWARD = Cycle.INPUT_ERROR | Cycle.UPDATE | Cycle.COMMIT


def serve(tile: AnalogTile, array: TileArray, number: int, arena: Arena, board: Board, bell: TileDoorbell) -> NoReturn:
    """Wait for rings, compute, hold the answer if an array would be slower, answer; for good.

    Args:
        tile: the tile.
        array: that it belongs to.
        number: its number in the machine.
        arena: the chip's rows.
        board: whose answer the chip sleeps for.
        bell: the tile's.

    Raises:
        OSError: nobody listens to answers any more.
    """
    words = tile.cells.words
    free_ns = 0  # when the array that this tile stands for is done with its last cycle
    while True:
        ring = bell.wait()
        if ring.number <= words[Word.ANSWERED]:
            continue  # done, by this process or one before it; the rows may be in use again
        if ring.after > words[Word.ANSWERED]:
            continue  # a ring was missed, or its cycle failed: that one has to come first
        try:
            _compute(tile, ring, array, arena)
        except Exception:  # noqa: BLE001  whatever it is, the coordinator has to hear of it
            traceback.print_exc()
            words[Word.STATE] = State.IDLE
            bell.answer(ring.number, Status.FAILED)
            continue
        if ring.hold_ns:
            words[Word.STATE] = State.HOLDING
            free_ns = max(free_ns, ring.rung_ns) + ring.hold_ns
            time.sleep(max(0, free_ns - time.monotonic_ns()) * 1e-9)
        words[Word.STATE] = State.IDLE
        words[Word.ANSWERED] = ring.number
        if board.asks(number):
            bell.answer(ring.number)


def _compute(tile: AnalogTile, ring: Ring, array: TileArray, arena: Arena) -> None:
    words, cycle = tile.cells.words, ring.cycle
    if cycle not in (Cycle.FORWARD, Cycle.DISCARD) and cycle & ~_BACKWARD:
        raise ValueError(f"a ring asks for cycle {cycle}, which there is not")
    patches, outputs = arena.rows(ring.patches, ring.rows, array.k), arena.rows(ring.outputs, ring.rows, array.c_out)
    if cycle == Cycle.FORWARD:
        words[Word.STATE] = State.FORWARD
        tile.forward(patches, outputs, ring.draw)
    elif cycle == Cycle.DISCARD:
        tile.discard(ring.number)
    elif cycle:
        words[Word.STATE] = State.BACKWARD
        tile.backward(
            patches,
            outputs,
            cycle=ring.number,
            update=Update(ring.learning_rate, ring.weight_decay) if cycle & Cycle.UPDATE else None,
            input_error=cycle & Cycle.INPUT_ERROR != 0,
            commit=cycle & Cycle.COMMIT != 0,
            draw=ring.draw,
        )
