"""Waking up in time: what a tile that holds its answer needs of the operating system."""

import ctypes

_PR_SET_TIMERSLACK = 29


def sharp_sleep() -> None:
    """Have the calling thread's sleeps end within a microsecond or so of their time, not within 50.

    Where the system does not offer it (it is Linux's), sleeps stay as they are.
    """
    prctl = getattr(ctypes.CDLL(None), "prctl", None)
    if prctl is not None:
        prctl(_PR_SET_TIMERSLACK, 1, 0, 0, 0)
