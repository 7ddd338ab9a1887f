"""What code a process runs, and that the processes of a run all run the same.

A run is a function of its configuration and seed only if they do. A worker of Ray's finds its modules for itself, on
another node in another installation; and one that is started anew finds those of the day. So everything that computes
for a coordinator is held against it before it computes. Places may differ, content must not.
"""

import functools
import hashlib
import os
import platform
import socket
import sys
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

import rapa_dist
from rapa_dist.errors import ClusterError
from rapa_dist.installed import version_of
from rapa_dist.native import SETTING, native

_PACKAGE = rapa_dist.__name__
_FOLDER = Path(rapa_dist.__file__).parent
_SETTINGS = ("OPENBLAS_CORETYPE", "NPY_DISABLE_CPU_FEATURES", "NPY_ENABLE_CPU_FEATURES")
_PACKAGES = ("torch", "torchvision", "pillow", "scipy")
_MOST_NAMED = 4


@dataclass(frozen=True, slots=True, kw_only=True)
class RunningCode:
    """What a process runs, as far as results depend on it."""

    host: str
    """The machine's name."""
    folder: str
    """Where this package is there."""
    modules: Mapping[str, str]
    """Digests of this package's modules, by their names."""
    others: Mapping[str, str]
    """Versions of what else is run, and settings in the environment that change how NumPy computes."""
    blas: frozenset[str]
    """The libraries that matrices are multiplied with: NumPy's, and in a coordinator those of others."""
    products: str
    """What the bits of a tile's products depend on."""
    products_detail: str
    """What a person is told of it: which vectors, or why NumPy multiplies."""

    def check(self, theirs: "RunningCode") -> None:
        """Raise ClusterError if a process has loaded something that this one, the coordinator, has not."""
        found = [name for name, digest in theirs.modules.items() if self.modules.get(name) != digest]
        for name, there in theirs.others.items():
            if there != (here := self.others.get(name, "none")):
                found.append(f"{name} ({there} there, {here} here)")
        if not theirs.blas <= self.blas:
            found.append(f"BLAS ({', '.join(sorted(theirs.blas))} there, {', '.join(sorted(self.blas))} here)")
        advice = ""
        if theirs.products != self.products:
            found.append(f"the tiles' products ({theirs.products} there, {self.products} here)")
            advice = (
                f" Tiles multiply with {theirs.products_detail} there, and with {self.products_detail} here: set "
                f"{SETTING} alike on all nodes, or nowhere, and see what `rapa-dist doctor` says on both."
            )
        if found:
            named = ", ".join(sorted(found)[:_MOST_NAMED]) + (", …" if len(found) > _MOST_NAMED else "")
            raise ClusterError(
                f"All processes have to run the coordinator's code, that in {self.folder} on {self.host}. A process on "
                f"{theirs.host} runs other code, that in {theirs.folder}. These differ: {named}. Install the same "
                "rapa-dist with the same packages on all nodes, start the cluster from that installation, and change "
                f"nothing there while a run trains.{advice}"
            )


def loaded_code() -> RunningCode:
    """Return what this process has loaded."""
    modules = {}
    for name, module in list(sys.modules.items()):
        if name.partition(".")[0] == _PACKAGE and module.__spec__ is not None:
            source = module.__spec__.loader.get_data(module.__file__)  # type: ignore[union-attr]
            modules[name] = _digest(source)
    return _code(modules, ())


@functools.cache
def installed_modules() -> Mapping[str, str]:
    """Return digests of all modules, loaded or not, as they were when this was first called: early in a run."""
    modules = {}
    for path in _FOLDER.rglob("*.py"):
        parts = path.relative_to(_FOLDER).with_suffix("").parts
        modules[".".join((_PACKAGE, *parts)).removesuffix(".__init__")] = _digest(path.read_bytes())
    return modules


@functools.cache
def installed_code() -> RunningCode:
    """Return all that this process may come to run. A coordinator's is what other processes are held against."""
    import numpy  # noqa: F401  a tile without the library has it, and is held against this

    return _code(installed_modules(), _PACKAGES)


def check_against(coordinator: RunningCode) -> RunningCode:
    """Return what this process, a tile or a chip, has loaded: all that it needs.

    Raises:
        ClusterError: it is not what the coordinator runs.
    """
    mine = loaded_code()
    coordinator.check(mine)
    return mine


def _code(modules: Mapping[str, str], packages: Iterable[str]) -> RunningCode:
    import ray  # it has been before; nothing here may be the first to do so

    others = {"Python": platform.python_version(), "Ray": ray.__version__}
    others |= {name: version_of(name) or "not installed" for name in packages}
    blas = []
    if (numpy := sys.modules.get("numpy")) is not None:  # a tile whose cycles the library does has none
        from threadpoolctl import ThreadpoolController

        others["NumPy"] = numpy.__version__
        blas = ThreadpoolController().select(user_api="blas").info()
    return RunningCode(
        host=socket.gethostname(),
        folder=str(_FOLDER),
        modules=modules,
        others=others | {name: os.environ.get(name, "not set") for name in _SETTINGS},
        blas=frozenset(f"{library['internal_api']} {library['version']}" for library in blas),
        products=native().meaning,
        products_detail=str(native()),
    )


def _digest(source: bytes) -> str:
    return hashlib.sha256(source).hexdigest()[:16]
