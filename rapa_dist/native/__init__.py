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

from rapa_dist.errors import UsageError
from rapa_dist.native.tile import NativeTile
from rapa_dist.tile import AnalogTile, Cells

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
    found = _load(wanted)
    if wanted and found.library is None:
        raise UsageError(
            f"{SETTING} is off, avx512, avx2 or neon, as the processor has them; not “{wanted}”: {found.vectors}."
        )
    return found


def tile_on(cells: Cells, *, bias: bool = True) -> AnalogTile | NativeTile:
    """Return the tile that computes on some cells: with the library, or without it."""
    library = native().library
    return AnalogTile(cells, bias=bias) if library is None else NativeTile(library, cells, bias=bias)


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
        return Native(None, "the library was not built")
    try:
        library = ctypes.CDLL(str(file))
    except OSError as error:
        return Native(None, f"the library can't be loaded: {error}")
    library.rapa_choose.restype = library.rapa_sources.restype = ctypes.c_char_p
    library.rapa_choose.argtypes = [ctypes.c_char_p]
    sources = library.rapa_sources().decode()
    if sources != _digest(folder):
        return Native(None, "the library was built from other files; install rapa-dist again")
    vectors = library.rapa_choose(wanted.encode() or None)
    if vectors is None:
        return Native(None, "the processor lacks the vectors")
    return Native(library, vectors.decode(), sources)


def _digest(folder: Path) -> str:
    """Return what setup.py gave to the library that it built from the files of a folder."""
    files = sorted(path for path in folder.iterdir() if path.suffix in (".c", ".h", ".inc"))
    return hashlib.sha256(b"".join(path.read_bytes() for path in files)).hexdigest()[:16]
