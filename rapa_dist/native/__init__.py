"""The library in C that tiles multiply with, where it could be built and the processor has the vectors for it.

Elsewhere, or with RAPA_DIST_NATIVE=off, NumPy's BLAS does. Both give the same within rounding, and each by itself the
same bits on every fabric.
"""

import ctypes
import functools
import hashlib
import os
from dataclasses import dataclass
from importlib.machinery import EXTENSION_SUFFIXES
from pathlib import Path
from typing import TYPE_CHECKING

from rapa_dist.cells import Cells
from rapa_dist.errors import UsageError
from rapa_dist.native.tile import NativeTile

if TYPE_CHECKING:
    from rapa_dist.tile import AnalogTile

KINDS = "avx512", "avx2", "neon"
"""Vectors that the library has products for."""
SETTING = "RAPA_DIST_NATIVE"
"""Environment variable: "off", or the vectors to use: "avx512", "avx2", "neon"."""


@dataclass(frozen=True, slots=True)
class Native:
    """What multiplies."""

    library: ctypes.CDLL | None
    """None: NumPy."""
    vectors: str
    """ "avx512", "avx2" or "neon"; without the library why there is none."""
    sources: str = ""
    """A digest of what the library was made from."""
    can_be_built: bool = False
    """Whether to install rapa-dist again would help, where there is none."""

    def __str__(self) -> str:
        """Return what a person is told."""
        return f"NumPy ({self.vectors})" if self.library is None else f"native ({self.vectors})"

    @property
    def meaning(self) -> str:
        """What the bits of products depend on: not on the vectors."""
        return "NumPy's" if self.library is None else f"of the native library, {self.sources}"


@functools.cache
def native() -> Native:
    """Return what tiles multiply with in this process.

    Raises:
        UsageError: RAPA_DIST_NATIVE asks for what is not there.
    """
    wanted = os.environ.get(SETTING, "")
    if wanted == "off":
        return Native(None, f"{SETTING}=off")
    if wanted not in ("", *KINDS):
        raise UsageError(
            f"{SETTING} is “{wanted}”; expected off, {', '.join(KINDS)}, or nothing for the best there is."
        )
    found = _load(wanted)
    if wanted and found.library is None:
        raise UsageError(f"{SETTING} is {wanted}, but {found.vectors}. Unset it, or set it to off for NumPy.")
    return found


def tile_on(cells: Cells, *, bias: bool = True) -> "AnalogTile | NativeTile":
    """Return the tile that computes on some cells: with the library, or without it."""
    library = native().library
    if library is not None:
        return NativeTile(library, cells, bias=bias)
    from rapa_dist.tile import AnalogTile  # and NumPy, which takes a tile's process longer than all the rest

    return AnalogTile(cells, bias=bias)


def use_threads(count: int) -> None:
    """Have the passes of the digital side done on so many threads, where the library does them; bits do not change."""
    library = native().library
    if library is not None:
        library.rapa_threads.argtypes = [ctypes.c_size_t]
        library.rapa_threads(count)


def _load(wanted: str) -> Native:
    folder = Path(__file__).parent
    file = next((path for suffix in EXTENSION_SUFFIXES if (path := folder / f"_library{suffix}").exists()), None)
    if file is None:
        return Native(None, "the library was not built", can_be_built=True)
    try:
        library = ctypes.CDLL(str(file))
        library.rapa_choose.restype = library.rapa_sources.restype = ctypes.c_char_p
        sources = library.rapa_sources().decode()
    except (OSError, AttributeError) as error:
        return Native(None, f"the library can't be loaded: {error}", can_be_built=True)
    if not sources.startswith(digest(folder)):
        return Native(None, "the library was built from other files", can_be_built=True)
    library.rapa_choose.argtypes = [ctypes.c_char_p]
    vectors = library.rapa_choose(wanted.encode() or None)
    if vectors is None:
        return Native(None, f"the processor has no {wanted or ' or '.join(KINDS)}")
    return Native(library, vectors.decode(), sources)


def digest(folder: Path) -> str:
    """Return what setup.py gave to the library that it built from the files of a folder."""
    found = hashlib.sha256()
    for path in sorted(folder.iterdir()):
        if path.suffix in (".c", ".h", ".inc") and not path.name.startswith("."):
            contents = path.read_bytes()
            found.update(f"{path.name} {len(contents)}\n".encode() + contents)
    return found.hexdigest()[:16]
