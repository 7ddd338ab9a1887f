"""The library in C that tiles multiply with, where it could be built and the processor has the vectors for it.

Elsewhere, or with RAPA_DIST_NATIVE=off, NumPy's BLAS does. Both give the same within rounding, and each by itself the
same bits on every fabric.
"""

import ctypes
import enum
import functools
import os
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rapa_dist.cells import Cells
from rapa_dist.errors import UsageError
from rapa_dist.native import build
from rapa_dist.native.tile import NativeTile

if TYPE_CHECKING:
    from rapa_dist.machine import TileArray
    from rapa_dist.tile import AnalogTile

KINDS = "avx512", "avx2", "neon"
"""Vectors that the library has products for."""
SETTING = "RAPA_DIST_NATIVE"
"""Environment variable: "off", or the vectors to use: "avx512", "avx2", "neon"."""


class Lack(enum.Enum):
    """Why there is no library to multiply with."""

    SWITCHED_OFF = f"{SETTING}=off"
    NOT_BUILT = "the library was not built"
    OUTDATED = "the library was built from other files, or with other flags"
    UNLOADABLE = "the library can't be loaded"
    NO_VECTORS = f"the processor has no {' or '.join(KINDS)}"


@dataclass(frozen=True, slots=True)
class Native:
    """What multiplies."""

    library: ctypes.CDLL | None
    """None: NumPy."""
    vectors: str
    """ "avx512", "avx2" or "neon"; without the library why there is none."""
    lack: Lack | None = None
    """Why, in a word."""
    sources: str = ""
    """A digest of what the library was made from."""
    compiler: str = ""
    """What compiled it."""

    def __str__(self) -> str:
        """Return what a person is told."""
        return f"NumPy ({self.vectors})" if self.library is None else f"native ({self.vectors})"

    @property
    def meaning(self) -> str:
        """What the bits of products depend on: not on the vectors, nor on the compiler."""
        return "NumPy's" if self.library is None else f"of the native library, {self.sources}"


@functools.cache
def native() -> Native:
    """Return what tiles multiply with in this process.

    Raises:
        UsageError: RAPA_DIST_NATIVE asks for what is not there.
    """
    wanted = os.environ.get(SETTING, "")
    if wanted == "off":
        return _without(Lack.SWITCHED_OFF)
    if wanted not in ("", *KINDS):
        printable = ascii(wanted)[1:-1]  # what came may be no UTF-8
        raise UsageError(
            f"{SETTING} is “{printable}”; expected off, {', '.join(KINDS)}, or nothing for the best there is."
        )
    found = load(build.FOLDER)
    if not wanted:
        return found
    if found.library is None:
        raise UsageError(
            f"{SETTING}={wanted} needs the library, but {found.vectors}. Unset it, or set it to off, for NumPy; "
            "unset, `rapa-dist doctor` says what to do."
        )
    if found.library.rapa_choose(wanted.encode()) is None:
        there = [kind for kind in KINDS if found.library.rapa_choose(kind.encode()) is not None]
        raise UsageError(
            f"{SETTING}={wanted}, but this processor has only {' and '.join(there)}. Unset it for the best of them."
        )
    return replace(found, vectors=wanted)


def tile_on(cells: Cells, *, bias: bool = True) -> "AnalogTile | NativeTile":
    """Return the tile that computes on some cells: with the library, or without it."""
    library = native().library
    if library is not None:
        return NativeTile(library, cells, bias=bias)
    from rapa_dist.tile import AnalogTile  # and NumPy, which takes a tile's process longer than all the rest

    return AnalogTile(cells, bias=bias)


def tile_of(cells: Cells, array: "TileArray", tile: int) -> "AnalogTile | NativeTile":
    """Return a tile of an array, as its physics is: with the library, or without it."""
    if array.physics is None:
        return tile_on(cells, bias=array.bias)
    from rapa_dist.physics.tile import PhysicalTile

    how: dict[str, Any] = {"seed": array.seed, "place": (array.index, tile), "bias": array.bias}
    library = native().library
    if library is None:
        return PhysicalTile(cells, array.physics, **how)
    from rapa_dist.native.physics import NativePhysicalTile

    return NativePhysicalTile(library, cells, array.physics, **how)


def use_threads(count: int) -> None:
    """Have the passes of the digital side done on so many threads, where the library does them; bits do not change."""
    library = native().library
    if library is not None:
        library.rapa_threads.argtypes = [ctypes.c_size_t]
        library.rapa_threads(count)


def load(folder: Path) -> Native:
    """Return the library of a folder, with the best vectors that the processor has, or why it is of no use."""
    file = folder / build.LIBRARY
    if not file.exists():
        return _without(Lack.NOT_BUILT)
    try:
        library = ctypes.CDLL(str(file))
        library.rapa_sources.restype = ctypes.c_char_p
    except OSError as error:  # names the file
        return _without(Lack.UNLOADABLE, f": {error}")
    except AttributeError:
        return _without(Lack.UNLOADABLE, f": {file} is another one")
    sources = library.rapa_sources().decode(errors="replace")
    if sources != build.digest(folder):
        return _without(Lack.OUTDATED)
    library.rapa_choose.restype = library.rapa_compiler.restype = ctypes.c_char_p
    library.rapa_choose.argtypes = [ctypes.c_char_p]
    vectors = library.rapa_choose(None)
    if vectors is None:
        return _without(Lack.NO_VECTORS)
    return Native(library, vectors.decode(), sources=sources, compiler=library.rapa_compiler().decode())


def _without(lack: Lack, more: str = "") -> Native:
    return Native(None, f"{lack.value}{more}", lack)
